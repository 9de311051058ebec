"""Operations with a derivative that is zero, or that says nothing of their jumps: rounding, sign, steps, thresholds.

Recognised only where their value depends on a floating-point argument: not in random masks, nor behind `stop_gradient`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn, Literal
from jax.extend.core.primitives import (
    ceil_p,
    floor_p,
    ge_p,
    gt_p,
    jit_p,
    le_p,
    lt_p,
    round_p,
    select_n_p,
    sign_p,
)

from topgap_jax.rewrite.body import (
    ELEMENTWISE,
    SAME,
    SPREADING,
    Body,
    Operation,
    ancestors,
    as_it_stands,
    before,
    is_float,
    literal,
    reshapes,
)
from topgap_jax.rewrite.interpreter import bind

COMPARISONS = (gt_p, ge_p, lt_p, le_p)


def rounding(eqn: JaxprEqn, body: Body) -> Operation | None:
    """round(x), by any method."""
    return _of_floats(eqn, body) if eqn.primitive is round_p else None


def floor(eqn: JaxprEqn, body: Body) -> Operation | None:
    """floor(x), ceil(x), x // c, or x converted to a whole number and back, as a quantised picture is."""
    if eqn.primitive in (floor_p, ceil_p) or (eqn.primitive is jit_p and eqn.params["name"] == "floor_divide"):
        return _of_floats(eqn, body)
    conversions, value = _converted(eqn, body)
    if len(conversions) < 2 or not is_float(value) or value not in body.floating:
        return None
    return Operation(lambda x: _applied(conversions, x), (value,))


def sign(eqn: JaxprEqn, body: Body) -> Operation | None:
    """sign(x)."""
    return _of_floats(eqn, body) if eqn.primitive is sign_p else None


def step(eqn: JaxprEqn, body: Body) -> Operation | None:
    """The number 1[upper > lower], of these two, or where(upper > lower, above, below), of these four.

    above and below are what no compared value is a part of: not of a leaky ReLU, nor of an ELU.
    """
    conversions, value = _converted(eqn, body)
    made = _made(value, body) if conversions else eqn
    selected = None if made is None else _selected(made)
    if selected:
        mask, *values = (made.invars[i] for i in selected)
    elif conversions and value.aval.dtype == bool:
        mask, values = value, []
    else:
        return None
    comparison = _comparison(mask, body)
    if comparison is None or not is_float(eqn.outvars[0]) or eqn.outvars[0] not in body.floating:
        return None
    compared = [v for v in comparison.invars if not isinstance(v, Literal) and v in body.floating]
    if not compared or any(_share(one, value, body) for one in compared for value in values):
        return None
    order = (1, 0) if comparison.primitive in (lt_p, le_p) else (0, 1)

    def function(*operands):
        (result,) = bind(comparison, [operands[i] for i in order])
        if selected:
            (result,) = bind(made, _placed(selected, (result, *operands[2:])))
        return _applied(conversions, result)

    return Operation(function, (*(comparison.invars[i] for i in order), *values))


def threshold(eqn: JaxprEqn, body: Body) -> Operation | None:
    """where(mask, x, constant) or where(mask, constant, x), of x, mask and constant, if x is compared for the mask.

    The constant is no function of x, or one that is the same over some axes, as a mean of the batch. Where the
    comparison is with the constant itself it is a maximum or minimum, a ReLU, with a derivative that serves.
    """
    selected = _selected(eqn)
    if selected is None or not is_float(eqn.outvars[0]):
        return None
    mask, above, below = (eqn.invars[i] for i in selected)
    select = lambda mask, above, below: bind(eqn, _placed(selected, (mask, above, below)))[0]
    if _is_gated(above, below, mask, eqn, body):
        return Operation(lambda x, mask, constant: select(mask, x, constant), (above, mask, below))
    if _is_gated(below, above, mask, eqn, body):
        return Operation(lambda x, mask, constant: select(mask, constant, x), (below, mask, above))
    return None


def _is_gated(x: Any, constant: Any, mask: Any, eqn: JaxprEqn, body: Body) -> bool:
    """Whether of a select's two values the one is compared for the mask, and the other a constant beside it."""
    if isinstance(x, Literal) or not {x, eqn.outvars[0]} <= body.floating or x.aval.shape != eqn.outvars[0].aval.shape:
        return False
    compared = [v for comparison in _comparisons(mask, body) for v in _variables(comparison)]
    if not any(_is_same(x, source, body) for v in compared for source in ancestors(v, body)):
        return False
    if _is_full(constant, x, body) and x in ancestors(constant, body):
        return False
    comparison = _comparison(mask, body)
    return comparison is None or not _is_limit(comparison, x, constant, body)


def _placed(selected: tuple[int, int, int], values: Sequence[Any]) -> list[Any]:
    """Mask, value where it is true and where it is not, in the order of the operands."""
    return [value for _, value in sorted(zip(selected, values), key=lambda pair: pair[0])]


