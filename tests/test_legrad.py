"""LeGrad: breadth 1's case, a transformer written by hand, and each image by itself."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from topgap_jax import explain, models
from topgap_jax.errors import UserError

random = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
IMAGES = jnp.asarray(random.uniform(size=(4, 4, 4, 3)), jnp.float32)
LABELS = jnp.arange(4) % 3


def test_worked_case():
    """One head, a class token and two patches: dP rows (1/6, 2/3, 1/6)."""
    values = jnp.array([[1.0, 0], [0, 2], [-1, 1]])

    def predict(images, keys=None):
        x = images.reshape(1, 3, 2) @ jnp.eye(2)
        weights = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", x, x @ jnp.ones((2, 2))))
        x = x + jnp.einsum("bqk,bkd->bqd", weights, x)
        return (x.mean(1) @ jnp.array([0.5, 1]))[:, None]

    maps = explain.legrad(grid=(1, 2)).maps(None, predict, values.reshape(1, 1, 3, 2), jnp.array([0]))
    np.testing.assert_allclose(maps[0], [[0.666667, 0.166667]], atol=1e-6)


class Transformer(nn.Module):
    """Two blocks with checkpoints, a class token, four patches."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), (2, 2), name="patches")(x).reshape(len(x), -1, 8)
        x = jnp.concatenate([jnp.broadcast_to(self.param("token", nn.initializers.ones, (8,)), (len(x), 1, 8)), x], 1)
        for i in range(2):
            x = nn.remat(Block)(name=f"block{i}")(x)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="norm")(x)[:, 0])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2)(y)
        return x + nn.Dense(8, name="narrow")(nn.gelu(nn.Dense(16, name="wide")(x)))


def by_hand(variables, x):
    """Of each block the gradient of the score behind it by its attention, with Flax's layers one by one."""
    params = variables["params"]
    layer = lambda kind, p, x: kind.apply({"params": p}, x)
    x = layer(nn.Conv(8, (2, 2), (2, 2)), params["patches"], x).reshape(len(x), -1, 8)
    x = jnp.concatenate([jnp.broadcast_to(params["token"], (len(x), 1, 8)), x], 1)
    maps = []
    for i in range(2):
        p = params[f"block{i}"]
        attention = p["MultiHeadDotProductAttention_0"]
        y = layer(nn.LayerNorm(), p["LayerNorm_0"], x)
        q, k, v = (
            jnp.einsum("bnc,chd->bnhd", y, attention[part]["kernel"]) + attention[part]["bias"]
            for part in ("query", "key", "value")
        )
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q / 2, k))

        def behind(weights, x=x, v=v, p=p, attention=attention):
            out = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
            x = x + jnp.einsum("bqhd,hdc->bqc", out, attention["out"]["kernel"]) + attention["out"]["bias"]
            wide = nn.gelu(layer(nn.Dense(16), p["wide"], x))
            return x + layer(nn.Dense(8), p["narrow"], wide)

        def score(weights, behind=behind):
            tokens = layer(nn.LayerNorm(), params["norm"], behind(weights))
            logits = layer(nn.Dense(3), params["head"], tokens[:, 0])
            return jnp.take_along_axis(logits, LABELS[:, None], 1).sum()

        maps.append(jax.nn.relu(jax.grad(score)(weights)).mean((1, 2)))
        x = behind(weights)
    return (sum(maps) / 2)[:, 1:].reshape(-1, 2, 2)


def test_a_transformer_by_hand_and_each_image_by_itself():
    model = models.linen(Transformer())
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    predict = jax.jit(models.bind(model, variables))
    maps = jax.jit(lambda images, labels: explain.legrad()(None, predict, images, labels))
    found = maps(IMAGES, LABELS)
    np.testing.assert_allclose(found, jax.jit(by_hand)(variables, IMAGES), atol=1e-6)
    assert found.shape == (4, 2, 2) and (found >= 0).all() and np.ptp(found) > 0
    others = maps(jnp.flip(IMAGES, 1).at[2].set(IMAGES[2]), (LABELS + 1).at[2].set(LABELS[2]) % 3)
    np.testing.assert_array_equal(others[2], found[2])
    assert (np.asarray(others) != np.asarray(found)).any((1, 2)).tolist() == [True, True, False, True]


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.wide, self.head = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

    def __call__(self, x):
        x = self.wide(x.reshape(len(x), -1, 3))
        return self.head((x + self.attention(x)).mean(1))


@pytest.mark.slow
def test_an_nnx_transformer_and_errors():
    model = models.nnx(Nnx(nnx.Rngs(0)))
    predict = models.bind(model, model.init(jax.random.key(0), IMAGES))
    assert explain.legrad(prefix=0).maps(None, predict, IMAGES, LABELS).shape == (4, 4, 4)
    with pytest.raises(UserError, match="16 tokens without 1 before the patches are no 3x3 patches; give grid="):
        explain.legrad()(None, predict, IMAGES, LABELS)
    with pytest.raises(UserError, match="the network has no attention that could be found"):
        explain.legrad()(None, lambda images, keys=None: images.mean((1, 2)), IMAGES, LABELS)
