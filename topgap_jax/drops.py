"""What training hides of a feature map: `dropout`, SGDrop, and the control that hides as much at random.

A drop is a value for `rewrite.with_drop(model, layer, drop)`. Features (b, ..., c) of any float type; `source` =
(features, head) is what the saliency is taken from, head: features -> logits (b, k) being the rest of the network in
eval mode.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.order import kth_largest
from topgap_jax.pool import LAST
from topgap_jax.types import Array, Drop

GRANULARITIES = ("element", "location", "channel")


def dropout(rate: float | Callable) -> Drop:
    """Every element is dropped with probability `rate`, the others are divided by 1 - rate (Srivastava et al. 2014).

    `rate` is a number or a schedule step -> number in [0, 1].
    """
    _check_rate(rate)

    def apply(keys, source, features, targets, step):
        if keys is None:
            raise UserError("dropout needs keys, one per example: model.apply(..., train=True, keys=keys)")
        keep = 1.0 - _rate_at(rate, step)
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep, features.shape[1:]))(keys)
        scaled = (features / jnp.maximum(keep, 1e-6)).astype(features.dtype)
        return jnp.where(kept, scaled, 0), _share(~kept)

    return Drop(apply)


def sgdrop(*, rate: float | Callable = 0.1, granularity: str = "element", teacher: bool = False) -> Drop:
    """Saliency-guided dropout: what speaks most for the label is hidden (Bertoin et al. 2024, arXiv 2409.17370).

    Per example, with g the gradient of the label's logit: A = max(g * features, 0), summed before the maximum over
    channels for granularity "location" and over positions for "channel". Dropped is what lies strictly above the (1 -
    rate) quantile of A's n units (linear interpolation): ceil((n - 1) rate) of them, fewer with ties, never one with A
    <= 0. No rescaling, no randomness. `rate` is a number or a schedule step -> number in [0, 1]; `teacher=True` takes
    the saliency from the averaged weights. Rows of mixed labels weight the logits.
    """
    _check_rate(rate)
    if granularity not in GRANULARITIES:
        raise UserError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    if not isinstance(teacher, bool):
        raise UserError(f"teacher must be True or False, got {teacher!r}")

    def apply(keys, source, features, targets, step):
        scores = jnp.maximum(_summed(attribution(source, targets), granularity), 0.0)
        units = scores.reshape(scores.shape[0], -1, 1)
        n = units.shape[1]
        if n < 2:
            raise UserError(
                f"sgdrop: features of shape {features.shape} have one {granularity}, there is none to choose"
            )
        # Above the interpolated quantile is above the value below it, which is the (1 + ceil((n - 1) rate))-th largest.
        # The factor keeps .1 * 30 = 3.0000000000000004, and a float32 rate of .1, from counting as 4.
        count = 1 + jnp.ceil((n - 1) * _rate_at(rate, step) * (1 - 1e-6))
        threshold = kth_largest(units, count).reshape(-1, *(1,) * (scores.ndim - 1))
        # Compiled, the scores may be computed twice, and differ in the last bit: by so little nothing is above the
        # threshold.
        dropped = jnp.broadcast_to(scores > threshold * (1 + 1e-6), features.shape)
        return jnp.where(dropped, 0, features), _share(dropped)

    return Drop(apply, teacher, granularity)


def random_matched(drop: Drop) -> Drop:
    """The control of `drop`: in every example as many units as it drops there, at the same granularity, drawn
    uniformly.

    The factors with which `drop` would multiply the features, in a random order; so a scale of the kept ones is kept as
    well.
    """
    if not isinstance(drop, Drop):
        raise UserError(f"random_matched needs a drop such as sgdrop(), got {drop!r}")

    def apply(keys, source, features, targets, step):
        if keys is None:
            raise UserError("random_matched needs keys, one per example: model.apply(..., train=True, keys=keys)")
        factors, rate = drop.apply(keys, source, jnp.ones_like(features), targets, step)
        one = _units(factors, drop.granularity)
        flat = one.reshape(one.shape[0], -1)
        # Not the numbers that `drop` itself may have drawn from these keys.
        order = jax.vmap(lambda key: jax.random.bits(jax.random.fold_in(key, 1), flat.shape[1:]))(keys)
        _, shuffled = lax.sort_key_val(order, flat)
        return features * lax.stop_gradient(shuffled.reshape(one.shape)), rate

    return Drop(apply, drop.teacher, drop.granularity)


def attribution(source: tuple[Array, Callable], targets: Array) -> Array:
    """Gradient times features (b, ..., c), float32, signed, of the logits weighted by targets (b, k): one vjp of the
    head."""
    features, head = source
    features = lax.stop_gradient(features.astype(jnp.float32))
    logits, gradient = jax.vjp(head, features)
    return gradient(targets.astype(logits.dtype))[0] * features


def _summed(values, granularity):
    """values (b, ..., c) summed over what a unit spans; the axes stay, with length 1."""
    return values.sum(_spanned(values, granularity), keepdims=True)


def _units(values, granularity):
    """One of the equal values of each unit; the axes it spans stay, with length 1."""
    return values[
        tuple(slice(0, 1) if axis in _spanned(values, granularity) else slice(None) for axis in range(values.ndim))
    ]


def _spanned(values, granularity):
    last = values.ndim - 1
    return {"element": (), "location": (last,), "channel": tuple(range(1, last))}[granularity]


def _share(dropped):
    return dropped.reshape(dropped.shape[0], -1).mean(1, dtype=jnp.float32)


def _rate_at(rate, step):
    return jnp.clip(rate(LAST if step is None else step), 0.0, 1.0) if callable(rate) else rate


def _check_rate(rate):
    if not callable(rate):
        check_number("rate", rate, 0, 1)


TABLE = table(dropout, sgdrop, random_matched)
