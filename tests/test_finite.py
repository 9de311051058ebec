"""`first_not_finite` names the layer at fault, and nothing that is not finite becomes finite on the way to the
logits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topgap_jax import models
from topgap_jax.rewrite import fast_convs, fold_batch_norm, fused, name
from topgap_jax.rewrite.finite import first_not_finite

IMAGES = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 8, 8, 3)), jnp.float32)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        y = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3))(x)))
        return nn.relu(x + nn.Conv(8, (3, 3))(y))


class Net(nn.Module):
    """Normalisation, a stem and two blocks whose values only ReLUs pass on, of which the second is computed twice."""

    mean: float = 0.5

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")((x - self.mean) / 0.25))
        x = nn.remat(Block, static_argnums=2)(name="block1")(Block(name="block0")(x, train), train)
        return nn.Dense(3, name="dense")(x.mean((1, 2)))


def changed(*path, change=lambda a: a.at[(0,) * a.ndim].set(jnp.nan)):
    """The variables with one array changed, by default to NaN at its first number."""
    *above, last = path
    variables = jax.tree.map(lambda a: a, VARIABLES)
    layer = variables
    for key in above:
        layer = layer[key]
    layer[last] = change(layer[last])
    return variables


VARIABLES = models.linen(Net()).init(jax.random.key(0), IMAGES)
CASES = {
    "as it should be": (None, 0.5, VARIABLES, IMAGES),
    "a NaN pixel": ("images", 0.5, VARIABLES, IMAGES.at[0, 5, 5, 0].set(jnp.nan)),
    "mean NaN": ("stem", jnp.nan, VARIABLES, IMAGES),
    "a NaN weight": ("block0/Conv_1", 0.5, changed("params", "block0", "Conv_1", "kernel"), IMAGES),
    "weights that overflow": (
        "block1/Conv_0",
        0.5,
        changed("params", "block1", "Conv_0", "kernel", change=lambda a: a * 3e38),
        IMAGES,
    ),
    "a negative variance": (
        "block1/BatchNorm_0",
        0.5,
        changed("batch_stats", "block1", "BatchNorm_0", "var", change=lambda a: -a),
        IMAGES,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_first_layer_is_named(case):
    layer, mean, variables, images = CASES[case]
    predict = models.bind(models.linen(Net(mean)), variables)
    assert first_not_finite(fold_batch_norm(fast_convs(predict)), images) == layer
    if case == "a negative variance":  # jitted, and for a function without Flax
        assert first_not_finite(jax.jit(predict), images) == layer


def test_functions_without_layers():
    assert first_not_finite(lambda x: x / 0, IMAGES) == "logits"
    assert first_not_finite(lambda x: name(x / 0, "features") * 0 + 1, IMAGES) == "features"
    assert first_not_finite(lambda x: (x > 2).sum((1, 2)), IMAGES) is None


@pytest.fixture(scope="module")
def logits():
    """(mean, variables, images) -> logits by plain JAX, and by fused convolutions."""
    predict = lambda mean, variables, images: models.bind(models.linen(Net(mean)), variables)(images)
    quick = lambda *args: fold_batch_norm(fast_convs(lambda images: predict(*args[:2], images)))(args[2])
    return jax.jit(predict), jax.jit(fused(quick))


@pytest.mark.parametrize("case", CASES)
def test_fused_logits_are_as_broken_as_plain_ones(logits, case):
    """Image by image: no ReLU makes a number of what is none."""
    layer, *args = CASES[case]
    plain, quick = (np.isfinite(f(*args)).all(1) for f in logits)
    np.testing.assert_array_equal(plain, quick)
    broken = {"as it should be": [], "a NaN pixel": [0]}.get(case, range(4))
    np.testing.assert_array_equal(np.flatnonzero(~plain), broken)
