"""The convolutions that are fast on a CPU, and what they are fast with."""

from topgap_jax.engine.convolution import KINDS, Geometry, convolution
from topgap_jax.engine.paths import Convolution, explain, refusal

__all__ = ["KINDS", "Convolution", "Geometry", "convolution", "explain", "refusal"]
