"""The same function in float32, of a function that computes in half precision."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core.primitives import convert_element_type_p, custom_jvp_call_p

from topgap_jax.errors import UserError
from topgap_jax.rewrite.interpreter import bind, evaluate, reaches, rebuild, subjaxprs, trace

HALF = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def in_float32(f: Callable) -> Callable:
    """f with float32 wherever it computes in bfloat16 or float16; a function that does neither is unchanged.

    A network with float32 parameters and bf16 layers gives what it gives with float32 layers. Works on any JAX
    function, under jit and remat and in derivatives of any order; functions with a `custom_jvp` of their own keep it,
    those with a `custom_vjp` do not. Raises UserError for half precision inside a primitive that cannot be entered.
    """

    def call(*args, **kwargs):
        closed, arrays, restore = trace(f, args, kwargs)
        return restore(_run(closed.jaxpr, closed.consts, [_widened(x) for x in arrays]))

    return call


def _run(jaxpr, consts, args):
    outs = evaluate(jaxpr, [_widened(x) for x in consts], args, _rule)
    return [_widened(x) for x in outs]  # literals


def _rule(eqn, values, read):
    if not _holds_half(eqn):
        return None
    values = [_widened(x) for x in values]  # literals
    if eqn.primitive is custom_jvp_call_p:
        return _custom_jvp(eqn)(*values)
    if reaches(eqn):
        return rebuild(eqn, values, _run)
    if any(True for _ in subjaxprs(eqn)):
        raise UserError(
            f"in_float32: half precision inside '{eqn.primitive.name}', which cannot be entered; give the model float32"
            " layers"
        )
    if eqn.primitive is convert_element_type_p and eqn.params["new_dtype"] in HALF:
        return [values[0].astype(jnp.float32)]
    params = {name: jnp.dtype(jnp.float32) if _is_half(value) else value for name, value in eqn.params.items()}
    return bind(eqn.replace(params=params), values)


def _custom_jvp(eqn):
    """The equation's function in float32 with its own rule in float32."""
    body = eqn.params["call_jaxpr"]
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]

    @jax.custom_jvp
    def again(*values):
        return _run(body.jaxpr, body.consts, values)

    @again.defjvp
    def jvp(primals, tangents):
        # The rule is written for the equation's own types: traced with those, and then evaluated in float32.
        rule = lambda primals, tangents: jax.jvp(lambda *values: bind(eqn, values), primals, tangents)
        closed = jax.make_jaxpr(rule)(shapes, shapes)
        outs = _run(closed.jaxpr, closed.consts, [*primals, *tangents])
        return outs[: len(eqn.outvars)], outs[len(eqn.outvars) :]

    return again


def _holds_half(eqn) -> bool:
    half = lambda v: getattr(v.aval, "dtype", None) in HALF
    return (
        any(map(half, (*eqn.invars, *eqn.outvars)))
        or any(map(_is_half, eqn.params.values()))
        or any(_holds_half(inner) for body in subjaxprs(eqn) for inner in body.eqns)
    )


def _is_half(value: Any) -> bool:
    return isinstance(value, np.dtype) and value in HALF


def _widened(value: Any) -> Any:
    return jnp.asarray(value, jnp.float32) if getattr(value, "dtype", None) in HALF else value
