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
from topgap_jax.pretrained.names.layout import fits, ours, torch_shape
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
    variables = {tuple(str(getattr(key, "key", key)) for key in keys): leaf.shape for keys, leaf in leaves}
    shapes = read(path).shapes
    names = torch_names(variables, shapes)
    missing = [name for name in names.values() if name not in shapes]
    unexpected = sorted(set(shapes) - set(names.values()))
    shaped = [
        f"{name} {shapes[name]} instead of {torch_shape(at, variables[at])}"
        for at, name in names.items()
        if name in shapes and not fits(at, variables[at], shapes[name])
    ]
    wrong = {"missing": missing, "unexpected": unexpected, "mis-shaped": shaped}
    if any(wrong.values()):
        parts = "; ".join(f"{kind}: {_listed(items)}" for kind, items in wrong.items() if items)
        raise UserError(f"{path} does not fit the model: {parts}")
    values = tensors(path)
    arrays = [jnp.asarray(ours(at, shape, values[names[at]]), jnp.float32) for at, shape in variables.items()]
    return jax.tree.unflatten(structure, arrays)


def _listed(items):
    more = f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return ", ".join(items[:LISTED]) + more
