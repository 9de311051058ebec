"""What the axes of every value of a network are: the batch, positions in the image, or channels, and whose channels.

The axes of the images are given. An equation passes them on (a reshape splits and merges them, a transpose moves them),
and a convolution says itself which of its axes is which. Each convolution or product over channels makes channels of
its own, which have its number: where two values have the same numbers, nothing in between has mixed channels.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.extend.core.primitives import (
    broadcast_in_dim_p,
    cond_p,
    dot_general_p,
    name_p,
    reshape_p,
    scan_p,
    transpose_p,
    while_p,
)

from topgap_jax.rewrite.interpreter import scanned, subjaxprs
from topgap_jax.rewrite.operations import convolution_axes

BATCH, POSITION = "batch", "position"
Axis = frozenset  # of BATCH, POSITION and the numbers of channels: several where axes were merged or values added


class Value(NamedTuple):
    """What the axes of a value are, and whether it depends on the images or on weights (a table of constants does
    not)."""

    axes: tuple[Axis, ...]
    varies: bool


class Named(NamedTuple):
    """A named value in the body of a loop or another equation."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]


class Reading(NamedTuple):
    """What is found in a jaxpr: its values; the equations, by `id`, that give each position something of every other
    one, as attention does; and what has a name inside an equation, by its `id`."""

    values: dict[Any, Value]
    mixing: set[int]
    inside: dict[int, list[Named]]


def images_and_others(jaxpr: Jaxpr) -> list[Value]:
    """The arguments of a network: the first array with four axes are images (b, h, w, c)."""
    found = [Value((Axis(),) * v.aval.ndim, True) for v in jaxpr.invars]
    first = next((i for i, v in enumerate(jaxpr.invars) if v.aval.ndim == 4), None)
    if first is not None:
        image = (Axis({BATCH}), Axis({POSITION}), Axis({POSITION}), Axis({0}))
        found[first] = Value(_sized(image, jaxpr.invars[first].aval.shape), True)
    return found


def follow(jaxpr: Jaxpr, arguments: Sequence[Value], numbers: Iterator[int] | None = None) -> Reading:
    """The axes of every value of the jaxpr, from those of its arguments."""
    numbers = itertools.count(1) if numbers is None else numbers
    values = {v: Value((Axis(),) * v.aval.ndim, True) for v in jaxpr.constvars}
    values |= dict(zip(jaxpr.invars, arguments, strict=True))
    reading = Reading(values, set(), {})
    for eqn in jaxpr.eqns:
        operands = [Value((Axis(),) * v.aval.ndim, False) if isinstance(v, Literal) else values[v] for v in eqn.invars]
        varies = any(operand.varies for operand in operands)
        for v, axes in zip(eqn.outvars, _results(eqn, operands, numbers, reading), strict=True):
            values[v] = Value(_sized(axes, v.aval.shape), varies)
    return reading


def channels(axes: Sequence[Axis]) -> Axis:
    """The numbers of the channels among the axes."""
    return Axis(label for axis in axes for label in axis if isinstance(label, int))


def is_channel(axis: Axis) -> bool:
    return bool(axis) and all(isinstance(label, int) for label in axis)


def is_position(axis: Axis) -> bool:
    return axis == {POSITION}


def _sized(axes: Sequence[Axis], shape: Sequence[int]) -> tuple[Axis, ...]:
    """An axis of length 1 holds neither positions nor a batch."""
    return tuple(axis if size > 1 else channels((axis,)) for axis, size in zip(axes, shape, strict=True))


def _results(eqn: JaxprEqn, operands: list[Value], numbers: Iterator[int], reading: Reading) -> list[tuple[Axis, ...]]:
    """The axes of the equation's results."""
    shapes = [v.aval.shape for v in eqn.outvars]
    if convolution := convolution_axes(eqn):
        source, out = operands[0].axes, [Axis()] * len(shapes[0])
        for here, there in zip(convolution.lhs_spec, convolution.out_spec):
            out[there] = Axis({POSITION}) | (source[here] - channels(source))
        out[convolution.out_spec[0]] = source[convolution.lhs_spec[0]]
        out[convolution.out_spec[1]] = Axis({next(numbers)})
        return [tuple(out)]
    if eqn.primitive is dot_general_p:
        axes, mixes = _product(eqn, operands, next(numbers))
        reading.mixing.update({id(eqn)} if mixes else ())
        return [axes]
    if eqn.primitive is reshape_p:
        return [_reshaped(operands[0].axes, eqn.invars[0].aval.shape, shapes[0])]
    if eqn.primitive is transpose_p:
        return [tuple(operands[0].axes[i] for i in eqn.params["permutation"])]
    if eqn.primitive is broadcast_in_dim_p:
        out = [Axis()] * len(shapes[0])
        for axis, size, place in zip(operands[0].axes, eqn.invars[0].aval.shape, eqn.params["broadcast_dimensions"]):
            out[place] = axis if size == shapes[0][place] else Axis()
        return [tuple(out)]
    if bodies := _bodies(eqn, operands):
        return _inside(eqn, bodies, numbers, reading)
    dropped = eqn.params.get("axes", eqn.params.get("dimensions"))  # of reductions, argmax and squeeze
    kept = [_without(operand.axes, dropped or ()) for operand in operands]
    return [_joined([axes for axes in kept if len(axes) == len(shape)], len(shape)) for shape in shapes]


