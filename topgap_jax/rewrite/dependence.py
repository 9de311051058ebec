"""Which elements of a function's input each element of its result can depend on, whatever the weights are.

Every equation is replaced by the sum of all that it is computed from: a convolution by one of ones, maximum and product
by a sum, and the derivative of what comes out is followed only as far as whether it is 0. The support of a gradient
would not do: a ReLU that is closed blocks it, and products of many weights are 0 in float32.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jax.extend.core.primitives import custom_jvp_call_p, custom_vjp_call_p, dot_general_p, reduce_window_sum_p

from topgap_jax.rewrite.body import ELEMENTWISE
from topgap_jax.rewrite.interpreter import enters, evaluate, inline, needed, trace
from topgap_jax.rewrite.operations import convolution_axes
from topgap_jax.types import Array

# Take elements as they are; of the indexed ones all operands but the first are indices.
INDEXED = {"dynamic_slice", "gather"}
MOVES = INDEXED | {
    *("broadcast_in_dim", "concatenate", "expand_dims", "pad", "reshape", "rev", "slice", "split", "squeeze", "tile"),
    "transpose",
}
EACH = ELEMENTWISE | {
    *("and", "atan2", "cbrt", "ceil", "clamp", "cos", "eq", "erf_inv", "exp2", "expm1", "floor", "ge", "gt"),
    *("is_finite", "le", "lt", "ne", "not", "or", "reduce_precision", "rem", "round", "rsqrt", "select_n", "sin"),
    *("stop_gradient", "tan", "xor"),
}
REDUCTIONS = {"argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum"}
WINDOWS = {"reduce_window_sum", "reduce_window_max", "reduce_window_min"}


class Dependent(NamedTuple):
    """A value that depends on the input, of which only that is kept: float32 of its shape."""

    value: Array


def dependence(f: Callable[[Array], Array], like: Array) -> tuple[Callable[[Array], Array], tuple[int, ...]]:
    """(pull, the shape of f(like)): pull(elements of the result, 0 or 1) is 1 for each element of the input that one of
    them can depend on, else 0.

    Convolutions and windows reach all that they cover, also with weights of 0; products with a constant matrix (a
    resizing) what its nonzero entries do. An equation not known here, such as a loop, reaches all there is.
    """
    closed, arrays, _ = trace(f, (like,), {})
    flat = inline(closed, arrays, remat=True)
    live = needed(flat.jaxpr)
    jaxpr = flat.jaxpr.replace(eqns=[eqn for eqn in flat.jaxpr.eqns if id(eqn) in live])

    def summed(values):
        (out,) = evaluate(jaxpr, flat.consts, [Dependent(values)], _rule)
        # Of what does not depend on the input at all nothing is reached.
        return out.value if isinstance(out, Dependent) else jnp.zeros(jnp.shape(out)) + 0 * values.sum()

    value, pull = jax.vjp(summed, jnp.zeros(like.shape, jnp.float32))
    return lambda elements: _whether(pull(elements.astype(jnp.float32))[0]), value.shape


def _rule(eqn: JaxprEqn, values: Sequence[Any], read: Callable) -> list | None:
    if not any(isinstance(value, Dependent) for value in values):
        return None
    if eqn.primitive in (custom_jvp_call_p, custom_vjp_call_p) or enters(eqn):
        body = eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"]
        return evaluate(getattr(body, "jaxpr", body), getattr(body, "consts", ()), values, _rule)
    outs = _summed(eqn, values)
    return [Dependent(_only_whether(out)) for out in outs]


def _summed(eqn: JaxprEqn, values: Sequence[Any]) -> list[Array]:
    """Sums of what each element of the equation's results is computed from, up to positive factors."""
    shape, name, given = eqn.outvars[0].aval.shape, eqn.primitive.name, [isinstance(x, Dependent) for x in values]
    floats = [x.value if isinstance(x, Dependent) else x for x in values]
    sources = [x.value for x in values if isinstance(x, Dependent)]
    if convolution_axes(eqn) and not given[1]:
        return [_bound(eqn, [floats[0], jnp.ones(jnp.shape(floats[1]))])]
    if eqn.primitive is dot_general_p:
        sides = []
        for side in (0, 1):
            if given[side]:
                other = jnp.ones(floats[1 - side].shape) if given[1 - side] else jnp.float32(floats[1 - side] != 0)
                sides.append(_bound(eqn, [floats[0], other] if side == 0 else [other, floats[1]]))
        return [sum(sides)]
    if name in WINDOWS:
        options = {
            word: eqn.params[word]
            for word in ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
        }
        return [reduce_window_sum_p.bind(sources[0], **options)]
    if name in REDUCTIONS:
        return [sources[0].sum(tuple(eqn.params["axes"]))]
    if name in EACH:
        return [sum(jnp.broadcast_to(x, shape) for x in sources)]
    data = 1 if name in INDEXED else len(values)
    if name in MOVES and not any(given[data:]):
        moved = [x if is_given else jnp.zeros(jnp.shape(x)) for x, is_given in zip(floats[:data], given)]
        outs = _bound(eqn, [*moved, *values[data:]])
        return outs if eqn.primitive.multiple_results else [outs]
    return [jnp.broadcast_to(sum(x.sum() for x in sources), v.aval.shape) for v in eqn.outvars]


def _bound(eqn: JaxprEqn, values: Sequence[Any]) -> Any:
    params = dict(eqn.params)
    if "preferred_element_type" in params:
        params["preferred_element_type"] = jnp.dtype(jnp.float32)
    return eqn.primitive.bind(*values, **params)


@jax.custom_vjp
def _only_whether(value):
    """The value; its gradient is followed only as far as whether it is 0."""
    return value


def _whether(gradient):
    return (gradient > 0).astype(jnp.float32)


_only_whether.defvjp(lambda value: (value, None), lambda _, gradient: (_whether(gradient),))
