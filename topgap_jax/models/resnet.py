"""Residual networks (He et al. 2015, arXiv 1512.03385): CIFAR's 20 to 56 layers, ImageNet's 18, 34 and 50, and a small
one.

Every factory returns a Linen module: images (b, h, w, c), any size -> {"stem": ..., "stage1": ..., ...}, features (b,
h', w', c') with the resolution falling. Strides, padding and order of operations are PyTorch's, so that its weights
fit.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.models.layers import batch_norm, convolution
from topgap_jax.types import Array


class BasicBlock(nn.Module):
    """relu(norm(conv3(relu(norm(conv3(x))))) + shortcut(x)), the stride in the first convolution."""

    features: int
    stride: int
    shortcut: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        y = convolution(self.features, 3, self.stride, dtype=self.dtype, name="conv1")(x)
        y = nn.relu(batch_norm(train, dtype=self.dtype, name="norm1")(y))
        y = convolution(self.features, 3, dtype=self.dtype, name="conv2")(y)
        y = batch_norm(train, dtype=self.dtype, name="norm2")(y)
        return nn.relu(y + _shortcut(x, self.features, self.stride, self.shortcut, train, self.dtype))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution, the last to 4 * features, the stride in the 3x3 one (torchvision's "v1.5")."""

    features: int
    stride: int
    shortcut: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        y = convolution(self.features, 1, dtype=self.dtype, name="conv1")(x)
        y = nn.relu(batch_norm(train, dtype=self.dtype, name="norm1")(y))
        y = convolution(self.features, 3, self.stride, dtype=self.dtype, name="conv2")(y)
        y = nn.relu(batch_norm(train, dtype=self.dtype, name="norm2")(y))
        y = convolution(4 * self.features, 1, dtype=self.dtype, name="conv3")(y)
        y = batch_norm(train, dtype=self.dtype, name="norm3")(y)
        return nn.relu(y + _shortcut(x, 4 * self.features, self.stride, self.shortcut, train, self.dtype))


def _shortcut(x, features, stride, kind, train, dtype):
    """The identity where the shape stays; else a strided 1x1 convolution with batch norm (ResNet-D: a mean over stride
    x stride pixels, then the convolution), or every stride-th pixel and zeros."""
    missing = features - x.shape[-1]
    if stride == 1 and missing == 0:
        return x
    if kind == "average" and stride > 1:
        edges = [(0, -n % stride) for n in x.shape[1:3]]  # an odd last row or column is a window of its own
        x, stride = nn.avg_pool(x, (stride, stride), (stride, stride), edges, count_include_pad=False), 1
    if kind in ("project", "average"):
        x = convolution(features, 1, stride, dtype=dtype, name="project")(x)
        return batch_norm(train, dtype=dtype, name="project_norm")(x)
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


class Stem(nn.Module):
    """Convolution (`deep`: two narrower ones with batch norm and ReLU before it, which take its stride), batch norm,
    ReLU, and where `pool` is set a 3x3 max pooling of stride 2."""

    features: int
    kernel: int
    stride: int
    pool: bool
    deep: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        stride = self.stride
        if self.deep:
            for i in (1, 2):
                x = convolution(self.features // 2, self.kernel, stride, dtype=self.dtype, name=f"conv{i}")(x)
                x, stride = nn.relu(batch_norm(train, dtype=self.dtype, name=f"norm{i}")(x)), 1
        x = convolution(self.features, self.kernel, stride, dtype=self.dtype, name="conv")(x)
        x = nn.relu(batch_norm(train, dtype=self.dtype, name="norm")(x))
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))) if self.pool else x


class Stage(nn.Module):
    """`blocks` residual blocks, the first with the stride."""

    block: type[nn.Module]
    blocks: int
    features: int
    stride: int
    shortcut: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        for i in range(self.blocks):
            stride = self.stride if i == 0 else 1
            x = self.block(self.features, stride, self.shortcut, self.dtype, name=f"block{i}")(x, train)
        return x