def _without(axes: tuple[Axis, ...], dropped: Sequence[int]) -> tuple[Axis, ...]:
    return tuple(axis for i, axis in enumerate(axes) if i not in dropped)


def _joined(several: Sequence[tuple[Axis, ...]], ndim: int) -> tuple[Axis, ...]:
    """Axis by axis all that the values say: of a sum, a selection, a concatenation, and of any equation not known
    here."""
    return tuple(Axis().union(*(axes[i] for axes in several)) for i in range(ndim))


def _reshaped(axes: Sequence[Axis], old: Sequence[int], new: Sequence[int]) -> tuple[Axis, ...]:
    out, i, j = [], 0, 0
    while j < len(new):
        merged, length, first, size = Axis(), 1, j, new[j]
        j += 1
        while length != size:
            if length < size and i < len(old):
                merged, length, i = merged | axes[i], length * old[i], i + 1
            elif j < len(new):
                size, j = size * new[j], j + 1
            else:
                break
        out += [merged] * (j - first)
    return tuple(out)


def _product(eqn: JaxprEqn, operands: list[Value], number: int) -> tuple[tuple[Axis, ...], bool]:
    """Axes of a matrix product, and whether it gives each position something of every other one.

    It does where the positions are summed over and there are still positions in the result, as in attention and in an
    MLP over tokens; not where nothing in one operand varies, as in the resizing of a map.
    """
    (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    sides = list(zip(operands, (left, right), (left_batch, right_batch)))
    summed = Axis().union(*(operand.axes[i] for operand, over, _ in sides for i in over))
    positions = any(operands[0].axes[i] | operands[1].axes[j] == {POSITION} for i, j in zip(left, right))
    free = [_without(operand.axes, (*over, *batch)) for operand, over, batch in sides]
    # The axes of a kernel, of which nothing is known, are the channels that it makes; behind a sum over positions,
    # positions.
    fresh = Axis({number}) if channels((summed,)) else Axis({POSITION}) & summed
    free = [
        axes if any(operand.axes) else (fresh,) * len(axes) for (operand, _, _), axes in zip(sides, free, strict=True)
    ]
    batch = tuple(operands[0].axes[i] | operands[1].axes[j] for i, j in zip(left_batch, right_batch))
    axes = (*batch, *free[0], *free[1])
    mixes = positions and all(free) and all(operand.varies for operand in operands)
    return axes, mixes and any(POSITION in axis for axis in axes)


def _bodies(eqn: JaxprEqn, operands: list[Value]) -> list[tuple[Jaxpr, list[Value], list[Value]]]:
    """The jaxprs inside the equation, their arguments, and those of them that a loop passes on from round to round."""
    params = eqn.params
    if eqn.primitive is scan_p:
        constants, carry, rows = scanned(params, operands)
        rows = [Value(row.axes[1:], row.varies) for row in rows]
        return [(params["jaxpr"].jaxpr, [*constants, *carry, *rows], carry)]
    if eqn.primitive is while_p:
        n, k = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        return [(params["body_jaxpr"].jaxpr, operands[n:], operands[k:])]
    if eqn.primitive is cond_p:
        return [(branch.jaxpr, operands[1:], []) for branch in params["branches"]]
    return [(body, operands, []) for body in subjaxprs(eqn) if len(body.invars) == len(operands)][:1]


def _inside(eqn: JaxprEqn, bodies: list, numbers: Iterator[int], reading: Reading) -> list[tuple[Axis, ...]]:
    """The axes of the results of an equation with bodies; a loop is followed for one round."""
    results = [[(Axis(),) * v.aval.ndim] for v in eqn.outvars]
    for body, arguments, carry in bodies:
        there = follow(body, arguments, numbers)
        reading.mixing.update({id(eqn)} if there.mixing else ())
        names = [e for e in body.eqns if e.primitive is name_p]
        found = [Named(e.params["name"], e.outvars[0].aval.shape, there.values[e.outvars[0]].axes) for e in names]
        reading.inside.setdefault(id(eqn), []).extend((*found, *itertools.chain(*there.inside.values())))
        outs = [() if isinstance(v, Literal) else there.values[v].axes for v in body.outvars]
        for result, axes in zip(results, outs, strict=True):
            result.append((Axis(),) * (len(result[0]) - len(axes)) + axes)  # what a scan stacks has one axis more
        for result, before in zip(results, carry):
            result.append(before.axes)
    return [_joined(several, len(several[0])) for several in results]
