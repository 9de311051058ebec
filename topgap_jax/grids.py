"""Maps on other grids: enlarged to an image, averaged over areas, scaled to [0, 1]; and images divided into cells."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax.errors import UserError
from topgap_jax.types import Array


def resized(maps: Array, size: tuple[int, int]) -> Array:
    """Maps at a size, values as they are: (b, h', w') -> (b, h, w) float32; bilinear, half-pixel centres, no
    antialiasing."""
    return jax.image.resize(maps.astype(jnp.float32), (len(maps), *size), "bilinear", antialias=False)


def same_size(maps: Sequence[Array], size: tuple[int, ...] = ()) -> list[Array]:
    """Maps (b, h', w') of several sizes at one, by default that of the largest, `resized`."""
    size = size or max((each.shape[1:] for each in maps), key=lambda shape: shape[0] * shape[1])
    return [resized(each, size) for each in maps]


def scaled(maps: Array, size: tuple[int, int]) -> Array:
    """Maps at a size, in [0, 1]: (b, h', w') -> (b, h, w). A constant map is 0."""
    full = resized(maps, size)
    low, high = full.min((1, 2), keepdims=True), full.max((1, 2), keepdims=True)
    # Of the map itself: interpolated between equal values, a constant map may differ by rounding.
    varies = (high > low) & (maps.max((1, 2), keepdims=True) > maps.min((1, 2), keepdims=True))
    return jnp.where(varies, (full - low) / jnp.where(varies, high - low, 1), 0)


def shrunk(maps: Array, size: tuple[int, int]) -> Array:
    """Maps (b, h', w') on a grid that is not finer, averaged over what a cell covers: (b, *size)."""
    return jax.image.resize(maps.astype(jnp.float32), (len(maps), *size), "linear", antialias=True)


def cell_numbers(where: str, n: int, size: tuple[int, int]) -> np.ndarray:
    """Number of the cell of each pixel, int32 (h, w), row by row, of n x n cells that differ by at most one pixel.
    UserError of the method `where` for a grid finer than the image.

    >>> cell_numbers("", 2, (2, 5))
    array([[0, 0, 0, 1, 1],
           [2, 2, 2, 3, 3]], dtype=int32)
    """
    if n > min(size):
        raise UserError(f"{where}: a grid of {n} x {n} cells is finer than images of {size[0]} x {size[1]} pixels")
    rows, columns = (np.arange(length) * n // length for length in size)
    return (rows[:, None] * n + columns).astype(np.int32)
