"""Which way each convolution of a function takes, and why."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params
from jax.extend.core.primitives import cond_p, conv_general_dilated_p, jit_p, remat_p, scan_p, while_p

from topgap_jax.engine import onednn
from topgap_jax.engine.convolution import KINDS
from topgap_jax.engine.fused import ALONE, fused_p

SHARD_MAP = "shard_map"
"""By name, for JAX keeps this primitive to itself."""

ENTERED = {jit_p.name, remat_p.name, scan_p.name, while_p.name, cond_p.name, SHARD_MAP}
"""Names of the equations whose bodies `fast_convs` goes into."""


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
    """Every convolution of f(*args), in order, those inside loops and branches once: `print(*explain(f, images),
    sep="\\n")`.

    path: "onednn" (a custom call), "xla" (the engine's form, compiled by XLA), or "lax" (as it was written). Not seen
    from the function alone: programs that `jax.export` writes, and those for several devices whose arrays name no mesh,
    take "xla".
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
    if params["batch_group_count"] != 1:
        return f"a batch in {params['batch_group_count']} groups"
    if any(step != 1 for step in params["lhs_dilation"]):
        return "dilated images"
    if any(pad < 0 for pads in params["padding"] for pad in pads):
        return "negative padding"
    if 0 in (*left.shape, *right.shape, *eqn.outvars[0].aval.shape):
        return "an empty array"
    return ""


def _convolutions(jaxpr: Jaxpr, within: str = "", partly: bool = False):
    """within: what `fast_convs` does not go into; partly: inside a `shard_map` over some axes of its mesh only."""
    for eqn in jaxpr.eqns:
        shapes = tuple(v.aval.shape for v in eqn.invars)
        if eqn.primitive is conv_general_dilated_p:
            outside = f"inside {within}" if within else "not under fast_convs"
            yield Convolution("convolution", shapes, "lax", refusal(eqn) or outside)
        elif eqn.primitive in KINDS or eqn.primitive is fused_p:
            dtype = eqn.invars[0].aval.dtype
            why = onednn.reason() or f"type {dtype}" * (dtype != jnp.float32)
            why = why or "inside a shard_map over some axes of its mesh" * partly
            path = "xla" if why else "onednn"
            if eqn.primitive is fused_p:
                kind = KINDS[ALONE[eqn.params["kind"]]]
                why = f"fused with {eqn.params['fused'].words}"
            else:
                kind = KINDS[eqn.primitive]
            yield Convolution(kind, shapes, path, why)
        name = eqn.primitive.name
        some = name == SHARD_MAP and set(eqn.params["newly_manual_axes"]) != set(eqn.params["mesh"].axis_names)
        for body in jaxprs_in_params(eqn.params):
            yield from _convolutions(body, within or name * (name not in ENTERED), partly or some)
