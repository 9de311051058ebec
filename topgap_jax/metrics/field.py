"""Measures of a non-negative map, made for receptive fields E (b, h, w): how wide it is and how much lies inside a
region.

A map that sums to 0 has no shape: every measure is NaN there, and evaluators count such images.
"""

import jax.numpy as jnp

from topgap_jax.types import Array


def share_inside(maps: Array, inside: Array) -> Array:
    """sum of E inside / sum of E: (b,); `inside` is a bool mask (b, h, w)."""
    return (maps * inside).sum((1, 2)) / maps.sum((1, 2))


def rms_radius(maps: Array, place: tuple[float, float]) -> Array:
    """sqrt(sum E d^2 / sum E) in pixels, d the distance from `place` = (row, column) in pixels: (b,)."""
    rows, columns = jnp.arange(maps.shape[1]) - place[0], jnp.arange(maps.shape[2]) - place[1]
    squares = rows[:, None] ** 2 + columns[None, :] ** 2
    return jnp.sqrt((maps * squares).sum((1, 2)) / maps.sum((1, 2)))


def luo_size(maps: Array, place: tuple[float, float]) -> Array:
    """sqrt(number of pixels with E > 4.55 % of E at `place`): (b,), in pixels (Luo et al. 2016, arXiv 1701.04128)."""
    # A place between two pixels belongs to the lower right one.
    row, column = (int(u + 0.5) for u in place)
    centre = maps[:, row, column][:, None, None]
    count = (maps > (1 - 0.9545) * centre).sum((1, 2))
    return jnp.where(maps.sum((1, 2)) > 0, jnp.sqrt(count.astype(jnp.float32)), jnp.nan)


def effective_area(maps: Array) -> Array:
    """(sum E)^2 / sum E^2 in pixels: (b,); n equal pixels count n."""
    scaled = maps / maps.sum((1, 2), keepdims=True)
    return 1 / (scaled**2).sum((1, 2))
