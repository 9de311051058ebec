"""Top-GAP for a classifier you did not write: find global average pooling and the dense layer, put class maps in their place."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.extend.core.primitives import (
    add_p,
    broadcast_in_dim_p,
    convert_element_type_p,
    div_p,
    dot_general_p,
    mul_p,
    name_p,
    reduce_sum_p,
    reduce_window_sum_p,
    reshape_p,
    select_n_p,
    squeeze_p,
)

from topgap_jax.errors import UserError
from topgap_jax.rewrite.interpreter import bind, evaluate, inline, subjaxprs, trace
from topgap_jax.rewrite.names import _layers, name, naming, resolve
from topgap_jax.rewrite.operations import SAME
from topgap_jax.types import Model, Pool

SHAPE = (reshape_p, squeeze_p, broadcast_in_dim_p)
SCALE = (mul_p, div_p, select_n_p)


def with_pool(model: Model, *, dense: str, pool: Pool) -> Model:
    """The classifier with `pool` over class maps instead of global average pooling followed by the dense layer named `dense`.

    From the dense layer's output the walk goes back through its bias, its matrix product, reshapes, dropout and a mean (or a
    full-window average pool) over the spatial axes to features (b, h, w, c). The class maps `features @ kernel + bias`
    (b, h, w, k) are named "maps", so that `cam()` finds them; `pool=gap()` gives the original logits again. Anything else on
    the walk is a UserError that says what stands there.
    """

    def apply(variables, images, *, train=False, keys=None, targets=None, step=None):
        f = lambda images: model.apply(variables, images, train=train, keys=keys, targets=targets, step=step)
        with naming():
            closed, arrays, restore = trace(f, (images,), {})
            full = resolve(dense, _layers(closed.jaxpr))
            flat = inline(closed, arrays)
            outs = _evaluate(flat.jaxpr, flat.consts, arrays, full, pool, step)
        return restore(outs)

    return Model(model.init, apply)


class Walk(NamedTuple):
    """What leads from the spatial features to the dense layer's output; equations are listed from the end."""

    after: list[JaxprEqn]  # between the product and the output: bias, casts
    product: JaxprEqn
    between: list[JaxprEqn]  # between the pooling's sum and the product: division by n, reshapes, dropout
    pooled: Any  # the variable that holds the sum
    features: Any  # the variable (b, h, w, c)
    positions: int  # how many positions the sum is over


def _evaluate(jaxpr: Jaxpr, consts, args, full, pool, step):
    producers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    target = next((eqn for eqn in jaxpr.eqns if eqn.primitive is name_p and eqn.params["name"] == full), None)
    if target is None:
        raise UserError(
            f"with_pool: '{full}' lies inside a function that cannot be entered (remat, scan or a custom rule)"
        )
    walk = _walk(target, producers, full)

    def rule(eqn, values, read):
        if eqn is not target:
            return None
        logits = pool(name(_class_maps(walk, read), "maps"), step)
        return [name(logits.astype(values[0].dtype), full)]

    return evaluate(jaxpr, consts, args, rule)


def _walk(target: JaxprEqn, producers: dict, full: str) -> Walk:
    """The way back from the dense layer's output to the features."""
    after: list[JaxprEqn] = []
    between: list[JaxprEqn] = []
    product, variable = None, target.invars[0]

    def stop(what):
        names = [eqn.params["name"] for eqn in between if eqn.primitive is name_p]
        where = f", before the output of '{names[-1]}'" if names else ""
        return UserError(
            f"with_pool: on the way back from '{full}' there is {what}{where}; it must be global average pooling (a mean over the "
            "spatial axes, or a full-window average pool) followed by this dense layer, with nothing but reshapes and dropout between"
        )

    while True:
        eqn = producers.get(variable)
        if eqn is None:
            raise stop("the function's own input, and no pooling")
        kind = eqn.primitive
        if product is None:
            if kind is dot_general_p:
                (contract_left, _), (batch_left, _) = eqn.params["dimension_numbers"]
                if batch_left or any(v.aval.ndim != 2 for v in eqn.invars) or tuple(contract_left) != (1,):
                    raise stop("a matrix product that is no plain dense layer")
                product, variable = eqn, eqn.invars[0]
            elif kind in SAME or kind is add_p:
                after.append(eqn)
                variable = _operand(eqn, producers, dot_general_p)
            else:
                raise stop(_what(eqn))
            continue
        if kind in (reduce_sum_p, reduce_window_sum_p):
            features, positions = _pooling(eqn, producers, stop)
            if features is not None:
                walk = Walk(after, product, between, variable, features, positions)
                return _checked(walk, producers, stop)
        elif kind in SHAPE and not _keeps_channels(eqn, *product.invars[0].aval.shape):
            flat = ": features flattened, not pooled" if eqn.invars[0].aval.ndim > 2 else ""
            raise stop(f"a change of shape from {eqn.invars[0].aval.shape} to {eqn.outvars[0].aval.shape}{flat}")
        elif kind not in SAME + SHAPE + SCALE:
            raise stop(_what(eqn))
        # Dropout and the division by n are linear and act on each channel by itself, so they may act on every position.
        between.append(eqn)
        variable = _operand(eqn, producers, reduce_sum_p, reduce_window_sum_p)


