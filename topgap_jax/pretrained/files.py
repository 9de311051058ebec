"""Files of tensors: .safetensors and .npz, read without running any code."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
from safetensors.numpy import load_file

from topgap_jax.errors import UserError

CONVERT = "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'FILE.safetensors')"


class Description(NamedTuple):
    """A file's tensors by name, as shapes, and its metadata."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]


def read(path: str | Path) -> Description:
    """Names and shapes of a file's tensors, without `module.` and `num_batches_tracked`, and its metadata."""
    path = Path(path)
    if path.suffix in (".pt", ".pth", ".bin", ".th", ".tar", ".ckpt", ".pkl", ".pickle"):
        raise UserError(
            f"{path}: pickled weights are never opened, since they can run code; convert them once, in PyTorch:"
            f" {CONVERT}"
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


def tensors(path: str | Path) -> dict[str, np.ndarray]:
    """The file's tensors by name, without `module.`."""
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


def _line(error):
    return " ".join(str(error).split()) or type(error).__name__
