"""A convolution or input gradient together with what a network in eval mode does to its result, in one pass over memory."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir, xla

from topgap_jax.engine.convolution import FORMS, Geometry, custom_call, lowering, needs_devices
from topgap_jax.engine.library import Fused
from topgap_jax.types import Array

fused_p = Primitive("topgap_fused_convolution")


def fused_convolution(
    kind: int, left: Array, right: Array, extras: Sequence[Array], geometry: Geometry, fused: Fused
) -> Array:
    """forward(x, w) + bias, or the input gradient of (dy, w); then + residual, ReLU, where(mask, ., 0), as `fused` says.

    extras: bias (o,), residual (as the result) and mask (bool, n x (h w c)), those that there are, in this order. It has no
    derivative: it is for functions that have been differentiated already.
    """
    return fused_p.bind(left, right, *extras, kind=kind, geometry=geometry, fused=fused)


def _type(left, right, *extras, kind, geometry, fused):
    type_of, _ = FORMS[kind]
    return type_of(left, right, geometry=geometry)


def _by_lax(left, right, *extras, kind, geometry, fused):
    _, form = FORMS[kind]
    out, rest = form(left, right, geometry=geometry), iter(extras)
    out = out + next(rest) if fused.bias else out
    out = out + next(rest) if fused.residual else out
    out = jnp.maximum(out, 0) if fused.relu else out
    return jnp.where(next(rest).reshape(out.shape), out, 0) if fused.mask else out


def _on_cpu(ctx, *operands, kind, geometry, fused):
    f = custom_call(ctx, kind, geometry, fused)
    f = f or functools.partial(_by_lax, kind=kind, geometry=geometry, fused=fused)
    return lowering(f)(ctx, *operands)


fused_p.def_abstract_eval(_type)
fused_p.def_impl(functools.partial(xla.apply_primitive, fused_p))
mlir.register_lowering(fused_p, lowering(_by_lax))
mlir.register_lowering(fused_p, _on_cpu, platform="cpu")
needs_devices(fused_p)
