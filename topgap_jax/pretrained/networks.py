"""Which network a file of weights is: recognised by the names and shapes of its tensors."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from topgap_jax.errors import UserError
from topgap_jax.pretrained.files import read
from topgap_jax.pretrained.hub import check_normalisation, settings

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

# Config text of a backbone and its head, and the shapes of some tensors that no other network has.
SIGNATURES = tuple(
    (f"efficientnet_lite{number}()", "conv_head(pool)", {"_conv_stem.weight": (32, 3, 3, 3), **last})
    for number, last in enumerate(
        (
            {"_blocks.15._project_conv.weight": (320, 1152, 1, 1)},
            {"_blocks.20._project_conv.weight": (320, 1152, 1, 1)},
            {"_blocks.20._project_conv.weight": (352, 1248, 1, 1)},
            {"_blocks.23._project_conv.weight": (384, 1392, 1, 1)},
            {"_blocks.29._project_conv.weight": (448, 1632, 1, 1)},
        )
    )
)


def describe(path: str | Path) -> dict[str, Any]:
    """What a file says of itself, and a hub's config.json beside it: {"mean": tuple, "std": tuple, "model": text for a
    config}, None for what they do not say; and where a hub says it, of how the network was tested: "image_size" (h, w),
    "crop_pct", "interpolation", "labels" (names of the classes), "num_classes".

    The model is recognised by names and shapes; mean and std stand in the metadata of a safetensors file
    ("0.485,0.456,0.406"), else in config.json, and are ImageNet's where the layout is torchvision's. UserError for
    numbers that cannot be a mean or a std.
    """
    description = read(path)
    model, torchvision = _architecture(description.shapes)
    said = {"mean": None, "std": None, **(IMAGENET if torchvision else {}), **settings(path)}
    for key in ("mean", "std"):
        if key in description.metadata:
            said[key] = _numbers(path, key, description.metadata[key])
    check_normalisation(path, said["mean"], said["std"])
    return {**said, "model": model}


def _architecture(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str | None, bool]:
    """The config text of the network with these tensors, or None; and whether the layout is torchvision's for
    ImageNet."""
    for text, head, tensors in SIGNATURES:
        if all(shapes.get(name) == shape for name, shape in tensors.items()):
            return _text(text, head), False
    stem = shapes.get("conv1.weight", ())
    blocks = tuple(len({name.split(".")[1] for name in shapes if name.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4))
    convolutions = sum(
        re.fullmatch(r"features\.\d+\.weight", name) is not None and len(shapes[name]) == 4 for name in shapes
    )
    if "linear1.weight" in shapes and blocks == (2, 2, 0, 0) and "bn1.weight" not in shapes:
        return "resnet4b(classes=classes, mean=mean, std=std)", False
    if convolutions in (8, 13) and "features.1.running_mean" in shapes:
        head = "vgg_head()" if "classifier.6.weight" in shapes else "map_head(pool)"
        return _text("vgg11()" if convolutions == 8 else "vgg16()", head), head == "vgg_head()"
    if stem[:2] == (16, 3) and blocks[0] in (3, 5, 7, 9) and blocks == (blocks[0],) * 3 + (0,):
        shortcut = "shortcut='project'" if "layer2.0.shortcut.0.weight" in shapes else ""
        return _text(f"resnet{6 * blocks[0] + 2}({shortcut})"), False
    if stem[:2] == (64, 3) and "bn.weight" in shapes and blocks == (2, 2, 2, 2):
        return _text("preact_resnet18()"), False
    depth = {((2, 2, 2, 2), False): 18, ((3, 4, 6, 3), False): 34, ((3, 4, 6, 3), True): 50}.get(
        (blocks, "layer1.0.conv3.weight" in shapes)
    )
    kind = {(64, 3, 7, 7): "imagenet", (64, 3, 3, 3): "cifar"}.get(stem)
    if depth and kind and "bn1.weight" in shapes:
        return _text(f"resnet{depth}(stem='{kind}')"), kind == "imagenet"
    return None, False


def _text(backbone, head="map_head(pool)"):
    return f"classifier({backbone}, {head}, classes=classes, mean=mean, std=std)"


def _numbers(path, key, text):
    try:
        return tuple(float(x) for x in text.split(","))
    except ValueError:
        raise UserError(f"{path}: the metadata say {key}={text!r}; expected numbers like '0.485,0.456,0.406'") from None
