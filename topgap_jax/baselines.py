"""What stands for "nothing to see" where a method takes pixels away: a mean colour, black, a blur, noise, a picture."""

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # scipy.ndimage is imported when it is first used

from topgap_jax.errors import UserError
from topgap_jax.keys import required
from topgap_jax.rewrite import zero_images
from topgap_jax.types import Array, Keys, Predict

Baseline: TypeAlias = str | float | Sequence[float] | Array
"""A name of `NAMES`, a number, one per channel, or an array that broadcasts to the images."""
NAMES = ("mean", "black", "white", "blur", "noise")
BLUR, SIGMA = 11, 5.0


def check_baseline(where: str, baseline: Baseline) -> None:
    """Raise a UserError if `baseline` is a text that is none of `NAMES`, or has values that no pixel has."""
    if isinstance(baseline, str) and baseline not in NAMES:
        raise UserError(
            f"{where} must be {', '.join(map(repr, NAMES))}, a number, one per channel or an array, got {baseline!r}"
        )
    if baseline is None or isinstance(baseline, str) or isinstance(baseline, jax.core.Tracer):
        return
    try:
        values = np.asarray(baseline, np.float32)
    except (TypeError, ValueError, RuntimeError):  # `baseline_images` says what it is
        return
    if not ((values >= -1e-6) & (values <= 1 + 1e-6)).all():  # as much as images may
        span = f"{values.min():.4g} to {values.max():.4g}" if values.size > 1 else f"{baseline!r}"
        raise UserError(f"{where} must lie in [0, 1] as images do, got {span}")


def baseline_images(where: str, baseline: Baseline, predict: Predict, images: Array, keys: Keys) -> Array:
    """The images (b, h, w, c) of a baseline; `where` names the option in an error, "integrated: baseline".

    "mean": what the network's normalisation maps to zero, the mean of (x - mean) / std (`rewrite.zero_images`; a
    network without normalisation: black). "blur": the images under an 11x11 Gaussian of sigma 5, with that mean beyond
    their edges. "noise": uniform in [0, 1], from the example's own key.
    """
    check_baseline(where, baseline)
    name = baseline if isinstance(baseline, str) else ""
    if name == "noise":
        return jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:], images.dtype))(required(keys))
    if name in ("mean", "blur"):
        mean = zero_images(predict, images)
        return mean if name == "mean" else blurred(images, mean)
    value = {"black": 0.0, "white": 1.0}.get(name, baseline)
    try:
        return jnp.broadcast_to(jnp.asarray(value, images.dtype), images.shape)
    except (TypeError, ValueError):
        shape = getattr(value, "shape", None)
        what = f"an array of shape {shape}" if shape is not None else repr(value)
        raise UserError(
            f"{where} must be {', '.join(map(repr, NAMES))}, a number, one per channel or an array for images of shape"
            f" {images.shape}, got {what}"
        ) from None


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
