"""ConvNeXt (Liu et al. 2022, arXiv 2201.03545), tiny, small and base.

Every factory returns a Linen module: images (b, h, w, c), at least 32x32 -> {"stem": ..., "stage1": ..., ...} at stride
4, 4, 8, 16, 32; its strided convolutions leave out rows and columns that fill no patch. With `convnext_head()` it is
the published classifier; other heads take the stages as they are.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from topgap_jax.build import check_number, table
from topgap_jax.models.heads import ordered
from topgap_jax.models.layers import (
    ACTIVATIONS,
    check_five_halvings,
    convolution,
    he_normal,
    layer_norm,
    stochastic_depth,
)
from topgap_jax.types import Array

LAYER_SCALE = nn.initializers.constant(1e-6)


class Stem(nn.Module):
    """Patches of 4x4 pixels, as a convolution, and layer norm."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = convolution(self.features, 4, 4, dtype=self.dtype, name="conv", bias=True, padding="valid")(x)
        return layer_norm(dtype=self.dtype, name="norm")(x)


class Block(nn.Module):
    """x + scale * dense(gelu(dense(norm(depthwise 7x7(x))))), the first dense layer 4 times as wide."""

    drop: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        width = x.shape[-1]
        dense = lambda features, name: nn.Dense(features, dtype=self.dtype, kernel_init=he_normal, name=name)
        y = convolution(width, 7, dtype=self.dtype, name="depthwise", bias=True, groups=width)(x)
        y = layer_norm(dtype=self.dtype, name="norm")(y)
        y = dense(width, "dense2")(ACTIVATIONS["gelu"](dense(4 * width, "dense1")(y)))
        y = y * self.param("layer_scale", LAYER_SCALE, (width,)).astype(y.dtype)
        return x + stochastic_depth(y, self.drop, train)


class Stage(nn.Module):
    """Layer norm and a 2x2 convolution of stride 2 where the stage is not the first, then the blocks."""

    features: int
    drops: tuple[float, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        if self.features != x.shape[-1]:
            x = layer_norm(dtype=self.dtype, name="downsample_norm")(x)
            halve = convolution(self.features, 2, 2, dtype=self.dtype, name="downsample", bias=True, padding="valid")
            x = halve(x)
        for i, drop in enumerate(self.drops):
            x = Block(drop, self.dtype, name=f"block{i}")(x, train)
        return x


class ConvNeXt(nn.Module):
    """Stem and stages: images (b, h, w, c) -> {"stem": features, "stage1": features, ...}.

    The probability to drop a block in training rises linearly over the blocks, from 0 to `stochastic_depth`.
    """

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    stochastic_depth: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> dict[str, Array]:
        check_five_halvings("ConvNeXt", images)
        x = Stem(self.widths[0], self.dtype, name="stem")(images)
        features, start, last = {"stem": x}, 0, sum(self.blocks) - 1
        for i, (blocks, width) in enumerate(zip(self.blocks, self.widths)):
            drops = tuple(self.stochastic_depth * n / last for n in range(start, start + blocks))
            name, start = f"stage{i + 1}", start + blocks
            x = features[name] = Stage(width, drops, self.dtype, name=name)(x, train)
        return features


class ConvNeXtHead(nn.Module):
    """Mean of the last stage, layer norm, a dense layer."""

    classes: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Mapping[str, Array], train: bool = False, step: Array | None = None) -> Array:
        x = features[ordered(features)[-1]].astype(jnp.float32).mean((1, 2))
        x = layer_norm(dtype=jnp.float32, name="norm")(x)
        return nn.Dense(self.classes, dtype=jnp.float32, kernel_init=he_normal, name="dense")(x)


def convnext_tiny(*, stochastic_depth: float = 0.1) -> ConvNeXt:
    """ConvNeXt-T: 96 / 192 / 384 / 768 channels at stride 4 / 8 / 16 / 32 (Liu et al. 2022, arXiv 2201.03545)."""
    return _convnext((3, 3, 9, 3), 96, stochastic_depth)


def convnext_small(*, stochastic_depth: float = 0.4) -> ConvNeXt:
    """ConvNeXt-S: ConvNeXt-T with 27 blocks in its third stage (Liu et al. 2022, arXiv 2201.03545)."""
    return _convnext((3, 3, 27, 3), 96, stochastic_depth)


def convnext_base(*, stochastic_depth: float = 0.5) -> ConvNeXt:
    """ConvNeXt-B: ConvNeXt-S with 128 / 256 / 512 / 1024 channels (Liu et al. 2022, arXiv 2201.03545)."""
    return _convnext((3, 3, 27, 3), 128, stochastic_depth)


def convnext_head() -> ConvNeXtHead:
    """ConvNeXt's own head, which has a layer norm behind its pooling, and so no class maps (Liu et al. 2022, arXiv
    2201.03545).

    For pretrained weights: logits (b, classes).
    """
    return ConvNeXtHead()


def _convnext(blocks, width, stochastic_depth):
    check_number("stochastic_depth", stochastic_depth, 0, 0.99)
    return ConvNeXt(blocks, (width, 2 * width, 4 * width, 8 * width), stochastic_depth)


TABLE = table(convnext_tiny, convnext_small, convnext_base, convnext_head)
