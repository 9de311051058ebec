"""Batch norm in eval mode, folded into the convolution before it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.extend.core.primitives import (
    div_p,
    mul_p,
    name_p,
    remat_p,
)

from topgap_jax.rewrite.affine import STEPS, convolution_axes
from topgap_jax.rewrite.interpreter import (
    bind,
    channel_vector,
    evaluate,
    keeps_derivatives,
    rebuild,
    subjaxprs,
    trace,
    users,
)
from topgap_jax.rewrite.names import NAMING


class Chain(NamedTuple):
    """What happens to a value channel by channel: (equation, position of the value, variable of the factors), several
    times.

    convolution: what the value is the result of, if nothing else uses it; axis: that of the value's channels.
    """

    value: Any
    axis: int
    steps: list[tuple[JaxprEqn, int, Any]]
    convolution: JaxprEqn | None


def fold_batch_norm(f: Callable) -> Callable:
    """f with batch norm as one product and one sum, and in eval mode with the product inside the convolution before it.

    Sums, products and quotients in a row, each with one value per channel (or one in all), directly behind a
    convolution, become v * a + b, whose gradient takes fewer passes over memory. Where nothing else uses the
    convolution's result, as in eval mode, conv(x, w) * a + b becomes conv(x, w * a) + b. Under `tap`, `read` and the
    like every name keeps its value, so that named convolutions stay as they are; a `jax.checkpoint` around all this
    must not go by names, which are gone otherwise. Equal up to rounding; derivatives of any order, by parameters too;
    under jit, remat and loops.
    """

    def folded(*args, **kwargs):
        closed, arrays, restore = trace(f, args, kwargs)
        return restore(_run(closed.jaxpr, closed.consts, arrays, named=NAMING.value is not None))

    return folded


def _run(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], named: bool) -> list:
    """Results of the jaxpr; named: whether somebody may ask for what is named."""
    jaxpr = jaxpr if named else _without_names(jaxpr)
    ends, passed = {}, set()
    for chain in _chains(jaxpr):
        *before, last = [eqn for eqn, _, _ in chain.steps]
        ends[id(last)] = chain
        passed.update(map(id, before))
        if chain.convolution:
            passed.add(id(chain.convolution))

    def rule(eqn, values, read):
        if id(eqn) in passed:
            return [None]  # nobody else reads it
        if id(eqn) in ends:
            return [_folded(ends[id(eqn)], read)]
        if keeps_derivatives(eqn) and any(map(_holds, subjaxprs(eqn))):
            inner = named or eqn.primitive is remat_p  # whose policy may go by names
            return rebuild(eqn, values, lambda body, consts, args: _run(body, consts, args, inner))
        return None

    return evaluate(jaxpr, consts, args, rule)


def _without_names(jaxpr: Jaxpr) -> Jaxpr:
    same, eqns = {}, []
    through = lambda variables: [v if isinstance(v, Literal) else same.get(v, v) for v in variables]
    for eqn in jaxpr.eqns:
        if eqn.primitive is name_p:
            (same[eqn.outvars[0]],) = through(eqn.invars)
        else:
            eqns.append(eqn.replace(invars=through(eqn.invars)))
    return jaxpr.replace(eqns=eqns, outvars=through(jaxpr.outvars))


def _folded(chain: Chain, read: Callable) -> Any:
    aval, axis = chain.value.aval, chain.axis
    channels = aval.shape[axis]
    scale, shift = jnp.ones(channels, aval.dtype), jnp.zeros(channels, aval.dtype)
    for step, position, variable in chain.steps:
        vector = jnp.broadcast_to(jnp.ravel(jnp.asarray(read(variable), aval.dtype)), channels)
        scale, shift = STEPS[step.primitive, position](scale, shift, vector)
    at = lambda vector, axis: jnp.expand_dims(vector, [i for i in range(aval.ndim) if i != axis])
    if chain.convolution is None:
        return read(chain.value) * at(scale, axis) + at(shift, axis)
    images, kernel = map(read, chain.convolution.invars)
    (out,) = bind(chain.convolution, [images, kernel * at(scale, convolution_axes(chain.convolution).rhs_spec[0])])
    return out + at(shift, axis)


def _chains(jaxpr: Jaxpr) -> list[Chain]:
    used, chains, taken = users(jaxpr), [], set()
    made_by = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    for eqn in jaxpr.eqns:
        numbers = convolution_axes(eqn)
        if numbers is None or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
            continue
        starts, axis = [eqn.outvars[0]], numbers.out_spec[1]
        starts += [user.outvars[0] for user in used[starts[0]] if user is not None and user.primitive is name_p]
        while starts:
            value = starts.pop()
            alone = len(used[value]) == 1 and value is eqn.outvars[0] and eqn.invars[1].aval.dtype == value.aval.dtype
            for first in [step for user in used[value] if (step := _step(user, value, axis, made_by, taken))]:
                steps = [first]
                while len(used[last := steps[-1][0].outvars[0]]) == 1:
                    following = _step(used[last][0], last, axis, made_by, taken)
                    if following is None:
                        break
                    steps.append(following)
                scaled = any(step.primitive in (mul_p, div_p) for step, _, _ in steps)
                if scaled and (alone or len(steps) > 1):
                    chains.append(Chain(value, axis, steps, eqn if alone else None))
                    taken.update(id(step) for step, _, _ in steps)
                elif not scaled:
                    starts.append(last)  # behind a bias, say
    return chains


def _step(eqn: JaxprEqn | None, value: Any, axis: int, made_by: dict, taken: set) -> tuple[JaxprEqn, int, Any] | None:
    """The equation as a step of a chain; None if it is none, or another chain's."""
    if eqn is None or id(eqn) in taken or not any(value is v for v in eqn.invars):
        return None
    position = 0 if eqn.invars[0] is value else 1
    if (eqn.primitive, position) not in STEPS or eqn.outvars[0].aval.dtype != value.aval.dtype:
        return None
    vector = channel_vector(eqn.invars[1 - position], axis, value.aval.ndim, made_by)
    return None if vector is None else (eqn, position, vector)


def _holds(jaxpr: Jaxpr) -> bool:
    return bool(_chains(jaxpr)) or any(_holds(body) for eqn in jaxpr.eqns for body in subjaxprs(eqn))
