"""A user's own config file: two networks written as the examples of Flax write theirs, without class maps.

`config.model = "with_pool(my_linen(classes), dense='Dense_0', pool=pool)"` or `"my_nnx(classes, pool)"`.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from tests.tiny_config import get_config as tiny
from topgap_jax import models
from topgap_jax.rewrite import with_pool
from topgap_jax.types import Model, Pool


class CNN(nn.Module):
    """After flax/examples/mnist and imagenet: everything inline, the layers named by Flax."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train: bool = True):
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5)
        x = nn.Conv(features=8, kernel_size=(3, 3), strides=(2, 2), use_bias=False)(x)
        x = norm()(x)
        x = nn.relu(x)
        x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = nn.Conv(features=16, kernel_size=(3, 3))(x)
        x = nn.relu(x)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dropout(rate=0.1, deterministic=not train)(x)
        x = nn.Dense(self.num_classes)(x)
        return x


class NNXCNN(nnx.Module):
    """After the tutorial of NNX: layers are attributes, `train()` and `eval()` switch batch norm and dropout."""

    def __init__(self, num_classes: int, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(3, 8, kernel_size=(3, 3), strides=(2, 2), rngs=rngs)
        self.batch_norm1 = nnx.BatchNorm(8, rngs=rngs)
        self.blocks = nnx.List([nnx.Conv(8, 16, kernel_size=(3, 3), rngs=rngs)])
        self.dropout = nnx.Dropout(rate=0.1, rngs=rngs)
        self.linear = nnx.Linear(16, num_classes, rngs=rngs)
        self.avg_pool = partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))

    def __call__(self, x):
        x = self.avg_pool(nnx.relu(self.batch_norm1(self.conv1(x))))
        for block in self.blocks:
            x = nnx.relu(block(x))
        x = x.mean(axis=(1, 2))
        return self.linear(self.dropout(x))


def my_linen(classes: int) -> Model:
    return models.linen(CNN(num_classes=classes))


def my_nnx(classes: int, pool: Pool) -> Model:
    return with_pool(models.nnx(NNXCNN(classes, rngs=nnx.Rngs(0))), dense="linear", pool=pool)


def methods():
    return {"my_linen": my_linen, "my_nnx": my_nnx}


def get_config() -> ConfigDict:
    config = tiny()
    config.pool = "top_gap(k=4)"
    config.model = "with_pool(my_linen(classes), dense='Dense_0', pool=pool)"
    config.epochs = 5
    config.optimizer = "adamw(0.01)"
    config.evaluators = "accuracy(), localisation(cam(), boxes=False)"
    config.explain = "cam(), grad_cam()"
    return config
