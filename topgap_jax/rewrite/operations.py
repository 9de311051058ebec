"""What an equation is: the one place that recognises a network's operations (ReLU, max pooling) in its jaxpr."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.extend.core.primitives import (
    conv_general_dilated_p,
    convert_element_type_p,
    copy_p,
    custom_jvp_call_p,
    jit_p,
    max_p,
    name_p,
    reduce_window_max_p,
)
from jax.lax import ConvDimensionNumbers

from topgap_jax.engine import forward_p
from topgap_jax.rewrite.interpreter import bind, subjaxprs

WHOLE = ("clip", "celu", "hard_sigmoid", "hard_silu")  # functions under `jit` whose maximum or relu6 is no ReLU
RELUS = {"relu": (jax.nn.relu, ["max"]), "relu6": (jax.nn.relu6, ["max", "min"])}
SAME = (name_p, copy_p, convert_element_type_p)  # up to the precision, the value they are given
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
    """Which axes of images, kernel and result are which, of a convolution by JAX or by the engine; None for another equation.

    (batch, channels, *space) of images and result, (channels out, channels in, *space) of the kernel.
    """
    if eqn.primitive is conv_general_dilated_p:
        return eqn.params["dimension_numbers"]
    return ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)) if eqn.primitive is forward_p else None


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
