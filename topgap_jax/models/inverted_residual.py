"""Networks of inverted residuals with depthwise convolutions (Sandler et al. 2018, arXiv 1801.04381): what EfficientNet
and MobileNetV3 share. Their tables of blocks are in `efficientnet.py` and `mobilenet.py`.

A stage begins where the stride does: `stem` is what works at stride 2, `stage1` ... `stage4` end at stride 4, 8, 16
and 32, each without the 1x1 convolution that such networks have before their pooling, which is a head's.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from topgap_jax.models.layers import ACTIVATIONS, SqueezeExcite, batch_norm, convolution, stochastic_depth
from topgap_jax.types import Array


class Block(NamedTuple):
    """One inverted residual: its depthwise kernel and stride, channels inside and out, and those of squeeze-and-excite
    (0: without)."""

    kernel: int
    stride: int
    expanded: int
    features: int
    squeeze: int
    activation: str


class Variant(NamedTuple):
    """What all blocks of a network share, and in which publications of its weights differ."""

    padding: str
    eps: float
    squeeze_activation: str = "relu"
    gate: Callable[[Array], Array] = nn.sigmoid


class InvertedResidual(nn.Module):
    """1x1 expansion (where there is one), depthwise convolution, squeeze-and-excite, 1x1 projection without activation;
    plus the block's input where the shape stays."""

    block: Block
    variant: Variant
    drop: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        kernel, stride, expanded, features, squeeze, activation = self.block
        padding, eps, squeeze_activation, gate = self.variant

        def conv_norm(x, width, kernel, stride, groups, name):
            x = convolution(width, kernel, stride, dtype=self.dtype, name=name, groups=groups, padding=padding)(x)
            return batch_norm(train, dtype=self.dtype, name=f"{name}_norm", eps=eps)(x)

        y, activate = x, ACTIVATIONS[activation]
        if expanded != x.shape[-1]:
            y = activate(conv_norm(y, expanded, 1, 1, 1, "expand"))
        y = activate(conv_norm(y, expanded, kernel, stride, expanded, "depthwise"))
        if squeeze:
            y = SqueezeExcite(squeeze, squeeze_activation, gate, self.dtype, name="squeeze_excite")(y)
        y = conv_norm(y, features, 1, 1, 1, "project")
        return x + stochastic_depth(y, self.drop, train) if stride == 1 and y.shape[-1] == x.shape[-1] else y


class Stage(nn.Module):
    """Inverted residuals, the first with the stride; the stem's begin with a 3x3 convolution of stride 2, batch norm
    and the activation."""

    blocks: tuple[Block, ...]
    drops: tuple[float, ...]
    variant: Variant
    dtype: Any
    stem: tuple[int, str] | None = None  # features, activation

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        if self.stem:
            width, activation = self.stem
            x = convolution(width, 3, 2, dtype=self.dtype, name="conv", padding=self.variant.padding)(x)
            x = ACTIVATIONS[activation](batch_norm(train, dtype=self.dtype, name="norm", eps=self.variant.eps)(x))
        for i, (block, drop) in enumerate(zip(self.blocks, self.drops)):
            x = InvertedResidual(block, self.variant, drop, self.dtype, name=f"block{i}")(x, train)
        return x


class InvertedResiduals(nn.Module):
    """Stem and stages: images (b, h, w, c) -> {"stem": features, "stage1": features, ...}.

    The probability to drop a block in training rises linearly over the blocks, from 0 to nearly `stochastic_depth`.
    """

    stem: tuple[int, str]  # features, activation
    blocks: tuple[Block, ...]
    variant: Variant
    stochastic_depth: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> dict[str, Array]:
        starts = [0, *(i for i, block in enumerate(self.blocks) if block.stride == 2), len(self.blocks)]
        x, features = images, {}
        for i, (start, end) in enumerate(itertools.pairwise(starts)):
            name, stem = (f"stage{i}", None) if i else ("stem", self.stem)
            drops = tuple(self.stochastic_depth * n / len(self.blocks) for n in range(start, end))
            stage = Stage(self.blocks[start:end], drops, self.variant, self.dtype, stem, name=name)
            x = features[name] = stage(x, train)
        return features


def round_channels(channels: float) -> int:
    """The nearest multiple of 8 that is not below 0.9 of `channels`.

    >>> round_channels(24 * 1.1), round_channels(40 * 1.1)
    (24, 48)
    """
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