class ResNet(nn.Module):
    """Stem and stages: images (b, h, w, c) -> {"stem": features, "stage1": features, ...}."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    stem: tuple[int, int, int, bool]  # features, kernel, stride, max pooling
    block: type[nn.Module] = BasicBlock
    shortcut: str = "project"
    deep: bool = False  # the stem
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> dict[str, Array]:
        x = Stem(*self.stem, self.deep, self.dtype, name="stem")(images, train)
        features = {"stem": x}
        for i, (width, blocks) in enumerate(zip(self.widths, self.blocks)):
            stride, name = 1 if i == 0 else 2, f"stage{i + 1}"
            x = Stage(self.block, blocks, width, stride, self.shortcut, self.dtype, name=name)(x, train)
            features[name] = x
        return features


def resnet20(*, shortcut: str = "pad") -> ResNet:
    """CIFAR's ResNet of 20 layers, 16 / 32 / 64 channels at stride 1 / 2 / 4 (He et al. 2015, arXiv 1512.03385).

    `shortcut`: "pad" (option A, no parameters) or "project" (B). Images (b, h, w, c) of any size.
    """
    return _cifar(3, shortcut)


def resnet32(*, shortcut: str = "pad") -> ResNet:
    """CIFAR's ResNet of 32 layers, 16 / 32 / 64 channels at stride 1 / 2 / 4 (He et al. 2015, arXiv 1512.03385).

    `shortcut`: "pad" (option A, no parameters) or "project" (B). Images (b, h, w, c) of any size.
    """
    return _cifar(5, shortcut)


def resnet44(*, shortcut: str = "pad") -> ResNet:
    """CIFAR's ResNet of 44 layers, 16 / 32 / 64 channels at stride 1 / 2 / 4 (He et al. 2015, arXiv 1512.03385).

    `shortcut`: "pad" (option A, no parameters) or "project" (B). Images (b, h, w, c) of any size.
    """
    return _cifar(7, shortcut)


def resnet56(*, shortcut: str = "pad") -> ResNet:
    """CIFAR's ResNet of 56 layers, 16 / 32 / 64 channels at stride 1 / 2 / 4 (He et al. 2015, arXiv 1512.03385).

    `shortcut`: "pad" (option A, no parameters) or "project" (B). Images (b, h, w, c) of any size.
    """
    return _cifar(9, shortcut)


def resnet18(*, stem: str = "imagenet", shortcut: str = "project") -> ResNet:
    """ResNet-18, 64 to 512 channels (He et al. 2015, arXiv 1512.03385).

    `stem`: "imagenet" (7x7 of stride 2, max pooling) or "cifar" (3x3 of stride 1). `stem="deep", shortcut="average"`
    (three 3x3 convolutions; a mean before the shortcut's convolution) is ResNet-D (He et al. 2018, arXiv 1812.01187).
    Images (b, h, w, c) of any size.
    """
    return _wide((2, 2, 2, 2), BasicBlock, stem, shortcut)


def resnet34(*, stem: str = "imagenet", shortcut: str = "project") -> ResNet:
    """ResNet-34, 64 to 512 channels (He et al. 2015, arXiv 1512.03385).

    `stem`: "imagenet" (7x7 of stride 2, max pooling) or "cifar" (3x3 of stride 1). `stem="deep", shortcut="average"`
    (three 3x3 convolutions; a mean before the shortcut's convolution) is ResNet-D (He et al. 2018, arXiv 1812.01187).
    Images (b, h, w, c) of any size.
    """
    return _wide((3, 4, 6, 3), BasicBlock, stem, shortcut)


def resnet50(*, stem: str = "imagenet", shortcut: str = "project") -> ResNet:
    """ResNet-50, 256 to 2048 channels, the stride in the 3x3 convolution ("v1.5") (He et al. 2015, arXiv 1512.03385).

    `stem`: "imagenet" (7x7 of stride 2, max pooling) or "cifar" (3x3 of stride 1). `stem="deep", shortcut="average"`
    (three 3x3 convolutions; a mean before the shortcut's convolution) is ResNet-D (He et al. 2018, arXiv 1812.01187).
    Images (b, h, w, c) of any size.
    """
    return _wide((3, 4, 6, 3), Bottleneck, stem, shortcut)


def small_resnet(
    *,
    widths: tuple[int, ...] = (8, 16, 32, 64),
    blocks: int = 1,
    stem: int = 16,
    stem_kernel: int = 5,
    stem_stride: int = 2,
) -> ResNet:
    """A net for a CPU: stages of `blocks` basic blocks, the first of stride 1 and the others of stride 2.

    The defaults make features of 32, 16, 8 and 4 pixels a side from 64x64 images, with 5.9 million multiplications
    (MMAC): stem 1.23, stages 1.90, 0.92, 0.92, 0.92. With `pyramid_head(pool, width=32)`, whose maps are then 16x16,
    and 6 classes it is 10.4 MMAC. As in every network with PyTorch's padding, a strided convolution centres output u on
    input 2u, so that a map of the last stage lies 7.5 pixels to the lower right of what it responds to.
    """
    check_number("blocks", blocks, 1, whole=True)
    return ResNet(tuple(widths), (blocks,) * len(widths), (stem, stem_kernel, stem_stride, False))


def _cifar(blocks, shortcut):
    if shortcut not in ("pad", "project"):
        raise UserError(f"shortcut must be 'pad' or 'project', got {shortcut!r}")
    return ResNet((16, 32, 64), (blocks,) * 3, (16, 3, 1, False), shortcut=shortcut)


STEMS = {"imagenet": (64, 7, 2, True), "cifar": (64, 3, 1, False), "deep": (64, 3, 2, True)}


def _wide(blocks, block, stem, shortcut):
    if stem not in STEMS:
        raise UserError(f"stem must be 'imagenet', 'cifar' or 'deep', got {stem!r}")
    if shortcut not in ("project", "average"):
        raise UserError(f"shortcut must be 'project' or 'average', got {shortcut!r}")
    return ResNet((64, 128, 256, 512), blocks, STEMS[stem], block, shortcut, stem == "deep")


TABLE = table(small_resnet, resnet20, resnet32, resnet44, resnet56, resnet18, resnet34, resnet50)
