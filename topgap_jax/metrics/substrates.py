"""What takes the place of pixels that are taken away: the mean colour, a blur, a colour, a picture."""

from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
import scipy  # scipy.ndimage is imported when it is first used

from topgap_jax.errors import UserError
from topgap_jax.rewrite import zero_images
from topgap_jax.types import Array, Predict

BLUR, SIGMA = 11, 5.0

Substrate: TypeAlias = str | float | tuple[float, ...] | Array
"""`"mean"` (what the network's normalisation maps to zero: the mean colour; `rewrite.zero_images`), "blur" (11x11
Gaussian, sigma 5), a colour in [0, 1], or a picture (h, w, c) in [0, 1]."""


def checked(where: str, substrate: Substrate) -> tuple[str | np.ndarray, str]:
    """(the substrate, its name in words); UserError of the method `where` for what is none."""
    if isinstance(substrate, str):
        if substrate not in ("mean", "blur"):
            raise UserError(
                f"{where}: substrate must be 'mean', 'blur', a colour or a picture in [0, 1], got {substrate!r}"
            )
        return substrate, {"mean": "mean colour", "blur": "blurred"}[substrate]
    values = np.asarray(substrate, np.float32)
    if values.ndim == 2 or not (values >= 0).all() or not (values <= 1).all():
        raise UserError(f"{where}: substrate must be 'mean', 'blur', a colour or a picture (h, w, c) in [0, 1]")
    return values, "a picture" if values.ndim > 1 else f"colour {', '.join(f'{part:g}' for part in np.ravel(values))}"


def substrate_images(where: str, substrate: str | np.ndarray, predict: Predict, images: Array) -> Array:
    """What stands in the place of every pixel of the images, (b, h, w, c)."""
    if not isinstance(substrate, str):
        try:
            return jnp.broadcast_to(substrate.astype(images.dtype), images.shape)
        except ValueError:
            raise UserError(
                f"{where}: a substrate of shape {substrate.shape} does not fit images of shape {images.shape[1:]}"
            ) from None
    zero = zero_images(predict, images)
    return zero if substrate == "mean" else blurred(images, zero)


def blurred(images: Array, outside: float | Array = 0.0) -> Array:
    """Images (b, h, w, c) under the 11x11 blur, with the colour `outside` beyond their edges."""
    h, w = images.shape[1:3]
    # As two products of matrices: a grouped convolution is slow on a CPU.
    return outside + jnp.einsum("ih,bhwc,jw->bijc", _band(h), images - outside, _band(w))


def blur_kernel() -> np.ndarray:
    """The 11 weights of the blur along one axis: a unit pulse under SciPy's Gaussian, whose reflecting border folds the
    tails back (RISE's kernel is their outer product: nearly flat, sum 1)."""
    pulse = np.zeros(BLUR)
    pulse[BLUR // 2] = 1
    return scipy.ndimage.gaussian_filter1d(pulse, SIGMA)


def _band(n):
    """(n, n): row i holds the kernel around i, cut at the ends."""
    kernel = blur_kernel()
    return jnp.asarray(sum(weight * np.eye(n, k=i - BLUR // 2) for i, weight in enumerate(kernel)), jnp.float32)
