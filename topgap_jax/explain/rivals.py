"""Maps that know no network: `edges` and `salience` of the image, the rivals that an explanation has to beat
(arXiv 2602.09238)."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from topgap_jax.build import table
from topgap_jax.types import Array, Cost, Explain

LUMINANCE = (0.299, 0.587, 0.114)


def edges() -> Explain:
    """Sobel's |grad Y| = sqrt(gx^2 + gy^2) of the luminance Y, maps (b, h, w), whatever the network and the label are.

    gx and gy are the 3x3 filters (1, 2, 1) x (-1, 0, 1), the image continued by its edge values (Sobel & Feldman 1968).
    Guided backprop looks much like it (Adebayo et al. 2018, arXiv 1810.03292).
    """
    return _of_images(lambda images: sobel(luminance(images)))


def salience() -> Explain:
    """|Y - blur(Y)| of the luminance Y, a Gaussian of sigma = w / 8 continued by the edge values, maps (b, h, w),
    whatever the network and the label are: what stands out from its surroundings."""

    def maps(images):
        values = luminance(images)
        return jnp.abs(values - blurred(values, values.shape[2] / 8))

    return _of_images(maps)


def luminance(images: Array) -> Array:
    """Y = .299 R + .587 G + .114 B (b, h, w) of images (b, h, w, 3); of other numbers of channels their mean."""
    channels = images.shape[-1]
    weights = LUMINANCE if channels == 3 else np.full(channels, 1 / channels)
    return images.astype(jnp.float32) @ jnp.asarray(weights, jnp.float32)


def sobel(values: Array) -> Array:
    """sqrt(gx^2 + gy^2) of values (b, h, w).

    >>> sobel(jnp.tile(jnp.array([0.0, 0, 1, 1]), (1, 2, 1))).tolist()
    [[[0.0, 4.0, 4.0, 0.0], [0.0, 4.0, 4.0, 0.0]]]
    """
    padded = jnp.pad(values, ((0, 0), (1, 1), (1, 1)), mode="edge")
    smooth = lambda x, axis: _shift(x, 0, axis) + 2 * _shift(x, 1, axis) + _shift(x, 2, axis)
    difference = lambda x, axis: _shift(x, 2, axis) - _shift(x, 0, axis)
    return jnp.hypot(difference(smooth(padded, 1), 2), difference(smooth(padded, 2), 1))


def blurred(values: Array, sigma: float) -> Array:
    """Values (b, h, w) under a Gaussian cut at 4 sigma, continued by the edge values."""
    h, w = values.shape[1:]
    return jnp.einsum("ih,bhw,jw->bij", _gaussian(h, sigma), values, _gaussian(w, sigma))


def _gaussian(n: int, sigma: float) -> np.ndarray:
    """(n, n): row i holds the weights of the values in the blurred value i."""
    radius = int(4 * sigma + 0.5)
    taps = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (taps / sigma) ** 2)
    matrix = np.zeros((n, n))
    for tap, weight in zip(taps, weights / weights.sum()):
        matrix[np.arange(n), np.clip(np.arange(n) + tap, 0, n - 1)] += weight
    return np.float32(matrix)


def _shift(padded, start, axis):
    index = [slice(None)] * 3
    index[axis] = slice(start, padded.shape[axis] - 2 + start)
    return padded[tuple(index)]


def _of_images(f: Callable[[Array], Array]) -> Explain:
    return Explain(lambda keys, predict, images, labels: f(images), lambda predict, images: Cost())


TABLE = table(edges, salience)
