"""What takes the place of pixels that are taken away: the mean colour, a blur, a colour, a picture."""

from typing import TypeAlias

import numpy as np

from topgap_jax.baselines import baseline_images
from topgap_jax.errors import UserError
from topgap_jax.types import Array, Predict

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
    return baseline_images(f"{where}: substrate", substrate, predict, images, None)
