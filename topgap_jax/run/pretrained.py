"""Weights in PyTorch naming and layout, from .safetensors or .npz, into variables of our models. Nothing is ever unpickled.

Known are the names of akamaster's CIFAR ResNets (and of ResNet-4B, which shares them) and of torchvision, which timm shares,
for ResNet-18/34/50 and VGG with batch norm. A prefix `module.` and `num_batches_tracked` are dropped.
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import load_file

from topgap_jax.errors import UserError
from topgap_jax.types import Model, Variables

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CONVERT = "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'FILE.safetensors')"
LISTED = 8  # keys of one kind that an error spells out

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


class Description(NamedTuple):
    """A file's tensors by name, as shapes, and its metadata."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]


def load(path: str | Path, model: Model, *, image_shape: tuple[int, int, int] = (32, 32, 3)) -> Variables:
    """The variables of `model` from a file in PyTorch naming and layout; image_shape (h, w, c) is what the model will be given.

    Convolutions (out, in, kh, kw) become (kh, kw, in, out), dense kernels (out, in) become (in, out), all float32. Raises
    UserError, in one line, for files that cannot be read and for missing, unexpected and mis-shaped tensors.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    template = jax.eval_shape(model.init, jax.random.key(0), images)
    leaves, structure = jax.tree.flatten_with_path(template)
    shapes = read(path).shapes
    names = torch_names([tuple(str(getattr(key, "key", key)) for key in keys) for keys, _ in leaves], shapes)
    expected = {name: _torch_shape(leaf.shape) for name, (_, leaf) in zip(names, leaves)}
    missing = [name for name in names if name not in shapes]
    unexpected = [name for name in shapes if name not in expected]
    shaped = [
        f"{name} {shapes[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    wrong = {"missing": missing, "unexpected": unexpected, "mis-shaped": shaped}
    if any(wrong.values()):
        parts = "; ".join(f"{kind}: {_listed(items)}" for kind, items in wrong.items() if items)
        raise UserError(f"{path} does not fit the model: {parts}")
    tensors = _tensors(path)
    return jax.tree.unflatten(structure, [jnp.asarray(_ours(tensors[name]), jnp.float32) for name in names])


def describe(path: str | Path) -> dict[str, Any]:
    """What a file says of itself: {"mean": tuple, "std": tuple, "model": text for a config}, None for what it does not say.

    The model is recognised by names and shapes; mean and std stand in the metadata of a safetensors file ("0.485,0.456,0.406"),
    and are ImageNet's where the layout is torchvision's.
    """
    description = read(path)
    model, torchvision = _architecture(description.shapes)
    normalisation = IMAGENET if torchvision else {"mean": None, "std": None}
    for key in ("mean", "std"):
        if key in description.metadata:
            normalisation = {**normalisation, key: _numbers(path, key, description.metadata[key])}
    return {**normalisation, "model": model}


def read(path: str | Path) -> Description:
    """Names and shapes of a file's tensors, without `module.` and `num_batches_tracked`, and its metadata."""
    path = Path(path)
    if path.suffix in (".pt", ".pth", ".bin", ".th", ".tar", ".ckpt", ".pkl", ".pickle"):
        raise UserError(
            f"{path}: pickled weights are never opened, since they can run code; convert them once, in PyTorch: {CONVERT}"
        )
    if path.suffix not in (".safetensors", ".npz"):
        raise UserError(
            f"{path}: weights are read from .safetensors or .npz files in PyTorch naming, not from '{path.suffix}'"
        )
    if not path.is_file():
        raise UserError(f"there is no weights file '{path}'")
    metadata: Mapping[str, str] = {}
    if path.suffix == ".npz":
        shapes = {name: tensor.shape for name, tensor in _arrays(path).items()}
    else:
        try:
            with safetensors.safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable safetensors file: {_line(error)}") from None
    return Description({_plain(name): shape for name, shape in shapes.items() if _counts(name)}, metadata)


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
    raise UserError(f"the layer '{layer}' of this model has no name in PyTorch's files: weights are read into backbones with "
                    "map_head(pool), VGG also with vgg_head(), and into resnet4b")  # fmt: skip


def _vgg_names(layers):
    """{"stem/conv1": "features.0", "stem/norm1": "features.1", ...}: convolution, norm, ReLU, and a pooling after each stage."""
    if "stem/conv1" not in layers:
        return {}
    names, index = {}, 0
    for stage in ("stem", "stage1", "stage2", "stage3", "stage4"):
        for i in range(1, 1 + sum(layer.startswith(f"{stage}/conv") for layer in layers)):
            names |= {f"{stage}/conv{i}": f"features.{index}", f"{stage}/norm{i}": f"features.{index + 1}"}
            index += 3
        index += 1
    return names


def _architecture(shapes) -> tuple[str | None, bool]:
    """The config text of the network with these tensors, or None; and whether the layout is torchvision's for ImageNet."""
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


def _tensors(path):
    arrays = _arrays(Path(path)) if Path(path).suffix == ".npz" else load_file(path)
    return {_plain(name): tensor for name, tensor in arrays.items()}


def _arrays(path):
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a readable .npz file of plain arrays: {_line(error)}") from None


def _counts(name):
    return not name.endswith("num_batches_tracked")


def _plain(name):
    return name.removeprefix("module.")


def _ours(tensor):
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def _torch_shape(shape):
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def _numbers(path, key, text):
    try:
        return tuple(float(x) for x in text.split(","))
    except ValueError:
        raise UserError(f"{path}: the metadata say {key}={text!r}; expected numbers like '0.485,0.456,0.406'") from None


def _listed(items):
    more = f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return ", ".join(items[:LISTED]) + more


def _line(error):
    return " ".join(str(error).split()) or type(error).__name__
