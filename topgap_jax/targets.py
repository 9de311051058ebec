"""In which order a targeted attack tries the classes, where that is not the order of their logits."""

import jax
import jax.numpy as jnp
from jax import lax

from topgap_jax.rewrite import speed
from topgap_jax.types import Array, Ball, Predict


def malt_order(
    predict: Predict, images: Array, labels: Array, logits: Array, ball: Ball, candidates: int = 100
) -> Array:
    """The classes (b, t) by their linearised distance (z_y - z_t) / |grad z_t - grad z_y|_q, the nearest first (MALT:
    Melamed et al. 2024, arXiv 2407.02240).

    images (b, h, w, c), labels (b,), logits (b, k) of the images. t = min(candidates, k - 1): distances are those of
    the classes with the largest logits. q is the dual of the ball's norm. A class without a gradient comes last;
    several of them, and all where a network returns no numbers, in the order of their logits. One forward and t
    backward passes, one after another.
    """
    kinds = jnp.arange(logits.shape[-1])
    others = jnp.where(kinds == labels[:, None], -jnp.inf, logits.astype(jnp.float32))
    classes = lax.top_k(others, min(candidates, len(kinds) - 1))[1]
    value, pull = jax.vjp(predict, images)

    def distance(target):
        row = (kinds == target[:, None]).astype(value.dtype) - (kinds == labels[:, None])
        gap = -(row * logits).sum(1)
        return gap / ball.dual_norm(pull(row.astype(value.dtype))[0])

    distances = speed.map_over(distance, (classes.T,)).T
    distances = jnp.where(jnp.isfinite(distances), distances, jnp.inf)
    return lax.sort((distances, classes), dimension=1, num_keys=1, is_stable=True)[1]
