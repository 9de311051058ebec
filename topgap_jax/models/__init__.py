"""Networks: ours, and any Flax module through `linen` or `nnx`."""

from topgap_jax.models.model import bind, linen, nnx

__all__ = ["bind", "linen", "nnx"]
