"""`alignment`: an attack that turns a network's input gradients away from the image, the inner one of ART (arXiv
1911.13073).

Also what it compares: images and gradients as vectors, their cosines, the triplet loss.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core.primitives import conv_general_dilated_p, dot_general_p

from topgap_jax.attacks.gradient import starting
from topgap_jax.attacks.state import check_step, move, where
from topgap_jax.build import check_number, table
from topgap_jax.engine import KINDS
from topgap_jax.errors import UserError
from topgap_jax.order import kth_largest
from topgap_jax.pool import positions
from topgap_jax.rewrite import in_float32, with_rules
from topgap_jax.rewrite.normalisation import channels, normalise
from topgap_jax.rules import softplus
from topgap_jax.types import Array, Attack, Ball, Cost, Predict

# Under the square root of squared lengths: the cosine with a zero vector is 0 and has a finite derivative.
TINY = 1e-12


class Search(NamedTuple):
    """Which entries of its gradient each example's attack compares."""

    salient: Array  # (b, d) float32: 1 where |p| is among the k largest at the start, else 0


def alignment(
    ball: Ball,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    steps: int = 3,
    step_size: float = 5 / 255,
    k: int | None = None,
    fraction: float = 0.3255,
    variant: str = "signed",
    beta: float | None = 50.0,
    start: str | None = "random",
    remat: bool = False,
) -> Attack:
    """Raises ART's triplet loss of image and input gradients (Singh et al. 2020, arXiv 1911.13073); it needs second
    derivatives.

    With anchor a = (x - mean) / std (as the model normalises), p and n the gradients with respect to a of the true
    logit and of the best wrong one, the score is log(1 + exp(cos(a, n) - cos(a, p))) on the entries of largest |p| at
    the start (`k` of h*w*c, by default the `fraction` of them, kept in `search.salient` (b, d)); `steps` steps x <- P(x
    + step_size * ascent(gradient)), the step in the ball's own norm, from a "random" point of the ball or
    (`start=None`) the clean image. Variant "abs_mean" compares means over channels of absolute values (k of h*w). The
    gradients are of the network with softplus(beta z) / beta for relu (`beta=None`: as it is, for smooth networks), in
    float32 whatever it computes in.

    The last iterate is images + delta, `best` the one with the highest score that a step has met. An example with eps 0
    (padding) takes part in nothing, also where a batch's statistics tie the rows together. remat: only results of
    convolutions and products are kept for the second differentiation. Raises UserError for a model with one class.
    """
    mean, std = channels(mean, std)
    check_number("steps", steps, 0, whole=True)
    check_step(step_size)
    check_number("fraction", fraction, 1e-9, 1)
    if beta is not None:
        check_number("beta", beta, 1e-6)
    if k is not None:
        check_number("k", k, 1, whole=True)
    if variant not in VARIANTS:
        raise UserError(f"variant must be 'signed' or 'abs_mean', got {variant!r}")
    vectors = as_vectors(mean, std, variant, remat)
    begin = starting(ball, start)

    def init(keys, predict, images, labels, logits, *, run=None, eps=None):
        state = begin(keys, images, labels, logits, run, eps)
        # Also what is misclassified is attacked: the verdict of this attack is no label.
        state = state._replace(status=state.count, broken_at=state.count - 1)
        gradients = vectors.gradients(in_float32(predict), images + state.delta, labels, _mask(state))
        size = jnp.abs(gradients[0])
        count = positions(fraction, size.shape[1]) if k is None else k
        if count > size.shape[1]:
            raise UserError(f"alignment: k={count} is more than the {size.shape[1]} entries of an image's gradient")
        salient = (size >= kth_largest(size[..., None], count)).astype(jnp.float32)
        return state._replace(search=Search(salient))

    def step(predict, state):
        soft, mask = in_float32(softened(predict, beta)), _mask(state)

        def summed(points):
            values = triplet_of(vectors, soft, points, state.labels, mask, state.search.salient)
            return values.sum(), values

        points = state.images + state.delta
        (_, values), rise = jax.value_and_grad(summed, has_aux=True)(points)
        better = values > state.score
        state = state._replace(best=where(better, points, state.best), score=jnp.where(better, values, state.score))
        return move(state, ball.project(state.images, state.delta + step_size * ball.ascent(rise), state.eps))

    # One forward and two backward passes, differentiated once more.
    cost = lambda predict, images: Cost(0, 6)
    return Attack(init, step, steps, cost, f"alignment-{steps}, {ball.name}", aim="map")


