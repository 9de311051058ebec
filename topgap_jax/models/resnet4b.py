"""ResNet-4B of the benchmark `cifar10_resnet` of VNN-COMP 2021: small, without batch norm, every convolution with
bias."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.models.classifier import channels, normalise
from topgap_jax.models.layers import convolution, he_normal
from topgap_jax.models.model import linen
from topgap_jax.types import Array, Model


class Stem(nn.Module):
    """relu(conv3(x)) to 16 channels, stride 2."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.relu(convolution(16, 3, 2, bias=True, dtype=jnp.float32, name="conv")(x))


class Block(nn.Module):
    """relu(conv3(relu(conv3(x))) + shortcut(x)), 32 channels, the shortcut a 1x1 convolution where the stride is 2."""

    stride: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = nn.relu(convolution(32, 3, self.stride, bias=True, dtype=jnp.float32, name="conv1")(x))
        y = convolution(32, 3, bias=True, dtype=jnp.float32, name="conv2")(y)
        if self.stride != 1:
            x = convolution(32, 1, self.stride, bias=True, dtype=jnp.float32, name="project")(x)
        return nn.relu(y + x)


class Stage(nn.Module):
    """Two blocks, the first of stride 2."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return Block(1, name="block1")(Block(2, name="block0")(x))


class ResNet4B(nn.Module):
    """Images (b, 32, 32, 3) in [0, 1] -> logits (b, classes)."""

    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @nn.compact
    def __call__(self, images: Array) -> Array:
        if images.shape[1:3] != (32, 32):
            raise UserError(f"resnet4b is for 32x32 images, got {images.shape[1]}x{images.shape[2]}")
        x = Stem(name="stem")(normalise(images, self.mean, self.std))
        x = Stage(name="stage2")(Stage(name="stage1")(x))
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)  # PyTorch flattens (channel, row, column)
        x = nn.relu(nn.Dense(100, kernel_init=he_normal, name="linear1")(x))
        return nn.Dense(self.classes, kernel_init=he_normal, name="linear2")(x)


def resnet4b(classes: int = 10, *, mean: Sequence[float], std: Sequence[float]) -> Model:
    """ResNet-4B, a whole classifier for 32x32 images (Wang et al. 2021, arXiv 2103.06624).

    It ends in dense layers on flattened features, so it has no class maps.
    """
    check_number("classes", classes, 2, whole=True)
    return linen(ResNet4B(classes, *channels(mean, std)))


TABLE = table(resnet4b)
