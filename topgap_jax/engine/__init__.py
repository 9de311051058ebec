"""The convolutions that are fast on a CPU, and what they are fast with."""

from topgap_jax.engine.convolution import KINDS, Geometry, convolution, forward_p, input_gradient_p
from topgap_jax.engine.fused import fused_convolution
from topgap_jax.engine.library import FORWARD, INPUT_GRADIENT, Fused
from topgap_jax.engine.onednn import available, found, status
from topgap_jax.engine.paths import ENTERED, SHARD_MAP, Convolution, explain, refusal

__all__ = [
    "ENTERED",
    "FORWARD",
    "INPUT_GRADIENT",
    "KINDS",
    "SHARD_MAP",
    "Convolution",
    "Fused",
    "Geometry",
    "available",
    "convolution",
    "explain",
    "forward_p",
    "found",
    "fused_convolution",
    "input_gradient_p",
    "refusal",
    "status",
]
