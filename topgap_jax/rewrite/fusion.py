"""The passes over memory behind a convolution, done in the convolution's own."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.extend.core.primitives import and_p, custom_jvp_call_p, dot_general_p, gt_p, lt_p, mul_p

from topgap_jax.engine import (
    FORWARD,
    INPUT_GRADIENT,
    Fused,
    available,
    forward_p,
    fused_convolution,
    input_gradient_p,
    stored,
)
from topgap_jax.rewrite.body import is_elementwise
from topgap_jax.rewrite.interpreter import bind, channel_vector, evaluate, reaches, rebuild, subjaxprs, trace, users
from topgap_jax.rewrite.operations import SUMS, is_masked, is_positive, relu_of, zeros_of

LIMITS = {jax.nn.relu: math.inf, jax.nn.relu6: 6.0}
CONVOLUTIONS = {forward_p: FORWARD, input_gradient_p: INPUT_GRADIENT}


class Group(NamedTuple):
    """Equations that become one: the convolution, those after it, the variables of bias, residual and mask (or None).

    limit: the most that a ReLU among them gives, None without.
    """

    convolution: JaxprEqn
    after: list[JaxprEqn]
    bias: Any
    residual: Any
    limit: float | None
    mask: Any


class Plan(NamedTuple):
    """What becomes of the equations of a jaxpr, by their `id`.

    last: the group that an equation ends; passed: those that happen inside a group; compared: comparisons with 0 or a
    limit, and the variable to compare, which after a group is the ReLU's result; flat: those of them that only a group
    needs, as its mask; stored: those whose result is computed once.
    """

    last: dict[int, Group]
    passed: set[int]
    compared: dict[int, Any]
    flat: set[Any]
    stored: set[int]


def fused(f: Callable) -> Callable:
    """f with the engine's convolutions, and their input gradients, fused with the bias, sum, ReLU (ReLU6) or its mask
    behind them; other ReLUs are computed once and their masks read off them, and so are the operands of dense layers.

    For a whole attack step or explanation in eval mode, outermost under `jit`, after differentiation: what it returns
    has no derivative. It needs oneDNN, and is f itself without. Best on `fold_batch_norm(fast_convs(predict))`. Equal
    up to rounding for finite numbers; what is not finite stays so (see `engine.fused_convolution`).
    """

    def merged(*args, **kwargs):
        if jax.default_backend() != "cpu" or not available():
            return f(*args, **kwargs)
        closed, arrays, restore = trace(f, args, kwargs)
        return restore(_evaluate(closed.jaxpr, closed.consts, arrays))

    return merged


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list:
    plan = _plan(jaxpr)

    def rule(eqn, values, read):
        if id(eqn) in plan.passed:
            return [None]  # nobody else reads it
        if id(eqn) in plan.last:
            return [_fused(plan.last[id(eqn)], read, plan.flat)]
        if id(eqn) in plan.compared:
            value = read(plan.compared[id(eqn)])
            # XLA's CPU compares a flat array faster than one with few channels.
            flat = value.reshape(value.shape[0], -1)
            flat = flat > 0 if eqn.primitive is gt_p else flat < eqn.invars[1].val
            return [flat if eqn.outvars[0] in plan.flat else flat.reshape(value.shape)]
        if id(eqn) in plan.stored:
            return [stored(*bind(eqn, values))]
        if reaches(eqn) and any(map(_holds, subjaxprs(eqn))):
            return rebuild(eqn, values, _evaluate)
        return None

    return evaluate(jaxpr, consts, args, rule)


def _fused(group: Group, read: Callable, flat: set) -> Any:
    eqn, extras = group.convolution, []
    left, right = map(read, eqn.invars)
    shape = eqn.outvars[0].aval.shape
    if group.bias is not None:
        extras.append(jnp.broadcast_to(jnp.ravel(jnp.float32(read(group.bias))), shape[3:]))
    if group.residual is not None:
        extras.append(read(group.residual))
    if group.mask is not None:
        mask = read(group.mask)
        extras.append(mask if group.mask in flat else mask.reshape(shape[0], -1))
    present = Fused(*(part is not None for part in (group.bias, group.residual, group.limit, group.mask)))
    if group.limit is not None:
        present = present._replace(limit=group.limit)
    return fused_convolution(CONVOLUTIONS[eqn.primitive], left, right, extras, eqn.params["geometry"], present)


def _plan(jaxpr: Jaxpr) -> Plan:
    used, zeros, plan = users(jaxpr), zeros_of(jaxpr), Plan({}, set(), {}, set(), set())
    made_by = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    place = {id(eqn): i for i, eqn in enumerate(jaxpr.eqns)}
    for eqn in jaxpr.eqns:
        if eqn.primitive not in CONVOLUTIONS or eqn.outvars[0].aval.dtype != jnp.float32:
            continue
        group = Group(eqn, [], None, None, None, None)
        (value,) = eqn.outvars
        if eqn.primitive is forward_p and (found := _sum(value, used, plan)):
            bias = channel_vector(found[1], 3, 4, made_by)
            if bias is not None:
                group, (value,) = group._replace(after=[found[0]], bias=bias), found[0].outvars
        if (found := _sum(value, used, plan)) and _is_like(found[1], value):
            group, (value,) = group._replace(after=[*group.after, found[0]], residual=found[1]), found[0].outvars
        if eqn.primitive is forward_p:
            limits = [(e, limit) for e in used[value] if e is not None and (limit := _limit(e, zeros))]
            others = [e for e in used[value] if not any(e is relu for relu, _ in limits)]
            compared = [e for e in others if e is not None and _is_compared(e, zeros, limits[0][1] if limits else 0)]
            later = all(place[id(limits[0][0])] < place[id(e)] for e in compared) if limits else False
            if len(limits) == 1 and id(limits[0][0]) not in plan.passed and others == compared and later:
                ((relu, limit),) = limits
                group = group._replace(after=[*group.after, relu], limit=limit)
                plan.compared.update({id(e): relu.outvars[0] for e in compared})
        else:
            (user,) = used[value] if len(used[value]) == 1 else (None,)
            if user is not None and is_masked(user, value, zeros):
                mask = user.invars[0]
                group = group._replace(after=[*group.after, user], mask=mask)
                made = [made_by[mask]] if mask in made_by else []
                both = made[0].invars if made and made[0].primitive is and_p else [mask]
                compared = [made_by[v] for v in both if v in made_by and _is_compared(made_by[v], zeros)]
                if len(compared) == len(both) and all(len(used[v]) == 1 for v in {*both, mask}):
                    for e in compared:
                        plan.compared.setdefault(id(e), e.invars[0])
                    plan.flat.update({*both, mask})
        if group.after:
            *before, last = [eqn, *group.after]
            plan.passed.update(map(id, before))
            plan.last[id(last)] = group
    alone = [eqn for eqn in jaxpr.eqns if not (id(eqn) in plan.passed or id(eqn) in plan.last) and _is_large(eqn)]
    for eqn in alone:
        limit = _limit(eqn, zeros)
        if limit is None:
            continue
        values = [v for v in eqn.invars if not isinstance(v, Literal) and v.aval.ndim]
        compared = [e for v in values for e in used[v] if e is not None and _is_compared(e, zeros, limit)]
        if compared and all(place[id(eqn)] < place[id(e)] for e in compared):
            plan.compared.update({id(e): eqn.outvars[0] for e in compared})
            plan.stored.add(id(eqn))
    read = {v for eqn in jaxpr.eqns if eqn.primitive is dot_general_p for v in eqn.invars if not isinstance(v, Literal)}
    plan.stored.update(
        id(eqn)
        for eqn in alone
        if eqn.outvars[0] in read and (is_elementwise(eqn) or eqn.primitive in (*SUMS, mul_p, custom_jvp_call_p))
    )
    return plan


def _is_large(eqn: JaxprEqn) -> bool:
    """Whether the equation gives the images or tokens of a batch, in float32."""
    return len(eqn.outvars) == 1 and eqn.outvars[0].aval.ndim >= 3 and eqn.outvars[0].aval.dtype == jnp.float32


def _sum(value: Any, used: dict, plan: Plan) -> tuple[JaxprEqn, Any] | None:
    """The sum that is the only use of a value, and what is added; None if it is used otherwise, or the sum is
    another's."""
    if len(used[value]) != 1 or used[value][0] is None:
        return None
    (eqn,) = used[value]
    if eqn.primitive not in SUMS or id(eqn) in plan.passed or id(eqn) in plan.last:
        return None
    return eqn, eqn.invars[1 if eqn.invars[0] is value else 0]


def _limit(eqn: JaxprEqn, zeros: set) -> float | None:
    """The most that the equation gives where it is a ReLU; None for any other."""
    return LIMITS.get(relu_of(eqn, zeros))


def _is_compared(eqn: JaxprEqn, zeros: set, limit: float | None = None) -> bool:
    """Whether the equation is value > 0, or value < limit, a number (any, for None)."""
    if eqn.primitive is not lt_p or not isinstance(eqn.invars[1], Literal) or isinstance(eqn.invars[0], Literal):
        return is_positive(eqn, zeros)
    number = eqn.invars[1]
    return number.aval.ndim == 0 and limit in (None, float(number.val))


def _is_like(variable: Any, value: Any) -> bool:
    same = variable.aval.shape == value.aval.shape and variable.aval.dtype == value.aval.dtype
    return same and not isinstance(variable, Literal)


def _holds(jaxpr: Jaxpr) -> bool:
    return any(eqn.primitive in CONVOLUTIONS or any(map(_holds, subjaxprs(eqn))) for eqn in jaxpr.eqns)
