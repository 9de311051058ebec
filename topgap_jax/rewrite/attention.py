"""What transformers are made of beside their dense layers: softmax, products of two values, gates, activations, the
deviation of a layer norm."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal
from jax.extend.core.primitives import (
    broadcast_in_dim_p,
    custom_jvp_call_p,
    div_p,
    dot_general_p,
    exp_p,
    jit_p,
    mul_p,
    pow_p,
    reduce_sum_p,
    rsqrt_p,
    sqrt_p,
)

from topgap_jax.rewrite.affine import product
from topgap_jax.rewrite.body import (
    ELEMENTWISE,
    SAME,
    Body,
    Operation,
    ancestors,
    as_it_stands,
    before,
    body_of,
    is_elementwise,
    is_float,
    is_view,
    reshapes,
)
from topgap_jax.rewrite.interpreter import bind, subjaxprs


def softmax(eqn: JaxprEqn, body: Body) -> Operation | None:
    """exp(u) / sum of exp(u), of u, the logits up to a shift."""
    if eqn.primitive is not div_p or any(isinstance(v, Literal) for v in eqn.invars):
        return None
    same = lambda e: e.primitive in SAME
    powers = before(eqn.invars[0], body, same)
    total = body.made_by.get(before(eqn.invars[1], body, reshapes))
    made = body.made_by.get(powers)
    if made is None or made.primitive is not exp_p or total is None or total.primitive is not reduce_sum_p:
        return None
    if before(total.invars[0], body, same) is not powers:
        return None
    axes = tuple(total.params["axes"])
    return Operation(lambda u: jax.nn.softmax(u, axes), (made.invars[0],))


def attention(eqn: JaxprEqn, body: Body) -> Operation | None:
    """The product of probabilities and values, in this order, the probabilities being a softmax as it stands."""
    if not _multiplies_values(eqn, body):
        return None
    left, right = eqn.invars
    if _is_softmax(left, body):
        return as_it_stands(eqn)
    if _is_softmax(right, body):
        return Operation(lambda probabilities, values: bind(eqn, [values, probabilities])[0], (right, left))
    return None


def matmul(eqn: JaxprEqn, body: Body) -> Operation | None:
    """A matrix product of two values, as of queries and keys; not that of `attention`."""
    return as_it_stands(eqn) if _multiplies_values(eqn, body) and attention(eqn, body) is None else None


def multiplication(eqn: JaxprEqn, body: Body) -> Operation | None:
    """An elementwise product of two values that are computed from layers: the signal, and what is spread over it.

    Not x times a function of x, which is an activation, nor a normalised value.
    """
    if eqn.primitive is not mul_p or not body.bare or activation(eqn, body):
        return None
    if not _are_values(eqn, body):
        return None
    first, second = (_unspread(v, body) for v in eqn.invars)
    if first is second or any(_normalises(v, body) or _is_vector(v, body) for v in (first, second)):
        return None
    if first.aval.size < second.aval.size:
        first, second = second, first
    dtype = eqn.outvars[0].aval.dtype
    return Operation(lambda signal, gate: jnp.multiply(signal, gate).astype(dtype), (first, second))


def activation(eqn: JaxprEqn, body: Body) -> Operation | None:
    """x times a function of x, element by element: SiLU, GELU, hard swish."""
    if eqn.primitive in (jit_p, custom_jvp_call_p):
        (inner,) = list(subjaxprs(eqn))[:1]
        floats = [v for v in eqn.invars if isinstance(v, Literal) or is_float(v)]
        alone = len(eqn.invars) == len(floats) == 1 and len(eqn.outvars) == 1 and not isinstance(floats[0], Literal)
        if not alone or floats[0] not in body.floating or isinstance(inner.outvars[0], Literal):
            return None
        within = body_of(inner)
        made = within.made_by.get(before(inner.outvars[0], within, _scales))
        x = _activated(made, within) if made is not None else None
        whole = x is not None and before(x, within, _scales) is inner.invars[0]
        return as_it_stands(eqn) if whole else None
    x = _activated(eqn, body)
    if x is None or x not in body.floating:
        return None
    steps = _between(x, eqn, body)
    if steps is None:
        return None

    def function(value):
        values = {x: value}
        for step in steps:
            values[step.outvars[0]] = bind(step, [v.val if isinstance(v, Literal) else values[v] for v in step.invars])[
                0
            ]
        return values[eqn.outvars[0]]

    return Operation(function, (x,))


def deviation(eqn: JaxprEqn, body: Body) -> Operation | None:
    """The root of a variance, or one over it, that a normalisation divides by: of what a gradient passes."""
    if eqn.primitive not in (rsqrt_p, sqrt_p, pow_p):
        return None
    variance = eqn.invars[0]
    if isinstance(variance, Literal) or variance not in body.floating:
        return None
    if eqn.primitive is pow_p and not (isinstance(eqn.invars[1], Literal) and abs(float(eqn.invars[1].val)) == 0.5):
        return None
    if not any(_sums(body.made_by[v]) for v in ancestors(variance, body, _each) if v in body.made_by):
        return None
    return Operation(lambda z: bind(eqn, [z, *(v.val for v in eqn.invars[1:])])[0], (variance,))


def _sums(eqn: JaxprEqn) -> bool:
    """Whether the equation is a sum, or a function such as `jnp.var` that holds one."""
    inner = subjaxprs(eqn) if eqn.primitive is jit_p else ()
    return eqn.primitive is reduce_sum_p or any(_sums(each) for body in inner for each in body.eqns)


def _multiplies_values(eqn: JaxprEqn, body: Body) -> bool:
    if eqn.primitive is not dot_general_p or not _are_values(eqn, body):
        return False
    if any(before(v, body, is_view) not in body.made_by for v in eqn.invars):
        return False  # a kernel
    return bool(eqn.params["dimension_numbers"][1][0]) or product(eqn, body) is None


def _are_values(eqn: JaxprEqn, body: Body) -> bool:
    """Whether a gradient passes both operands, and one is computed from a layer."""
    floating = all(not isinstance(v, Literal) and v in body.floating for v in eqn.invars)
    return floating and any(v in body.behind for v in eqn.invars)


def _is_vector(variable: Any, body: Body) -> bool:
    """Whether the variable is a parameter with one number a channel, as it stands."""
    source = before(variable, body, reshapes)
    return source not in body.made_by and source.aval.ndim < 2


def _is_softmax(variable: Any, body: Body) -> bool:
    """Whether the variable is a softmax, in a function of its own or not, up to changes of shape."""
    made = body.made_by.get(before(variable, body, reshapes))
    if made is None:
        return False
    if made.primitive in (jit_p, custom_jvp_call_p) and len(made.outvars) == 1:
        inner = next(subjaxprs(made))
        return not isinstance(inner.outvars[0], Literal) and _is_softmax(inner.outvars[0], body_of(inner))
    return softmax(made, body) is not None


def _activated(eqn: JaxprEqn, body: Body) -> Any | None:
    """The x of which the product is x times a function of x; None where it is none."""
    if eqn.primitive is not mul_p or any(isinstance(v, Literal) for v in eqn.invars):
        return None
    first, second = (_line(v, body) for v in eqn.invars)
    x = next((v for v in first if v in second), None)
    if x is None or eqn.invars[0] is eqn.invars[1]:
        return None
    linear = any(_is_multiple(v, x, body) for v in eqn.invars)
    return x if linear else None


def _line(variable: Any, body: Body) -> list[Any]:
    """The variable, and what it is computed from element by element as long as that is one variable at a time."""
    line = [variable]
    while (made := body.made_by.get(line[-1])) is not None and made.primitive.name in ELEMENTWISE:
        values = [v for v in made.invars if not isinstance(v, Literal)]
        if is_elementwise(made):
            line.append(values[0])
            continue
        if len(values) != 2:
            break
        first, second = (_line(v, body) for v in values)
        common = next((v for v in first if v in second), None)
        if common is None:
            break
        line.append(common)
    # a function of one value, as `jax.nn.sigmoid` and `relu6` are
    if made is not None and made.primitive in (jit_p, custom_jvp_call_p) and len(made.invars) == 1:
        if not isinstance(made.invars[0], Literal) and _is_each(next(subjaxprs(made))):
            line += _line(made.invars[0], body)
    return line


def _is_each(jaxpr: Any) -> bool:
    """Whether all that the jaxpr does, it does element by element."""
    return all(
        all(map(_is_each, subjaxprs(eqn)))
        if eqn.primitive in (jit_p, custom_jvp_call_p)
        else eqn.primitive.name in ELEMENTWISE
        for eqn in jaxpr.eqns
    )


def _is_multiple(variable: Any, x: Any, body: Body) -> bool:
    return before(variable, body, _scales) is before(x, body, _scales)


def _scales(eqn: JaxprEqn) -> bool:
    """Whether the equation multiplies one value by a number, or leaves it as it is."""
    return eqn.primitive in SAME or (eqn.primitive in (mul_p, div_p) and is_elementwise(eqn))


def _between(x: Any, eqn: JaxprEqn, body: Body) -> list[JaxprEqn] | None:
    """The equations that make the equation's result of x, in their order; None where something else is needed."""
    needed, waiting = {}, [eqn]
    while waiting:
        step = waiting.pop()
        needed[id(step)] = step
        before_it = [v for v in step.invars if not isinstance(v, Literal) and v is not x]
        if any(v not in body.made_by for v in before_it):
            return None
        waiting += [body.made_by[v] for v in before_it]
    order = {id(step): i for i, step in enumerate(body.made_by.values())}
    return sorted(needed.values(), key=lambda step: order[id(step)])


def _each(eqn: JaxprEqn) -> bool:
    return eqn.primitive.name in ELEMENTWISE or reshapes(eqn)


def _normalises(variable: Any, body: Body) -> bool:
    """Whether the variable is computed from a deviation, element by element."""
    return any(
        v in body.made_by and deviation(body.made_by[v], body) is not None for v in ancestors(variable, body, _each)
    )


def _unspread(variable: Any, body: Body) -> Any:
    """What the variable is spread from, where the axes are as many."""
    made = body.made_by.get(variable)
    if made is not None and made.primitive is broadcast_in_dim_p and made.invars[0].aval.ndim == variable.aval.ndim:
        return made.invars[0]
    return variable
