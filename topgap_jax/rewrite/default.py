"""Which layer a method takes that is given none."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal
from jax.extend.core.primitives import name_p

from topgap_jax.errors import UserError
from topgap_jax.rewrite.axes import (
    POSITION,
    Axis,
    Reading,
    channels,
    follow,
    images_and_others,
    is_channel,
    is_position,
)
from topgap_jax.rewrite.body import SAME
from topgap_jax.rewrite.interpreter import depending, inline, needed, users

NAME = "topgap_jax.rewrite.name"
NNX = " (the layers of an NNX module have names in models.nnx(module))"


class Features(NamedTuple):
    """A value with positions: where in the program it is computed, and the equations that name it, in their order."""

    place: int
    names: list[JaxprEqn]
    value: Any
    axes: tuple[Axis, ...]


def last_features(closed: ClosedJaxpr, arrays: Sequence[Any]) -> str:
    """The name of the last (b, h, w, c) value that the results depend on, before the class maps and the pooling.

    Last in the order of computation, wherever its name is given. UserError where there is none, where a later one
    stands in a loop or has a name that is met twice, where the positions are mixed after it, and where the axes are (b,
    c, h, w).
    """
    jaxpr = inline(closed, arrays, remat=True).jaxpr
    reading, live = follow(jaxpr, images_and_others(jaxpr)), needed(jaxpr)
    every = [x for x in _features(jaxpr, reading, live) if _is_map(x.value.aval.shape, x.axes)]
    maps = _class_maps(jaxpr, reading)
    before = [x for x in every if not (any(_is_maps(eqn) for eqn in x.names) or channels(x.axes) in maps)]
    loops = [
        (i, x)
        for i, eqn in enumerate(jaxpr.eqns)
        if id(eqn) in live
        for x in reading.inside.get(id(eqn), ())
        if len(x.shape) == 4 and _is_map(x.shape, x.axes)
    ]
    last = before[-1] if before else None
    if loops and (last is None or loops[-1][0] > last.place):
        instead = f"a layer outside it, such as layer='{_label(jaxpr, last, live)}'" if last else "a layer outside it"
        raise UserError(
            f"the last named (b, h, w, c) value, '{loops[-1][1].name}', stands in a loop or another function that"
            f" cannot be entered: give {instead}, or name what comes out of the loop, {NAME}(value, 'features')"
        )
    if last is None:
        where = "before the class maps" if every else "in this function"
        more = "" if every else NNX
        raise UserError(f"no named (b, h, w, c) value {where}: name one with {NAME}(value, 'features'){more}")
    label = _label(jaxpr, last, live)
    if is_channel(last.axes[1]):
        raise _channels_first(f"the last named value before the pooling, '{label}' {last.value.aval.shape},")
    after = depending(jaxpr, [last.value])
    if any(id(eqn) in reading.mixing & live and after.intersection(eqn.outvars) for eqn in jaxpr.eqns):
        raise UserError(
            f"tokens are mixed after '{label}', the last named (b, h, w, c) value: give a later layer (b, n, c) as"
            f" tokens(LAYER, (rows, columns)); where none has a name, {NAME}(tokens, 'tokens') is one; or give"
            f" layer='{label}'"
        )
    return label


def check_axes(closed: ClosedJaxpr, arrays: Sequence[Any], label: str) -> None:
    """UserError where the value of this name has the axes (b, c, h, w), which the convolution that made it tells."""
    jaxpr = inline(closed, arrays, remat=True).jaxpr
    reading = follow(jaxpr, images_and_others(jaxpr))
    for eqn in jaxpr.eqns:
        if eqn.primitive is name_p and eqn.params["name"] == label and eqn.outvars[0].aval.ndim == 4:
            axes = reading.values[eqn.outvars[0]].axes
            if is_channel(axes[1]) and is_position(axes[2]) and not is_channel(axes[3]):
                raise _channels_first(f"layer '{label}' {eqn.outvars[0].aval.shape}")


def _channels_first(what: str) -> UserError:
    return UserError(
        f"{what} has the axes (b, c, h, w): name its transpose,"
        f" {NAME}(value.transpose(0, 2, 3, 1), 'features'), and compute the rest from that"
    )


def _features(jaxpr, reading: Reading, live: set[int]) -> list[Features]:
    """The named values with four axes, in the order of computation."""
    made_by = {v: (i, eqn) for i, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
    of_images = depending(jaxpr, jaxpr.invars)
    batches = {v.aval.shape[0] for v in jaxpr.invars if v.aval.ndim == 4}
    found: dict[Any, Features] = {}
    for eqn in jaxpr.eqns:
        out = eqn.outvars[0]
        if eqn.primitive is not name_p or id(eqn) not in live or out.aval.ndim != 4 or out not in of_images:
            continue
        if batches and out.aval.shape[0] not in batches:
            continue  # windows (b * windows, h, w, c)
        value = eqn.invars[0]
        while value in made_by and made_by[value][1].primitive in SAME:
            value = made_by[value][1].invars[0]
        place = made_by[value][0] if value in made_by else -1
        found.setdefault(value, Features(place, [], value, reading.values[value].axes)).names.append(eqn)
    return sorted(found.values(), key=lambda x: x.place)


def _is_map(shape: Sequence[int], axes: tuple[Axis, ...]) -> bool:
    """Whether the value has more than one position, as (b, h, w, c) or (b, c, h, w).

    No gate (b, 1, 1, c) and no tensor of attention (b, tokens, heads, dim).

    A value of which nothing is known may be one.
    """
    if is_position(axes[0]) or (any(axes) and not any(POSITION in axis for axis in axes[1:])):
        return False
    last = not is_channel(axes[1]) and not is_channel(axes[2]) and not is_position(axes[3])
    first = is_channel(axes[1]) and not is_channel(axes[2]) and not is_channel(axes[3])
    return (last and shape[1] * shape[2] > 1) or (first and shape[2] * shape[3] > 1)


def _class_maps(jaxpr, reading: Reading) -> set[Axis]:
    """The channels of the logits, and of what is named "maps": a value that has these and no others is class maps."""
    ends = [v for v in jaxpr.outvars if not isinstance(v, Literal) and v.aval.ndim == 2]
    ends += [eqn.outvars[0] for eqn in jaxpr.eqns if eqn.primitive is name_p and _is_maps(eqn)]
    return {channels(reading.values[v].axes) for v in ends} - {Axis()}


def _is_maps(eqn: JaxprEqn) -> bool:
    return eqn.params["name"].split("/")[-1] == "maps"


def _label(jaxpr, features: Features, live: set[int]) -> str:
    """The outermost of the value's names that everything behind it is computed from, and rather "stage4" than
    "backbone['stage4']".

    UserError where each of them is met twice.
    """
    calls = [eqn.params["name"] for eqn in jaxpr.eqns if eqn.primitive is name_p]
    unique = [eqn for eqn in features.names if calls.count(eqn.params["name"]) == 1]
    if not unique:
        label = features.names[-1].params["name"]
        raise UserError(
            f"the last (b, h, w, c) value before the pooling is named '{label}', which is met {calls.count(label)}"
            f" times: give it a name of its own, {NAME}(value, 'features'), or give layer="
        )
    used, same, eqn = users(jaxpr), [], unique[0]
    while eqn is not None and eqn.primitive in SAME:
        same += [eqn.params["name"]] if eqn in unique else []
        later = [user for user in used[eqn.outvars[0]] if user is None or id(user) in live]
        eqn = later[0] if len(later) == 1 else None
    return [label for label in same if "[" not in label or label == same[0]][-1]
