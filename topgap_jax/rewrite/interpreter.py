"""The one small interpreter under every transformation here: trace a function to a jaxpr, evaluate it, do something
else at the right places."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.extend.core.primitives import (
    broadcast_in_dim_p,
    cond_p,
    conv_general_dilated_p,
    custom_jvp_call_p,
    custom_vjp_call_p,
    jit_p,
    remat_p,
    scan_p,
    while_p,
)

from topgap_jax import engine
from topgap_jax.engine import SHARD_MAP


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


def inline(closed: ClosedJaxpr, arrays: Sequence[Any], remat: bool = False) -> ClosedJaxpr:
    """The same program without any inner `jit`, so that a walk over producers meets every equation on one level.

    remat: also without `jax.checkpoint`, for a program that is only looked at.
    """

    def rule(eqn, values, read):
        if eqn.primitive is jit_p:
            inner = eqn.params["jaxpr"]
            return evaluate(inner.jaxpr, inner.consts, values, rule)
        if remat and eqn.primitive is remat_p:
            return evaluate(eqn.params["jaxpr"], (), values, rule)
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


def users(jaxpr: Jaxpr) -> dict[Any, list[JaxprEqn | None]]:
    """The equations that take each variable, once for each time; None stands for the jaxpr's own results."""
    found: dict[Any, list[JaxprEqn | None]] = {v: [] for eqn in jaxpr.eqns for v in eqn.outvars}
    found |= {v: [] for v in (*jaxpr.invars, *jaxpr.constvars)}
    for user, variables in (*((eqn, eqn.invars) for eqn in jaxpr.eqns), (None, jaxpr.outvars)):
        for v in variables:
            if not isinstance(v, Literal):
                found[v].append(user)
    return found


def needed(jaxpr: Jaxpr) -> set[int]:
    """The equations, by `id`, that the jaxpr's results depend on."""
    wanted, found = {v for v in jaxpr.outvars if not isinstance(v, Literal)}, set()
    for eqn in reversed(jaxpr.eqns):
        if wanted.intersection(eqn.outvars):
            found.add(id(eqn))
            wanted.update(v for v in eqn.invars if not isinstance(v, Literal))
    return found


def depending(jaxpr: Jaxpr, sources: Iterable[Any], passes: Callable[[JaxprEqn], bool] = lambda eqn: True) -> set[Any]:
    """The variables that depend on the sources, which are among them, by equations that `passes` lets through."""
    found = set(sources)
    for eqn in jaxpr.eqns:
        if passes(eqn) and found.intersection(v for v in eqn.invars if not isinstance(v, Literal)):
            found.update(eqn.outvars)
    return found


def channel_vector(variable: Any, axis: int, ndim: int, made_by: dict[Any, JaxprEqn]) -> Any | None:
    """Where the values are from, one per index of `axis` or one in all, that an array of `ndim` axes is made of; else
    None."""
    eqn = None if isinstance(variable, Literal) else made_by.get(variable)
    if eqn is not None and eqn.primitive is broadcast_in_dim_p:
        source, places = eqn.invars[0], eqn.params["broadcast_dimensions"]
    elif variable.aval.ndim in (0, ndim):
        source, places = variable, range(variable.aval.ndim)
    else:
        return None
    fits = all(size == 1 or place == axis for size, place in zip(source.aval.shape, places))
    return source if fits else None


def enters(eqn: JaxprEqn) -> bool:
    """Whether the equation's body is run once, where it stands: `jit` and `remat`."""
    return eqn.primitive is jit_p or eqn.primitive is remat_p


def reaches(eqn: JaxprEqn) -> bool:
    """Whether `rebuild` can go into the equation: also loops, branches, `shard_map`, functions with derivatives of
    their own."""
    return keeps_derivatives(eqn) or eqn.primitive in (custom_jvp_call_p, custom_vjp_call_p)


def keeps_derivatives(eqn: JaxprEqn) -> bool:
    """Whether `rebuild` goes into the equation and what comes out has its derivatives: not a function with ones of its
    own."""
    return eqn.primitive.name in engine.ENTERED


def rebuild(eqn: JaxprEqn, values: Sequence[Any], run: Callable[[Jaxpr, Sequence[Any], Sequence[Any]], Any]) -> Any:
    """`run(body, consts, values)` inside the same `jax.checkpoint`, loop, branches or `shard_map` as the equation's
    body.

    A function with derivatives of its own gets those of what `run` does. In a loop or branch `run` returns a list of
    results.
    """
    params = eqn.params
    within = lambda closed: lambda *args: run(closed.jaxpr, closed.consts, args)
    if eqn.primitive is remat_p and params["differentiated"]:
        # What is computed again must stay apart from what was computed before, which a new `jax.checkpoint` would not
        # ask for.
        closed = jax.make_jaxpr(lambda *args: run(params["jaxpr"], (), args))(*values)
        body = closed.jaxpr.replace(constvars=[], invars=[*closed.jaxpr.constvars, *closed.jaxpr.invars])
        return remat_p.bind(*closed.consts, *values, **(params | {"jaxpr": body}))
    if eqn.primitive is remat_p:
        again = lambda *args: run(params["jaxpr"], (), args)
        policy = params["policy"] and _policy(params["policy"])
        return jax.checkpoint(again, prevent_cse=params["prevent_cse"], policy=policy)(*values)
    if eqn.primitive is scan_p:
        body, (constants, start, inputs) = within(params["jaxpr"]), scanned(params, values)

        def step(carry, row):
            outs = body(*constants, *carry, *row)
            return outs[: len(carry)], outs[len(carry) :]

        options = {word: params[word] for word in ("length", "reverse", "unroll")}
        carry, rows = lax.scan(step, start, inputs, **options)
        return [*carry, *rows]
    if eqn.primitive is while_p:
        n, k = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        goes_on, body = within(params["cond_jaxpr"]), within(params["body_jaxpr"])
        start = list(values[k:])
        return lax.while_loop(
            lambda carry: goes_on(*values[:n], *carry)[0], lambda carry: body(*values[n:k], *carry), start
        )
    if eqn.primitive is cond_p:
        return lax.switch(values[0], [within(branch) for branch in params["branches"]], *values[1:])
    if eqn.primitive.name == SHARD_MAP:
        options = {word: params[word] for word in ("mesh", "in_specs", "out_specs", "check_vma")}
        each = lambda *args: tuple(run(params["jaxpr"], (), args))
        return list(jax.shard_map(each, axis_names=params["newly_manual_axes"], **options)(*values))
    return within(params["jaxpr" if eqn.primitive is jit_p else "call_jaxpr"])(*values)


def _policy(policy: Callable) -> Callable:
    """The same `jax.checkpoint` policy, to which the engine's convolutions are convolutions."""
    return lambda primitive, *args, **params: policy(
        conv_general_dilated_p if primitive in engine.KINDS else primitive, *args, **params
    )


def scanned(params: dict[str, Any], values: Sequence[Any]) -> list[list[Any]]:
    """What the body of a scan finds the same each time, what it passes on, and what it gets row by row."""
    if "ft_in" in params:  # jax 0.12
        return [list(part) for part in params["ft_in"].update(values).unpack()]
    n, k = params["num_consts"], params["num_consts"] + params["num_carry"]
    return [list(values[:n]), list(values[n:k]), list(values[k:])]


def _is_array(leaf):
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))
