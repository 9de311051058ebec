"""The convolutions that are fast on a CPU, and what they are fast with."""

from topgap_jax.engine.convolution import KINDS, convolution, forward_p, input_gradient_p
from topgap_jax.engine.fused import fused_convolution, stored
from topgap_jax.engine.library import FORWARD, INPUT_GRADIENT, Fused, Geometry
from topgap_jax.engine.onednn import available, found, status
from topgap_jax.engine.paths import ENTERED, SHARD_MAP, Convolution, explain, refusal
