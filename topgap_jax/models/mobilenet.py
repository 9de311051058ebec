"""MobileNetV3 (Howard et al. 2019, arXiv 1905.02244), large and small.

Every factory returns a Linen module: images (b, h, w, c), any size -> {"stem": ..., "stage1": ..., ...} at stride 2, 4,
8, 16, 32. With `mobilenet_head()` it is the published classifier; other heads take the stages as they are.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from topgap_jax.build import check_number, table
from topgap_jax.models.heads import ordered
from topgap_jax.models.inverted_residual import Block, InvertedResiduals, Variant, round_channels
from topgap_jax.models.layers import batch_norm, check_variant, convolution, he_normal
from topgap_jax.rewrite import name
from topgap_jax.types import Array

RELU, SWISH = "relu", "hard_swish"

# kernel, stride, channels inside, channels out, squeeze-and-excite, activation
LARGE = (
    (3, 1, 16, 16, False, RELU),
    (3, 2, 64, 24, False, RELU),
    (3, 1, 72, 24, False, RELU),
    (5, 2, 72, 40, True, RELU),
    (5, 1, 120, 40, True, RELU),
    (5, 1, 120, 40, True, RELU),
    (3, 2, 240, 80, False, SWISH),
    (3, 1, 200, 80, False, SWISH),
    (3, 1, 184, 80, False, SWISH),
    (3, 1, 184, 80, False, SWISH),
    (3, 1, 480, 112, True, SWISH),
    (3, 1, 672, 112, True, SWISH),
    (5, 2, 672, 160, True, SWISH),
    (5, 1, 960, 160, True, SWISH),
    (5, 1, 960, 160, True, SWISH),
)
SMALL = (
    (3, 2, 16, 16, True, RELU),
    (3, 2, 72, 24, False, RELU),
    (3, 1, 88, 24, False, RELU),
    (5, 2, 96, 40, True, SWISH),
    (5, 1, 240, 40, True, SWISH),
    (5, 1, 240, 40, True, SWISH),
    (5, 1, 120, 48, True, SWISH),
    (5, 1, 144, 48, True, SWISH),
    (5, 2, 288, 96, True, SWISH),
    (5, 1, 576, 96, True, SWISH),
    (5, 1, 576, 96, True, SWISH),
)


class MobileNetHead(nn.Module):
    """A 1x1 convolution of the last stage with batch norm and hard-swish, mean, a dense layer with hard-swish, dropout,
    a dense layer."""

    width: int
    hidden: int
    eps: float
    dropout: float
    classes: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Mapping[str, Array], train: bool = False, step: Array | None = None) -> Array:
        x = convolution(self.width, 1, dtype=self.dtype, name="conv")(features[ordered(features)[-1]])
        x = name(nn.hard_swish(batch_norm(train, dtype=self.dtype, name="norm", eps=self.eps)(x)), "features")
        x = x.astype(jnp.float32).mean((1, 2))
        x = nn.hard_swish(nn.Dense(self.hidden, dtype=self.dtype, kernel_init=he_normal, name="hidden")(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, dtype=jnp.float32, kernel_init=he_normal, name="dense")(x)


def mobilenet_v3_large(
    *, padding: str = "symmetric", eps: float = 1e-3, stochastic_depth: float = 0.0
) -> InvertedResiduals:
    """MobileNetV3-Large: 24 / 40 / 112 / 160 channels at stride 4 / 8 / 16 / 32 (Howard et al. 2019, arXiv 1905.02244).

    `padding` "symmetric" and batch norm's `eps` 1e-3 are torchvision's; timm's have 1e-5, its `tf_` ones "same" and
    1e-3.
    """
    return _mobilenet(LARGE, padding, eps, stochastic_depth)


def mobilenet_v3_small(
    *, padding: str = "symmetric", eps: float = 1e-3, stochastic_depth: float = 0.0
) -> InvertedResiduals:
    """MobileNetV3-Small: 16 / 24 / 48 / 96 channels at stride 4 / 8 / 16 / 32 (Howard et al. 2019, arXiv 1905.02244).

    Its published head is `mobilenet_head(width=576, hidden=1024)`; options as of `mobilenet_v3_large`.
    """
    return _mobilenet(SMALL, padding, eps, stochastic_depth)


def mobilenet_head(*, width: int = 960, hidden: int = 1280, eps: float = 1e-3, dropout: float = 0.2) -> MobileNetHead:
    """MobileNetV3's own head, which has a dense layer with hard-swish behind its pooling, and so no class maps; the
    defaults are MobileNetV3-Large's (Howard et al. 2019, arXiv 1905.02244).

    For pretrained weights: logits (b, classes). What it pools (b, h, w, width) is named "features".
    """
    check_number("width", width, 1, whole=True)
    check_number("hidden", hidden, 1, whole=True)
    check_number("eps", eps, 0)
    check_number("dropout", dropout, 0, 1)
    return MobileNetHead(width, hidden, eps, dropout)


def _mobilenet(rows, padding, eps, stochastic_depth):
    check_variant(padding, eps, stochastic_depth)
    blocks = tuple(
        Block(kernel, stride, expanded, features, round_channels(expanded // 4) if squeeze else 0, activation)
        for kernel, stride, expanded, features, squeeze, activation in rows
    )
    return InvertedResiduals((16, SWISH), blocks, Variant(padding, eps, RELU, nn.hard_sigmoid), stochastic_depth)


TABLE = table(mobilenet_v3_large, mobilenet_v3_small, mobilenet_head)
