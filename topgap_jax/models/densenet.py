"""DenseNet-121 (Huang et al. 2016, arXiv 1608.06993), as torchvision has it."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from topgap_jax.build import table
from topgap_jax.models.layers import batch_norm, check_five_halvings, convolution
from topgap_jax.types import Array

GROWTH = 32


class Stem(nn.Module):
    """7x7 convolution of stride 2, batch norm, ReLU, 3x3 max pooling of stride 2."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = convolution(self.features, 7, 2, dtype=self.dtype, name="conv")(x)
        x = nn.relu(batch_norm(train, dtype=self.dtype, name="norm")(x))
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


class Block(nn.Module):
    """x and 32 channels more: conv3(relu(norm(conv1(relu(norm(x))))))."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        y = nn.relu(batch_norm(train, dtype=self.dtype, name="norm1")(x))
        y = convolution(4 * GROWTH, 1, dtype=self.dtype, name="conv1")(y)
        y = nn.relu(batch_norm(train, dtype=self.dtype, name="norm2")(y))
        return jnp.concatenate([x, convolution(GROWTH, 3, dtype=self.dtype, name="conv2")(y)], -1)


class Stage(nn.Module):
    """A transition to half the channels and half the size where the stage is not the first, then the blocks; `last`:
    followed by batch norm and ReLU."""

    blocks: int
    transition: bool
    last: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        if self.transition:
            x = nn.relu(batch_norm(train, dtype=self.dtype, name="transition_norm")(x))
            x = convolution(x.shape[-1] // 2, 1, dtype=self.dtype, name="transition")(x)
            x = nn.avg_pool(x, (2, 2), (2, 2))
        for i in range(self.blocks):
            x = Block(self.dtype, name=f"block{i}")(x, train)
        return nn.relu(batch_norm(train, dtype=self.dtype, name="norm")(x)) if self.last else x


class DenseNet(nn.Module):
    """Stem and stages: images (b, h, w, c) -> {"stem": features, "stage1": features, ...}."""

    blocks: tuple[int, ...]
    stem: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> dict[str, Array]:
        check_five_halvings("DenseNet", images)
        x = Stem(self.stem, self.dtype, name="stem")(images, train)
        features = {"stem": x}
        for i, blocks in enumerate(self.blocks):
            name, last = f"stage{i + 1}", i + 1 == len(self.blocks)
            x = features[name] = Stage(blocks, i > 0, last, self.dtype, name=name)(x, train)
        return features


def densenet121() -> DenseNet:
    """DenseNet-121: 256 / 512 / 1024 / 1024 channels at stride 4 / 8 / 16 / 32 (Huang et al. 2016, arXiv 1608.06993).

    Its transitions drop an odd row or column. With `map_head(gap())` it is the published classifier; images (b, h, w,
    c) of at least 32x32 (UserError).
    """
    return DenseNet((6, 12, 24, 16), 64)


TABLE = table(densenet121)
