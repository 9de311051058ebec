"""What PyTorch's authors call our layers."""

import re
from collections.abc import Mapping
from typing import Any

from topgap_jax.errors import UserError

# Our layers and what PyTorch's authors call them; the first name that the file has counts.
LAYERS = (
    (r"stem/conv", ("conv1",)),
    (r"stem/norm", ("bn1",)),
    (r"stage(\d)/block(\d+)/conv(\d)", (r"layer\1.\2.conv\3",)),
    (r"stage(\d)/block(\d+)/norm(\d)", (r"layer\1.\2.bn\3",)),
    (r"stage(\d)/block(\d+)/project", (r"layer\1.\2.downsample.0", r"layer\1.\2.shortcut.0")),
    (r"stage(\d)/block(\d+)/project_norm", (r"layer\1.\2.downsample.1", r"layer\1.\2.shortcut.1")),
    (r"stage\d/norm", ("bn",)),
    (r"head/dense", ("fc", "linear", "classifier")),
    (r"head/dense1", ("classifier.0",)),
    (r"head/dense2", ("classifier.3",)),
    (r"head/dense3", ("classifier.6",)),
    (r"(linear[12])", (r"\1",)),
)
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def torch_names(paths: list[tuple[str, ...]], known: Mapping[str, Any]) -> list[str]:
    """PyTorch's name of each of our variables, e.g. ("params", "backbone", "stem", "conv", "kernel") -> "conv1.weight".

    known: the names in the file, which decide where authors differ (`fc` or `linear`, `downsample` or `shortcut`).
    """
    layers = [("/".join(path[1:-1]).removeprefix("backbone/"), LEAVES.get(path[-1], path[-1])) for path in paths]
    features = _vgg_names({layer for layer, _ in layers})
    return [f"{features.get(layer) or _layer_name(layer, known)}.{leaf}" for layer, leaf in layers]


def _layer_name(layer, known):
    for pattern, candidates in LAYERS:
        match = re.fullmatch(pattern, layer)
        if match:
            names = [match.expand(candidate) for candidate in candidates]
            return next((name for name in names if f"{name}.weight" in known), names[0])
    raise UserError(
        f"the layer '{layer}' of this model has no name in PyTorch's files: weights are read into backbones "
        "with map_head(pool), VGG also with vgg_head(), and into resnet4b"
    )


def _vgg_names(layers):
    """{"stem/conv1": "features.0", "stem/norm1": "features.1", ...}: convolution, norm, ReLU, and a pooling after each
    stage."""
    if "stem/conv1" not in layers:
        return {}
    names, index = {}, 0
    for stage in ("stem", "stage1", "stage2", "stage3", "stage4"):
        for i in range(1, 1 + sum(layer.startswith(f"{stage}/conv") for layer in layers)):
            names |= {f"{stage}/conv{i}": f"features.{index}", f"{stage}/norm{i}": f"features.{index + 1}"}
            index += 3
        index += 1
    return names
