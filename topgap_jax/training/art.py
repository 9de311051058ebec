"""`art`, attributional robustness training: the true logit's input gradient aligns with the image (Singh et al. 2020, arXiv 1911.13073)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core.primitives import conv_general_dilated_p, dot_general_p

from topgap_jax import rewrite, rules
from topgap_jax.balls import linf
from topgap_jax.build import check_number, table
from topgap_jax.engine import KINDS
from topgap_jax.errors import UserError
from topgap_jax.models import bind
from topgap_jax.models.classifier import channels, normalise
from topgap_jax.order import kth_largest
from topgap_jax.pool import positions
from topgap_jax.training.standard import standard
from topgap_jax.types import Array, Objective, Predict

# Under the square root of squared lengths: the cosine with a zero vector is 0 and has a finite derivative.
TINY = 1e-12


def art(
    *,
    mean: Sequence[float],
    std: Sequence[float],
    weight: float = 0.5,
    beta: float | None = 50.0,
    eps: float = 8 / 255,
    steps: int = 3,
    step_size: float = 5 / 255,
    k: int | None = None,
    fraction: float = 0.3255,
    variant: str = "signed",
    remat: bool = False,
) -> Objective:
    """Cross-entropy at attacked images, plus weight * a triplet loss that draws input gradients to the image (arXiv 1911.13073).

    With anchor a = (x - mean) / std (`mean` and `std` as the model normalises, one number per channel), positive p and negative
    n, the gradients with respect to a of the true logit and of the best wrong one, and cosine distances, the loss is
    log(1 + exp(dist(a, p) - dist(a, n))) over the clean and the attacked image, each with the pair's worst p and worst n.
    The attack maximises it on the entries of largest |p| at its start (`k` of h*w*c, by default the `fraction` of them),
    `steps` sign steps of `step_size` from a random start within `eps`; variant "abs_mean" compares means over channels of
    absolute values (k of h*w). Both see the network with softplus(beta x) / beta for relu (`beta=None`: as it is, for smooth
    networks), in float32 whatever the model computes in, with the batch's statistics, which only the cross-entropy's pass
    writes, and without dropout. remat: only results of convolutions and products are kept for the second differentiation.

    Logged beside the accuracy at the attacked images: `cross_entropy`, `alignment` (the triplet loss), and the cosines of
    image and gradient `cosine_true` (p) and `cosine_wrong` (n), means over the pair. Raises UserError for a model with one class.
    """
    mean, std = channels(mean, std)
    check_number("weight", weight, 0)
    if beta is not None:
        check_number("beta", beta, 1e-6)
    check_number("eps", eps, 0)
    check_number("steps", steps, 0, whole=True)
    check_number("step_size", step_size, 0)
    check_number("fraction", fraction, 1e-9, 1)
    if k is not None:
        check_number("k", k, 1, whole=True)
    if variant not in ("signed", "abs_mean"):
        raise UserError(f"variant must be 'signed' or 'abs_mean', got {variant!r}")
    inner, ball = standard(), linf(eps)
    vectors = as_vectors(mean, std, variant, remat)

    def salient(predict, images, labels, mask):
        """1 at the k entries of largest |p| (b, d), 0 elsewhere; of a tie at the edge, at all."""
        size = jnp.abs(vectors.gradients(predict, images, labels, mask)[0])
        count = positions(fraction, size.shape[1]) if k is None else k
        if count > size.shape[1]:
            raise UserError(f"art: k={count} is more than the {size.shape[1]} entries of an image's gradient")
        return (size >= kth_largest(size[..., None], count)).astype(jnp.float32)

    def attacked(keys, relu, soft, images, labels, mask):
        delta = ball.project(images, jax.vmap(ball.start)(keys, images))
        chosen = salient(relu, images + delta, labels, mask)

        def climb(_, delta):
            rise = jax.grad(lambda points: alignment(vectors, soft, points, labels, mask, chosen).sum())(images + delta)
            return ball.project(images, delta + step_size * jnp.sign(rise))

        return images + lax.fori_loop(0, steps, climb, delta)

    def objective(keys, model, variables, batch, step):
        images, labels = batch["image"], batch["label"]
        mask = batch["mask"].astype(jnp.float32)
        # Fast convolutions, since without them the loop of the attack would be slow on a CPU.
        bound = lambda variables: rewrite.fast_convs(bind(model, variables, train=True, step=step))
        relu = lambda variables: rewrite.in_float32(bound(variables))
        soft = lambda variables: rewrite.in_float32(softened(bound(variables), beta))
        still = lax.stop_gradient(variables)
        adversarial = lax.stop_gradient(attacked(keys, relu(still), soft(still), images, labels, mask))

        # Clean and attacked side by side, so that a pair stays on one device.
        both = jnp.stack([images, adversarial], 1).reshape(-1, *images.shape[1:])
        twice = lambda values: jnp.repeat(values, 2, 0)
        a, (p, n) = vectors.anchors(both), vectors.gradients(soft(variables), both, twice(labels), twice(mask))
        a, p, n = (values.reshape(len(images), 2, -1) for values in (a, p, n))
        aligned = triplet(a, p, n)

        loss, metrics, batch_stats = inner(keys, model, variables, {**batch, "image": adversarial}, step)
        logs = {"cross_entropy": loss, "alignment": aligned}
        logs |= {"cosine_true": cosine(a, p).mean(1), "cosine_wrong": cosine(a, n).mean(1)}
        return loss + weight * aligned, {**metrics, **logs}, batch_stats

    return objective


class Vectors(NamedTuple):
    """What is compared, (b, d) each: anchors(images), and gradients(predict, images, labels, mask) -> positives, negatives."""

    anchors: Callable[[Array], Array]
    gradients: Callable[[Predict, Array, Array, Array], tuple[Array, Array]]


def as_vectors(mean: Sequence[float], std: Sequence[float], variant: str = "signed", remat: bool = False) -> Vectors:
    """Normalised images, and gradients by them, flat; for "abs_mean" the means over channels of their absolute values."""
    mean, std = channels(mean, std)

    def flat(values):
        values = values if variant == "signed" else jnp.abs(values).mean(-1)
        return values.reshape(values.shape[0], -1)

    def gradients(predict, images, labels, mask):
        by_pixel = class_gradients(predict, images, labels, mask, remat=remat)
        p, n = (flat(gradient * jnp.asarray(std, jnp.float32)) for gradient in by_pixel)
        return p, n

    return Vectors(lambda images: flat(normalise(images, mean, std)), gradients)


def alignment(vectors: Vectors, predict: Predict, points: Array, labels: Array, mask: Array, chosen: Array) -> Array:
    """What the attack raises (b,): the triplet loss of each image alone, on the entries where chosen (b, d) is 1.

    Unlike the loss of training it depends on the image also through the anchor.
    """
    p, n = vectors.gradients(predict, points, labels, mask)
    a = vectors.anchors(points) * chosen
    return jax.nn.softplus(cosine(a, n * chosen) - cosine(a, p * chosen)) * mask


def softened(predict: Predict, beta: float | None) -> Predict:
    """The network with softplus(beta x) / beta for relu, whose second derivative is not 0; itself for beta=None."""
    return predict if beta is None else rewrite.with_rules(predict, **rules.softplus(beta))


def class_gradients(
    predict: Predict, images: Array, labels: Array, mask: Array, *, remat: bool = False
) -> tuple[Array, Array]:
    """Gradients (b, h, w, c) by pixel of the true logit and of the best wrong one, by one forward and two backward passes.

    Of a sum over the rows with mask 1: with batch statistics, rows act on each other. `remat`: a second differentiation finds
    the results of convolutions and matrix products, and computes everything else again.
    """

    def gradients(images):
        logits, backward = jax.vjp(predict, images)
        classes = logits.shape[-1]
        if classes < 2:
            raise UserError(f"art needs a best wrong class, and the model has {classes} class; give it two or more")
        true = jax.nn.one_hot(labels, classes)
        wrong = jax.nn.one_hot(jnp.argmax(jnp.where(true > 0, -jnp.inf, logits), -1), classes)
        (positive,), (negative,) = backward(true * mask[:, None]), backward(wrong * mask[:, None])
        return positive, negative

    return jax.checkpoint(gradients, policy=_is_product)(images) if remat else gradients(images)


def triplet(anchor: Array, positive: Array, negative: Array) -> Array:
    """The soft-margin triplet loss (b,) of vectors (b, r, d), the mean over r, with the hardest of each example's r p and n."""
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


TABLE = table(art)
