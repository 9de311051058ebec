"""Pre-activation residual networks: PreActResNet-18 (He et al. 2016, arXiv 1603.05027), WRN-28-10 (Zagoruyko &
Komodakis 2016, arXiv 1605.07146).

Every factory returns a Linen module: images (b, h, w, c), any size -> {"stem": ..., "stage1": ..., ...}. The last stage
ends with the batch norm and ReLU that such networks need before the head; the earlier ones end with the plain sum.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from topgap_jax.build import table
from topgap_jax.models.layers import ACTIVATIONS, batch_norm, check_activation, check_padding, convolution
from topgap_jax.types import Array


class PreActBlock(nn.Module):
    """conv3(relu(norm(conv3(relu(norm(x)))))) + shortcut, which where the shape changes is a 1x1 convolution of
    relu(norm(x))."""

    features: int
    stride: int
    dtype: Any
    activation: str = "relu"
    padding: str = "symmetric"

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        activate = ACTIVATIONS[self.activation]
        active = activate(batch_norm(train, dtype=self.dtype, name="norm1")(x))
        if self.stride != 1 or x.shape[-1] != self.features:
            x = convolution(self.features, 1, self.stride, dtype=self.dtype, name="project")(active)
        y = convolution(self.features, 3, self.stride, dtype=self.dtype, name="conv1", padding=self.padding)(active)
        y = activate(batch_norm(train, dtype=self.dtype, name="norm2")(y))
        return x + convolution(self.features, 3, dtype=self.dtype, name="conv2")(y)


class Stem(nn.Module):
    """A 3x3 convolution, without norm or ReLU: the first block begins with these."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        return convolution(self.features, 3, dtype=self.dtype, name="conv")(x)


class Stage(nn.Module):
    """`blocks` blocks, the first with the stride; `last`: followed by batch norm and the activation."""

    blocks: int
    features: int
    stride: int
    last: bool
    activation: str
    padding: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        for i in range(self.blocks):
            stride = self.stride if i == 0 else 1
            block = PreActBlock(self.features, stride, self.dtype, self.activation, self.padding, name=f"block{i}")
            x = block(x, train)
        return ACTIVATIONS[self.activation](batch_norm(train, dtype=self.dtype, name="norm")(x)) if self.last else x


class PreActResNet(nn.Module):
    """Stem and stages: images (b, h, w, c) -> {"stem": features, "stage1": features, ...}."""

    widths: tuple[int, ...]
    blocks: int
    stem: int
    activation: str = "relu"
    padding: str = "symmetric"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> dict[str, Array]:
        x = Stem(self.stem, self.dtype, name="stem")(images, train)
        features = {"stem": x}
        for i, width in enumerate(self.widths):
            stride, last, name = 1 if i == 0 else 2, i + 1 == len(self.widths), f"stage{i + 1}"
            stage = Stage(self.blocks, width, stride, last, self.activation, self.padding, self.dtype, name=name)
            x = stage(x, train)
            features[name] = x
        return features


def preact_resnet18() -> PreActResNet:
    """PreActResNet-18 with a 3x3 stem (He et al. 2016, arXiv 1603.05027).

    64 / 128 / 256 / 512 channels at stride 1 / 2 / 4 / 8; images (b, h, w, c) of any size.
    """
    return PreActResNet((64, 128, 256, 512), 2, 64)


def wrn28_10(*, activation: str = "relu", padding: str = "symmetric") -> PreActResNet:
    """WRN-28-10, without dropout (Zagoruyko & Komodakis 2016, arXiv 1605.07146).

    160 / 320 / 640 channels at stride 1 / 2 / 4, 36.5 million parameters; images (b, h, w, c) of any size. The robust
    networks of TRADES's kind (arXiv 1901.08573) have the defaults, those of DeepMind's (arXiv 2010.03593) `activation`
    "silu" and `padding` "same".
    """
    check_activation(activation)
    check_padding(padding)
    return PreActResNet((160, 320, 640), 4, 16, activation, padding)


TABLE = table(preact_resnet18, wrn28_10)
