"""SmoothTaylor: Taylor expansions of first order at noisy roots, at a noise level that each image may look for."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # scipy.integrate is imported when it is first used
from jax import lax

from topgap_jax.build import check_number, table
from topgap_jax.explain.pixels import input_gradient, pixel_explanation
from topgap_jax.keys import fold_in, normal
from topgap_jax.rewrite.speed import sum_over
from topgap_jax.scores import logit
from topgap_jax.types import Array, Cost, Explain, Score

RATE, DECAY, STOPS = 0.1, 0.9, 3
SHRINK, SMALLEST = 1.5, 30


def smooth_taylor(
    *, samples: int = 150, sigma: float = 0.1, adaptive: int = 0, score: Score = logit, reduce: str = "sum"
) -> Explain:
    """Mean over roots z = x + sigma e, e ~ N(0, 1), of (x - z) d s / d x at z, signed maps (b, h, w) (Goh et al. 2020,
    arXiv 2004.10484).

    sigma is in units of each image's own range, max - min. By Stein's identity the mean is -sigma^2 d^2 s / d x^2 of
    the smoothed score: of a linear network it is 0, and what is seen is noise of size sigma |w| / sqrt(samples).

    adaptive: at most so many rounds (20 in the paper) in which each image looks for the sigma that gives its smoothest
    map, the least `total_variation_curve`, from sigma on: a step of lr = .1 of the range up, or down where up is worse;
    worse than before: lr *= .9, and the fourth time in a row it stays. The best of all is taken. Each round costs up to
    two maps.
    """
    check_number("samples", samples, 1, whole=True)
    check_number("sigma", sigma, 0)
    check_number("adaptive", adaptive, 0, whole=True)

    def pixels(keys, predict, images, labels):
        spread = jnp.ptp(images, (1, 2, 3))

        def at(level):
            scale = (level * spread)[:, None, None, None]

            def one(sample):
                noise = normal(fold_in(keys, sample), images)
                return -scale * noise * input_gradient(predict, images + scale * noise, labels, score) / samples

            return sum_over(one, (np.arange(samples),), images)

        start = jnp.full_like(spread, sigma)

        def roughness(level):
            maps = at(level).sum(-1)
            # Without noise the map is zero everywhere, and as smooth as it is empty.
            return jnp.where(jnp.ptp(maps, (1, 2)) > 0, total_variation_curve(maps), jnp.inf)

        return at(adaptive_level(roughness, start, adaptive))

    return pixel_explanation(pixels, reduce, Cost(0, (2 + 2 * adaptive if adaptive else 1) * samples))


def adaptive_level(value, start: Array, rounds: int) -> Array:
    """The level (b,) with the least value(level) (b,) that the paper's walk visits from `start` (b,), `rounds` steps
    long."""
    if not rounds:
        return start

    def step(state, _):
        level, current, rate, stops, best, least, ended = state
        up, down = jnp.abs(level + rate), jnp.abs(level - rate)
        at_up = value(up)
        higher = at_up > current
        after, moved = jnp.where(higher, value(down), at_up), jnp.where(higher, down, up)
        worse = after > current
        ends = worse & (stops >= STOPS)
        better = ~ended & (after < least)
        best, least = jnp.where(better, moved, best), jnp.where(better, after, least)
        keep = lambda new, old: jnp.where(ended, old, new)
        state = (
            keep(moved, level), keep(after, current), keep(jnp.where(worse, DECAY * rate, rate), rate),
            keep(jnp.where(worse, stops + 1, 0), stops), best, least, ended | ends,
        )  # fmt: skip
        return state, None

    current = value(start)
    zero = jnp.zeros_like(start)
    state = (start, current, zero + RATE, zero.astype(jnp.int32), start, current, zero > 0)
    return lax.scan(step, state, length=rounds)[0][4]


def average_total_variation(maps: Array) -> Array:
    """(sum |d_y| + sum |d_x|) / (h w) of |maps|, less its minimum, over its 99th percentile, clipped to [0, 1]: (b, h,
    w) -> (b,); 0 of a constant map."""
    values = jnp.abs(maps)
    low = values.min((1, 2), keepdims=True)
    high = jnp.percentile(values, 99, (1, 2), keepdims=True)
    scaled = jnp.clip(jnp.where(high > low, (values - low) / jnp.where(high > low, high - low, 1), 0), 0, 1)
    variation = jnp.abs(jnp.diff(scaled, axis=1)).sum((1, 2)) + jnp.abs(jnp.diff(scaled, axis=2)).sum((1, 2))
    return variation / (maps.shape[1] * maps.shape[2])


def total_variation_curve(maps: Array) -> Array:
    """The area under the average total variation over a Gaussian pyramid, by Simpson's rule with levels 1 apart
    (AUTVC): signed maps (b, h, w) -> (b,).

    Each level is smoothed by a Gaussian of sigma .5 and 1.5 times smaller, down to sides of 30 pixels. A map with one
    level only has that level's variation.
    """
    levels = [average_total_variation(maps)]
    while min(np.ceil(np.asarray(maps.shape[1:]) / SHRINK)) >= SMALLEST:
        size = tuple(int(np.ceil(side / SHRINK)) for side in maps.shape[1:])
        maps = jax.image.resize(_smoothed(maps), (len(maps), *size), "bilinear", antialias=False)
        levels.append(average_total_variation(maps))
    return _simpson(len(levels)) @ jnp.stack(levels)


def _smoothed(maps):
    """Under a Gaussian of sigma 2 * 1.5 / 6, cut at 4 sigma, mirrored at the borders."""
    weights = np.exp(-0.5 * (np.arange(-2, 3) / (2 * SHRINK / 6)) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    padded = jnp.pad(maps, ((0, 0), (2, 2), (2, 2)), "symmetric")
    h, w = maps.shape[1:]
    rows = sum(weight * padded[:, i : i + h] for i, weight in enumerate(weights))
    return sum(weight * rows[:, :, i : i + w] for i, weight in enumerate(weights))


def _simpson(n):
    """Weights (n,) of Simpson's rule with unit steps, as SciPy's for an even number of points (Cartwright's
    correction)."""
    return jnp.ones(1) if n == 1 else jnp.asarray([scipy.integrate.simpson(row) for row in np.eye(n)], jnp.float32)


TABLE = table(smooth_taylor)
