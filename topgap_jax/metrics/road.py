"""`road`: remove what the map marks so that the hole cannot be seen, and ask the network (Rong et al. 2022, arXiv
2202.00449)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from topgap_jax.build import check_number, table
from topgap_jax.keys import fold_in, normal, split
from topgap_jax.metrics.perturbation import pixel_ranks
from topgap_jax.rewrite.speed import map_over
from topgap_jax.scores import probability
from topgap_jax.types import Array, Cost, Curve, Measure, Metric

SHARES = tuple(round(0.1 * i, 1) for i in range(1, 10))
MISSING = 1e-5  # relative residual at which a removed pixel counts as the mean of its neighbours
STEPS = 1000
COARSEST = 32


def road(*, shares: Sequence[float] = SHARES, noise: float = 0.01) -> Metric:
    """(least - most) / 2, the mean over `shares`: the label's probability when the least salient pixels are removed,
    and when the most salient ones are: {"road": (b,)}, higher is better (as in pytorch-grad-cam's ROADCombined).

    Also {"road_most_curve", "road_least_curve": (b, shares)}, those probabilities. int(share h w) pixels are replaced
    by weighted means of their neighbours, kept or replaced (`impute`), plus Gaussian noise of `noise`, so that the mask
    itself says nothing of the class. {"road_unsolved": (b,)}: 1 where the linear system was not solved to 1e-5 in 1,000
    steps of conjugate gradients. Ties of the map are shuffled by the example's key.
    """
    for share in shares:
        check_number("shares", share, 0, 1)
    check_number("noise", noise, 0)

    def rows(keys, predict, maps, batch):
        images, labels = batch["image"], batch["label"]
        rank_keys, noise_keys = split(keys)
        ranks = pixel_ranks(rank_keys, maps, images.shape[1:3])
        size, m = ranks[0].size, len(shares)
        counts = jnp.asarray([int(size * share + 1e-6) for share in shares])  # .29 of 100 pixels are 29

        def one(index, least, count):
            removed = jnp.where(least, ranks >= size - count, ranks < count)
            filled, solved = impute(images, removed)
            drawn = normal(fold_in(noise_keys, index), images)
            return probability(predict(filled + noise * removed[..., None] * drawn), labels), solved

        least = jnp.arange(2 * m) >= m
        values, solved = map_over(one, (jnp.arange(2 * m), least, jnp.concatenate([counts, counts])))
        return {
            "road": (values[m:] - values[:m]).mean(0) / 2,
            "road_most_curve": values[:m].T,
            "road_least_curve": values[m:].T,
            "road_unsolved": 1 - solved.all(0).astype(jnp.float32),
        }

    axes = ("share of pixels removed", "probability")
    about = {
        "road": Measure(better="higher", label="ROAD, least minus most salient"),
        "road_most_curve": Curve(tuple(map(float, shares)), axes=axes, label="ROAD, most salient removed"),
        "road_least_curve": Curve(tuple(map(float, shares)), axes=axes, label="ROAD, least salient removed"),
        "road_unsolved": Measure(label="share of images with a hole that was not filled", main=False),
    }
    return Metric(rows, about, lambda predict, images: Cost(2 * len(shares), 0))


def impute(images: Array, removed: Array) -> tuple[Array, Array]:
    """Images (b, h, w, c) whose removed pixels, bool (b, h, w), are weighted means of their neighbours; and whether
    that was reached (b,).

    sum over the existing neighbours n of a removed pixel u of w_n (v_n - v_u) = 0, w 1/6 of the four neighbours and
    1/12 of the diagonal ones, kept pixels as they are. Solved for each channel by conjugate gradients with Jacobi's
    preconditioner, from coarse to fine; the matrix is never made. Where nothing is kept, black.
    """
    filled, solved = jax.vmap(_imputed)(images.astype(jnp.float32).transpose(0, 3, 1, 2), removed)
    return filled.transpose(0, 2, 3, 1), solved


def _imputed(image, removed):
    """Of one image, channels first: (c, h, w), (h, w). Sums over the last two axes are the fast ones."""
    hole = removed.astype(jnp.float32)
    degree = _around(jnp.ones_like(hole))
    matrix = lambda v: hole * (degree * v - _around(v))
    dot = lambda a, b: (a * b).sum((-2, -1), keepdims=True)
    kept = image * (1 - hole)
    target = hole * _around(kept)
    start = hole * _guess(kept, hole)
    residual = target - matrix(start)
    least = MISSING**2 * jnp.maximum(dot(target, target), dot(residual, residual))

    def step(state):
        v, r, p, rz, number = state
        product = matrix(p)
        curvature = dot(p, product)
        length = jnp.where(curvature > 0, rz / jnp.where(curvature > 0, curvature, 1), 0)
        v, r = v + length * p, r - length * product
        after = dot(r, r / degree)
        return v, r, r / degree + jnp.where(rz > 0, after / jnp.where(rz > 0, rz, 1), 0) * p, after, number + 1

    first = residual / degree
    state = start, residual, first, dot(residual, first), 0
    v, r, *_ = lax.while_loop(lambda state: (dot(state[1], state[1]) > least).any() & (state[4] < STEPS), step, state)
    return kept + v, (dot(r, r) <= least).all()


def _guess(kept, hole):
    """Where to start from, (c, h, w): the solution of half the size, of the smallest the mean of what is kept. Waves as
    long as a wide hole take conjugate gradients a step for every pixel of them."""
    c, h, w = kept.shape
    if h % 2 or w % 2 or min(h, w) < COARSEST:
        return kept.sum((1, 2), keepdims=True) / jnp.maximum((1 - hole).sum(), 1)
    halved = lambda values: values.reshape(-1, h // 2, 2, w // 2, 2).sum((2, 4))
    (number,) = halved(1 - hole)
    coarse, _ = _imputed(halved(kept) / jnp.maximum(number, 1), number == 0)
    return jax.image.resize(coarse, kept.shape, "linear")


def _around(values):
    """Weighted sum over the eight neighbours, nothing beyond the border: (..., h, w). (1 2 1) x (1 2 1) without its
    centre."""
    h, w = values.shape[-2:]
    padded = jnp.pad(values, [(0, 0)] * (values.ndim - 2) + [(1, 1), (1, 1)])
    rows = padded[..., :h, :] + 2 * padded[..., 1 : h + 1, :] + padded[..., 2:, :]
    return (rows[..., :w] + 2 * rows[..., 1 : w + 1] + rows[..., 2:] - 4 * values) / 12


TABLE = table(road)
