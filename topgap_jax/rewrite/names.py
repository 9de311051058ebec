"""Any layer of any model: values of a traced function have names, and can be read or replaced by them.

While a function is traced here, every array that a Flax submodule returns gets the submodule's path as its name, e.g.
"backbone/stage3/block0/conv1". Anyone else writes `name(value, "features")` where they want one. A layer is given by
its full name or by any trailing part of it that is unique: "stage3". `tokens(layer, grid)` takes a value (b, n, c) as
features (b, h, w, c), wherever a layer is taken.
"""

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.extend.core.primitives import name_p

from topgap_jax.errors import UserError
from topgap_jax.rewrite.default import NNX, check_axes, last_features
from topgap_jax.rewrite.interpreter import enters, evaluate, rebuild, subjaxprs, trace
from topgap_jax.rewrite.tokens import Tokens
from topgap_jax.types import Array

# Part of the key of JAX's trace caches: a jitted function is traced once with names and once without, and both stay
# warm.
NAMING = jax.make_user_context(default_value=None)


class Layer(NamedTuple):
    """A named value: its name, shape, how often it occurs, and whether it stands where it can be tapped."""

    name: str
    shape: tuple[int, ...]
    calls: int
    reachable: bool


def name(value: Array, label: str) -> Array:
    """`value`, named `label` for `tap`, `read` and `layers`; otherwise the identity."""
    return checkpoint_name(value, label)


@contextlib.contextmanager
def naming():
    """While this is open, Flax submodules name what they return. Nested, it does nothing: nothing is named twice."""
    if NAMING.value is not None:
        yield
        return
    with NAMING(True), nn.intercept_methods(_name_outputs):
        yield


def layers(f: Callable, *args: Any, **kwargs: Any) -> list[Layer]:
    """The named values of f(*args) in the order of computation: Layer(name, shape, calls, reachable) each."""
    with naming():
        closed, _, _ = trace(f, args, kwargs)
    return _layers(closed.jaxpr)


def tap(f: Callable, layer: str | Tokens, edit: Callable[[Array], Array]) -> Callable:
    """f with the value named `layer` replaced by `edit(value)`, which must keep its shape.

    Raises UserError for an unknown name, one met twice, and one inside `scan` or another primitive that cannot be
    entered.
    """
    return lambda *args, **kwargs: _run(f, layer, lambda value: (edit(value), None), args, kwargs)[0]


def read(f: Callable, layer: str | Tokens | None = None) -> Callable:
    """f that returns (result, value named `layer`); by default the last (b, h, w, c) value before the pooling."""
    return lambda *args, **kwargs: _run(f, layer, lambda value: (value, value), args, kwargs)


def default_layer(f: Callable, *args: Any, **kwargs: Any) -> str:
    """Name of the last (b, h, w, c) value with more than one position that the logits depend on, before class maps and
    pooling.

    Last in the order of computation. Tensors of attention (b, tokens, heads, dim) are none, nor are class maps under
    any name, whose Grad-CAM is CAM again. UserError, which says what to give, where there is none, where a later one
    stands in a loop, where tokens are mixed after it, and where the axes are (b, c, h, w).
    """
    return feature_layer(f, None, *args, **kwargs)


def feature_layer(f: Callable, layer: str | Tokens | None, *args: Any, **kwargs: Any) -> str | Tokens:
    """`layer` by its full name, whose value a method takes as features (b, h, w, c), or the default layer for None.

    UserError for an unknown layer, and where the axes of its value are (b, c, h, w).
    """
    with naming():
        closed, arrays, _ = trace(f, args, kwargs)
        return feature_layer_of(closed, arrays, layer)


def feature_layer_of(closed: ClosedJaxpr, arrays: Sequence[Any], layer: str | Tokens | None) -> str | Tokens:
    """`feature_layer` of a function that has been traced while `naming` was open."""
    if layer is None:
        return last_features(closed, arrays)
    if isinstance(layer, Tokens):
        return layer._replace(layer=resolve(layer.layer, _layers(closed.jaxpr)))
    full = resolve(layer, _layers(closed.jaxpr))
    check_axes(closed, arrays, full)
    return full


