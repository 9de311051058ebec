"""ViT-S/16, a whole classifier with attention (Dosovitskiy et al. 2020, arXiv 2010.11929; Touvron et al. 2020, arXiv
2012.12877)."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.models.layers import ACTIVATIONS, layer_norm
from topgap_jax.models.model import linen
from topgap_jax.rewrite import name
from topgap_jax.rewrite.normalisation import channels, normalise
from topgap_jax.types import Array, Model

PATCH, WIDTH, DEPTH, HEADS = 16, 384, 12, 6
INIT = nn.initializers.truncated_normal(0.02)


class Attention(nn.Module):
    """Self-attention of 6 heads: tokens (b, n, c) -> (b, n, c), proj(softmax(q k^T / sqrt(d)) v)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, n, c = x.shape
        qkv = nn.Dense(3 * c, kernel_init=INIT, name="qkv")(x).reshape(b, n, 3, HEADS, c // HEADS)
        q, k, v = (qkv[:, :, i] for i in range(3))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q * (c // HEADS) ** -0.5, k))
        values = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, n, c)
        return nn.Dense(c, kernel_init=INIT, name="project")(values)


class Block(nn.Module):
    """x + attention(norm(x)), then x + dense(gelu(dense(norm(x)))): tokens (b, n, c) -> (b, n, c).

    grid: rows and columns of the patches, whose normalised tokens are then named.
    """

    grid: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = layer_norm(dtype=None, name="norm1")(x)
        if self.grid:
            b, n, c = y.shape
            prefix = n - self.grid[0] * self.grid[1]
            patches = name(y[:, prefix:].reshape(b, *self.grid, c), "tokens")
            y = jnp.concatenate([y[:, :prefix], patches.reshape(b, -1, c)], 1)
        x = x + Attention(name="attention")(y)
        y = layer_norm(dtype=None, name="norm2")(x)
        y = ACTIVATIONS["gelu"](nn.Dense(4 * WIDTH, kernel_init=INIT, name="dense1")(y))
        return x + nn.Dense(WIDTH, kernel_init=INIT, name="dense2")(y)


class ViT(nn.Module):
    """Images (b, h, w, c) in [0, 1], h and w multiples of 16 -> logits (b, classes)."""

    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    registers: int

    @nn.compact
    def __call__(self, images: Array) -> Array:
        b, h, w, _ = images.shape
        if h % PATCH or w % PATCH:
            raise UserError(f"vit_s16 takes images whose sides are multiples of {PATCH}, got {h}x{w}")
        x = normalise(images, self.mean, self.std)
        x = nn.Conv(WIDTH, (PATCH, PATCH), PATCH, "VALID", kernel_init=INIT, name="patches")(x)
        x = x.reshape(b, -1, WIDTH)
        token = lambda kind, n: jnp.broadcast_to(self.param(kind, INIT, (1, n, WIDTH)), (b, n, WIDTH))
        placed = lambda x: x + self.param("positions", INIT, (1, x.shape[1], WIDTH))
        if self.registers:  # the positions are the patches' only
            x = jnp.concatenate([token("class_token", 1), token("registers", self.registers), placed(x)], 1)
        else:
            x = placed(jnp.concatenate([token("class_token", 1), x], 1))
        for i in range(DEPTH):
            # Behind the last attention the logits depend on the class token alone: its input is what an explanation
            # can look at.
            x = Block((h // PATCH, w // PATCH) if i == DEPTH - 1 else None, name=f"block{i}")(x)
        x = layer_norm(dtype=None, name="norm")(x)
        return nn.Dense(self.classes, kernel_init=INIT, name="head")(x[:, 0])


def vit_s16(classes: int = 1000, *, mean: Sequence[float], std: Sequence[float], registers: int = 0) -> Model:
    """ViT-S/16, a whole classifier: 384 channels, 12 blocks, 6 heads (Touvron et al. 2020, arXiv 2012.12877).

    Tokens (b, 1 + registers + h w / 256, 384) in the order class, registers, patches by rows; the class token's logits.
    It has no class maps, and its positions are learned for one image size, a multiple of 16. The patches that the last
    block looks at (b, h / 16, w / 16, 384) are named "tokens", for `grad_cam("tokens")`. With `registers` (Darcet et
    al. 2023, arXiv 2309.16588) the positions belong to the patches only.
    """
    check_number("classes", classes, 2, whole=True)
    check_number("registers", registers, 0, whole=True)
    return linen(ViT(classes, *channels(mean, std), registers))


TABLE = table(vit_s16)
