"""Gradients for what has none: a stand-in on the backward pass of rounding, signs and thresholds (BPDA)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from topgap_jax.types import Array, Rule, Rules

STEEPNESS = 10  # of the sigmoid that stands in for a step


def identity(operation: Callable, gradient: Array, x: Array, *others: Array) -> tuple[Array, ...]:
    """g, as if the operation were x -> x (Bengio et al. 2013, arXiv 1308.3432); to other operands goes nothing."""
    return gradient, *map(jnp.zeros_like, others)


def quotient(operation: Callable, gradient: Array, x: Array, *divisor: Array) -> tuple[Array, ...]:
    """g, as if the operation were x -> x, or x / c of x // c."""
    return _through(jnp.divide, gradient, x, *divisor) if divisor else (gradient,)


def hard_tanh(operation: Callable, gradient: Array, x: Array) -> Array:
    """g 1[|x| <= 1], as if sign(x) were clip(x, -1, 1) (Hubara et al. 2016, arXiv 1602.02830)."""
    return jnp.where(jnp.abs(x) <= 1, gradient, 0)


def sigmoid(operation: Callable, gradient: Array, upper: Array, lower: Array, *values: Array) -> tuple[Array, ...]:
    """As if 1[u > l] were the sigmoid of 10 (u - l), on the way to what is compared; above and below as they are."""

    def stand_in(upper, lower, above=1.0, below=0.0):
        jump = lax.stop_gradient(jnp.where(jnp.isfinite(above - below), above - below, 0))
        smooth = jump * jax.nn.sigmoid(STEEPNESS * (upper - lower))
        return jnp.broadcast_to(jnp.where(upper > lower, above, below) + smooth, gradient.shape)

    return _through(stand_in, gradient, upper, lower, *values)


def _through(stand_in: Callable, gradient: Array, *inputs: Array) -> tuple[Array, ...]:
    """What the derivative of the stand-in makes of the gradient; of whole numbers too, which are numbers of a text."""
    return jax.vjp(stand_in, *(jnp.asarray(z, gradient.dtype) for z in inputs))[1](gradient)


straight_through: Rules = {
    "round": Rule(backward=identity),
    "floor": Rule(backward=quotient),
    "sign": Rule(backward=hard_tanh),
    "threshold": Rule(backward=identity),
    "step": Rule(backward=sigmoid),
}
