"""Top-GAP for a classifier you did not write: find global average pooling and the dense layer, put class maps in their place."""

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.extend.core.primitives import (
    add_p,
    convert_element_type_p,
    copy_p,
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
from topgap_jax.rewrite.interpreter import bind, evaluate, inline, trace
from topgap_jax.rewrite.names import _layers, name, naming, resolve
from topgap_jax.types import Model, Pool

SAME = (name_p, copy_p, convert_element_type_p)
SHAPE = (reshape_p, squeeze_p)


def with_pool(model: Model, *, dense: str, pool: Pool) -> Model:
    """The classifier with `pool` over class maps instead of global average pooling followed by the dense layer named `dense`.

    From the dense layer's output the walk goes back through its bias, its matrix product, reshapes, dropout and a mean (or a
    full-window average pool) over the two spatial axes to features (b, h, w, c). The class maps
    `features @ kernel + bias` (b, h, w, k) are named "maps", so that `cam()` finds them; `pool=gap()` gives the original
    logits again. Anything else on the walk is a UserError that says what stands there.
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


def _evaluate(jaxpr: Jaxpr, consts, args, full, pool, step):
    producers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    target = next((eqn for eqn in jaxpr.eqns if eqn.primitive is name_p and eqn.params["name"] == full), None)
    if target is None:
        raise UserError(f"with_pool: '{full}' lies inside a function that cannot be entered (remat, scan or a custom rule)")
    walk = _walk(target, producers, full)

    def rule(eqn, values, read):
        if eqn is not target:
            return None
        logits = pool(name(_class_maps(walk, read), "maps"), step)
        return [name(logits.astype(values[0].dtype), full)]

    return evaluate(jaxpr, consts, args, rule)


def _walk(target: JaxprEqn, producers: dict, full: str) -> dict:
    """What leads from the spatial features to the dense layer: variables and equations, found from the end."""
    stop = lambda what: UserError(
        f"with_pool: on the way back from '{full}' there is {what}; it must be global average pooling (a mean over the two spatial "
        "axes, or a full-window average pool) followed by this dense layer, with nothing but reshapes and dropout between"
    )
    after: list[JaxprEqn] = []  # the bias, from the end
    product, between = None, []
    variable = target.invars[0]
    while True:
        eqn = producers.get(variable)
        if eqn is None:
            raise stop("the function's own input, and no pooling")
        kind = eqn.primitive
        if product is not None and kind is reduce_sum_p:
            if tuple(eqn.params["axes"]) != (1, 2) or len(eqn.invars[0].aval.shape) != 4:
                raise stop(f"a sum over axes {tuple(eqn.params['axes'])} of a value of shape {eqn.invars[0].aval.shape}")
            return dict(after=after, product=product, between=between, features=eqn.invars[0], pooled=variable)
        if product is not None and kind is reduce_window_sum_p:
            shape = eqn.invars[0].aval.shape
            window = tuple(eqn.params["window_dimensions"])
            if len(shape) != 4 or window != (1, *shape[1:3], 1) or any(p != (0, 0) for p in eqn.params["padding"]):
                raise stop(f"an average pool with window {window} over a value of shape {shape}, not over all of it")
            return dict(after=after, product=product, between=between, features=eqn.invars[0], pooled=variable)
        if kind is dot_general_p and product is None:
            left, right = eqn.invars
            (contract_left, contract_right), (batch_left, _) = eqn.params["dimension_numbers"]
            if batch_left or len(left.aval.shape) != 2 or len(right.aval.shape) != 2 or tuple(contract_left) != (1,) or tuple(contract_right) != (0,):
                raise stop("a matrix product that is no plain dense layer")
            product, variable = eqn, left
            continue
        if kind in SAME or (kind in SHAPE and product is not None):
            (after if product is None else between).append(eqn)
            variable = eqn.invars[0]
            continue
        if kind is add_p and product is None:
            after.append(eqn)
            variable = _operand(eqn, producers, dot_general_p)
            continue
        if kind in (mul_p, div_p, select_n_p) and product is not None:
            # Dropout: linear in the pooled features and acting on each channel by itself, so it may act on every position.
            between.append(eqn)
            variable = _operand(eqn, producers, reduce_sum_p, reduce_window_sum_p)
            if kind is div_p and variable is not eqn.invars[0]:
                raise stop("a division by the features")
            continue
        raise stop(f"'{kind.name}'" + _whose(eqn))


def _operand(eqn: JaxprEqn, producers: dict, *wanted) -> object:
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

    candidates = eqn.invars[1:] if eqn.primitive is select_n_p else eqn.invars
    return min(candidates, key=distance)


def _class_maps(walk: dict, read):
    """features @ kernel + bias at every position. What lay between pooling and product acts on n times each position: the
    pooling was a sum, and its division by n is one of these steps."""
    features = read(walk["features"])
    b, h, w, c = features.shape
    kernel = read(walk["product"].invars[1])

    def one(position):
        env = {walk["pooled"]: (position * (h * w)).reshape(walk["pooled"].aval.shape)}
        for eqn in reversed(walk["between"]):
            env[eqn.outvars[0]] = bind(eqn, [env.get(v) if not isinstance(v, Literal) and v in env else read(v) for v in eqn.invars])[0]
        return env[walk["product"].invars[0]]

    over_width = jax.vmap(one, in_axes=1, out_axes=1)
    scaled = jax.vmap(over_width, in_axes=1, out_axes=1)(features)  # (b, h, w, c)
    maps = scaled @ kernel
    for eqn in reversed(walk["after"]):
        if eqn.primitive is add_p:
            bias = [read(v) for v in eqn.invars if not _depends(v, walk)]
            maps = maps + bias[0].reshape(-1, 1, 1, maps.shape[-1])
        elif eqn.primitive is convert_element_type_p:
            maps = maps.astype(eqn.params["new_dtype"])
    return maps


def _depends(v, walk) -> bool:
    """Whether v is on the walk's own way (and not the bias)."""
    on_the_way = {walk["product"].outvars[0], *(eqn.outvars[0] for eqn in walk["after"])}
    return not isinstance(v, Literal) and v in on_the_way


def _whose(eqn: JaxprEqn) -> str:
    """' (LayerNorm_0)' where the trace knows which module an equation comes from."""
    stack = str(eqn.source_info.name_stack) if hasattr(eqn, "source_info") else ""
    return f" (in {stack})" if stack else ""

