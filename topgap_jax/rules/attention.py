"""Relevance through what is no layer with weights: attention, gates, activations, normalisations, as backward rules.

AttnLRP (Achtibat et al. 2024, arXiv 2402.05602) as modified gradients: the relevance of a value is the value times its
gradient, as in `rules.relevance`; softmax, sums and all that is left out have the ordinary gradient.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from topgap_jax.types import Array, Rule, Rules

SMALL = 1e-20  # below it phi(x) / x is not computed


def identity(operation: Callable, gradient: Array, x: Array) -> Array:
    """g phi(x) / x: the relevance of the result is that of the input; phi'(0) g at 0."""
    value, back = jax.vjp(operation, x)
    small = jnp.abs(x) < SMALL
    return jnp.where(small, back(gradient)[0], gradient * value / jnp.where(small, 1, x))


def constant(operation: Callable, gradient: Array, *inputs: Array) -> tuple[Array, ...]:
    """0: what the operation computes counts as a constant."""
    return tuple(map(jnp.zeros_like, inputs))


def halves(operation: Callable, gradient: Array, *factors: Array) -> tuple[Array, ...]:
    """Half of the relevance to each of two factors: the uniform rule."""
    return tuple(back / 2 for back in jax.vjp(operation, *factors)[1](gradient))


def values_only(operation: Callable, gradient: Array, probabilities: Array, values: Array) -> tuple[Array, Array]:
    """All of the relevance to the values, none to queries and keys: CP-LRP."""
    return jnp.zeros_like(probabilities), jax.vjp(operation, probabilities, values)[1](gradient)[1]


def signal_only(operation: Callable, gradient: Array, signal: Array, gate: Array) -> tuple[Array, Array]:
    """All of the relevance to the signal, none to a gate that is spread over it (Arras et al. 2017, arXiv 1706.07206);
    half each where both are of one size."""
    if signal.size == gate.size:
        return halves(operation, gradient, signal, gate)
    return jax.vjp(operation, signal, gate)[1](gradient)[0], jnp.zeros_like(gate)


attn_lrp: Rules = {
    "activation": Rule(backward=identity),
    "deviation": Rule(backward=constant),
    "mul": Rule(backward=halves),
    "attention": Rule(backward=halves),
    "matmul": Rule(backward=halves),
}
"""AttnLRP: LRP-0 in layers, the uniform rule in products, the identity in GELU and SiLU, and in layer norm but for the
mean."""
cp_lrp: Rules = attn_lrp | {"attention": Rule(backward=values_only)}
"""CP-LRP in attention, where probabilities are constants; AttnLRP elsewhere (Ali et al. 2022, arXiv 2202.07304)."""
signals: Rules = attn_lrp | {"mul": Rule(backward=signal_only)}
"""AttnLRP for a network with gates over channels, as squeeze and excitation has them."""

VALUES = {"attn_lrp": attn_lrp, "cp_lrp": cp_lrp}
