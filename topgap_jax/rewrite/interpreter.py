"""The one small interpreter under every transformation here: trace a function to a jaxpr, evaluate it, do something else at the right places."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.extend.core.primitives import jit_p, remat_p


def trace(f: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[ClosedJaxpr, list[Any], Callable]:
    """Jaxpr of f, its array arguments, and the function that puts results back into f's output tree.

    Python values that are not arrays (None, True, text) stay as they are: they steer the trace.
    """
    leaves, tree = jax.tree.flatten((tuple(args), kwargs))
    arrays = [leaf for leaf in leaves if _is_array(leaf)]

    def flat(*arrays):
        remaining = iter(arrays)
        args, kwargs = jax.tree.unflatten(tree, [next(remaining) if _is_array(leaf) else leaf for leaf in leaves])
        return f(*args, **kwargs)

    closed, shape = jax.make_jaxpr(flat, return_shape=True)(*arrays)
    return closed, arrays, lambda outs: jax.tree.unflatten(jax.tree.structure(shape), outs)


def evaluate(
    jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], rule: Callable[[JaxprEqn, list[Any], Callable], Any]
) -> list:
    """Results of `jaxpr`. `rule(equation, values, read)` gives an equation's results, or None to leave it as it is.

    `read(variable)` is the value of any variable computed so far.
    """
    env: dict[Any, Any] = {}
    read = lambda v: v.val if isinstance(v, Literal) else env[v]
    env.update(zip(jaxpr.constvars, consts))
    env.update(zip(jaxpr.invars, args))
    for eqn in jaxpr.eqns:
        values = [read(v) for v in eqn.invars]
        outs = rule(eqn, values, read)
        if outs is None:
            outs = bind(eqn, values)
        env.update(zip(eqn.outvars, outs))
    return [read(v) for v in jaxpr.outvars]


def bind(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """The equation as it stands, applied to `values`."""
    with eqn.ctx.manager:
        outs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(outs) if eqn.primitive.multiple_results else [outs]


def inline(closed: ClosedJaxpr, arrays: Sequence[Any]) -> ClosedJaxpr:
    """The same program without any inner `jit`, so that a walk over producers meets every equation on one level."""

    def rule(eqn, values, read):
        if eqn.primitive is jit_p:
            inner = eqn.params["jaxpr"]
            return evaluate(inner.jaxpr, inner.consts, values, rule)
        return None

    return jax.make_jaxpr(lambda *args: evaluate(closed.jaxpr, closed.consts, args, rule))(*arrays)


def subjaxprs(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """Jaxprs among the parameters of an equation: bodies of jit, remat, scan, cond, custom rules."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def enters(eqn: JaxprEqn) -> bool:
    """Whether the interpreter goes into the equation's body: `jit` and `remat`."""
    return eqn.primitive is jit_p or eqn.primitive is remat_p


def rebuild(eqn: JaxprEqn, values: Sequence[Any], run: Callable[[Jaxpr, Sequence[Any], Sequence[Any]], Any]) -> Any:
    """`run(body, consts, values)`, under the same `jax.checkpoint` if the equation is one."""
    if eqn.primitive is remat_p:
        body = eqn.params["jaxpr"]
        again = lambda *args: run(body, (), args)
        return jax.checkpoint(again, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])(*values)
    inner = eqn.params["jaxpr"]
    return run(inner.jaxpr, inner.consts, values)


def _is_array(leaf):
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))