def _converted(eqn: JaxprEqn, body: Body) -> tuple[list[JaxprEqn], Any]:
    """The conversions that end with this one, last first, back to a floating-point number, or a mask or whole number
    that something else makes; and what they convert."""
    conversions, value = [], eqn.outvars[0]
    while (made := _made(value, body)) is not None and made.primitive in SAME:
        if isinstance(made.invars[0], Literal):
            break
        conversions.append(made)
        value = made.invars[0]
        if is_float(value):
            break
    return conversions, value


def _applied(conversions: Sequence[JaxprEqn], value: Any) -> Any:
    for conversion in reversed(conversions):
        (value,) = bind(conversion, [value])
    return value


def _of_floats(eqn: JaxprEqn, body: Body) -> Operation | None:
    has_gradient = {eqn.invars[0], eqn.outvars[0]} <= body.floating if not isinstance(eqn.invars[0], Literal) else False
    return as_it_stands(eqn) if has_gradient and is_float(eqn.outvars[0]) else None


def _selected(eqn: JaxprEqn) -> tuple[int, int, int] | None:
    """Which operands of the equation are mask, value where it is true and where it is not: of a select of two, or of
    a `jnp.where`, which is one under `jit`. None for another equation."""
    if eqn.primitive is select_n_p and len(eqn.invars) == 3:
        return (0, 2, 1) if eqn.invars[0].aval.dtype == bool else None
    if eqn.primitive is not jit_p or eqn.params["name"] != "_where":
        return None
    inner = eqn.params["jaxpr"].jaxpr
    made_by = {v: e for e in inner.eqns for v in e.outvars}
    select = made_by.get(inner.outvars[0])
    if select is None or select.primitive is not select_n_p or len(inner.invars) != 3:
        return None
    places = []
    for v in (select.invars[0], select.invars[2], select.invars[1]):
        while v in made_by and made_by[v].primitive.name in SPREADING:
            v = made_by[v].invars[0]
        if v not in inner.invars:
            return None
        places.append(inner.invars.index(v))
    return tuple(places) if len(set(places)) == 3 else None


def _made(variable: Any, body: Body) -> JaxprEqn | None:
    return None if isinstance(variable, Literal) else body.made_by.get(variable)


def _comparison(mask: Any, body: Body) -> JaxprEqn | None:
    """The comparison of floating-point numbers that the mask is, None where it is anything else."""
    made = _made(mask, body)
    return made if made is not None and made.primitive in COMPARISONS and is_float(made.invars[0]) else None


def _comparisons(mask: Any, body: Body) -> Iterator[JaxprEqn]:
    """All comparisons of floating-point numbers that the mask is made of by `and`, `or`, `not` and changes of shape."""
    waiting = [mask]
    while waiting:
        made = _made(waiting.pop(), body)
        if made is not None and _comparison(made.outvars[0], body):
            yield made
        elif made is not None:
            waiting += [v for v in made.invars if v.aval.dtype == bool]


def _variables(eqn: JaxprEqn) -> list[Any]:
    return [v for v in eqn.invars if not isinstance(v, Literal)]


def _share(compared: Any, value: Any, body: Body) -> bool:
    """Whether the value is computed from what is compared, or both element by element from the same."""
    each = lambda eqn: eqn.primitive.name in ELEMENTWISE or reshapes(eqn)
    both = ancestors(compared, body, each) & ancestors(value, body, each) & body.floating
    return bool(both) or compared in ancestors(value, body)


def _is_same(a: Any, b: Any, body: Body) -> bool:
    """Whether two variables are one, or one value that is computed twice, element by element."""
    if isinstance(a, Literal) or isinstance(b, Literal):
        return isinstance(a, Literal) and isinstance(b, Literal) and _is_equal(a, b)
    first, second = _made(a, body), _made(b, body)
    if a is b or first is None or second is None:
        return a is b
    each = first.primitive.name in ELEMENTWISE or reshapes(first)
    if not each or first.primitive is not second.primitive or first.params != second.params:
        return False
    return all(_is_same(v, w, body) for v, w in zip(first.invars, second.invars))


def _is_equal(a: Literal, b: Literal) -> bool:
    return a.aval.ndim == b.aval.ndim == 0 and np.float32(a.val) == np.float32(b.val)


def _is_full(constant: Any, x: Any, body: Body) -> bool:
    """Whether the constant has a value of its own for each of x."""
    return not isinstance(constant, Literal) and before(constant, body, reshapes).aval.size >= x.aval.size


def _is_limit(comparison: JaxprEqn, x: Any, constant: Any, body: Body) -> bool:
    """Whether x itself is compared with the constant."""
    left, right = (before(v, body, reshapes) for v in comparison.invars)
    source = before(x, body, reshapes)
    if source not in (left, right):
        return False
    limit, constant = (literal(v, body) for v in (comparison.invars[1 if left is source else 0], constant))
    if isinstance(limit, Literal) and isinstance(constant, Literal):
        return _is_equal(limit, constant)
    if isinstance(limit, Literal) or isinstance(constant, Literal):
        return False
    return before(limit, body, reshapes) is before(constant, body, reshapes)
