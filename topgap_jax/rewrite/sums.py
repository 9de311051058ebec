"""The sum over positions before the dense layer, not behind it."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.extend.core.primitives import dot_general_p, reduce_sum_p

from topgap_jax.rewrite.interpreter import (
    channel_vector,
    evaluate,
    keeps_derivatives,
    rebuild,
    subjaxprs,
    trace,
    users,
)
from topgap_jax.rewrite.operations import SUMS

AXES = (1, 2)
DENSE = (((3,), (0,)), ((), ()))


class Pooled(NamedTuple):
    """A dense layer of images whose results are summed over positions, and used for nothing else; bias: a variable or
    None."""

    dense: JaxprEqn
    bias: Any


def sum_first(f: Callable) -> Callable:
    """f with sum(x @ w + b) over the positions of images (b, h, w, c) as sum(x) @ w + h w b, in float32.

    So class maps whose mean are the logits cost no more than a dense layer behind global average pooling. Where the
    maps are named, used or returned they stay. Equal up to rounding; derivatives of any order, under jit, remat and
    loops.
    """

    def summed(*args, **kwargs):
        closed, arrays, restore = trace(f, args, kwargs)
        return restore(_run(closed.jaxpr, closed.consts, arrays))

    return summed


def _run(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list:
    sums, passed = _sums(jaxpr)

    def rule(eqn, values, read):
        if id(eqn) in passed:
            return [None]  # nobody else reads it
        if id(eqn) in sums:
            dense, bias = sums[id(eqn)]
            x, w = map(read, dense.invars)
            options = {word: dense.params[word] for word in ("precision", "preferred_element_type")}
            out = lax.dot_general(x.sum(AXES), w, (((1,), (0,)), ((), ())), **options)
            return [out if bias is None else out + math.prod(x.shape[1:3]) * jnp.ravel(read(bias))]
        if keeps_derivatives(eqn) and any(map(_holds, subjaxprs(eqn))):
            return rebuild(eqn, values, _run)
        return None

    return evaluate(jaxpr, consts, args, rule)


def _sums(jaxpr: Jaxpr) -> tuple[dict[int, Pooled], set[int]]:
    """The sums that come first, by `id`, and the equations that they replace."""
    sums, passed = {}, set()
    if not any(eqn.primitive is reduce_sum_p for eqn in jaxpr.eqns):
        return sums, passed
    used, made_by = users(jaxpr), {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    for eqn in jaxpr.eqns:
        if eqn.primitive is not reduce_sum_p or eqn.params["axes"] != AXES or eqn.params.get("out_sharding"):
            continue
        last = made_by.get(eqn.invars[0])
        replaced, bias = [last], None
        if last is not None and last.primitive in SUMS:
            value, bias = _value_and_bias(last, made_by)
            replaced = [made_by.get(value), last]
        if None not in replaced and _is_dense(replaced[0]) and all(len(used[e.outvars[0]]) == 1 for e in replaced):
            sums[id(eqn)] = Pooled(replaced[0], bias)
            passed.update(map(id, replaced))
    return sums, passed


def _value_and_bias(eqn: JaxprEqn, made_by: dict[Any, JaxprEqn]) -> tuple[Any, Any]:
    """The dense layer's result and the variable of its bias; None where the sum is another."""
    for value, other in (eqn.invars, eqn.invars[::-1]):
        dense = None if isinstance(value, Literal) else made_by.get(value)
        if dense is not None and _is_dense(dense) and (bias := channel_vector(other, 3, 4, made_by)) is not None:
            return value, bias
    return None, None


def _is_dense(eqn: JaxprEqn) -> bool:
    if eqn.primitive is not dot_general_p or eqn.params["dimension_numbers"] != DENSE or eqn.params["out_sharding"]:
        return False
    return eqn.invars[0].aval.ndim == 4 and all(v.aval.dtype == jnp.float32 for v in (*eqn.invars, *eqn.outvars))


def _holds(jaxpr: Jaxpr) -> bool:
    return bool(_sums(jaxpr)[0]) or any(_holds(body) for eqn in jaxpr.eqns for body in subjaxprs(eqn))
