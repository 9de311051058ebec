"""`ssim`: do two maps have the same structure, window by window?"""

import jax.numpy as jnp
import numpy as np

from topgap_jax.errors import UserError
from topgap_jax.types import Array

WINDOW, SIGMA = 11, 1.5


def ssim(a: Array, b: Array) -> Array:
    """Structural similarity of maps (b, h, w) in [0, 1], (b,) (Wang et al. 2004): mean over all 11x11 windows inside.

    (2 m_a m_b + c1)(2 s_ab + c2) / ((m_a^2 + m_b^2 + c1)(s_a^2 + s_b^2 + c2)) with Gaussian weights of sigma 1.5,
    population (co)variances, c1 = .01^2, c2 = .03^2. scikit-image's default is a uniform 7x7 window with sample
    covariances: its `gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1` is this. Maps below
    11x11 have none: UserError.
    """
    if a.shape != b.shape or min(a.shape[1:]) < WINDOW:
        raise UserError(
            f"ssim: maps must have one shape of at least {WINDOW}x{WINDOW} positions, got {a.shape} and {b.shape}"
        )
    h, w = a.shape[1:]
    mean = lambda values: jnp.einsum("ih,bhw,jw->bij", _windows(h), values, _windows(w))
    mean_a, mean_b = mean(a), mean(b)
    both = mean(a * b) - mean_a * mean_b
    squares = mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2
    c1, c2 = 0.01**2, 0.03**2
    values = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (squares + c2))
    return values.mean((1, 2))


def _windows(n):
    """(n - 10, n): row i holds the Gaussian's weights of the window that starts at i."""
    weights = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SIGMA) ** 2)
    weights /= weights.sum()
    return jnp.asarray(np.stack([np.pad(weights, (i, n - WINDOW - i)) for i in range(n - WINDOW + 1)]), jnp.float32)
