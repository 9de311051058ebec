"""The two layers every backbone is made of, with PyTorch's padding and float32 parameters."""

from typing import Any

import flax.linen as nn

he_normal = nn.initializers.he_normal()


def convolution(features: int, kernel: int, stride: int = 1, *, dtype: Any, name: str, bias: bool = False) -> nn.Conv:
    """A square convolution that pads kernel // 2 rows and columns on every side, which is not `SAME` for stride 2."""
    pad = (kernel // 2, kernel // 2)
    return nn.Conv(
        features, (kernel, kernel), stride, (pad, pad), use_bias=bias, dtype=dtype, kernel_init=he_normal, name=name
    )


def batch_norm(train: bool, *, dtype: Any, name: str) -> nn.BatchNorm:
    """Batch norm with float32 statistics, momentum 0.9, epsilon 1e-5; outside training it uses the running
    statistics."""
    return nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name)
