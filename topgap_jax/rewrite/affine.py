"""Convolutions and dense layers: alone, and with all that is done to their channels afterwards, bias and batch norm."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal
from jax.extend.core.primitives import (
    add_p,
    broadcast_in_dim_p,
    conv_general_dilated_p,
    div_p,
    dot_general_p,
    mul_p,
    sub_p,
)
from jax.lax import ConvDimensionNumbers

from topgap_jax.engine import forward_p
from topgap_jax.rewrite.body import SAME, Body, Operation, as_it_stands, before, is_view, sources_of
from topgap_jax.rewrite.interpreter import bind

# (equation, position of the layer's values) -> (scale, shift) after it, of (scale, shift) before it and the other
# operand.
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
    """A convolution or dense layer and what happens to its channels: (equation, position of the value) several times.

    features: the axes of the result that the kernel makes; kernel: the axis of the kernel that each of them is.
    """

    linear: Operation
    features: tuple[int, ...]
    kernel: tuple[int, ...]
    steps: list[tuple[JaxprEqn, int]]


def convolution_axes(eqn: JaxprEqn) -> ConvDimensionNumbers | None:
    """Which axes of images, kernel and result are which, of a convolution by JAX or by the engine; None for another
    equation.

    (batch, channels, *space) of images and result, (channels out, channels in, *space) of the kernel.
    """
    if eqn.primitive is conv_general_dilated_p:
        return eqn.params["dimension_numbers"]
    return ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)) if eqn.primitive is forward_p else None


def convolution(eqn: JaxprEqn, body: Body) -> Operation | None:
    """Of images and kernel."""
    return as_it_stands(eqn) if eqn.primitive in (conv_general_dilated_p, forward_p) else None


def product(eqn: JaxprEqn, body: Body) -> Operation | None:
    """A product of a value and a kernel, in this order whatever that of the equation.

    The kernel is what no argument changes, else what depends on fewer arguments than the value and on none of its own
    (x @ W and W @ x). A product of two values that depend on the same, as queries and keys, is no dense layer, unless
    one of them is an argument as it stands (a kernel that is used twice).
    """
    if eqn.primitive is not dot_general_p or eqn.params["dimension_numbers"][1][0]:
        return None
    left, right = eqn.invars
    varying = [v for v in eqn.invars if v in body.varying]
    if len(varying) == 2:
        sources = {v: sources_of(v, body) & body.varying for v in varying}
        matrices = [v for v in (right, left) if v.aval.ndim > 1]
        given = [v for v in matrices if before(v, body, is_view) not in body.made_by]
        if sources[left] & sources[right]:
            kernel = given[0] if len(given) == 1 else None
        else:
            kernel = min(matrices, key=lambda v: (len(sources[v]), v not in given))
    else:
        kernel = left if varying == [right] else right
    if kernel is None:
        return None
    if kernel is right:
        return as_it_stands(eqn)
    return Operation(lambda value, kernel: bind(eqn, [kernel, value])[0], (right, left))


def conv_layer(eqn: JaxprEqn, body: Body) -> Operation | None:
    """Of images, kernel and bias, (1, 1, 1, c) in the axes of the result: the last step of what happens to the
    channels."""
    return _layer(eqn, body, convolution)


def dense_layer(eqn: JaxprEqn, body: Body) -> Operation | None:
    """Of value, kernel and bias, with the axes of the result."""
    return _layer(eqn, body, product)


def _layer(eqn: JaxprEqn, body: Body, recognise: Callable) -> Operation | None:
    if eqn.primitive in SAME or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return None
    chain = _chain(eqn, body, recognise)
    if chain is None:
        return None
    linear, out = chain.linear.function, eqn.outvars[0].aval
    shape = tuple(size if i in chain.features else 1 for i, size in enumerate(out.shape))
    vectors = tuple(step.invars[1 - position] for step, position in chain.steps)

    def inputs(value, kernel, *vectors):
        scale, shift = jnp.ones(shape, out.dtype), jnp.zeros(shape, out.dtype)
        for (step, position), vector in zip(chain.steps, vectors):
            if jnp.ndim(vector):
                vector = vector[tuple(slice(None) if i in chain.features else slice(1) for i in range(out.ndim))]
            scale, shift = STEPS[step.primitive, position](scale, shift, jnp.asarray(vector, out.dtype))
        scale, shift = jnp.broadcast_to(scale, shape), jnp.broadcast_to(shift, shape)
        if any(step.primitive is not add_p for step, _ in chain.steps):
            places = [1] * kernel.ndim
            for feature, axis in zip(chain.features, chain.kernel):
                places[axis] = shape[feature]
            kernel = (kernel * scale.reshape(places)).astype(kernel.dtype)
        return value, kernel, shift

    layer = lambda value, kernel, bias: linear(value, kernel).astype(bias.dtype) + bias
    return Operation(layer, (*chain.linear.operands, *vectors), inputs)


def _chain(eqn: JaxprEqn | None, body: Body, recognise: Callable) -> Chain | None:
    """What the equation is the last step of; None where it is no such thing."""
    if eqn is None:
        return None
    if linear := recognise(eqn, body):
        return Chain(linear, *_features(eqn, linear), [])
    for position, value in enumerate(eqn.invars):
        if (eqn.primitive, position) not in STEPS or isinstance(value, Literal) or value.aval.ndim < 2:
            continue
        vector = eqn.invars[1 - position]
        source = _spread(vector, value.aval.ndim, body)
        if source is None or value.aval.shape != eqn.outvars[0].aval.shape:
            continue
        varies = not isinstance(vector, Literal) and vector in body.varying
        if varies and sources_of(vector, body) & sources_of(value, body) & body.varying:
            continue  # what depends on the value, as the gate of one image alone may, is no channel's own number
        chain = _chain(body.made_by.get(before(value, body, lambda e: e.primitive in SAME)), body, recognise)
        if chain is not None and all(size == 1 or i in chain.features for i, size in source):
            return chain._replace(steps=[*chain.steps, (eqn, position)])
    return None


def _spread(variable: Any, ndim: int, body: Body) -> list[tuple[int, int]] | None:
    """(axis, size) of what the variable is spread from over `ndim` axes; None where it has other axes."""
    if variable.aval.ndim not in (0, ndim):
        return None
    made = None if isinstance(variable, Literal) else body.made_by.get(variable)
    if made is not None and made.primitive is broadcast_in_dim_p:
        return list(zip(made.params["broadcast_dimensions"], made.invars[0].aval.shape))
    return list(enumerate(variable.aval.shape))


def _features(eqn: JaxprEqn, linear: Operation) -> tuple[tuple[int, ...], tuple[int, ...]]:
    numbers = convolution_axes(eqn)
    if numbers is not None:
        return (numbers.out_spec[1],), (numbers.rhs_spec[0],)
    position = 1 if linear.operands[1] is eqn.invars[1] else 0
    kernel, contracted = eqn.invars[position].aval, eqn.params["dimension_numbers"][0][position]
    free = tuple(i for i in range(kernel.ndim) if i not in contracted)
    first = eqn.outvars[0].aval.ndim - len(free) if position == 1 else 0
    return tuple(range(first, first + len(free))), free
