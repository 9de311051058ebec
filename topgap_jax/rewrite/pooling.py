"""Top-GAP for a classifier you did not write: find global average pooling and the dense layer, put class maps in their
place."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr
from jax.extend.core.primitives import convert_element_type_p, name_p

from topgap_jax.errors import UserError
from topgap_jax.rewrite.interpreter import bind, evaluate, inline, trace
from topgap_jax.rewrite.names import _layers, name, naming, resolve
from topgap_jax.rewrite.operations import SCALE, SUMS, summed_axes
from topgap_jax.rewrite.walk import Step, Walk, laid_out, positions_summed, walk_from
from topgap_jax.types import Model, Pool


def with_pool(model: Model, *, dense: str, pool: Pool) -> Model:
    """The classifier with `pool` over class maps instead of global average pooling and the dense layer named `dense`.

    The layer is a matrix product or a 1x1 convolution, behind the pooling or before it. The pooling is a mean over the
    two spatial axes, however it is written (jnp.mean, a sum over their number, einops, a full-window average pool), of
    (b, h, w, c) or (b, c, h, w). Between them may be reshapes, transposes and dropout. The class maps `features @
    kernel + bias` (b, h, w, k) are named "maps", so that `cam()` finds them; `pool=gap()` gives the original logits
    again. Anything else on the walk is a UserError that says what stands there.
    """

    def apply(variables, images, *, train=False, keys=None, targets=None, step=None):
        f = lambda images: model.apply(variables, images, train=train, keys=keys, targets=targets, step=step)
        with naming():
            closed, arrays, restore = trace(f, (images,), {})
            full = resolve(dense, _layers(closed.jaxpr))
            flat = inline(closed, arrays)
            outs = _evaluate(flat.jaxpr, flat.consts, arrays, full, lambda maps: pool(maps, step))
        return restore(outs)

    return model._replace(apply=apply)


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], full: str, pool: Callable) -> list:
    target = next((eqn for eqn in jaxpr.eqns if eqn.primitive is name_p and eqn.params["name"] == full), None)
    if target is None:
        raise UserError(
            f"with_pool: '{full}' lies inside a function that cannot be entered (remat, scan or a custom rule)"
        )
    walk = walk_from(jaxpr, target, full)

    def rule(eqn, values, read):
        if eqn is not walk.end:
            return None
        out = eqn.outvars[0].aval
        logits = pool(name(_class_maps(walk, read), "maps")).astype(out.dtype).reshape(out.shape)
        return [name(logits, full) if eqn is target else logits]

    return evaluate(jaxpr, consts, args, rule)


def _class_maps(walk: Walk, read: Callable) -> Any:
    """What the network does to the mean of the features, done at every position: its mean is the same, as all of it is
    linear."""
    maps = read(walk.features).transpose(walk.order)
    for step in walk.before:
        maps = _at_every_position(step, maps, read)
    if walk.product:
        (eqn, operand, _), layer = walk.product
        kernel = layer.matrix(read(eqn.invars[1 - operand]))
        options = {word: eqn.params.get(word) for word in ("precision", "preferred_element_type")}
        maps = lax.dot_general(maps, kernel, (((3,), (0,)), ((), ())), **options)
    for step in walk.after:
        maps = _at_every_position(step, maps, read)
    return maps


def _at_every_position(step: Step, maps: Any, read: Callable) -> Any:
    """The step, on values (b, h, w, c) that are still to be pooled."""
    eqn = step.eqn
    if summed_axes(eqn) is not None:
        return maps * positions_summed(eqn)  # which a later step divides by
    if eqn.primitive is convert_element_type_p:
        return maps.astype(eqn.params["new_dtype"])
    if eqn.primitive in SCALE + SUMS:
        others = [laid_out(jnp.asarray(read(v)), step.labels) for v in eqn.invars]
        return bind(
            eqn, [maps if i == step.operand else jnp.broadcast_to(x, maps.shape) for i, x in enumerate(others)]
        )[0]
    return maps  # a change of shape, or a name: these are not the values it stands for
