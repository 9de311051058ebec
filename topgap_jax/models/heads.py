"""Heads: features of a backbone -> logits (b, classes), float32.

A head is a Linen module with a field `classes` (filled in by `classifier`) and `__call__(features {name: (b, h, w, c)},
train=False, step=None)`. Features count as ordered `stem`, `stage1`, `stage2`, ..., whatever the order of the dict,
since a dict that passes through a JAX transformation comes out sorted.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.models.layers import ACTIVATIONS, batch_norm, check_activation, convolution, he_normal
from topgap_jax.rewrite import name
from topgap_jax.types import Array, Pool


class MapHead(nn.Module):
    """Class maps of the last stage, pooled."""

    pool: Pool
    classes: int = 0

    @nn.compact
    def __call__(self, features: Mapping[str, Array], train: bool = False, step: Array | None = None) -> Array:
        return self.pool(_class_maps(features[ordered(features)[-1]], self.classes), step)


class ConvHead(nn.Module):
    """A 1x1 convolution of the last stage, batch norm, activation, dropout of whole channels, then class maps,
    pooled."""

    pool: Pool
    width: int
    activation: str
    eps: float
    dropout: float
    classes: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Mapping[str, Array], train: bool = False, step: Array | None = None) -> Array:
        x = convolution(self.width, 1, dtype=self.dtype, name="conv")(features[ordered(features)[-1]])
        x = ACTIVATIONS[self.activation](batch_norm(train, dtype=self.dtype, name="norm", eps=self.eps)(x))
        x = name(nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(x), "features")
        return self.pool(_class_maps(x, self.classes), step)


class PyramidHead(nn.Module):
    """Class maps of a feature pyramid at the resolution of its finest level, pooled."""

    pool: Pool
    width: int
    merge: str
    levels: int
    finest: str | None
    norm: str | None
    classes: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Mapping[str, Array], train: bool = False, step: Array | None = None) -> Array:
        def conv3(x, name):
            return convolution(self.width, 3, bias=True, dtype=self.dtype, name=name)(x)

        def activate(x, name):
            return nn.relu(x if self.norm is None else batch_norm(train, dtype=self.dtype, name=name)(x))

        coarsest, *finer = reversed(self._levels(features))
        x = conv3(features[coarsest], f"lateral_{coarsest}")
        if self.merge == "add":
            for level in finer:
                lateral = conv3(features[level], f"lateral_{level}")
                x = lateral + upsample(x, *lateral.shape[1:3])
            x = activate(conv3(x, "smooth"), "norm")
        else:
            x = activate(x, f"norm_{coarsest}")
            for level in finer:
                lateral = conv3(features[level], f"lateral_{level}")
                x = jnp.concatenate([lateral, upsample(x, *lateral.shape[1:3])], -1)
                x = activate(conv3(x, f"merge_{level}"), f"norm_{level}")
        return self.pool(_class_maps(x, self.classes), step)

    def _levels(self, features):
        names = ordered(features)
        listed = f"the backbone has {', '.join(names)}"
        if self.finest is not None and self.finest not in names:
            raise UserError(f"pyramid_head: there is no stage '{self.finest}' for finest; {listed}")
        first = len(names) - self.levels if self.finest is None else names.index(self.finest)
        if first < 0 or first + self.levels > len(names):
            start = "" if self.finest is None else f" from '{self.finest}' on"
            raise UserError(f"pyramid_head: {self.levels} levels{start} are too many; {listed}")
        return names[first : first + self.levels]


class VGGHead(nn.Module):
    """Adaptive 7x7 mean pooling, two dense layers with ReLU and dropout, a dense layer."""

    width: int
    dropout: float
    classes: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Mapping[str, Array], train: bool = False, step: Array | None = None) -> Array:
        x = adaptive_mean(features[ordered(features)[-1]], 7)
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)  # PyTorch flattens (channel, row, column)
        for i in (1, 2):
            x = nn.relu(nn.Dense(self.width, dtype=self.dtype, kernel_init=he_normal, name=f"dense{i}")(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, dtype=jnp.float32, kernel_init=he_normal, name="dense3")(x)


def map_head(pool: Pool) -> MapHead:
    """A 1x1 convolution from the last stage to one map per class, then `pool`: CAM's head (Zhou et al. 2016, arXiv
    1512.04150).

    With `gap()` its logits are those of global average pooling and a dense layer. The maps (b, h, w, classes) are named
    "maps".
    """
    _check_pool("map_head", pool)
    return MapHead(pool)


def conv_head(
    pool: Pool, *, width: int = 1280, activation: str = "relu6", eps: float = 1e-3, dropout: float = 0.2
) -> ConvHead:
    """EfficientNet's own head: a 1x1 convolution to `width` channels, batch norm, activation, then one map per class
    and `pool` (Tan & Le 2019, arXiv 1905.11946).

    With `gap()` its logits are those of the published networks; the defaults are EfficientNet-Lite0's, B0 has
    `activation` "silu" and `eps` 1e-5. In training whole channels are dropped with probability `dropout`, which behind
    `gap()` is the published dropout of the pooled features. What the maps are made of (b, h, w, width) is named
    "features", the maps (b, h, w, classes) "maps".
    """
    _check_pool("conv_head", pool)
    check_number("width", width, 1, whole=True)
    check_activation(activation)
    check_number("eps", eps, 0)
    check_number("dropout", dropout, 0, 1)
    return ConvHead(pool, width, activation, eps, dropout)


def pyramid_head(
    pool: Pool,
    *,
    width: int = 256,
    merge: str = "add",
    levels: int = 3,
    finest: str | None = None,
    norm: str | None = None,
) -> PyramidHead:
    """A feature pyramid of 3x3 convolutions, a 1x1 convolution to one map per class, then `pool` (arXiv 2409.04819,
    figure 2).

    With stages F_1 (coarsest) ... F_L, L = `levels`, and nearest-neighbour `up`:
        add:     P_1 = conv3(F_1);  P_l = conv3(F_l) + up(P_{l-1});  H = relu(conv3(P_L))
        concat:  P_1 = relu(conv3(F_1));  P_l = relu(conv3([conv3(F_l), up(P_{l-1})]));  H = P_L
    F_L is the stage `finest`, by default the L-th from the end; the maps (b, h, w, classes), named "maps", have its
    size. `norm="batch"` puts batch norm before every ReLU; without it the pyramid trains with AdamW but hardly with
    SGD.
    """
    _check_pool("pyramid_head", pool)
    check_number("width", width, 1, whole=True)
    check_number("levels", levels, 1, whole=True)
    if merge not in ("add", "concat"):
        raise UserError(f"merge must be 'add' or 'concat', got {merge!r}")
    if norm not in (None, "batch"):
        raise UserError(f"norm must be None or 'batch', got {norm!r}")
    return PyramidHead(pool, width, merge, levels, finest, norm)


def vgg_head(*, width: int = 4096, dropout: float = 0.5) -> VGGHead:
    """VGG's three dense layers on the last stage, as torchvision has them (Simonyan & Zisserman 2014, arXiv 1409.1556).

    For pretrained weights: logits (b, classes), no class maps.
    """
    check_number("width", width, 1, whole=True)
    check_number("dropout", dropout, 0, 1)
    return VGGHead(width, dropout)


def ordered(features: Mapping[str, Array]) -> list[str]:
    """Names of the stages from the input on: the stem, then the rest by name."""
    return sorted(features, key=lambda stage: (stage != "stem", stage))


def upsample(x: Array, height: int, width: int) -> Array:
    """x (b, h, w, c) -> (b, height, width, c), nearest neighbour."""
    b, h, w, c = x.shape
    if height % h == 0 and width % w == 0:  # a broadcast: resize's gradient is a scatter, 7 times slower on a CPU
        return jnp.repeat(jnp.repeat(x, height // h, 1), width // w, 2)
    return jax.image.resize(x, (b, height, width, c), "nearest")


def adaptive_mean(x: Array, size: int) -> Array:
    """x (b, h, w, c) -> (b, size, size, c), float32: means over floor(i h / size) ... ceil((i + 1) h / size), as
    PyTorch's."""
    rows, columns = _bins(x.shape[1], size), _bins(x.shape[2], size)
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x.astype(jnp.float32), precision="highest")


def _bins(n, size):
    weights = np.zeros((size, n), np.float32)
    for i in range(size):
        first, end = i * n // size, -(-(i + 1) * n // size)
        weights[i, first:end] = 1 / (end - first)
    return weights


def _class_maps(x, classes):
    # A dense layer at every position is the 1x1 convolution, and half its cost on a CPU. float32 even behind a bf16
    # trunk: bf16 would make ties among the largest values.
    return name(nn.Dense(classes, dtype=jnp.float32, kernel_init=he_normal, name="dense")(x), "maps")


def _check_pool(head, pool):
    if not callable(pool):
        raise UserError(f"{head} needs a pool such as gap() or top_gap(k=4), got {pool!r}")


TABLE = table(map_head, conv_head, pyramid_head, vgg_head)
