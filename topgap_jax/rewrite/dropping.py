"""A drop at any layer of a model nobody edited."""

import zlib

from jax import lax
from jax.extend.core.primitives import name_p

from topgap_jax.errors import UserError
from topgap_jax.keys import fold_in
from topgap_jax.rewrite.fusion import fused
from topgap_jax.rewrite.interpreter import enters, evaluate, rebuild, subjaxprs, trace
from topgap_jax.rewrite.names import _layers, _run, read, tap
from topgap_jax.rewrite.speed import fast
from topgap_jax.types import Drop, Model


def with_drop(model: Model, layer: str, drop: Drop | None) -> Model:
    """The model with `drop` on the value named `layer` in training; in eval mode, and with None, it is the model
    itself.

    The drop gets the layer's value and the rest of the network in eval mode, of the weights in training or, for a drop
    with `teacher=True`, of their averages `variables["ema"]` on the same images. What leads to the layer is not
    computed again for that (but for a teacher), what goes past it is: where a skip or a pyramid branch starts below the
    layer, the rest of the network reads it in eval mode, and the compiled step holds the trunk up to that branch a
    second time. The realised rate (b,) is logged as "drop_rate". A pass without targets (an attack or an explanation
    that uses batch statistics) drops nothing. Raises UserError for an unknown layer, and for a teacher without
    averages.
    """
    if drop is None:  # a config whose `drop` is to be set on the command line
        return model
    if not isinstance(drop, Drop):
        raise UserError(f"with_drop needs a drop such as sgdrop(), got {drop!r}; usage: with_drop(model, layer, drop)")

    def apply(variables, images, *, train=False, keys=None, targets=None, step=None):
        f = lambda images: model.apply(variables, images, train=train, keys=keys, targets=targets, step=step)
        if not train or targets is None:
            return f(images)
        if drop.teacher and "ema" not in variables:
            raise UserError(
                "with_drop: teacher=True takes the saliency from averaged weights, and there are none; set config.ema,"
                " e.g. 0.999"
            )
        # One pass holds the trunk: the head is the network with this layer given, so what leads to the layer is dead
        # code.
        still, seen = lax.stop_gradient((variables["ema"] if drop.teacher else variables, images))
        predict = lambda images: model.apply(still, images, step=step).logits
        head = lambda features: tap(predict, layer, lambda _: features)(seen)
        taught = fused(fast(_unnamed(read(predict, layer))))(seen)[1] if drop.teacher else None
        own = None if keys is None else _own_keys(keys, layer)

        def edit(features):
            source = lax.stop_gradient(features) if taught is None else taught
            return _unnamed(lambda features: drop.apply(own, (source, head), features, targets, step))(features)

        out, rate = _run(f, layer, edit, (images,), {}, features=True)
        name = f"drop_rate/{layer}" if "drop_rate" in out.logs else "drop_rate"  # one with_drop around another
        return out._replace(logs={**out.logs, name: rate})

    return model._replace(apply=apply)


def _own_keys(keys, layer):
    """Keys of this layer: `keys` themselves serve the random layers of the user's module."""
    return fold_in(keys, zlib.crc32(layer.encode()))


def _unnamed(f):
    """f without names: the layers of a second pass are not the ones that somebody else's `tap` or `read` asks for."""

    def run(jaxpr, consts, args):
        def rule(eqn, values, read):
            if eqn.primitive is name_p:
                return values
            named = enters(eqn) and any(_layers(body) for body in subjaxprs(eqn))
            return rebuild(eqn, values, run) if named else None

        return evaluate(jaxpr, consts, args, rule)

    def call(*args):
        closed, arrays, restore = trace(f, args, {})
        return restore(run(closed.jaxpr, closed.consts, arrays))

    return call