VARIANTS = ("signed", "abs_mean")


def _mask(state):
    return (state.eps > 0).astype(jnp.float32)


class Vectors(NamedTuple):
    """What is compared, (b, d) each: anchors(images), and gradients(predict, images, labels, mask) -> positives,
    negatives."""

    anchors: Callable[[Array], Array]
    gradients: Callable[[Predict, Array, Array, Array], tuple[Array, Array]]


def as_vectors(mean: Sequence[float], std: Sequence[float], variant: str = "signed", remat: bool = False) -> Vectors:
    """Normalised images, and gradients by them, flat; for "abs_mean" the means over channels of their absolute
    values."""
    mean, std = channels(mean, std)

    def flat(values):
        values = values if variant == "signed" else jnp.abs(values).mean(-1)
        return values.reshape(values.shape[0], -1)

    def gradients(predict, images, labels, mask):
        by_pixel = class_gradients(predict, images, labels, mask, remat=remat)
        p, n = (flat(gradient * jnp.asarray(std, jnp.float32)) for gradient in by_pixel)
        return p, n

    return Vectors(lambda images: flat(normalise(images, mean, std)), gradients)


def triplet_of(vectors: Vectors, predict: Predict, points: Array, labels: Array, mask: Array, salient: Array) -> Array:
    """What the attack raises (b,): the triplet loss of each image alone, on the entries where salient (b, d) is 1.

    Unlike the loss of training it depends on the image also through the anchor.
    """
    p, n = vectors.gradients(predict, points, labels, mask)
    a = vectors.anchors(points) * salient
    return jax.nn.softplus(cosine(a, n * salient) - cosine(a, p * salient)) * mask


def softened(predict: Predict, beta: float | None) -> Predict:
    """The network with softplus(beta x) / beta for relu, whose second derivative is not 0; itself for beta=None."""
    return predict if beta is None else with_rules(predict, **softplus(beta))


def class_gradients(
    predict: Predict, images: Array, labels: Array, mask: Array, *, remat: bool = False
) -> tuple[Array, Array]:
    """Gradients (b, h, w, c) by pixel of the true logit and of the best wrong one, by one forward and two backward
    passes.

    Of a sum over the rows with mask 1: with batch statistics, rows act on each other. `remat`: a second differentiation
    finds the results of convolutions and matrix products, and computes everything else again.
    """

    def gradients(images):
        logits, backward = jax.vjp(predict, images)
        classes = logits.shape[-1]
        if classes < 2:
            raise UserError(
                f"alignment needs a best wrong class, and the model has {classes} class; give it two or more"
            )
        true = jax.nn.one_hot(labels, classes)
        wrong = jax.nn.one_hot(jnp.argmax(jnp.where(true > 0, -jnp.inf, logits), -1), classes)
        (positive,), (negative,) = backward(true * mask[:, None]), backward(wrong * mask[:, None])
        return positive, negative

    return jax.checkpoint(gradients, policy=_is_product)(images) if remat else gradients(images)


def triplet(anchor: Array, positive: Array, negative: Array) -> Array:
    """The soft-margin triplet loss (b,) of vectors (b, r, d), the mean over r, with the hardest of each example's r p
    and n."""
    to_positive, to_negative = 1 - _cosines(anchor, positive), 1 - _cosines(anchor, negative)
    return jax.nn.softplus(to_positive.max(2) - to_negative.min(2)).mean(1)


def cosine(u: Array, v: Array) -> Array:
    """Cosine of vectors along the last axis; 0 with a zero vector."""
    return (u * v).sum(-1) / (_length(u) * _length(v))


def _cosines(u, v):
    """cosine(u[i, r], v[i, s]) (b, r, s)."""
    products = jnp.einsum("brd,bsd->brs", u, v, precision="highest")
    return products / (_length(u)[:, :, None] * _length(v)[:, None, :])


def _length(values):
    return jnp.sqrt((values * values).sum(-1) + TINY)


def _is_product(primitive, *_, **__):
    """A policy of `jax.checkpoint`."""
    return primitive in (conv_general_dilated_p, dot_general_p, *KINDS)


TABLE = table(alignment)
