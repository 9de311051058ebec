"""Batch norm in eval mode, folded into the convolution before it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn
from jax.extend.core.primitives import (
    add_p,
    conv_general_dilated_p,
    custom_jvp_call_p,
    custom_vjp_call_p,
    div_p,
    mul_p,
    sub_p,
)

from topgap_jax.engine import forward_p
from topgap_jax.rewrite.interpreter import bind, channel_vector, evaluate, reaches, rebuild, subjaxprs, trace, users

# (equation, position of the convolution's values) -> (scale, shift) after it, of (scale, shift) before it and the other operand.
STEPS = {
    (add_p, 0): lambda a, b, v: (a, b + v),
    (add_p, 1): lambda a, b, v: (a, b + v),
    (sub_p, 0): lambda a, b, v: (a, b - v),
    (sub_p, 1): lambda a, b, v: (-a, v - b),
    (mul_p, 0): lambda a, b, v: (a * v, b * v),
    (mul_p, 1): lambda a, b, v: (a * v, b * v),
    (div_p, 0): lambda a, b, v: (a / v, b / v),
}


class Chain(NamedTuple):
    """A convolution and what follows it channel by channel: (equation, position of the values, variable of the factors)."""

    convolution: JaxprEqn
    steps: list[tuple[JaxprEqn, int, Any]]


def fold_batch_norm(f: Callable) -> Callable:
    """f with conv(x, w) * a + b computed as conv(x, w * a) + b: batch norm in eval mode costs nothing, nor does its gradient.

    Folded are sums, products and quotients with one value per channel (or one in all) that stand directly behind a convolution
    whose result nothing else uses, so that in training mode, where the statistics use it, nothing changes. A name in between
    (`tap`, `read`) keeps the convolution as it is: what is named keeps its value. Equal up to rounding; derivatives of any
    order, by parameters too. Works on any JAX function, under jit, remat and loops.
    """

    def folded(*args, **kwargs):
        closed, arrays, restore = trace(f, args, kwargs)
        return restore(_evaluate(closed.jaxpr, closed.consts, arrays))

    return folded


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list:
    ends, passed = {}, set()
    for chain in _chains(jaxpr):
        *before, last = [chain.convolution, *(eqn for eqn, _, _ in chain.steps)]
        ends[id(last)] = chain
        passed.update(map(id, before))

    def rule(eqn, values, read):
        if id(eqn) in passed:
            return [None]  # nobody else reads it
        if id(eqn) in ends:
            return [_folded(ends[id(eqn)], read)]
        own = eqn.primitive in (custom_jvp_call_p, custom_vjp_call_p)  # entered, it would lose its own derivative
        if reaches(eqn) and not own and any(map(_holds, subjaxprs(eqn))):
            return rebuild(eqn, values, _evaluate)
        return None

    return evaluate(jaxpr, consts, args, rule)


def _folded(chain: Chain, read: Callable) -> Any:
    eqn = chain.convolution
    images, kernel = map(read, eqn.invars)
    across, along = _channel_axes(eqn)
    channels, dtype = kernel.shape[along], kernel.dtype
    scale, shift = jnp.ones(channels, dtype), jnp.zeros(channels, dtype)
    for step, position, variable in chain.steps:
        vector = jnp.broadcast_to(jnp.ravel(jnp.asarray(read(variable), dtype)), channels)
        scale, shift = STEPS[step.primitive, position](scale, shift, vector)
    at = lambda vector, axis: jnp.expand_dims(vector, [i for i in range(kernel.ndim) if i != axis])
    (out,) = bind(eqn, [images, kernel * at(scale, along)])
    return out + at(shift, across)


def _chains(jaxpr: Jaxpr) -> list[Chain]:
    used, chains = users(jaxpr), []
    made_by = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    for eqn in jaxpr.eqns:
        if eqn.primitive not in (conv_general_dilated_p, forward_p):
            continue
        (value,), steps = eqn.outvars, []
        axis, dtype = _channel_axes(eqn)[0], value.aval.dtype
        while len(used[value]) == 1 and used[value][0] is not None:
            (step,) = used[value]
            position = 0 if step.invars[0] is value else 1
            if (step.primitive, position) not in STEPS or step.outvars[0].aval.dtype != dtype:
                break
            vector = channel_vector(step.invars[1 - position], axis, value.aval.ndim, made_by)
            if vector is None:
                break
            steps.append((step, position, vector))
            (value,) = step.outvars
        if any(step.primitive in (mul_p, div_p) for step, _, _ in steps):
            chains.append(Chain(eqn, steps))
    return chains


def _channel_axes(eqn: JaxprEqn) -> tuple[int, int]:
    """The axis of the channels in a convolution's result, and that of the same channels in its kernel."""
    if eqn.primitive is forward_p:
        return 3, 3
    numbers = eqn.params["dimension_numbers"]
    return numbers.out_spec[1], numbers.rhs_spec[0]


def _holds(jaxpr: Jaxpr) -> bool:
    return bool(_chains(jaxpr)) or any(_holds(body) for eqn in jaxpr.eqns for body in subjaxprs(eqn))
