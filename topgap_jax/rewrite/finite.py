"""Where a function stops being finite: the layer to name when an evaluation meets NaN or infinity."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr
from jax.extend.core.primitives import name_p

from topgap_jax.rewrite.interpreter import enters, evaluate, subjaxprs, trace
from topgap_jax.rewrite.names import naming
from topgap_jax.types import Array


def first_not_finite(f: Callable, images: Array) -> str | None:
    """The first layer of f(images), in the order of computation, one of whose numbers is NaN or infinite; None if there
    is none.

    "images" if they are not finite themselves, "logits" if only the result is not. Layers are what `layers` lists, but
    for those inside loops, which count with what follows them. For the error that says so: it compiles f once more,
    without `fused`.
    """
    with naming():
        closed, arrays, _ = trace(f, (images,), {})
    labels: list[str] = []

    def finite(consts, arrays):
        flags = [_is_finite(array) for array in arrays]
        labels[:] = ["images"] * len(flags)
        outs = _watched(closed.jaxpr, consts, arrays, labels, flags)
        return [*flags, *map(_is_finite, outs)]

    flags = jax.device_get(jax.jit(finite)(closed.consts, arrays))
    labels += ["logits"] * (len(flags) - len(labels))
    return next((label for label, flag in zip(labels, flags) if not flag), None)


def _watched(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], labels: list[str], flags: list[Array]) -> list:
    """Results of the jaxpr; its names, and whether what they name is finite, are put behind `labels` and `flags`."""

    def rule(eqn, values, read):
        if eqn.primitive is name_p:
            labels.append(eqn.params["name"])
            flags.append(_is_finite(values[0]))
        if not enters(eqn):
            return None
        # Inline, since nothing is differentiated: a `jax.checkpoint` would hide the flags.
        (body,) = subjaxprs(eqn)
        return _watched(body, getattr(eqn.params["jaxpr"], "consts", ()), values, labels, flags)

    return evaluate(jaxpr, consts, args, rule)


def _is_finite(value: Array) -> Array:
    return jnp.isfinite(value).all() if jnp.issubdtype(value.dtype, jnp.inexact) else jnp.array(True)
