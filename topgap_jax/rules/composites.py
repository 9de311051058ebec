"""Which rule of relevance has which layer: the composites of LRP, and excitation backprop."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from topgap_jax.rules.attention import signals
from topgap_jax.rules.relevance import alpha_beta, box, by_layer, epsilon, flat, gamma, stabilised, z_plus
from topgap_jax.types import Array, Rule, Rules


def stable(operation: Callable, gradient: Array, *terms: Array) -> tuple[Array, ...]:
    """LRP-epsilon with the stabiliser alone, of a sum of two values or a mean (zennit's `Norm`)."""
    z, back = jax.vjp(operation, *terms)
    return back(gradient * z / stabilised(z))


def _composite(conv: Rules, first: Rules | None = None) -> Rules:
    """These rules in convolutions and in the first layer, epsilon in dense layers, those of attention and gates."""
    layers = {"conv_layer": conv["conv_layer"], "dense_layer": epsilon()["dense_layer"]}
    layers = layers if first is None else dict(by_layer(first=first, otherwise=layers))
    return signals | layers | {"add": Rule(backward=stable), "mean": Rule(backward=stable)}


def epsilon_gamma_box(low: float | Array = 0.0, high: float | Array = 1.0) -> Rules:
    """The box rule in the first layer, gamma = 0.25 in other convolutions, epsilon in dense layers (Montavon et al.
    2019).

    low, high: what black and white are behind the network's normalisation, which `explain.lrp` fills in.
    """
    return _composite(gamma(0.25), box(low, high))


epsilon_plus: Rules = _composite(z_plus)
"""z+ in convolutions, epsilon in dense layers."""
epsilon_plus_flat: Rules = _composite(z_plus, flat)
epsilon_alpha2_beta1: Rules = _composite(alpha_beta(2, 1))
"""alpha-beta (2, 1) in convolutions, epsilon in dense layers."""
epsilon_alpha2_beta1_flat: Rules = _composite(alpha_beta(2, 1), flat)


def winner(operation: Callable, gradient: Array, a: Array, kernel: Array, bias: Array) -> tuple[Array, ...]:
    """Marginal winning probability through excitatory weights: P_i = sum_j a_i w_ji+ / (sum_k a_k w_jk+) P_j, the bias
    left out; what is negative, of positions that a pool takes together, passes nothing."""
    return _through(1, operation, operation(a, kernel, bias) * gradient, a, kernel, bias)


def loser(operation: Callable, gradient: Array, a: Array, kernel: Array, bias: Array) -> tuple[Array, ...]:
    """`winner`, but a probability below 0 wins through the negative weights: that of the label, in the dual pass."""
    probability = operation(a, kernel, bias) * gradient
    passes = (_through(sign, operation, sign * probability, a, kernel, bias) for sign in (1, -1))
    return tuple(map(jnp.add, *passes))


def _through(sign: int, operation: Callable, probability: Array, a: Array, kernel: Array, bias: Array) -> tuple:
    weights, none = jnp.maximum(sign * kernel, 0), jnp.zeros_like(bias)
    back = _winners(lambda a: operation(a, weights, none), jnp.maximum(probability, 0), a)
    return *back, jnp.zeros_like(kernel), none


def winner_of_sum(operation: Callable, gradient: Array, *terms: Array) -> tuple[Array, ...]:
    """P shared out as u+ / (u+ + v+)."""
    return _winners(operation, operation(*terms) * gradient, *terms)


def winner_of_mean(operation: Callable, gradient: Array, a: Array) -> Array:
    """P shared out as positive inputs are; where none is, as class maps of a label with a negative logit may be, as
    they are."""
    value, back = jax.vjp(operation, a)
    (positive,) = _winners(operation, value * gradient, a)
    (others,) = back(jnp.where(operation(jnp.maximum(a, 0)) > 0, 0, gradient))
    return positive + others


def loser_of_mean(operation: Callable, gradient: Array, a: Array) -> Array:
    """`winner_of_mean`; a probability below 0, that of the label in the dual pass, is shared out as the dual class's
    maps would share it, whose weights are turned: as inputs below 0 are."""
    dual = operation(a) * gradient < 0
    of_label = winner_of_mean(operation, jnp.where(dual, 0, gradient), a)
    return of_label + winner_of_mean(operation, jnp.where(dual, gradient, 0), -a)


def _winners(operation: Callable, probability: Array, *inputs: Array) -> tuple[Array, ...]:
    total, back = jax.vjp(operation, *(jnp.maximum(a, 0) for a in inputs))
    share = jnp.where(total > 0, probability / jnp.where(total > 0, total, 1), 0)
    return tuple(jnp.where(a > 0, each, 0) for a, each in zip(inputs, back(share)))


excitation: Rules = signals | {
    "conv_layer": Rule(backward=winner),
    "dense_layer": Rule(backward=winner),
    "add": Rule(backward=winner_of_sum),
    "mean": Rule(backward=winner_of_mean),
}
"""Excitation backprop (Zhang et al. 2016, arXiv 1608.00507): probabilities that go on where inputs and weights are
positive."""
contrast: Rules = excitation | {
    "conv_layer": Rule(backward=loser),
    "dense_layer": Rule(backward=loser),
    "mean": Rule(backward=loser_of_mean),
}
"""The dual pass of contrastive excitation backprop, which starts with -1: only the last layer's weights are turned."""

VALUES = {
    "epsilon_alpha2_beta1": epsilon_alpha2_beta1,
    "epsilon_alpha2_beta1_flat": epsilon_alpha2_beta1_flat,
    "epsilon_gamma_box": epsilon_gamma_box,
    "epsilon_plus": epsilon_plus,
    "epsilon_plus_flat": epsilon_plus_flat,
    "excitation": excitation,
}
