"""EfficientNet-B0 (Tan & Le 2019, arXiv 1905.11946) and EfficientNet-Lite 0 to 4, which have ReLU6 and no
squeeze-and-excite.

Every factory returns a Linen module: images (b, h, w, c), any size -> {"stem": ..., "stage1": ..., ...} at stride 2, 4,
8, 16, 32. With `conv_head(pool)` it is the published classifier; other heads take the stages as they are.
"""

import math
from typing import NamedTuple

from topgap_jax.build import table
from topgap_jax.models.inverted_residual import Block, InvertedResiduals, Variant, round_channels
from topgap_jax.models.layers import check_variant


class Group(NamedTuple):
    """`repeats` blocks, of which the first has the stride."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    features: int


GROUPS = (
    Group(1, 3, 1, 1, 16),
    Group(2, 3, 2, 6, 24),
    Group(2, 5, 2, 6, 40),
    Group(3, 3, 2, 6, 80),
    Group(3, 5, 1, 6, 112),
    Group(4, 5, 2, 6, 192),
    Group(1, 3, 1, 6, 320),
)
LITE = {0: (1.0, 1.0), 1: (1.0, 1.1), 2: (1.1, 1.2), 3: (1.2, 1.4), 4: (1.4, 1.8)}  # factors of width and of depth
STEM = 32


def efficientnet_lite0(*, padding: str = "same", eps: float = 1e-3, stochastic_depth: float = 0.2) -> InvertedResiduals:
    """EfficientNet-Lite0: 24 / 40 / 112 / 320 channels at stride 4 / 8 / 16 / 32, 0.39 GMAC at 224 pixels (Tan & Le
    2019, arXiv 1905.11946, scaled for phones).

    `padding` "same" and batch norm's `eps` 1e-3 are those of the published weights; "symmetric" and 1e-5 are those of
    weights trained in timm.
    """
    return _lite(0, padding, eps, stochastic_depth)


def efficientnet_lite1(*, padding: str = "same", eps: float = 1e-3, stochastic_depth: float = 0.2) -> InvertedResiduals:
    """EfficientNet-Lite1, made for 240 pixels: Lite0 1.1 times as deep; options as of `efficientnet_lite0`."""
    return _lite(1, padding, eps, stochastic_depth)


def efficientnet_lite2(*, padding: str = "same", eps: float = 1e-3, stochastic_depth: float = 0.2) -> InvertedResiduals:
    """EfficientNet-Lite2, made for 260 pixels: Lite0 1.1 times as wide and 1.2 times as deep; options as of
    `efficientnet_lite0`."""
    return _lite(2, padding, eps, stochastic_depth)


def efficientnet_lite3(*, padding: str = "same", eps: float = 1e-3, stochastic_depth: float = 0.2) -> InvertedResiduals:
    """EfficientNet-Lite3, made for 280 pixels: Lite0 1.2 times as wide and 1.4 times as deep; options as of
    `efficientnet_lite0`."""
    return _lite(3, padding, eps, stochastic_depth)


def efficientnet_lite4(*, padding: str = "same", eps: float = 1e-3, stochastic_depth: float = 0.2) -> InvertedResiduals:
    """EfficientNet-Lite4, made for 300 pixels: Lite0 1.4 times as wide and 1.8 times as deep; options as of
    `efficientnet_lite0`."""
    return _lite(4, padding, eps, stochastic_depth)


def efficientnet_b0(
    *, padding: str = "symmetric", eps: float = 1e-5, stochastic_depth: float = 0.2
) -> InvertedResiduals:
    """EfficientNet-B0: 24 / 40 / 112 / 320 channels at stride 4 / 8 / 16 / 32, SiLU and squeeze-and-excite (Tan & Le
    2019, arXiv 1905.11946).

    `padding` "symmetric" and batch norm's `eps` 1e-5 are torchvision's and timm's; "same" and 1e-3 TensorFlow's, which
    timm's `tf_efficientnet_b0` keeps.
    """
    check_variant(padding, eps, stochastic_depth)
    blocks = _blocks(1.0, 1.0, "silu", squeeze=4)
    return InvertedResiduals((STEM, "silu"), blocks, Variant(padding, eps, "silu"), stochastic_depth)


def _lite(number, padding, eps, stochastic_depth):
    check_variant(padding, eps, stochastic_depth)
    blocks = _blocks(*LITE[number], "relu6", squeeze=None)
    return InvertedResiduals((STEM, "relu6"), blocks, Variant(padding, eps), stochastic_depth)


def _blocks(width, depth, activation, squeeze):
    """The blocks of all groups; of Lite's, neither stem nor head nor the repeats of the first and last group scale."""
    blocks, before = [], STEM
    for i, (repeats, kernel, stride, expansion, features) in enumerate(GROUPS):
        features = round_channels(features * width)
        repeats = repeats if i in (0, len(GROUPS) - 1) else math.ceil(repeats * depth)
        for j in range(repeats):
            reduced = max(1, before // squeeze) if squeeze else 0
            blocks.append(Block(kernel, 1 if j else stride, before * expansion, features, reduced, activation))
            before = features
    return tuple(blocks)


TABLE = table(
    efficientnet_lite0, efficientnet_lite1, efficientnet_lite2, efficientnet_lite3, efficientnet_lite4, efficientnet_b0
)
