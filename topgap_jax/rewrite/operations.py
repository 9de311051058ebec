"""What an equation is: the one place that recognises a network's operations in its jaxpr.

ReLU, max pooling, convolution (JAX's or the engine's), dense layer, sum, average pool, change of shape.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.extend.core.primitives import (
    add_jaxvals_p,
    add_p,
    broadcast_in_dim_p,
    conv_general_dilated_p,
    convert_element_type_p,
    copy_p,
    custom_jvp_call_p,
    div_p,
    dot_general_p,
    gt_p,
    jit_p,
    max_p,
    mul_p,
    name_p,
    reduce_sum_p,
    reduce_window_max_p,
    reduce_window_sum_p,
    reshape_p,
    select_n_p,
    squeeze_p,
    transpose_p,
)
from jax.lax import ConvDimensionNumbers

from topgap_jax.engine import forward_p
from topgap_jax.rewrite.interpreter import bind, subjaxprs

WHOLE = ("clip", "celu", "hard_sigmoid", "hard_silu")  # functions under `jit` whose maximum or relu6 is no ReLU
RELUS = {"relu": (jax.nn.relu, ["max"]), "relu6": (jax.nn.relu6, ["max", "min"])}
SAME = (name_p, copy_p, convert_element_type_p)  # up to the precision, the value they are given
SHAPE = (reshape_p, squeeze_p, broadcast_in_dim_p, transpose_p)
SCALE = (mul_p, div_p, select_n_p)  # a select of the value or zero is dropout
SUMS = (add_p, add_jaxvals_p)
SPREADING = ("broadcast_in_dim", "convert_element_type", "pcast", "pvary")


def operations(jaxpr: Jaxpr, bare: bool = True) -> set[str]:
    """The operations that occur in the jaxpr, at any depth."""
    zeros, found = zeros_of(jaxpr), set()
    for eqn in jaxpr.eqns:
        name, _ = match(eqn, zeros, bare)
        found |= {name} if name else held(eqn, bare)
    return found


def held(eqn: JaxprEqn, bare: bool) -> set[str]:
    """The operations inside the equation; in a function of `WHOLE` there are none."""
    if eqn.primitive is jit_p and eqn.params["name"] in WHOLE:
        return set()
    return set().union(*(operations(body, bare and eqn.primitive is not custom_jvp_call_p) for body in subjaxprs(eqn)))


def match(eqn: JaxprEqn, zeros: set, bare: bool) -> tuple[str | None, Callable | None]:
    """The operation that the equation is, as a function of its first operand; (None, None) for any other equation."""
    if eqn.primitive is custom_jvp_call_p:
        body = eqn.params["call_jaxpr"].jaxpr
        function, primitives = RELUS.get(body.debug_info.func_name, (None, None))
        if function and _primitives(body) == primitives and len(body.invars) == 1 and _has_zero_maximum(body):
            return "relu", function
    elif eqn.primitive is max_p and bare:
        z, zero = eqn.invars
        if is_zero(zero, zeros) and jnp.issubdtype(z.aval.dtype, jnp.floating):
            return "relu", jax.nn.relu
    elif eqn.primitive is reduce_window_max_p:
        return "max_pool", lambda z: bind(eqn, [z])[0]
    return None, None


def _has_zero_maximum(jaxpr: Jaxpr) -> bool:
    """Whether the jaxpr, or a `jit` in it, takes the maximum with 0."""
    zeros = zeros_of(jaxpr)
    return any(
        (eqn.primitive is max_p and any(is_zero(v, zeros) for v in eqn.invars))
        or any(map(_has_zero_maximum, subjaxprs(eqn)))
        for eqn in jaxpr.eqns
    )


def relu_of(eqn: JaxprEqn, zeros: set) -> bool:
    """Whether the equation is a ReLU: `jax.nn.relu`, or a bare maximum(x, 0)."""
    return match(eqn, zeros, bare=True)[1] is jax.nn.relu


def convolution_axes(eqn: JaxprEqn) -> ConvDimensionNumbers | None:
    """Which axes of images, kernel and result are which, of a convolution by JAX or by the engine; None for another
    equation.

    (batch, channels, *space) of images and result, (channels out, channels in, *space) of the kernel.
    """
    if eqn.primitive is conv_general_dilated_p:
        return eqn.params["dimension_numbers"]
    return ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)) if eqn.primitive is forward_p else None


class Dense(NamedTuple):
    """A product of a value with a kernel over its channels.

    axes: where each other axis of the value is in the result; channels, classes: the axis of what is summed over in the
    value, and that of what is made in the result; matrix: the kernel as (channels, classes).
    """

    axes: dict[int, int]
    channels: int
    classes: int
    matrix: Callable[[Any], Any]


def dense(eqn: JaxprEqn, operand: int) -> Dense | None:
    """The equation as a dense layer of this operand: a plain matrix product, or a 1x1 convolution; None for anything
    else."""
    numbers = convolution_axes(eqn)
    if numbers is None and eqn.primitive is not dot_general_p:
        return None
    value, kernel, (out,) = eqn.invars[operand], eqn.invars[1 - operand], eqn.outvars
    if numbers is None:
        contracted, batch = eqn.params["dimension_numbers"]
        if len(contracted[0]) != 1 or batch[0] or kernel.aval.ndim != 2:
            return None
        (channels,), (rows,) = contracted[operand], contracted[1 - operand]
        first = 0 if operand == 0 else 1  # the axes of the left operand come first
        free = [i for i in range(value.aval.ndim) if i != channels]
        axes = {i: first + place for place, i in enumerate(free)}
        return Dense(axes, channels, (1 - first) * len(free), lambda kernel: kernel if rows == 0 else kernel.T)
    if operand != 0 or any(kernel.aval.shape[i] != 1 for i in numbers.rhs_spec[2:]):
        return None
    axes = {i: j for i, j in zip(numbers.lhs_spec, numbers.out_spec) if i != numbers.lhs_spec[1]}
    channels_in = value.aval.shape[numbers.lhs_spec[1]]
    strides = eqn.params["geometry"].strides if eqn.primitive is forward_p else eqn.params["window_strides"]
    if set(strides) != {1} or any(value.aval.shape[i] != out.aval.shape[j] for i, j in axes.items()):
        return None
    if kernel.aval.shape[numbers.rhs_spec[1]] != channels_in or eqn.params.get("batch_group_count", 1) != 1:
        return None  # in groups
    matrix = lambda kernel: kernel.transpose(numbers.rhs_spec[1], numbers.rhs_spec[0], *numbers.rhs_spec[2:]).reshape(
        channels_in, -1
    )
    return Dense(axes, numbers.lhs_spec[1], numbers.out_spec[1], matrix)


def summed_axes(eqn: JaxprEqn) -> tuple[int, ...] | None:
    """The axes that the equation sums its operand over: a sum, or the sum of an average pool; None for anything
    else."""
    if eqn.primitive is reduce_sum_p:
        return tuple(eqn.params["axes"])
    if eqn.primitive is reduce_window_sum_p:
        return tuple(i for i, size in enumerate(eqn.params["window_dimensions"]) if size > 1)
    return None


def is_whole(eqn: JaxprEqn) -> bool:
    """Whether a sum is over the whole of its axes: any sum, and an average pool with one full window."""
    if eqn.primitive is reduce_sum_p:
        return True
    params, shape, out = eqn.params, eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if any(tuple(pad) != (0, 0) for pad in params["padding"]) or set(params["base_dilation"]) != {1}:
        return False
    return all(
        (size, pooled) in ((length, 1), (1, length))
        for size, pooled, length in zip(params["window_dimensions"], out, shape)
    )


def is_positive(eqn: JaxprEqn, zeros: set) -> bool:
    """Whether the equation is value > 0."""
    return eqn.primitive is gt_p and is_zero(eqn.invars[1], zeros)


def is_masked(eqn: JaxprEqn, value: Any, zeros: set) -> bool:
    """Whether the equation is where(mask, value, 0) element by element, as a ReLU's derivative is."""
    if eqn.primitive is not select_n_p or len(eqn.invars) != 3:
        return False
    mask, otherwise, kept = eqn.invars
    return kept is value and is_zero(otherwise, zeros) and mask.aval.shape == value.aval.shape


def zeros_of(jaxpr: Jaxpr) -> set:
    """The variables that are a literal 0, spread over a shape or over the devices of a `shard_map`."""
    zeros = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in SPREADING and is_zero(eqn.invars[0], zeros):
            zeros.update(eqn.outvars)
    return zeros


def is_zero(variable: Any, zeros: set) -> bool:
    if isinstance(variable, Literal):
        return variable.aval.ndim == 0 and variable.val == 0
    return variable in zeros


def _primitives(jaxpr: Jaxpr) -> list[str]:
    """Names of the primitives in order, with those inside `jit` in its place, without what only spreads a literal."""
    names = []
    for eqn in jaxpr.eqns:
        if eqn.primitive is jit_p:
            names += _primitives(eqn.params["jaxpr"].jaxpr)
        elif eqn.primitive.name not in SPREADING:
            names.append(eqn.primitive.name)
    return names
