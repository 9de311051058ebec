"""What attacks raise and explanations explain: functions of logits (b, k), labels (b,), the clean logits (b, k) and the
target classes (b,) to (b,) in float32."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from topgap_jax.build import check_number, table
from topgap_jax.edges import check_logits
from topgap_jax.errors import UserError
from topgap_jax.types import Array, Score


def logit(logits: Array, labels: Array, clean: Array | None = None, target: Array | None = None) -> Array:
    """z_y, the label's own logit."""
    _check(logits, labels)
    return _pick(logits, labels)


def probability(logits: Array, labels: Array, clean: Array | None = None, target: Array | None = None) -> Array:
    """p_y = softmax(z)_y, what methods that only ask the network follow; of a single output (b, 1) that output itself.

    Its gradient in float32 is 0 where p_y is 1: gradients explain `logit`.
    """
    _check(logits, labels)
    z = logits.astype(jnp.float32)
    return _pick(z if z.shape[-1] == 1 else jax.nn.softmax(z), labels)


def cross_entropy(logits: Array, labels: Array, clean: Array | None = None, target: Array | None = None) -> Array:
    """softplus(logsumexp of the other classes of (z_k - z_y)), equal to logsumexp(z) - z_y.

    Written so, its gradient holds no p_y - 1, which in float32 is rounding noise on confident images and exactly 0 from
    a margin of 17 on (`14.11` in the tests); here it stays right up to a margin of 87.
    """
    others = jnp.where(_one_hot(logits, labels), -jnp.inf, logits.astype(jnp.float32))
    return jax.nn.softplus(jax.nn.logsumexp(others, -1) - _pick(logits, labels))


def margin(logits: Array, labels: Array, clean: Array | None = None, target: Array | None = None) -> Array:
    """max over k != y of z_k, minus z_y: positive iff misclassified (Carlini & Wagner 2017, arXiv 1608.04644,
    unclipped)."""
    others = jnp.where(_one_hot(logits, labels), -jnp.inf, logits.astype(jnp.float32))
    return others.max(-1) - _pick(logits, labels)


def dlr(logits: Array, labels: Array, clean: Array | None = None, target: Array | None = None) -> Array:
    """Difference of logits ratio, -(z_y - z_o) / (z_(1) - z_(3) + 1e-12), z_o the best other (Croce & Hein 2020, arXiv
    2003.01690).

    Invariant to shift and scale. Two classes have no z_(3): the plain margin takes its place.
    """
    if logits.shape[-1] < 3:
        return margin(logits, labels)
    ranked, _ = lax.top_k(logits.astype(jnp.float32), 3)  # unlike a sort, differentiable on a mesh with Explicit axes
    return margin(logits, labels) / (ranked[..., 0] - ranked[..., 2] + 1e-12)


