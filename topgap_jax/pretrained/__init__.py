"""Weights in PyTorch naming and layout, from .safetensors or .npz, into variables of our models. Nothing is ever
unpickled.

Known are the names of akamaster's CIFAR ResNets (and of ResNet-4B, which shares them) and of torchvision, which timm
shares, for ResNet-18/34/50 and VGG with batch norm. A prefix `module.` and `num_batches_tracked` are dropped.
"""

from pathlib import Path

import jax
import jax.numpy as jnp

from topgap_jax.errors import UserError
from topgap_jax.pretrained.files import Description, read, tensors
from topgap_jax.pretrained.names import torch_names
from topgap_jax.pretrained.networks import describe
from topgap_jax.types import Model, Variables

LISTED = 8  # keys of one kind that an error spells out


def load(path: str | Path, model: Model, *, image_shape: tuple[int, int, int] = (32, 32, 3)) -> Variables:
    """The variables of `model` from a file in PyTorch naming and layout; image_shape (h, w, c) is what the model will
    be given.

    Convolutions (out, in, kh, kw) become (kh, kw, in, out), dense kernels (out, in) become (in, out), all float32.
    Raises UserError, in one line, for files that cannot be read and for missing, unexpected and mis-shaped tensors.
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
    values = tensors(path)
    return jax.tree.unflatten(structure, [jnp.asarray(_ours(values[name]), jnp.float32) for name in names])


def _ours(tensor):
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def _torch_shape(shape):
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def _listed(items):
    more = f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return ", ".join(items[:LISTED]) + more
