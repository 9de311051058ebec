"""Transformations of traced functions: read, replace and re-pool layers of models nobody edited."""

from topgap_jax.rewrite.names import Layer, default_layer, layers, name, naming, read, tap
from topgap_jax.rewrite.pooling import with_pool

__all__ = ["Layer", "default_layer", "layers", "name", "naming", "read", "tap", "with_pool"]
