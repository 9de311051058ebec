"""Transformations of traced functions: read, replace and re-pool layers of models nobody edited."""

from topgap_jax.rewrite.convs import canonical_convs, fast_convs
from topgap_jax.rewrite.dropping import with_drop
from topgap_jax.rewrite.folding import fold_batch_norm
from topgap_jax.rewrite.fusion import fused
from topgap_jax.rewrite.head import features_and_head
from topgap_jax.rewrite.names import Layer, default_layer, feature_layer, layers, name, naming, read, tap
from topgap_jax.rewrite.normalisation import zero_images
from topgap_jax.rewrite.pooling import with_pool
from topgap_jax.rewrite.precision import in_float32
from topgap_jax.rewrite.rules import with_rules
from topgap_jax.rewrite.speed import fast, loop, map_over, sum_over
from topgap_jax.rewrite.tokens import Tokens, tokens
