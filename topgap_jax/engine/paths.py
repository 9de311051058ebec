"""Which way each convolution of a function takes, and why."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params
from jax.extend.core.primitives import conv_general_dilated_p

from topgap_jax.engine import onednn
from topgap_jax.engine.convolution import KINDS
from topgap_jax.engine.fused import ALONE, fused_p

CLOSED = ("custom_jvp_call", "custom_vjp_call")
"""What `fast_convs` does not go into."""


class Convolution(NamedTuple):
    """A convolution of a function: what it computes, from operands of which shapes, its path, and the reason."""

    kind: str
    operands: tuple[tuple[int, ...], ...]
    path: str
    why: str

    def __str__(self):
        first_two = " ".join(map(str, self.operands[:2]))
        return f"{self.kind:<16} {first_two}: {self.path}{self.why and f' ({self.why})'}"


def explain(f: Callable, *args) -> list[Convolution]:
    """Every convolution of f(*args), in order, those inside loops and branches once: `print(*explain(f, images), sep="\\n")`.

    path: "onednn" (a custom call), "xla" (the engine's form, compiled by XLA), or "lax" (as it was written).
    """
    return list(_convolutions(jax.make_jaxpr(f)(*args).jaxpr))


def refusal(eqn: JaxprEqn) -> str:
    """Why the engine leaves a `conv_general_dilated` as it is; "" if it does not."""
    params, (left, right) = eqn.params, (v.aval for v in eqn.invars)
    if left.ndim != 4:
        return f"{left.ndim - 2} spatial axes, not 2"
    if left.dtype != right.dtype or not jnp.issubdtype(left.dtype, jnp.floating):
        return f"types {left.dtype} and {right.dtype}"
    if params["preferred_element_type"] not in (None, left.dtype):
        return f"result of type {params['preferred_element_type']}"
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return f"{max(params['feature_group_count'], params['batch_group_count'])} groups"
    if any(step != 1 for step in (*params["lhs_dilation"], *params["rhs_dilation"])):
        return "dilation"
    if any(pad < 0 for pads in params["padding"] for pad in pads):
        return "negative padding"
    if 0 in (*left.shape, *right.shape, *eqn.outvars[0].aval.shape):
        return "an empty array"
    return ""


def _convolutions(jaxpr: Jaxpr, within: str = ""):
    for eqn in jaxpr.eqns:
        shapes = tuple(v.aval.shape for v in eqn.invars)
        if eqn.primitive is conv_general_dilated_p:
            outside = f"inside {within}" if within else "not under fast_convs"
            yield Convolution("convolution", shapes, "lax", refusal(eqn) or outside)
        elif eqn.primitive in KINDS or eqn.primitive is fused_p:
            path = "onednn" if onednn.available() and eqn.invars[0].aval.dtype == jnp.float32 else "xla"
            why = "" if path == "onednn" else onednn.reason() or f"type {eqn.invars[0].aval.dtype}"
            if eqn.primitive is fused_p:
                kind = KINDS[ALONE[eqn.params["kind"]]]
                why = "fused with " + ", ".join(word for word, on in eqn.params["fused"]._asdict().items() if on)
            else:
                kind = KINDS[eqn.primitive]
            yield Convolution(kind, shapes, path, why)
        closed = within or (eqn.primitive.name if eqn.primitive.name in CLOSED else "")
        for body in jaxprs_in_params(eqn.params):
            yield from _convolutions(body, closed)
