"""VGG-11 and VGG-16 with batch norm (Simonyan & Zisserman 2014, arXiv 1409.1556), as torchvision has them.

Each of the five stages `stem`, `stage1` ... `stage4` ends with its max pooling: 224x224 pixels give maps of 112, 56,
28, 14, 7.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from topgap_jax.build import table
from topgap_jax.models.layers import batch_norm, check_five_halvings, convolution
from topgap_jax.types import Array


class Stage(nn.Module):
    """`convolutions` times convolution (with bias), batch norm, ReLU; then 2x2 max pooling, which drops an odd row or
    column."""

    convolutions: int
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        for i in range(1, self.convolutions + 1):
            x = convolution(self.features, 3, bias=True, dtype=self.dtype, name=f"conv{i}")(x)
            x = nn.relu(batch_norm(train, dtype=self.dtype, name=f"norm{i}")(x))
        return nn.max_pool(x, (2, 2), (2, 2))


class VGG(nn.Module):
    """Five stages: images (b, h, w, c), at least 32x32 -> {"stem": features, "stage1": features, ...}."""

    convolutions: tuple[int, int, int, int, int]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> dict[str, Array]:
        check_five_halvings("VGG", images)
        x, features = images, {}
        names = ("stem", "stage1", "stage2", "stage3", "stage4")
        for name, count, width in zip(names, self.convolutions, (64, 128, 256, 512, 512)):
            x = Stage(count, width, self.dtype, name=name)(x, train)
            features[name] = x
        return features


def vgg11() -> VGG:
    """VGG-11 with batch norm, without its dense layers (Simonyan & Zisserman 2014, arXiv 1409.1556).

    64 / 128 / 256 / 512 / 512 channels at stride 2 / 4 / 8 / 16 / 32; images (b, h, w, c) of at least 32x32
    (UserError).
    """
    return VGG((1, 1, 2, 2, 2))


def vgg16() -> VGG:
    """VGG-16 with batch norm, without its dense layers (Simonyan & Zisserman 2014, arXiv 1409.1556).

    64 / 128 / 256 / 512 / 512 channels at stride 2 / 4 / 8 / 16 / 32; images (b, h, w, c) of at least 32x32
    (UserError).
    """
    return VGG((2, 2, 3, 3, 3))


TABLE = table(vgg11, vgg16)
