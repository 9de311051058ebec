"""Explanations of transformers from their attention: `legrad`."""

import math

import jax
import jax.numpy as jnp

from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.rewrite.blocks import blocks
from topgap_jax.scores import logit
from topgap_jax.types import Cost, Explain, Score


def legrad(*, grid: tuple[int, int] | None = None, prefix: int = 1, score: Score = logit) -> Explain:
    """LeGrad: mean over blocks, heads and queries of relu(d s_l / d P_l), by the key that is seen, maps (b, h', w').

    Bousselham et al. 2024, arXiv 2404.03214.

    P_l is the attention of block l behind its softmax, s_l the score of what the network's own head makes of the tokens
    that the block leaves. prefix: how many tokens stand before the patches, class token and registers. grid: rows and
    columns of the patches, by default a square. Attention is found in the program: a softmax over the last axis and its
    product with values, in Linen, NNX or plain functions, not inside a loop.
    """
    check_number("prefix", prefix, 0, whole=True)

    def maps(keys, predict, images, labels):
        parts = blocks(predict, images)
        shapes = [_without_ones(shape) for shape in parts.probabilities]
        if len({shape[-1] for shape in shapes}) > 1 or any(shape[0] != len(images) for shape in shapes):
            raise UserError(f"legrad: the attention of all blocks must be (b, heads, queries, keys), got {shapes}")
        side = _grid(shapes[0][-1])

        def total(changes):
            tokens = jnp.stack(parts.tokens(changes))
            logits = jax.vmap(parts.head)(tokens)
            return jax.vmap(lambda each: score(each, labels))(logits).sum()

        gradients = jax.grad(total)([jnp.zeros(shape) for shape in parts.probabilities])
        rows = [jax.nn.relu(g.reshape(shape)).astype(jnp.float32) for g, shape in zip(gradients, shapes)]
        means = jnp.stack([row.mean(tuple(range(1, row.ndim - 1))) for row in rows]).mean(0)
        return means[:, prefix:].reshape(len(images), *side)

    def _grid(tokens):
        side = grid or (math.isqrt(max(tokens - prefix, 0)),) * 2
        if side[0] * side[1] != tokens - prefix or tokens <= prefix:
            raise UserError(
                f"legrad: {tokens} tokens without {prefix} before the patches are no {side[0]}x{side[1]} patches; give"
                " grid=(rows, columns) and prefix="
            )
        return side

    return Explain(maps, lambda predict, images: Cost(1, 1))


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the axis that `jax.nn.dot_product_attention` has before the batch."""
    return shape[1:] if len(shape) == 5 and shape[0] == 1 else shape


TABLE = table(legrad)
