"""Layer-wise relevance propagation and excitation backprop as backward rules.

A rule is given what arrives at a layer's result z as a gradient g, whose relevance is R = z g, and gives back g' with a
g' = R' for the layer's input a. What no rule touches (reshapes, sums, averages, max pooling, ReLU) has the ordinary
gradient, which is the rule LRP-0. So relevance passes through any function, not only through those somebody has
foreseen. `explain.lrp` makes the pixels' relevance of it. Bach et al. 2015; Montavon et al. 2019; the conventions are
zennit's. The layers' bias, and batch norm in eval mode, are part of them (`conv_layer`, `dense_layer`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.types import Array, ByLayer, Rule, Rules

LAYERS = ("conv_layer", "dense_layer")
TINY = 1e-9  # what an input of 0 counts as where its relevance is not in proportion to it


def stabilised(z: Array, eps: float = 1e-6) -> Array:
    """z + eps sign(z), with sign(0) = 1."""
    return z + jnp.where(z < 0, -eps, eps)


def nonzero(a: Array) -> Array:
    """a, with `TINY` in place of what is smaller: a rule that divides by it and a map that multiplies by it agree."""
    return jnp.where(jnp.abs(a) < TINY, TINY, a)


def epsilon(eps: float = 1e-6) -> Rules:
    """LRP-epsilon in convolutions and dense layers: R_i = sum_j a_i w_ji / (z_j + eps sign z_j) R_j.

    The bias, and eps, take their part of the relevance.
    """
    check_number("eps", eps, 0)

    def backward(operation, gradient, a, kernel, bias):
        z = operation(a, kernel, bias)
        return _only(_back(operation, a, kernel, _share(z * gradient, stabilised(z, eps) if eps else z)), kernel, bias)

    return _of_layers(backward)


def alpha_beta(alpha: float = 2, beta: float = 1) -> Rules:
    """LRP-alpha-beta in convolutions and dense layers, alpha - beta = 1: R_i = sum_j (alpha z_ji+ / sum_k z_jk+ - beta
    z_ji- / sum_k z_jk-) R_j.

    z_ji = a_i w_ji, its positive and its negative part, each with that of the bias in its sum.
    """
    check_number("beta", beta, 0)
    check_number("alpha", alpha, 1)
    if abs(alpha - beta - 1) > 1e-6:
        raise UserError(f"alpha_beta: alpha - beta must be 1, got {alpha} - {beta}")

    def backward(operation, gradient, a, kernel, bias):
        relevance = operation(a, kernel, bias) * gradient
        back = alpha * _signed_share(operation, relevance, a, kernel, bias, 1)
        if beta:
            back = back - beta * _signed_share(operation, relevance, a, kernel, bias, -1)
        return _only(back, kernel, bias)

    return _of_layers(backward)


def gamma(gamma: float = 0.25) -> Rules:
    """LRP-gamma in convolutions and dense layers: the epsilon rule with weights w + gamma w+, bias likewise.

    With inputs of both signs the generalised rule: at z_j > 0 a part z_ji > 0 counts 1 + gamma times, at z_j < 0 one
    below 0. For gamma -> infinity it is z+ at positive results.
    """
    check_number("gamma", gamma, 0)

    def backward(operation, gradient, a, kernel, bias):
        z = operation(a, kernel, bias)
        back = jnp.zeros_like(a)
        for sign in (1, -1):
            more = lambda weights, sign=sign: weights + gamma * _part(weights, sign)
            parts = [(_part(a, part), more(kernel) if part == 1 else _other(kernel, gamma, sign)) for part in (1, -1)]
            total = operation(*parts[0], more(bias)) + operation(*parts[1], jnp.zeros_like(bias))
            share = jnp.where(sign * z > 0, _share(z * gradient, stabilised(total)), 0)
            for part, (_, weights) in zip((1, -1), parts):
                back = back + jnp.where(part * a > 0, _back(operation, a, weights, share), 0)
        return _only(back, kernel, bias)

    return _of_layers(backward)


def box(low: float | Array, high: float | Array) -> Rules:
    """LRP-zB for the first layer, whose input lies in a box: R_i = sum_j z_ji / sum_k z_jk R_j, z_ji = a_i w_ji - low_i
    w_ji+ - high_i w_ji-.

    low, high: numbers, one a channel, or arrays (b, h, w, c). Relevance goes to inputs that are 0 too: a gradient R / a
    with `TINY` for 0, which `explain.lrp` multiplies by the same.
    """

    def backward(operation, gradient, a, kernel, bias):
        none, positive, negative = jnp.zeros_like(bias), _part(kernel, 1), _part(kernel, -1)
        below, above = _as(low, a), _as(high, a)
        relevance = operation(a, kernel, bias) * gradient
        total = operation(a, kernel, none) - operation(below, positive, none) - operation(above, negative, none)
        share = _share(relevance, stabilised(total))
        back = a * _back(operation, a, kernel, share) - below * _back(operation, a, positive, share)
        back = back - above * _back(operation, a, negative, share)
        return _only(back / nonzero(a), kernel, bias)

    return _of_layers(backward)


def _of_kernel(change: Callable[[Array], Array]) -> Rules:
    """The first layer's rule in which each input's share is a function of its weight alone."""

    def backward(operation, gradient, a, kernel, bias):
        weights, none = change(kernel), jnp.zeros_like(bias)
        relevance = operation(a, kernel, bias) * gradient
        share = _share(relevance, stabilised(operation(jnp.ones_like(a), weights, none)))
        return _only(_back(operation, a, weights, share) / nonzero(a), kernel, bias)

    return _of_layers(backward)


def by_layer(*layers: tuple[str, Rules], first: Rules | None = None, otherwise: Rules | None = None) -> Rules:
    """Rules by the name of the layer that an operation stands in: by_layer(("head", epsilon()), otherwise=gamma()).

    layers: (name, rules), the first that fits; a name stands for all layers inside it, "stage1" for "stage1/block2",
    and may be the last part of a path. first: of the first convolution or dense layer, the one whose input is computed
    from none. otherwise: anywhere else. Where the rules have none for an operation, it stays as it is. An unknown name
    is a UserError when a network is traced.
    """
    for pair in layers:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and pair[0]):
            raise UserError(f"by_layer: give pairs of a layer's name and rules, ('head', epsilon()), got {pair!r}")
    each = [(name, rules) for name, rules in layers]
    if first is not None:
        each.append((None, first))
    for name, rules in [*each, ("otherwise", otherwise or {})]:
        if not isinstance(rules, Mapping) or any(not isinstance(rule, Rule) for rule in rules.values()):
            raise UserError(f"by_layer: rules must be like guided or epsilon(), got {rules!r} for '{name or 'first'}'")
    otherwise = otherwise or {}
    names = dict.fromkeys(name for _, rules in [*each, (None, otherwise)] for name in rules)
    result: dict[str, Any] = {}
    for name in names:
        # Only a layer with weights is the first.
        rows = [(label, rules.get(name)) for label, rules in each if label is not None or name in LAYERS]
        result[name] = ByLayer(tuple(rows), otherwise.get(name)) if rows else otherwise[name]
    return result


def _of_layers(backward: Callable) -> Rules:
    return {name: Rule(backward=backward) for name in LAYERS}


def _part(values: Array, sign: int) -> Array:
    """The positive (1) or negative (-1) part, the rest 0."""
    return jnp.where(sign * values > 0, values, 0)


def _other(kernel: Array, gamma: float, sign: int) -> Array:
    """The weights for negative inputs: what with them makes a part of this sign counts more."""
    return kernel + gamma * _part(kernel, -sign)


def _share(relevance: Array, total: Array) -> Array:
    """relevance / total, and 0 where the total is."""
    return jnp.where(total == 0, 0, relevance / jnp.where(total == 0, 1, total))


def _back(operation: Callable, a: Array, kernel: Array, share: Array) -> Array:
    """What the transposed layer with these weights makes of the shares: sum_j w_ji s_j."""
    bias = jnp.zeros((1,) * share.ndim, share.dtype)
    (back,) = jax.vjp(lambda a: operation(a, kernel, bias), a)[1](share)
    return back


def _signed_share(operation, relevance, a, kernel, bias, sign):
    """sum_j [z_ji of this sign] / sum_k (the same)_k R_j, over a_i."""
    weights = {part: _part(kernel, sign * part) for part in (1, -1)}  # for positive and for negative inputs
    total = operation(_part(a, 1), weights[1], _part(bias, sign))
    total = total + operation(_part(a, -1), weights[-1], jnp.zeros_like(bias))
    share = _share(relevance, stabilised(total))
    # Both transposed layers: an input has one sign, and goes by the weights of that.
    return jnp.where(a > 0, _back(operation, a, weights[1], share), 0) + jnp.where(
        a < 0, _back(operation, a, weights[-1], share), 0
    )


def _only(back: Array, kernel: Array, bias: Array) -> tuple[Array, Array, Array]:
    """Relevance for the input alone."""
    return back, jnp.zeros_like(kernel), jnp.zeros_like(bias)


def _as(bound: Any, a: Array) -> Array:
    """A bound of the box in the axes of the layer's input, which may be channels first."""
    bound = jnp.asarray(bound, a.dtype)
    if bound.ndim == a.ndim == 4 and bound.shape != a.shape and bound.transpose(0, 3, 1, 2).shape == a.shape:
        bound = bound.transpose(0, 3, 1, 2)
    if bound.ndim == 4 and bound.shape != a.shape and bound.size == a.size:
        bound = bound.reshape(a.shape)  # a dense layer's pixels, row by row
    try:
        return jnp.broadcast_to(bound, a.shape)
    except ValueError:
        raise UserError(
            f"box: the first layer's input is {a.shape}, the bounds are {bound.shape}: between the normalisation and"
            " that layer the images are made into something else; use epsilon_plus, or flat as the first layer's rule"
        ) from None


z_plus: Rules = alpha_beta(1, 0)
"""LRP-z+ in convolutions and dense layers: only positive parts z_ji of a result pass relevance on."""
flat: Rules = _of_kernel(jnp.ones_like)
"""LRP-flat for the first layer: R_i = sum_j R_j / (number of inputs of j inside the image)."""
w_square: Rules = _of_kernel(jnp.square)
"""LRP-w^2 for the first layer: R_i = sum_j w_ji^2 / sum_k w_jk^2 R_j."""

TABLE = table(alpha_beta, box, by_layer, epsilon, gamma)
VALUES = {"flat": flat, "w_square": w_square, "z_plus": z_plus}