def resolve(layer: str, found: list[Layer]) -> str:
    """The full name that `layer` stands for."""
    names = [x.name for x in found]
    if not isinstance(layer, str):
        raise UserError(f"a layer is named by a text such as 'stage3', got {layer!r}")
    matches = [layer] if layer in names else [n for n in names if n.endswith("/" + layer)]
    listed = f"layers: {', '.join(names)}" if names else f"the function has no named values{NNX}"
    if not matches:
        raise UserError(f"no layer '{layer}'; {listed}")
    if len(matches) > 1:
        raise UserError(f"layer '{layer}' is not unique: {', '.join(matches)}; give more of its path")
    chosen = next(x for x in found if x.name == matches[0])
    if chosen.calls > 1:
        raise UserError(
            f"layer '{chosen.name}' is met {chosen.calls} times, so it is not clear which is meant; {listed}"
        )
    if not chosen.reachable:
        raise UserError(
            f"layer '{chosen.name}' lies inside a loop or another function that cannot be entered; {listed}"
        )
    return chosen.name


def _name_outputs(next_fun, args, kwargs, context):
    out = next_fun(*args, **kwargs)
    if context.method_name != "__call__" or not context.module.path:
        return out
    return name_tree(out, "/".join(context.module.path))


def name_tree(out: Any, label: str) -> Any:
    """An array named `label`; the arrays of a tuple or dict named `label[key]`. A container that takes none is left as
    it is."""
    if isinstance(out, dict):
        # Not by jax.tree: it would hand the dict back with sorted keys, and a caller may go by their order.
        try:
            named = copy.copy(out)  # with what a subclass has besides its items
            for key, value in out.items():
                named[key] = name_tree(value, f"{label}[{key!r}]")
        except Exception:  # a subclass that is not to be copied or changed
            return out
        return named
    return jax.tree_util.tree_map_with_path(
        lambda path, x: checkpoint_name(x, label + jax.tree_util.keystr(path)) if isinstance(x, jax.Array) else x, out
    )


def _run(f, layer, edit, args, kwargs, features=False):
    """(result of f with the named value replaced, told), where edit(value) -> (replacement, told).

    features: whether the value is taken as (b, h, w, c), so that (b, c, h, w) is an error.
    """
    if isinstance(layer, Tokens):
        return _run(f, layer.layer, lambda value: layer.edit(value, edit), args, kwargs)
    with naming():
        closed, arrays, restore = trace(f, args, kwargs)
        plain = layer is not None and not features
        full = resolve(layer, _layers(closed.jaxpr)) if plain else feature_layer_of(closed, arrays, layer)
        outs, told = _replace(closed.jaxpr, closed.consts, arrays, full, edit)
    return restore(outs), told


def _replace(jaxpr: Jaxpr, consts, args, full: str, edit):
    """Results of the jaxpr with the named value edited, and what the edit tells (None where the value does not
    occur)."""
    told = []

    def rule(eqn, values, read):
        if eqn.primitive is name_p and eqn.params["name"] == full:
            after, tells = edit(values[0])
            told.append(tells)
            after = jnp.asarray(after, values[0].dtype)
            if after.shape != values[0].shape:
                raise UserError(
                    f"tap: '{full}' has shape {values[0].shape}, its replacement {after.shape}; they must agree"
                )
            # The name is given again, so that nested taps find it.
            return [checkpoint_name(after, full)]
        if enters(eqn) and any(_holds(body, full) for body in subjaxprs(eqn)):
            outs, tells = rebuild(eqn, values, lambda body, consts, args: _replace(body, consts, args, full, edit))
            told.append(tells)
            return outs
        return None

    outs = evaluate(jaxpr, consts, args, rule)
    return outs, (told[0] if told else None)


def _holds(jaxpr: Jaxpr, full: str) -> bool:
    return any(
        (eqn.primitive is name_p and eqn.params["name"] == full) or any(_holds(body, full) for body in subjaxprs(eqn))
        for eqn in jaxpr.eqns
    )


def _layers(jaxpr: Jaxpr) -> list[Layer]:
    found: dict[str, Layer] = {}

    def walk(jaxpr, reachable):
        for eqn in jaxpr.eqns:
            if eqn.primitive is name_p:
                label, shape = eqn.params["name"], tuple(eqn.outvars[0].aval.shape)
                before = found.get(label, Layer(label, shape, 0, True))
                found[label] = Layer(label, shape, before.calls + 1, before.reachable and reachable)
            for body in subjaxprs(eqn):
                walk(body, reachable and enters(eqn))

    walk(jaxpr, True)
    return list(found.values())
