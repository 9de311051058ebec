"""What takes the place of pixels that are hidden from a network: a colour, the mean, the image blurred, a picture."""

from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
import scipy  # scipy.ndimage is imported when it is first used

from topgap_jax.errors import UserError
from topgap_jax.rewrite.normalisation import zero_images
from topgap_jax.types import Array

BLUR, SIGMA = 11, 5.0

Substrate: TypeAlias = str | float | tuple[float, ...] | Array
"""Pixels instead of the image's: "mean" (what the network's normalisation maps to zero: the mean colour;
`zero_images`), "blur" (11x11 Gaussian, sigma 5), a number or a colour in [0, 1] (0 is black), or a picture
(h, w, c)."""


def checked_substrate(where: str, substrate: Substrate, what: str = "substrate") -> str | np.ndarray:
    """`substrate`, a number, colour or picture as a float32 array; UserError of `where`, which calls it `what`."""
    if isinstance(substrate, str):
        if substrate not in ("mean", "blur"):
            raise UserError(
                f"{where}: {what} must be 'mean', 'blur', a colour or a picture in [0, 1], got {substrate!r}"
            )
        return substrate
    try:
        values = np.asarray(substrate, np.float32)
    except (TypeError, ValueError):
        values = np.full(2, np.nan)
    if values.ndim == 2 or not (values >= 0).all() or not (values <= 1).all():
        raise UserError(f"{where}: {what} must be 'mean', 'blur', a colour or a picture (h, w, c) in [0, 1]")
    return values


def substrate_words(substrate: str | np.ndarray) -> str:
    """A checked substrate in words: "mean colour", "blurred", "colour 0", "a picture"."""
    if isinstance(substrate, str):
        return {"mean": "mean colour", "blur": "blurred"}[substrate]
    return "a picture" if substrate.ndim > 1 else f"colour {', '.join(f'{part:g}' for part in np.ravel(substrate))}"


def substrate_images(
    where: str, substrate: str | np.ndarray, predict: Callable, images: Array, what: str = "substrate"
) -> Array:
    """The images (b, h, w, c) that a checked substrate stands for."""
    if not isinstance(substrate, str):
        try:
            return jnp.broadcast_to(substrate.astype(images.dtype), images.shape)
        except ValueError:
            raise UserError(
                f"{where}: a {what} of shape {substrate.shape} does not fit images of shape {images.shape[1:]}"
            ) from None
    zero = zero_images(predict, images)
    return zero if substrate == "mean" else blurred(images, zero)


def blur_kernel() -> np.ndarray:
    """The 11 weights of the blur along one axis: a unit pulse under SciPy's Gaussian, whose reflecting border folds the
    tails back (RISE's kernel is their outer product: nearly flat, sum 1)."""
    pulse = np.zeros(BLUR)
    pulse[BLUR // 2] = 1
    return scipy.ndimage.gaussian_filter1d(pulse, SIGMA)


def blurred(images: Array, outside: float | Array = 0.0) -> Array:
    """Images (b, h, w, c) under the 11x11 blur, with the colour `outside` beyond their edges."""
    h, w = images.shape[1:3]
    # As two products of matrices: a grouped convolution is slow on a CPU.
    return outside + jnp.einsum("ih,bhwc,jw->bijc", _band(h), images - outside, _band(w))


def _band(n):
    """(n, n): row i holds the kernel around i, cut at the ends."""
    kernel = blur_kernel()
    return jnp.asarray(sum(weight * np.eye(n, k=i - BLUR // 2) for i, weight in enumerate(kernel)), jnp.float32)
