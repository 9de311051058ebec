"""`broken_gradients`: the operations between images and logits through which no gradient goes, or another one."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from topgap_jax.rewrite.interpreter import subjaxprs

ZERO = ("round", "floor", "ceil", "sign", "stop_gradient")
"""Primitives whose derivative is 0 wherever there is one."""
CUSTOM = ("custom_vjp_call", "custom_vjp_call_jaxpr")
"""A function with a backward pass of its own. A `custom_jvp_call` is none: ReLU is one, and has the true derivative."""


def broken_gradients(f: Callable, *args: Any, of: int = 0) -> list[str]:
    """Names of the operations that depend on the argument number `of` and lose or replace its gradient, each once, in
    order.

    f is traced, not run; arguments may be shapes. Of functions with a backward pass of their own the name is given:
    "custom_vjp of f". What only chooses (a maximum, a sort) has the gradient of what it chooses, and is none of these.
    """
    leaves = [len(jax.tree.leaves(arg)) for arg in args]
    jaxpr = jax.make_jaxpr(f)(*args).jaxpr
    first = sum(leaves[:of])
    return list(dict.fromkeys(_names(jaxpr, set(jaxpr.invars[first : first + leaves[of]]))))


def _names(jaxpr: Jaxpr, depends: set) -> Iterable[str]:
    for eqn in jaxpr.eqns:
        inputs = [isinstance(v, Literal) or v not in depends for v in eqn.invars]
        if all(inputs):
            continue
        depends.update(eqn.outvars)
        name = eqn.primitive.name
        if name in ZERO:
            yield name
        elif name in CUSTOM:
            yield f"custom_vjp of {_function(eqn)}"
        else:
            for body in subjaxprs(eqn):
                yield from _names(body, _of_body(eqn, body, inputs))


def _of_body(eqn: JaxprEqn, body: Jaxpr, constant: list[bool]) -> set:
    """The variables of an equation's body that depend on the argument: in a loop all may."""
    if len(body.invars) > len(constant) or eqn.primitive.name in ("while", "scan"):
        return set(body.invars)
    return {v for v, same in zip(reversed(body.invars), reversed(constant)) if not same}


def _function(eqn: JaxprEqn) -> str:
    for body in subjaxprs(eqn):
        return body.debug_info.func_name
    return "a function"