def _keeps_channels(eqn: JaxprEqn, b: int, c: int) -> bool:
    """Whether a change of shape only adds and removes axes of length 1 between batch and channels."""
    return all(v.aval.shape[-1:] == (c,) and v.aval.size == b * c for v in (eqn.invars[0], eqn.outvars[0]))


def _pooling(eqn: JaxprEqn, producers: dict, stop) -> tuple[Any, int]:
    """Features (b, h, w, c) under a sum over positions, and their number; (None, 0) where another sum must come first."""
    operand = eqn.invars[0]
    shape = operand.aval.shape
    if eqn.primitive is reduce_window_sum_p:
        window = tuple(eqn.params["window_dimensions"])
        if len(shape) != 4 or window != (1, *shape[1:3], 1) or any(p != (0, 0) for p in eqn.params["padding"]):
            raise stop(f"an average pool with window {window} over a value of shape {shape}, not over all of it")
        return operand, shape[1] * shape[2]
    axes = tuple(eqn.params["axes"])
    if len(shape) == 4 and axes in ((1, 2), (1,), (2,)):
        return operand, shape[1] * shape[2] if axes == (1, 2) else shape[axes[0]]
    if len(shape) == 3 and axes == (1,):
        before = producers.get(operand)
        while before is not None and before.primitive in SAME:
            before = producers.get(before.invars[0])
        if before is None or before.primitive is not reshape_p:
            return None, 0  # a mean over rows after a mean over columns
        source = before.invars[0]
        if len(source.aval.shape) == 4 and (source.aval.shape[0], source.aval.shape[3]) == (shape[0], shape[2]):
            return source, shape[1]
    raise stop(f"a sum over axes {axes} of a value of shape {shape}")


def _checked(walk: Walk, producers: dict, stop) -> Walk:
    """The walk, if no factor on it is made from the pooled features themselves, as in a swish or a gate."""
    on_the_way = {eqn.outvars[0] for eqn in walk.between} | {walk.pooled}
    for eqn in walk.between:
        front = [v for v in eqn.invars if not isinstance(v, Literal) and v not in on_the_way]
        seen = set(front)
        while eqn.primitive in SCALE and front:
            v = front.pop()
            if v in on_the_way:
                raise stop(f"{_what(eqn)} by a value that depends on the pooled features")
            fresh = [
                u
                for u in (producers[v].invars if v in producers else ())
                if not isinstance(u, Literal) and u not in seen
            ]
            seen.update(fresh)
            front.extend(fresh)
    return walk


def _operand(eqn: JaxprEqn, producers: dict, *wanted) -> Any:
    """The operand that comes from one of the wanted primitives by the shortest way back."""

    def distance(v):
        front, depth, seen = [v], 0, set()
        while front and depth < 12:
            eqns = [producers[x] for x in front if not isinstance(x, Literal) and x in producers and x not in seen]
            seen.update(x for x in front if not isinstance(x, Literal))
            if any(e.primitive in wanted for e in eqns):
                return depth
            front, depth = [x for e in eqns for x in e.invars], depth + 1
        return 10**6

    return min(eqn.invars[1:] if eqn.primitive is select_n_p else eqn.invars, key=distance)


def _class_maps(walk: Walk, read):
    """features @ kernel + bias at every position. What lay between pooling and product acts on n times each position: the
    pooling was a sum, and its division by n is one of these steps."""
    features, left = read(walk.features), walk.product.invars[0]
    pooled = walk.pooled.aval
    channels = lambda position: position.reshape(pooled.shape[0], *(1,) * (len(pooled.shape) - 2), pooled.shape[-1])

    def one(position):  # (b, c) -> what the product takes, (b, c)
        env = {walk.pooled: jnp.broadcast_to(channels(position * walk.positions), pooled.shape).astype(pooled.dtype)}
        for eqn in reversed(walk.between):
            values = [env[v] if not isinstance(v, Literal) and v in env else read(v) for v in eqn.invars]
            # A name is left out: these are not the values it stands for, and nothing may be named twice.
            env[eqn.outvars[0]] = values[0] if eqn.primitive is name_p else bind(eqn, values)[0]
        return env[left]

    scaled = jax.vmap(jax.vmap(one, in_axes=1, out_axes=1), in_axes=1, out_axes=1)(features)
    contract_right = walk.product.params["dimension_numbers"][0][1]
    options = {word: walk.product.params[word] for word in ("precision", "preferred_element_type")}
    maps = lax.dot_general(scaled, read(walk.product.invars[1]), (((3,), contract_right), ((), ())), **options)
    on_the_way = {walk.product.outvars[0], *(eqn.outvars[0] for eqn in walk.after)}
    for eqn in reversed(walk.after):
        if eqn.primitive is add_p:
            bias = [read(v) for v in eqn.invars if isinstance(v, Literal) or v not in on_the_way]
            maps = maps + jnp.broadcast_to(bias[0], eqn.outvars[0].aval.shape)[:, None, None, :]
        elif eqn.primitive is convert_element_type_p:
            maps = maps.astype(eqn.params["new_dtype"])
    return maps


def _what(eqn: JaxprEqn) -> str:
    """'custom_jvp_call' (relu): a primitive, and the name of the function in it where there is one."""
    bodies = [body.debug_info.func_name for body in subjaxprs(eqn) if body.debug_info is not None]
    return f"'{eqn.primitive.name}'" + (f" ({bodies[0]})" if bodies else "")
