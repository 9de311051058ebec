"""One way of naming the layers of a family, and how our variables get their names by it."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}

Path = tuple[str, ...]  # ("params", "backbone", "stem", "conv", "kernel")
Shape = tuple[int, ...]


class Naming(NamedTuple):
    """table: our layer without its numbers -> the file's template or alternatives, of which the first that the file has
    counts.

    Keys are "stem/conv", "block/conv1" (of any stage), "stage/norm", "head/dense"; a parameter that is no layer's
    stands as "block/layer_scale", and its template is the whole name. Fields of a template: {s} stage from 1, {s0} from
    0, {i} block of the stage from 0, {i1} from 1, {n} block of the network from 0, and those that `numbers(layers)`
    adds, {our layer: {field: value}} for layers {our layer: shape of its first variable}.
    """

    table: Mapping[str, str | tuple[str, ...]]
    numbers: Callable[[Mapping[str, Shape]], Mapping[str, Mapping[str, Any]]] = lambda layers: {}

    def names(self, variables: Mapping[Path, Shape], file: Collection[str] = ()) -> dict[Path, str] | None:
        """What a file calls each of the variables (path: shape); None where a layer has no name by this naming."""
        if self.nameless(variables):
            return None
        layers: dict[str, Shape] = {}
        for path, shape in variables.items():
            layers.setdefault(_layer(path), shape)
        blocks = sorted({place[:2] for layer in layers if (place := _place(layer))[1] is not None})
        more, names = self.numbers(layers), {}
        for path in variables:
            layer, leaf = _layer(path), LEAVES.get(path[-1])
            stage, block, key = _place(layer)
            templates = self.table[key]
            fields = {"s": stage, "s0": stage - 1}
            if block is not None:
                fields |= {"i": block, "i1": block + 1, "n": blocks.index((stage, block))}
            fields |= more.get(layer, {})
            choices = (templates,) if isinstance(templates, str) else templates
            choices = [choice.format(**fields) for choice in choices]
            exists = lambda choice: f"{choice}.weight" in file or choice in file
            names[path] = next(filter(exists, choices), choices[0]) + (f".{leaf}" if leaf else "")
        return names

    def nameless(self, variables: Collection[Path]) -> list[str]:
        """The layers among the variables that this naming has no name for."""
        layers = dict.fromkeys(map(_layer, variables))
        return [layer for layer in layers if _place(layer)[2] not in self.table]


def _layer(path):
    """("params", "backbone", "stem", "conv", "kernel") -> "stem/conv"; a parameter that is no layer's is one."""
    layer = path[1:-1] if path[-1] in LEAVES else path[1:]
    return "/".join(layer).removeprefix("backbone/")


def _place(layer):
    """(stage, block, key): "stage2/block0/conv1" -> (2, 0, "block/conv1"), "stem/conv" -> (0, None, "stem/conv"); 0 is
    the stem, and where there are no stages."""
    stem, stage, block, rest = re.fullmatch(r"(?:(stem)/|stage(\d+)/)?(?:block(\d+)/)?(.+)", layer).groups()
    at = "block/" if block else "stage/" if stage else "stem/" if stem else ""
    return int(stage or 0), None if block is None else int(block), at + rest
