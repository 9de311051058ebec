"""Tensors of PyTorch's layout and ours: convolutions (out, in, kh, kw) and (kh, kw, in, out), dense kernels (out, in)
and (in, out)."""

import math

import numpy as np


def torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in PyTorch of our variable of this path and shape."""
    if path[-1] != "kernel":
        return shape
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def fits(path: tuple[str, ...], shape: tuple[int, ...], file: tuple[int, ...]) -> bool:
    """Whether a file's tensor is our variable: of its shape in PyTorch, or a dense kernel (o, i) that is written as a
    convolution of all positions (o, c, h, w), a vector (c,) as (c, 1, 1)."""
    due = torch_shape(path, shape)
    if path[-1] == "kernel" and len(due) == 2:
        return file[:1] == due[:1] and math.prod(file[1:]) == due[1]
    return [n for n in file if n != 1] == [n for n in due if n != 1] and (len(due) != 4 or file == due)


def ours(path: tuple[str, ...], shape: tuple[int, ...], tensor: np.ndarray) -> np.ndarray:
    """The tensor of a file in our layout."""
    if path[-1] != "kernel":
        return tensor.reshape(shape)
    return tensor.transpose(2, 3, 1, 0) if len(shape) == 4 else tensor.reshape(shape[1], shape[0]).T
