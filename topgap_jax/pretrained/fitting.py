"""Which tensor of a file is which variable of a model: by PyTorch's names and layout, or by the module's own paths."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax.errors import UserError
from topgap_jax.pretrained.architectures import unlike
from topgap_jax.pretrained.names import NAMINGS, torch_names, unused
from topgap_jax.pretrained.names.layout import fits, ours, torch_shape
from topgap_jax.types import Array, Model, Variables

LISTED = 4  # keys of one kind that an error spells out
HEAD = "head"  # the module of a classifier that its number of classes decides

Path = tuple[str, ...]  # ("params", "backbone", "stem", "conv", "kernel")
Shape = tuple[int, ...]


class Fit(NamedTuple):
    """Names in a file by path of a variable, and whether they are the module's own."""

    names: Mapping[Path, str]
    own: bool


def filled(
    where: Any,
    shapes: Mapping[str, Shape],
    tensors: Callable[[], Mapping[str, np.ndarray]],
    model: Model,
    image_shape: tuple[int, int, int],
    head: str | None,
    key: Array,
) -> Variables:
    """The variables of `model` from tensors by name, read once they are seen to fit; all float32.

    where: what an error begins with. head=None: the head is drawn with `key`, and the file's own head is left out; of a
    module's own tree the head is "head", or the one layer that has another number of outputs in the file.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    template = jax.eval_shape(model.init, key, images)
    leaves, structure = jax.tree.flatten_with_path(template)
    variables = {tuple(str(getattr(part, "key", part)) for part in parts): leaf.shape for parts, leaf in leaves}
    other = _other_head(variables, shapes) if head is None else {}
    in_head = lambda path: head is None and (path[1] == HEAD or path in other)
    wanted = {path: shape for path, shape in variables.items() if not in_head(path)}
    fit = _fit(where, {name: shape for name, shape in shapes.items() if name not in other.values()}, wanted, head)
    values = tensors()
    types = dict(zip(variables, (leaf.dtype for leaf in jax.tree.leaves(template))))
    arrays = {
        path: _cast(where, fit, path, _array(fit, path, shape, values), types[path]) for path, shape in wanted.items()
    }
    if len(wanted) < len(variables):

        def fresh(key):  # of the head alone: XLA then leaves the rest of `init` out
            leaves = zip(variables, jax.tree.leaves(model.init(key, jnp.zeros(images.shape))))
            return [leaf for path, leaf in leaves if path not in wanted]

        head_paths = [path for path in variables if path not in wanted]
        arrays |= dict(zip(head_paths, jax.jit(fresh)(key)))
        arrays = {path: arrays[path] for path in variables}
    return jax.tree.unflatten(structure, list(arrays.values()))


def own_names(variables: Mapping[Path, Shape], file: Mapping[str, Shape]) -> dict[Path, str] | None:
    """What a parameter tree of the module itself calls the variables; None where the file is no such tree.

    ("params", "stem", "kernel") is "params/stem/kernel", or "stem/kernel" where the tree is that of the parameters
    alone; "." may stand for "/".
    """
    names = {}
    for path in variables:
        choices = [separator.join(part) for part in (path, path[1:]) for separator in "/."]
        names[path] = next((name for name in choices if name in file), choices[0])
    # Most of them: PyTorch calls a bias in the outermost module as we do ("linear1.bias").
    return names if 2 * sum(name in file for name in names.values()) > len(names) else None


def _other_head(variables: Mapping[Path, Shape], file: Mapping[str, Shape]) -> dict[Path, str]:
    """{path: name in the file} of the one layer of a module's own tree that has another number of outputs there."""
    names = own_names(variables, file) or {}
    other = {
        path: name
        for path, name in names.items()
        if path[0] == "params" and file.get(name, variables[path]) != variables[path]
    }
    one = len({path[:-1] for path in other}) == 1
    return other if one and all(file[name][:-1] == variables[path][:-1] for path, name in other.items()) else {}


def _fit(where, shapes, variables, head):
    own = own_names(variables, shapes)
    names = own or torch_names(variables, shapes)
    expected = lambda path: variables[path] if own else torch_shape(path, variables[path])
    right = lambda path: (
        shapes[names[path]] == expected(path) if own else fits(path, variables[path], shapes[names[path]])
    )
    missing = [name for name in names.values() if name not in shapes]
    unexpected = sorted(name for name in set(shapes) - set(names.values()) if not unused(name))
    if head is None:
        unexpected = [name for name in unexpected if not _of_a_head(name, own)]
    shaped = {
        path: f"{name} {shapes[name]} instead of {expected(path)}"
        for path, name in names.items()
        if name in shapes and not right(path)
    }
    wrong = {"missing": missing, "unexpected": unexpected, "mis-shaped": list(shaped.values())}
    if any(wrong.values()):
        parts = "; ".join(f"{kind}: {_listed(items)}" for kind, items in wrong.items() if items)
        hint = _hint(shapes, own, [*missing, *unexpected], shaped, own and _other_head(variables, shapes))
        # Before the names, which may be longer than what is shown of an error.
        raise UserError(f"{where} does not fit the model{f'; {hint}' if hint else ''}: {parts}")
    return Fit(names, bool(own))


def _hint(shapes, own, names, shaped, outputs=False):
    """What is to be done about a file with these names missing or unexpected, and these variables mis-shaped; outputs:
    whether these are the outputs of one layer."""
    heads = all(_of_a_head(name, own) for name in names) and all(path[1] == HEAD for path in shaped)
    heads = heads or (not names and outputs)
    if heads and (names or shaped):
        return "its head is another; head=None leaves the file's head out, as topgap train does"
    if not names and all(path[-1] == "positions" for path in shaped):
        patches = next(shape[-2] for name, shape in shapes.items() if re.search(r"(pos_embed|positions)$", name))
        side = 16 * math.isqrt(patches)  # beside them stand a few tokens of no place
        return f"its positions are those of images of {side} x {side} pixels; give the model that size"
    return None if own else unlike(shapes)


def _array(fit, path, shape, values):
    return values[fit.names[path]] if fit.own else ours(path, shape, values[fit.names[path]])


def _cast(where, fit, path, array, dtype):
    """float32, or the integers that a module counts in."""
    whole = jnp.issubdtype(dtype, jnp.integer)
    if fit.own and not whole and not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(
            f"{where}: '{fit.names[path]}' is of type {array.dtype}, and weights are floating-point numbers"
        )
    return jnp.asarray(array, dtype if whole else jnp.float32)


def _of_a_head(name, own):
    """Is it a tensor of a published head (`fc.weight`, `_conv_head.weight`), or of a head of the module's own?"""
    if own:
        return HEAD in re.split(r"[/.]", name)[:2]
    return any(re.match(rf"{pattern}(\.|$)", name) for pattern in _head_patterns())


def _head_patterns():
    for naming in NAMINGS.values():
        for layer, templates in naming.table.items():
            if layer.split("/")[0] == HEAD:
                for template in (templates,) if isinstance(templates, str) else templates:
                    yield r"\d+".join(map(re.escape, re.split(r"\{\w+\}", template)))


def _listed(items):
    more = f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return ", ".join(items[:LISTED]) + more
