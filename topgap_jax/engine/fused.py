"""Fewer passes over memory: a convolution or input gradient together with what a network in eval mode does to its
result, and arrays that are computed once."""

import functools
from collections.abc import Sequence

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from topgap_jax.engine import onednn
from topgap_jax.engine.convolution import (
    bind,
    custom_call,
    devices,
    forward_p,
    input_gradient_p,
    lowering,
    needs_devices,
    result_type,
)
from topgap_jax.engine.forms import BY_LAX, ON_CPU, after
from topgap_jax.engine.library import FORWARD, INPUT_GRADIENT, Fused, Geometry
from topgap_jax.types import Array

ALONE = {FORWARD: forward_p, INPUT_GRADIENT: input_gradient_p}
"""The primitive of each kind to which something can be fused."""

fused_p = Primitive("topgap_fused_convolution")
stored_p = Primitive("topgap_stored")


def fused_convolution(
    kind: int, left: Array, right: Array, extras: Sequence[Array], geometry: Geometry, fused: Fused
) -> Array:
    """forward(x, w) + bias, or the input gradient of (dy, w); then + residual, ReLU up to a limit, where(mask, ., 0),
    as `fused` says.

    extras: bias (o,), residual (as the result) and mask (bool, n x (h w c)), those that there are, in this order. It is
    for functions that have been differentiated already: its derivatives and its `vmap` are right, and not fused. NaN
    stays NaN; oneDNN keeps -inf behind a ReLU, and makes NaN of what is not finite where the mask is False.
    """
    return fused_p.bind(left, right, *extras, kind=kind, geometry=geometry, fused=fused)


def stored(x: Array) -> Array:
    """x, computed once for all its users.

    XLA's CPU computes an elementwise result again in every fusion that reads it, with all that it is made of: a ReLU's
    mask with the whole sum of a residual network's stage. On one device with oneDNN; elsewhere nothing.
    """
    return stored_p.bind(x)


def _type(left, right, *extras, kind, geometry, fused):
    return result_type(kind, left, right, geometry=geometry)


def _by(forms, left, right, *extras, kind, geometry, fused):
    return after(forms[kind](left, right, geometry=geometry), extras, fused)


def _apart(left, right, *extras, kind, geometry, fused):
    """The same as several equations, which have derivatives."""
    return after(bind(ALONE[kind], left, right, geometry), extras, fused)


def _on_cpu(ctx, *operands, kind, geometry, fused):
    f = custom_call(ctx, kind, geometry, fused)
    f = f or functools.partial(_by, ON_CPU, kind=kind, geometry=geometry, fused=fused)
    return lowering(f)(ctx, *operands)


fused_p.def_abstract_eval(_type)
fused_p.def_impl(functools.partial(xla.apply_primitive, fused_p))
mlir.register_lowering(fused_p, lowering(functools.partial(_by, BY_LAX)))
mlir.register_lowering(fused_p, _on_cpu, platform="cpu")
needs_devices(fused_p)


def _jvp(primals, tangents, **params):
    tangents = tuple(ad.instantiate_zeros(tangent) for tangent in tangents)
    return jax.jvp(functools.partial(_apart, **params), tuple(primals), tangents)


def _batched(operands, axes, **params):
    return jax.vmap(functools.partial(_apart, **params), axes)(*operands), 0


ad.primitive_jvps[fused_p] = _jvp
batching.primitive_batchers[fused_p] = _batched


def _stored_on_cpu(ctx, x):
    alone = onednn.available() and devices(ctx.module_context) == 1
    return lowering(onednn.stored)(ctx, x) if alone else [x]


stored_p.def_abstract_eval(lambda x: x)
stored_p.def_impl(lambda x: x)
mlir.register_lowering(stored_p, lambda ctx, x: [x])
mlir.register_lowering(stored_p, _stored_on_cpu, platform="cpu")
needs_devices(stored_p)
ad.deflinear2(stored_p, lambda ct, x: [ct])
batching.defvectorized(stored_p)
