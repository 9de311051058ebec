"""An operation of a network, and what surrounds its equation: what its variables are made of, up to changes of shape
and the like."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.extend.core.primitives import (
    broadcast_in_dim_p,
    conv_general_dilated_p,
    convert_element_type_p,
    copy_p,
    custom_jvp_call_p,
    custom_vjp_call_p,
    dot_general_p,
    name_p,
    reshape_p,
    slice_p,
    squeeze_p,
    transpose_p,
)

from topgap_jax.engine import forward_p
from topgap_jax.rewrite.interpreter import bind, depending, enters, needed, subjaxprs

SAME = (name_p, copy_p, convert_element_type_p)  # up to the precision, the value they are given
SHAPE = (reshape_p, squeeze_p, broadcast_in_dim_p, transpose_p)
ELEMENTWISE = {
    *("abs", "add", "add_any", "convert_element_type", "copy", "div", "erf", "erfc", "exp", "integer_pow", "log"),
    *("log1p", "logistic", "max", "min", "mul", "name", "neg", "pow", "sign", "sqrt", "square", "sub", "tanh"),
}
VARYING = ("pcast", "pvary")  # inside a `shard_map`: the same on every device, or made to look different
SPREADING = ("broadcast_in_dim", "convert_element_type", *VARYING)


class Operation(NamedTuple):
    """What the network computes there: function(*operands), operands being variables of the jaxpr.

    inputs: what makes the operands of those variables' values where they are others, as a kernel with batch norm in it.
    """

    function: Callable[..., Any]
    operands: tuple[Any, ...]
    inputs: Callable[..., tuple[Any, ...]] | None = None


def as_it_stands(eqn: JaxprEqn) -> Operation:
    return Operation(lambda *values: bind(eqn, values)[0], tuple(eqn.invars))


class Body(NamedTuple):
    """What the recognition of an equation needs of the jaxpr around it.

    zeros: its variables that are 0; made_by: the equation of each variable; varying: what depends on the arguments, not
    on constants alone; floating: what a gradient passes, from a result to floating-point arguments and not into
    `stop_gradient`; bare: whether a maximum(x, 0) or a sum is the network's own, not a part of a function with
    derivatives of its own; behind: what is computed from a convolution or a matrix product, whatever that is.
    """

    zeros: set
    made_by: dict[Any, JaxprEqn]
    varying: set
    floating: set
    bare: bool
    behind: set


def body_of(jaxpr: Jaxpr, bare: bool = True, floating: Iterable[Any] | None = None, behind: Iterable[Any] = ()) -> Body:
    """floating: the arguments that a gradient goes to; all floating-point numbers if not given. behind: those that are
    computed from a convolution or a matrix product."""
    made_by = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    sources = filter(is_float, jaxpr.invars) if floating is None else floating
    passed = depending(jaxpr, sources, lambda eqn: eqn.primitive.name != "stop_gradient")
    result = needed(jaxpr)
    passed -= {v for eqn in jaxpr.eqns if id(eqn) not in result for v in eqn.outvars}
    layers = {v for eqn in jaxpr.eqns if _multiplies(eqn) for v in eqn.outvars}
    varying = depending(jaxpr, jaxpr.invars)
    return Body(zeros_of(jaxpr), made_by, varying, passed, bare, depending(jaxpr, {*layers, *behind}))


def _multiplies(eqn: JaxprEqn) -> bool:
    """Whether there is a convolution or a matrix product in the equation."""
    return eqn.primitive in (conv_general_dilated_p, dot_general_p, forward_p) or any(
        _multiplies(inner) for body in subjaxprs(eqn) for inner in body.eqns
    )


def behind_inside(eqn: JaxprEqn, jaxpr: Jaxpr, body: Body) -> list[Any]:
    """Of a jaxpr inside the equation of the body, the arguments that are computed from a convolution or a product."""
    if not enters(eqn) and eqn.primitive not in (custom_jvp_call_p, custom_vjp_call_p):
        return list(jaxpr.invars)  # a loop's, the second time
    return [v for v, outer in zip(jaxpr.invars, eqn.invars) if not isinstance(outer, Literal) and outer in body.behind]


def floating_inside(eqn: JaxprEqn, jaxpr: Jaxpr, body: Body) -> list[Any] | None:
    """Of a jaxpr inside the equation of the body, the arguments that a gradient goes to; None where it runs again."""
    if not enters(eqn) and eqn.primitive not in (custom_jvp_call_p, custom_vjp_call_p):
        return None
    given = zip(jaxpr.invars, eqn.invars)
    return [v for v, outer in given if not isinstance(outer, Literal) and outer in body.floating]


def is_float(variable: Any) -> bool:
    return jnp.issubdtype(variable.aval.dtype, jnp.floating)


def before(variable: Any, body: Body, passed: Callable[[JaxprEqn], bool]) -> Any:
    """What the variable was before the equations that are passed."""
    while not isinstance(variable, Literal) and variable in body.made_by and passed(body.made_by[variable]):
        variable = next(v for v in body.made_by[variable].invars if not isinstance(v, Literal))
    return variable


def literal(variable: Any, body: Body) -> Any:
    """The number that is spread over the variable's shape or devices; the variable itself where it is none."""
    source = variable
    while (
        not isinstance(source, Literal) and source in body.made_by and body.made_by[source].primitive.name in SPREADING
    ):
        source = body.made_by[source].invars[0]
    return source if isinstance(source, Literal) and source.aval.ndim == 0 else variable


def reshapes(eqn: JaxprEqn) -> bool:
    same = eqn.primitive in SAME + SHAPE or eqn.primitive.name in VARYING
    return same and not isinstance(eqn.invars[0], Literal)


def is_view(eqn: JaxprEqn) -> bool:
    """Whether the equation takes a part of one value, or puts its axes in another order."""
    return eqn.primitive in (*SAME, transpose_p, squeeze_p, slice_p) or eqn.primitive.name in VARYING


def is_elementwise(eqn: JaxprEqn) -> bool:
    """Whether the equation is a function of each element of one value."""
    return eqn.primitive.name in ELEMENTWISE and sum(not isinstance(v, Literal) for v in eqn.invars) == 1


def sources_of(variable: Any, body: Body) -> set:
    """The arguments and constants of the body that the variable is computed from."""
    waiting, sources, seen = [variable], set(), set()
    while waiting:
        v = waiting.pop()
        if isinstance(v, Literal) or v in seen:
            continue
        seen.add(v)
        if v in body.made_by:
            waiting.extend(body.made_by[v].invars)
        else:
            sources.add(v)
    return sources


def ancestors(variable: Any, body: Body, passed: Callable[[JaxprEqn], bool] = lambda eqn: True) -> set[Any]:
    """The variable and all that it is computed from, by equations that are passed."""
    waiting, found = [variable], set()
    while waiting:
        v = waiting.pop()
        if not isinstance(v, Literal) and v not in found:
            found.add(v)
            made = body.made_by.get(v)
            waiting += made.invars if made is not None and passed(made) else []
    return found


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
