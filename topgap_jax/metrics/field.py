"""Measures of a non-negative map, made for receptive fields E (b, h, w): how wide it is and how much lies inside a
region.

A map that sums to 0 has no shape: every measure is NaN there, and evaluators count such images.
"""

import jax.numpy as jnp
import numpy as np

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


def gaussian_fit(maps: Array, place: tuple[float, float]) -> tuple[Array, Array]:
    """(sigma, share) (b,) of the round Gaussian a exp(-d^2 / 2 sigma^2) around `place` nearest to E in least squares.

    sigma in pixels; share = 1 - sum (E - Gaussian)^2 / sum E^2, 1 where E is one. The field of n stacked convolutions
    of k x k equal weights tends to a Gaussian with sigma^2 = n (k^2 - 1) / 12: it grows as sqrt(n), the theoretical
    field as n (Luo et al. 2016, arXiv 1701.04128). Sigmas from .25 pixels to the longer side are searched, exact to
    0.1 %.
    """
    maps = maps / maps.max((1, 2), keepdims=True)
    rows, columns = jnp.arange(maps.shape[1]) - place[0], jnp.arange(maps.shape[2]) - place[1]
    energy = (maps**2).sum((1, 2))

    def share(sigmas):
        """Of sigmas (b, s): <E, G>^2 / (<G, G> <E, E>), what the best a leaves of 1."""
        along = lambda distance: jnp.exp(-((distance / sigmas[..., None]) ** 2) / 2)
        by_row, by_column = along(rows), along(columns)
        product = jnp.einsum("bhw,bsh,bsw->bs", maps, by_row, by_column, precision="highest")
        return product**2 / ((by_row**2).sum(-1) * (by_column**2).sum(-1) * energy[:, None])

    exponents, step = jnp.linspace(np.log(0.25), np.log(max(maps.shape[1:])), 64, retstep=True)
    best = jnp.broadcast_to(exponents, (len(maps), 64))
    for _ in range(3):
        shares = share(jnp.exp(best))
        middle = jnp.take_along_axis(best, shares.argmax(1)[:, None], 1)
        best, step = middle + step * jnp.linspace(-1, 1, 17), step / 8
    shares = share(jnp.exp(best))
    sigma = jnp.exp(jnp.take_along_axis(best, shares.argmax(1)[:, None], 1))[:, 0]
    largest = shares.max(1)
    return jnp.where(jnp.isnan(largest), jnp.nan, sigma), largest


def effective_area(maps: Array) -> Array:
    """(sum E)^2 / sum E^2 in pixels: (b,); n equal pixels count n."""
    scaled = maps / maps.sum((1, 2), keepdims=True)
    return 1 / (scaled**2).sum((1, 2))