def targeted_dlr(logits: Array, labels: Array, clean: Array | None = None, target: Array | None = None) -> Array:
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12), t the target (Croce & Hein 2020, arXiv 2003.01690).

    With three classes or fewer: z_t - z_y. Needs `target` (b,).
    """
    rise = targeted_margin(logits, labels, clean, target)
    if logits.shape[-1] < 4:
        return rise
    ranked, _ = lax.top_k(logits.astype(jnp.float32), 4)
    return rise / (ranked[..., 0] - 0.5 * (ranked[..., 2] + ranked[..., 3]) + 1e-12)


def targeted_margin(logits: Array, labels: Array, clean: Array | None = None, target: Array | None = None) -> Array:
    """z_t - z_y, t the target, what a multi-targeted attack raises (Gowal et al. 2019, arXiv 1910.09338). Needs
    `target` (b,)."""
    if target is None:
        raise UserError(
            "a targeted score needs target classes: score(logits, labels, clean, target), or an attack's targets=9"
        )
    return _pick(logits, target) - _pick(logits, labels)


def probability_margin(logits: Array, labels: Array, clean: Array | None = None, target: Array | None = None) -> Array:
    """max over k != y of p_k, minus p_y, p = softmax(z): positive iff misclassified (arXiv 2411.15210).

    Like every score of probabilities its gradient is 0 in float32 from a margin of 87 on.
    """
    values = jax.nn.log_softmax(logits.astype(jnp.float32))
    others = jnp.where(_one_hot(logits, labels), -jnp.inf, values).max(-1)
    return jnp.exp(others) - jnp.exp(_pick(values, labels))


def class_of_rank(logits: Array, labels: Array, rank: Array) -> Array:
    """The class with the rank-th largest logit among those that are not the label's: (b, k), (b,), (b,) -> (b,) int32.

    Rank 0 is the best other class; a rank beyond the last one is the last.
    """
    others = jnp.where(_one_hot(logits, labels), -jnp.inf, logits.astype(jnp.float32))
    _, order = lax.top_k(others, logits.shape[-1])
    last = max(logits.shape[-1] - 2, 0)
    return jnp.take_along_axis(order, jnp.minimum(rank, last)[..., None], -1)[..., 0].astype(jnp.int32)


def kl(logits: Array, labels: Array, clean: Array | None = None, target: Array | None = None) -> Array:
    """KL(softmax(clean) | softmax(logits)), what TRADES raises (Zhang et al. 2019, arXiv 1901.08573). Needs `clean`.

    At the clean image it is 0 and so is its gradient: start at random.
    """
    if clean is None:
        raise UserError("kl needs the clean logits: kl(logits, labels, clean)")
    reference, now = (jax.nn.log_softmax(values.astype(jnp.float32)) for values in (clean, logits))
    return (jnp.exp(reference) * (reference - now)).sum(-1)


def residual_softmax(logits: Array, labels: Array, clean: Array | None = None, target: Array | None = None) -> Array:
    """z_y + log p_y, p = softmax(z): what Shapley-CAM explains (arXiv 2501.06261, its residual softmax target)."""
    _check(logits, labels)
    return _pick(logits, labels) + _pick(jax.nn.log_softmax(logits.astype(jnp.float32)), labels)


def finer(*, weights: str = "uniform", strength: float = 0.6, count: int = 3, stop_weights: bool = True) -> Score:
    """z_y - strength * sum_t q_t z_t over the `count` classes t whose logits are nearest to z_y, y excluded: what
    Finer-CAM explains (2025, arXiv 2501.11309).

    weights: "uniform", q_t = 1 / count, or "softmax", q = softmax of the logits of those classes. stop_weights: whether
    q is a constant in derivatives; the authors' code differentiates it, which can turn the sign of a class round. Which
    classes they are is a constant always; of two as near the one with the lower index. strength=0 is `logit`.
    """
    if weights not in ("uniform", "softmax"):
        raise UserError(f"finer: weights must be 'uniform' or 'softmax', got {weights!r}")
    check_number("strength", strength)
    check_number("count", count, 1, whole=True)

    def score(logits, labels, clean=None, target=None):
        _check(logits, labels)
        z, classes = logits.astype(jnp.float32), logits.shape[-1]
        if classes == 1:
            return _pick(z, labels)
        distance = jnp.where(_one_hot(z, labels), jnp.inf, jnp.abs(z - _pick(z, labels)[..., None]))
        _, nearest = lax.top_k(lax.stop_gradient(-distance), min(count, classes - 1))
        others = jnp.take_along_axis(z, nearest, -1)
        shares = jax.nn.softmax(others if weights == "softmax" else jnp.zeros_like(others))
        shares = lax.stop_gradient(shares) if stop_weights else shares
        return _pick(z, labels) - strength * (shares * others).sum(-1)

    return score


def _one_hot(logits, labels):
    return jnp.arange(logits.shape[-1]) == labels[..., None]


def _check(logits, labels):
    """Refuse what a network returned that has not a row of logits for each label."""
    if getattr(logits, "ndim", 0) != jnp.ndim(labels) + 1:
        check_logits("the score of an explanation", logits)


def _pick(logits, labels):
    return jnp.take_along_axis(logits.astype(jnp.float32), labels[..., None], -1)[..., 0]


TARGETED = (targeted_dlr, targeted_margin)
"""Scores that need target classes."""

EXPLAINED = (logit, probability, residual_softmax)
"""Scores that are high where the label is predicted: for explanations alone."""

SUBSTITUTES = ((dlr, 3, "max z_k - z_y"), (targeted_dlr, 4, "z_t - z_y"))
"""Scores, how many classes they need, and what takes their place where there are fewer."""


def substitute(score: Any, classes: int) -> str:
    """What takes the place of a score that needs more classes than these, as a formula; "" where nothing does.

    >>> substitute(targeted_dlr, 3), substitute(targeted_dlr, 4), substitute(margin, 2)
    ('z_t - z_y', '', '')
    """
    return next((formula for of, needed, formula in SUBSTITUTES if of is score and classes < needed), "")


VALUES = table(
    logit, probability, cross_entropy, margin, dlr, kl, probability_margin, residual_softmax, targeted_dlr,
    targeted_margin,
)  # fmt: skip
"""Scores, which a config names without a call."""

TABLE = table(finer)
"""Functions that make a score of their options."""
