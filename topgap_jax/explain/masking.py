"""What methods share that only ask the network: groups of pixels, and loops over copies with pixels replaced.

No method holds more than `chunk` copies of the images at a time, nor their masks: a mask is made where it is used.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax.build import check_number
from topgap_jax.errors import UserError
from topgap_jax.grids import cell_numbers
from topgap_jax.rewrite.speed import map_over, sum_over
from topgap_jax.types import Array, Predict, Score

BATCH = 32  # images in one forward pass of a small batch, if no chunk is given

Segments: TypeAlias = int | Array
"""Groups of pixels: n (a grid of n x n cells, which differ by a pixel where n does not divide the size), or their
numbers as an int array (h, w), or (b, h, w) with those of each image of the one batch that is explained."""


def check_chunk(chunk: int | None) -> None:
    if chunk is not None:
        check_number("chunk", chunk, 1, whole=True)


def masked_scores(
    keep: Callable[[Any], Array],
    rows: tuple,
    predict: Predict,
    score: Score,
    images: Array,
    labels: Array,
    other: Array,
    chunk: int | None,
) -> Array:
    """Scores (n, b) of the images where keep(*row) is 1 and of `other` where it is 0, for each of the n rows.

    keep(*row): (b, h, w) or (1, h, w), bool or in [0, 1].
    """
    return map_over(
        lambda *row: score(predict(mixed(keep(*row), images, other)), labels), rows, chunk=_chunk(chunk, images)
    )


def mixed(mask: Array, images: Array, other: Array) -> Array:
    """mask * images + (1 - mask) * other; of a bool mask exactly one or the other."""
    mask = mask[..., None]
    return jnp.where(mask, images, other) if mask.dtype == bool else other + mask * (images - other)


def sum_of(f: Callable[[Array], Any], n: int, images: Array, chunk: int | None) -> Any:
    """The sum of f(i) over i = 0 ... n - 1 in float32, at most `chunk` of them computed at a time; f(i): a tree of (b,
    ...)."""
    chunks = -(-n // _chunk(chunk, images))
    size = -(-n // chunks)
    if size == 1:
        return sum_over(f, (np.arange(n),), images)

    def several(indices):
        # The last chunk may hold more indices than there are left: those count nothing.
        counts = lambda x: (indices < n).reshape(-1, *(1,) * (x.ndim - 1))
        return jax.tree.map(lambda x: jnp.where(counts(x), x, 0).sum(0), jax.vmap(f)(indices))

    return sum_over(several, (np.arange(chunks * size).reshape(chunks, size),), images)


def _chunk(chunk: int | None, images: Array) -> int:
    return max(1, BATCH // len(images)) if chunk is None else chunk


def checked_segments(where: str, segments: Segments) -> tuple[int | np.ndarray, int]:
    """The segments, numbered from 0 without gaps, and how many there are; UserError of `where`."""
    if isinstance(segments, int | np.integer):
        check_number("segments", segments, 1, whole=True)
        segments = int(segments)
        return segments, segments**2
    ids = np.asarray(segments)
    if ids.ndim not in (2, 3) or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
        raise UserError(
            f"{where}: segments must be a number n (n x n cells) or an int array (h, w) or (b, h, w), got"
            f" {f'an array of shape {ids.shape} and type {ids.dtype}' if ids.ndim else repr(segments)}"
        )
    values, ids = np.unique(ids, return_inverse=True)
    return ids.reshape(np.shape(segments)).astype(np.int32), len(values)


def segment_ids(where: str, segments: int | np.ndarray, images: Array) -> Array:
    """Number of each pixel's segment, int32 (1, h, w) or (b, h, w), of checked segments."""
    b, h, w = images.shape[:3]
    if isinstance(segments, int):
        return jnp.asarray(cell_numbers(where, segments, (h, w)))[None]
    ids = segments if segments.ndim == 3 else segments[None]
    if ids.shape[1:] != (h, w) or len(ids) not in (1, b):
        raise UserError(
            f"{where}: segments of shape {segments.shape} do not fit {b} images of {h} x {w}; give (h, w) or (b, h, w)"
        )
    return jnp.asarray(ids)


def paint(values: Array, ids: Array) -> Array:
    """values (b, n) of each segment on its pixels: (b, h, w)."""
    flat = jnp.broadcast_to(ids.reshape(len(ids), -1), (len(values), ids[0].size))
    return jnp.take_along_axis(values, flat, 1).reshape(-1, *ids.shape[1:])
