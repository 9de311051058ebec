"""The layers that backbones are made of, with PyTorch's padding unless they say otherwise, and float32 parameters."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from topgap_jax.build import check_number
from topgap_jax.errors import UserError
from topgap_jax.types import Array

he_normal = nn.initializers.he_normal()

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "silu": nn.silu,
    "hard_swish": nn.hard_swish,
    "gelu": lambda x: nn.gelu(x, approximate=False),
}


def convolution(
    features: int,
    kernel: int,
    stride: int = 1,
    *,
    dtype: Any,
    name: str,
    bias: bool = False,
    groups: int = 1,
    padding: str = "symmetric",
) -> nn.Conv:
    """A square convolution. "symmetric" pads kernel // 2 rows and columns on every side, as PyTorch's networks do;
    "same" is TensorFlow's SAME, which at stride 2 and even sizes pads one less at the top and left; "valid" pads
    nothing."""
    pad = (kernel // 2, kernel // 2)
    return nn.Conv(
        features,
        (kernel, kernel),
        stride,
        (pad, pad) if padding == "symmetric" else padding.upper(),
        feature_group_count=groups,
        use_bias=bias,
        dtype=dtype,
        kernel_init=he_normal,
        name=name,
    )


def batch_norm(train: bool, *, dtype: Any, name: str, eps: float = 1e-5) -> nn.BatchNorm:
    """Batch norm with float32 statistics; outside training it uses the running statistics.

    Its momentum is 0.9, as PyTorch's, and 0.99 with the eps 1e-3 of TensorFlow's networks, which came with it.
    """
    return nn.BatchNorm(not train, momentum=0.99 if eps == 1e-3 else 0.9, epsilon=eps, dtype=dtype, name=name)


def layer_norm(*, dtype: Any, name: str, eps: float = 1e-6) -> nn.LayerNorm:
    """Layer norm over the channels, its statistics in float32."""
    return nn.LayerNorm(epsilon=eps, dtype=dtype, name=name)


def stochastic_depth(x: Array, rate: float, train: bool) -> Array:
    """In training, x (b, ...) without the rows that are dropped with probability `rate`, the others over 1 - rate
    (Huang et al. 2016, arXiv 1603.09382). It draws from the stream 'dropout'."""
    rows = tuple(range(1, x.ndim))
    return nn.Dropout(rate, broadcast_dims=rows, deterministic=not train)(x) if rate else x


class SqueezeExcite(nn.Module):
    """x times gate(expand(activation(reduce(mean of x over positions)))) (Hu et al. 2017, arXiv 1709.01507)."""

    reduced: int
    activation: str
    gate: Callable[[Array], Array]
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = lambda width, name: nn.Dense(width, dtype=self.dtype, kernel_init=he_normal, name=name)
        y = jnp.mean(x, (1, 2), keepdims=True)
        y = ACTIVATIONS[self.activation](dense(self.reduced, "reduce")(y))
        return x * self.gate(dense(x.shape[-1], "expand")(y))


def check_five_halvings(network: str, images: Array) -> None:
    """UserError for images (b, h, w, c) of which a network that rounds down would leave no position."""
    height, width = images.shape[1:3]
    if min(height, width) < 32:
        raise UserError(f"{network} halves its images five times and needs at least 32x32 pixels, got {height}x{width}")


def check_activation(activation: str) -> None:
    """UserError unless it is a name in ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise UserError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def check_padding(padding: str) -> None:
    """UserError unless it is one of the two ways to pad that backbones have."""
    if padding not in ("symmetric", "same"):
        raise UserError(f"padding must be 'symmetric' or 'same', got {padding!r}")


def check_variant(padding: str, eps: float, stochastic_depth: float) -> None:
    """The options in which publications of one network differ: UserError unless they are right."""
    check_padding(padding)
    check_number("eps", eps, 0)
    check_number("stochastic_depth", stochastic_depth, 0, 0.99)
