"""The way back from a classifier's logits to the features that it pools: global average pooling and a dense layer,
however written."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.extend.core.primitives import broadcast_in_dim_p, name_p, transpose_p

from topgap_jax.errors import UserError
from topgap_jax.rewrite.axes import follow, images_and_others, is_channel, is_position
from topgap_jax.rewrite.body import SAME, SHAPE
from topgap_jax.rewrite.interpreter import depending, needed, subjaxprs, users
from topgap_jax.rewrite.operations import SCALE, SUMS, Dense, dense, is_whole, summed_axes

BATCH, POSITION, CHANNEL = "batch", "position", "channel"  # what an axis is; None: an axis of length 1
Labels = tuple[str | None, ...]


class Step(NamedTuple):
    """An equation on the way, which of its operands is on it, and what the axes of its result are."""

    eqn: JaxprEqn
    operand: int
    labels: Labels


class Walk(NamedTuple):
    """What leads from features to logits, in the order of computation.

    features: the variable; order: its axes as (b, h, w, c); before, after: steps on either side of the product, which
    is None where the features are class maps already; end: the equation whose result the pooled class maps replace.
    """

    features: Any
    order: tuple[int, ...]
    before: list[Step]
    product: tuple[Step, Dense] | None
    after: list[Step]
    end: JaxprEqn


def walk_from(jaxpr: Jaxpr, target: JaxprEqn, full: str) -> Walk:
    """The walk from the dense layer's output, which is named `full` by `target`.

    An output with positions is class maps, whose pooling comes behind it: the walk starts from its end. UserError for
    anything but reshapes, transposes, dropout, factors and one product on the way.
    """
    made_by = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    of_images = depending(jaxpr, jaxpr.invars)
    pooled_first = _has_no_positions(target.outvars[0].aval.shape)
    end = target if pooled_first else _end_of_pooling(jaxpr, target, full, of_images)
    variable, labels = end.outvars[0], _labels_of(end.outvars[0].aval.shape)
    product, steps, after = None, [], []

    def stop(what: str) -> UserError:
        names = [step.eqn.params["name"] for step in steps if step.eqn.primitive is name_p]
        where = f", before the output of '{names[-1]}'" if product and names else ""
        return _stop(f"on the way back from '{full}' there is {what}{where}")

    while (pooled_first and product is None) or labels.count(POSITION) < 2:
        eqn = made_by.get(variable)
        if eqn is None:
            raise stop("the function's own input, and no pooling")
        adds, scales = product is None, product is not None or not pooled_first
        operand = _operand(eqn, of_images)
        layer = dense(eqn, operand) if adds and operand is not None else None
        step = Step(eqn, operand, labels)
        if layer and labels[layer.classes] == CHANNEL:
            product, after, steps = (step, layer), steps[::-1], []
            labels = _in_front_of(layer, labels, eqn.invars[operand].aval.ndim)
        else:
            sums = summed_axes(eqn) is not None and (product or not pooled_first)
            allowed = eqn.primitive in SAME + SHAPE + SUMS * adds + SCALE * scales
            if not allowed and not sums:
                raise stop(_what(eqn))
            if operand is None:
                raise stop(f"{_what(eqn)} of values that both depend on the images, or of none")
            labels = _before(step, made_by, stop)
            steps.append(step)
        variable = eqn.invars[operand]
    shape = variable.aval.shape
    if len(shape) != 4 or labels.count(CHANNEL) != 1 or labels.count(POSITION) != 2:
        raise stop(f"a mean over a value of shape {shape}, not over the positions of (b, h, w, c)")
    positions, channel = [i for i in range(4) if labels[i] == POSITION], labels.index(CHANNEL)
    known = follow(jaxpr, images_and_others(jaxpr)).values[variable].axes
    if is_position(known[channel]) or any(is_channel(known[i]) for i in positions):
        raise stop(f"a mean over the channels of a value of shape {shape}")
    (batch,) = {0, 1, 2, 3} - {*positions, channel}
    return Walk(variable, (batch, *positions, channel), steps[::-1], product, after, end)


def _end_of_pooling(jaxpr: Jaxpr, target: JaxprEqn, full: str, of_images: set) -> JaxprEqn:
    """The last equation of the pooling behind class maps, with what scales its result."""
    used, live = users(jaxpr), needed(jaxpr)
    variable, end = target.outvars[0], None
    while True:
        later = [eqn for eqn in used[variable] if eqn is None or id(eqn) in live]
        eqn = later[0] if len(later) == 1 else None
        known = eqn and (eqn.primitive in SAME + SHAPE + SCALE + SUMS or (summed_axes(eqn) is not None and end is None))
        if not known or _operand(eqn, of_images) is None:
            break
        out = eqn.outvars[0]
        if end is not None and (eqn.primitive is transpose_p or out.aval.size != variable.aval.size):
            break
        end, variable = eqn if _has_no_positions(out.aval.shape) else None, out
    if end is None:
        what = _what(eqn) if eqn else "its pooling" if later else "nothing"
        raise _stop(
            f"behind '{full}', a map of shape {target.outvars[0].aval.shape}, there is {what}, no mean over its"
            " positions"
        )
    return end


def _operand(eqn: JaxprEqn, of_images: set) -> int | None:
    """The operand that depends on the images; None where not exactly one does."""
    found = [i for i, v in enumerate(eqn.invars) if not isinstance(v, Literal) and v in of_images]
    return found[0] if len(found) == 1 else None


def _has_no_positions(shape: tuple[int, ...]) -> bool:
    return sum(size > 1 for size in shape[1:]) <= 1


def _labels_of(shape: tuple[int, ...]) -> Labels:
    """Those of a value (b, k), with axes of length 1 or without."""
    channel = max((i for i, size in enumerate(shape) if size > 1 and i), default=len(shape) - 1)
    return tuple(BATCH if i == 0 else CHANNEL if i == channel else None for i in range(len(shape)))


def _in_front_of(layer: Dense, labels: Labels, ndim: int) -> Labels:
    return tuple(CHANNEL if i == layer.channels else labels[layer.axes[i]] for i in range(ndim))


def _before(step: Step, made_by: dict, stop: Callable) -> Labels:
    """The labels of the operand, from those of the result."""
    eqn, labels = step.eqn, step.labels
    shape, out = eqn.invars[step.operand].aval.shape, eqn.outvars[0].aval.shape
    summed = summed_axes(eqn)
    if summed is not None:
        if not is_whole(eqn):
            window = tuple(eqn.params["window_dimensions"])
            raise stop(f"an average pool with window {window} over a value of shape {shape}, not over all of it")
        rest = iter(labels if len(out) < len(shape) else [x for i, x in enumerate(labels) if i not in summed])
        return tuple(POSITION if i in summed else next(rest) for i in range(len(shape)))
    if eqn.primitive is transpose_p:
        order = eqn.params["permutation"]
        return tuple(labels[order.index(i)] for i in range(len(shape)))
    if eqn.primitive in SHAPE:
        return _reshaped(labels, out, shape, stop)
    if shape != out:
        raise stop(f"{_what(eqn)} of a value of shape {shape}, which becomes {out}")
    others = [v for i, v in enumerate(eqn.invars) if i != step.operand]
    if eqn.primitive in SCALE + SUMS and not all(_same_everywhere(v, labels, made_by) for v in others):
        raise stop(f"{_what(eqn)} by a value for each position")
    return labels


def _same_everywhere(variable: Any, labels: Labels, made_by: dict) -> bool:
    """Whether a factor of a value with these labels is one for all positions."""
    eqn = None if isinstance(variable, Literal) else made_by.get(variable)
    if eqn is not None and eqn.primitive is broadcast_in_dim_p:
        shape, places = eqn.invars[0].aval.shape, eqn.params["broadcast_dimensions"]
    else:
        shape, places = variable.aval.shape, range(variable.aval.ndim)
    return all(size == 1 or labels[place] != POSITION for size, place in zip(shape, places))


def _reshaped(labels: Labels, out: tuple[int, ...], shape: tuple[int, ...], stop: Callable) -> Labels:
    """In front of a change of shape that adds or removes axes of length 1, or makes one axis of the positions."""
    before: list[str | None] = [None] * len(shape)
    places = [i for i, size in enumerate(shape) if size > 1]
    fits = True
    for size, label in zip(out, labels):
        if size == 1 and label != CHANNEL:
            continue
        length, taken = 1, []
        while places and (length < size or not taken):
            taken.append(places.pop(0))
            length *= shape[taken[-1]]
        fits = fits and length == size and (len(taken) == 1 or label == POSITION)
        for i in taken:
            before[i] = label
    if places or not fits:
        flat = ": features flattened, not pooled" if len(shape) > 2 else ""
        raise stop(f"a change of shape from {shape} to {out}{flat}")
    return tuple(before)


def _stop(what: str) -> UserError:
    return UserError(
        f"with_pool: {what}; it must be global average pooling (a mean over the spatial axes, or a full-window average"
        " pool) and this dense layer or 1x1 convolution, behind it or before it, with nothing but reshapes, transposes"
        " and dropout between"
    )


def _what(eqn: JaxprEqn) -> str:
    """'custom_jvp_call' (relu): a primitive, and the name of the function in it where there is one."""
    bodies = [body.debug_info.func_name for body in subjaxprs(eqn) if body.debug_info is not None]
    return f"'{eqn.primitive.name}'" + (f" ({bodies[0]})" if bodies else "")


def laid_out(value: Any, labels: Labels) -> Any:
    """A factor or bias of the value with these labels, as (b, 1, 1, c); it is the same at every position."""
    if value.ndim == 0:
        return value
    value = value[tuple(0 if label == POSITION else slice(None) for label in labels)]
    labels = tuple(label for label in labels if label != POSITION)
    order = sorted(range(len(labels)), key=lambda i: (labels[i] == CHANNEL, labels[i] != BATCH))
    channels = value.shape[labels.index(CHANNEL)]
    return value.transpose(order).reshape(-1, 1, 1, channels)


def positions_summed(eqn: JaxprEqn) -> int:
    """How many positions a sum is over."""
    return math.prod(eqn.invars[0].aval.shape[i] for i in summed_axes(eqn))
