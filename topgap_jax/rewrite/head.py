"""A network in two parts at a layer: what comes before is computed once, what comes after is a function."""

from collections.abc import Callable

import jax.numpy as jnp
from jax.extend.core import Literal
from jax.extend.core.primitives import name_p

from topgap_jax.errors import UserError
from topgap_jax.rewrite.interpreter import depending, evaluate, inline, needed, trace
from topgap_jax.rewrite.names import feature_layer_of, naming
from topgap_jax.rewrite.tokens import Tokens
from topgap_jax.types import Array, Predict


def features_and_head(predict: Predict, layer: str | Tokens | None, images: Array) -> tuple[Array, Callable]:
    """The features (b, h', w', c) of a layer, and the rest of the network, head(features) -> logits (b, k).

    The default layer is `default_layer`'s. All that does not depend on the features, such as the shortcut round a
    layer inside a residual block, is computed here and once, not by each call of the head, so that a head in a loop
    holds no network below the layer. UserError for an unknown layer, and for a value that is not (b, h, w, c).
    """
    with naming():
        closed, arrays, restore = trace(predict, (images,), {})
        full = feature_layer_of(closed, arrays, layer)
        flat = inline(closed, arrays, remat=True)
    jaxpr, label = flat.jaxpr, full.layer if isinstance(full, Tokens) else full
    (named,) = [eqn for eqn in jaxpr.eqns if eqn.primitive is name_p and eqn.params["name"] == label]
    (variable,), live = named.outvars, needed(jaxpr.replace(outvars=[*jaxpr.outvars, *named.outvars]))
    after = depending(jaxpr, [variable])
    later = [eqn for eqn in jaxpr.eqns if id(eqn) in live and eqn is not named and after.intersection(eqn.outvars)]
    before = [eqn for eqn in jaxpr.eqns if id(eqn) in live and (eqn is named or not after.intersection(eqn.outvars))]
    used = [v for eqn in later for v in eqn.invars] + list(jaxpr.outvars)
    others = list(dict.fromkeys(v for v in used if not isinstance(v, Literal) and v not in after))
    first = jaxpr.replace(eqns=before, outvars=[variable, *others])
    value, *values = evaluate(first, flat.consts, arrays, lambda *_: None)
    rest = jaxpr.replace(constvars=[], invars=[variable, *others], eqns=later)
    logits = lambda value: restore(evaluate(rest, (), [value, *values], lambda *_: None))
    if isinstance(full, Tokens):
        features = full.edit(value, lambda features: (features, features))[1]
        return features, lambda z: logits(full.edit(value, lambda _: (z, None))[0])
    if value.ndim != 4:
        raise UserError(
            f"layer '{full}' has shape {value.shape}; features (b, h, w, c) are needed, of a transformer's tokens"
            f" tokens('{full}', (rows, columns))"
        )
    return value, lambda z: logits(jnp.asarray(z, value.dtype))
