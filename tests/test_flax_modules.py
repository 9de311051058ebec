"""`linen`, `nnx` and `bind`: what a user's module is told, what it may return, and that a call leaves nothing
behind."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from topgap_jax import models, pool
from topgap_jax.errors import UserError
from topgap_jax.models.model import SWITCHES
from topgap_jax.rewrite import layers, read, tap

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4, 4, 3)), jnp.float32)
KEYS, OTHER = jax.random.split(jax.random.key(0), 4), jax.random.split(jax.random.key(1), 4)


class Normalised(nn.Module):
    """Batch norm of the pooled pixels, then dropout."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x.mean((1, 2)))
        return nn.Dropout(0.5, deterministic=not train)(x)


class Part(nnx.Module):
    def __init__(self, inside, out, rngs):
        self.conv = nnx.Conv(inside, out, (3, 3), rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.conv(x))


class Parts(nnx.Module):
    """Two parts of one class, a list, a Sequential, batch norm, dropout with its own stream of keys."""

    def __init__(self, rngs):
        self.first, self.second = Part(3, 4, rngs), Part(4, 5, rngs)
        self.more = nnx.List([Part(5, 5, rngs), Part(5, 5, rngs)])
        self.norm = nnx.BatchNorm(5, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Sequential(nnx.Linear(5, 6, rngs=rngs), nnx.relu, nnx.Linear(6, 3, rngs=rngs))

    def __call__(self, x):
        x = self.second(self.first(x))
        for part in self.more:
            x = part(x)
        return self.head(self.dropout(self.norm(x).mean((1, 2))))


@pytest.fixture(scope="module")
def parts():
    module = nnx.jit(lambda: Parts(nnx.Rngs(0)))()
    model = models.nnx(module)
    return module, model, model.init(jax.random.key(0), IMAGES)


def message(call):
    with pytest.raises(UserError) as raised:
        call()
    return str(raised.value)


def test_linen_passes_the_switches_it_knows():
    class Told(nn.Module):
        def __call__(
            self,
            x,
            train,
            training,
            is_training,
            deterministic,
            use_running_average,
            eval,
            inference,
            step=-1,
            scale=1.0,
        ):
            flags = [train, training, is_training, deterministic, use_running_average, eval, inference]
            return scale * jnp.tile(jnp.array([*flags, -1 if step is None else step], jnp.float32), (len(x), 1))

    model = models.linen(Told())
    variables = model.init(jax.random.key(0), IMAGES)
    assert variables == {"params": {}, "batch_stats": {}}
    np.testing.assert_array_equal(model.apply(variables, IMAGES).logits[0], [0, 0, 0, 1, 1, 1, 1, -1])
    np.testing.assert_array_equal(
        model.apply(variables, IMAGES, train=True, step=7).logits[0], [1, 1, 1, 0, 0, 0, 0, 7]
    )
    np.testing.assert_array_equal(
        models.bind(model, variables, train=True, step=3)(IMAGES)[0], [1, 1, 1, 0, 0, 0, 0, 3]
    )
    assert len(SWITCHES) == 7


def test_nnx_passes_switches_and_rngs():
    class Told(nnx.Module):
        def __call__(self, x, rngs, *, deterministic, step):
            seeded = jnp.zeros(()) if rngs is None else jax.random.uniform(rngs())
            return jnp.tile(jnp.stack([jnp.float32(deterministic), jnp.float32(step or 0), seeded]), (len(x), 1))

    model = models.nnx(Told())
    variables = model.init(jax.random.key(0), IMAGES)
    np.testing.assert_array_equal(model.apply(variables, IMAGES).logits[0], [1, 0, 0])
    train = model.apply(variables, IMAGES, train=True, step=7, keys=KEYS).logits[0]
    np.testing.assert_array_equal(train[:2], [0, 7])
    assert train[2] > 0 and train[2] != model.apply(variables, IMAGES, train=True, keys=OTHER).logits[0, 2]


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_dropout_is_reproducible_from_the_keys(kind, parts):
    model = models.linen(Normalised()) if kind == "linen" else parts[1]
    variables = model.init(jax.random.key(0), IMAGES)
    run = jax.jit(lambda variables, keys: model.apply(variables, IMAGES, train=True, keys=keys).logits)
    first = run(variables, KEYS)
    np.testing.assert_array_equal(run(variables, KEYS), first)
    assert (run(variables, OTHER) != first).any()
    # Only the first key counts, and none of them in eval mode.
    np.testing.assert_array_equal(run(variables, OTHER.at[0].set(KEYS[0])), first)
    evaluate = jax.jit(lambda variables, keys: model.apply(variables, IMAGES, keys=keys).logits)
    np.testing.assert_array_equal(evaluate(variables, KEYS), evaluate(variables, OTHER))


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_training_mode_without_keys_has_no_dropout(kind, parts):
    """But the batch's statistics: the logits that keys of which nothing is dropped would give."""
    model = models.linen(Normalised()) if kind == "linen" else parts[1]
    variables = model.init(jax.random.key(0), IMAGES)
    logits = models.bind(model, variables, train=True)(IMAGES)
    np.testing.assert_array_equal(models.bind(model, variables, train=True)(IMAGES), logits)
    if kind == "linen":
        pooled = np.asarray(IMAGES.mean((1, 2)))
        np.testing.assert_allclose(
            logits, (pooled - pooled.mean(0)) / np.sqrt(pooled.var(0) + 1e-5), rtol=1e-4, atol=1e-4
        )
    else:
        _, given = read(models.bind(model, variables, train=True), "dropout")(IMAGES)
        _, normed = read(models.bind(model, variables, train=True), "norm")(IMAGES)
        np.testing.assert_allclose(given, normed.mean((1, 2)), atol=1e-6)
    assert np.abs(logits - models.bind(model, variables)(IMAGES)).max() > 1e-3


@pytest.mark.parametrize("train", [True, False])
def test_linen_batch_statistics(train):
    model = models.linen(Normalised())
    variables = model.init(jax.random.key(0), IMAGES)
    stats = {"BatchNorm_0": {"mean": jnp.array([0.5, 0, -0.5]), "var": jnp.array([1.0, 2, 3])}}
    variables = {**variables, "batch_stats": stats}
    out = model.apply(variables, IMAGES, train=train, keys=KEYS)
    pooled = np.asarray(IMAGES.mean((1, 2)))
    if train:
        expected = {
            "mean": 0.9 * stats["BatchNorm_0"]["mean"] + 0.1 * pooled.mean(0),
            "var": 0.9 * stats["BatchNorm_0"]["var"] + 0.1 * pooled.var(0),
        }
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), out.batch_stats, {"BatchNorm_0": expected}
        )
        kept = np.asarray(out.logits) != 0  # dropout
        normalised = 2 * (pooled - pooled.mean(0)) / np.sqrt(pooled.var(0) + 1e-5)
        np.testing.assert_allclose(np.asarray(out.logits)[kept], normalised[kept], atol=1e-4)
    else:
        assert out.batch_stats is stats
        normalised = (pooled - stats["BatchNorm_0"]["mean"]) / np.sqrt(stats["BatchNorm_0"]["var"] + 1e-5)
        np.testing.assert_allclose(out.logits, normalised, atol=1e-5)
    np.testing.assert_array_equal(models.bind(model, variables, train=train)(IMAGES, KEYS), out.logits)


def test_nnx_batch_statistics_and_leftovers(parts):
    """Training moves the statistics by their momentum; a call changes neither the module nor the next call, jitted or
    not."""
    module, model, variables = parts
    content = lambda: jax.tree.map(
        np.asarray, [nnx.to_pure_dict(part) for part in nnx.state(module, nnx.Param, nnx.BatchStat)]
    )
    before = content()
    train = lambda variables: model.apply(variables, IMAGES, train=True)  # without keys: the module's own random state
    out, again, jitted = train(variables), train(variables), jax.jit(train)(variables)
    np.testing.assert_array_equal(again.logits, out.logits)
    np.testing.assert_allclose(jitted.logits, out.logits, atol=1e-5)
    _, inputs = read(lambda images: model.apply(variables, images, train=True).logits, "more/1")(IMAGES)
    moved = {"mean": 0.1 * inputs.mean((0, 1, 2)), "var": 0.9 + 0.1 * inputs.var((0, 1, 2))}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), out.batch_stats, {"norm": moved})
    assert model.apply(variables, IMAGES).batch_stats is variables["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, content(), before)
    assert type(module.first) is Part and type(module.more[1]) is Part


def test_nnx_names(parts):
    _, model, variables = parts
    predict = models.bind(model, variables)
    found = layers(predict, IMAGES)
    assert [x.name for x in found] == [
        *("first/conv", "first", "second/conv", "second", "more/0/conv", "more/0", "more/1/conv", "more/1"),
        *("norm", "dropout", "head/layers/0", "head/layers/2", "head"),
    ]
    assert all(x.reachable and x.calls == 1 for x in found)
    assert [x.name for x in layers(jax.jit(predict), IMAGES)] == [x.name for x in found]


def test_nnx_under_jit_and_grad(parts):
    """The gradient with a layer's output replaced by a constant is that of the parameters behind it only."""
    _, model, variables = parts

    def loss(params, layer):
        predict = models.bind(model, {**variables, "params": params})
        return (tap(predict, layer, jnp.ones_like)(IMAGES) ** 2).sum()

    gradient = jax.jit(jax.grad(lambda params: loss(params, "more/0")))(variables["params"])
    size = lambda tree: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))
    assert size(gradient["first"]) == size(gradient["second"]) == size(gradient["more"][0]) == 0
    assert size(gradient["norm"]) > 0 and size(gradient["head"]) > 0
    plain = jax.jit(jax.grad(lambda params: (model.apply({**variables, "params": params}, IMAGES).logits ** 2).sum()))(
        variables["params"]
    )
    assert size(plain["first"]) > 0


def test_a_pools_schedule_sees_the_step():
    class Pooled(nn.Module):
        @nn.compact
        def __call__(self, x, step=None):
            return pool.top_gap(k=lambda step: jnp.where(step < 5, 16.0, 1.0))(x, step)

    model = models.linen(Pooled())
    for step, pooled in {0: pool.gap(), 5: pool.gmp(), None: pool.gmp()}.items():
        np.testing.assert_allclose(
            models.bind(model, model.init(jax.random.key(0), IMAGES), step=step)(IMAGES), pooled(IMAGES), atol=1e-6
        )


def test_errors():
    class Cached(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.variable("cache", "seen", jnp.zeros, ())
            self.variable("spectral", "norm", jnp.zeros, ())
            return x.mean((1, 2))

    class Maps(nn.Module):
        def __call__(self, x):
            return x

    class Two(nnx.Module):
        def __call__(self, x):
            return x.mean((1, 2)), x

    assert message(lambda: models.linen(Cached()).init(jax.random.key(0), IMAGES)) == (
        "linen: Cached keeps collections that are not supported: cache, spectral"
    )
    empty = {"params": {}, "batch_stats": {}}
    assert message(lambda: models.linen(Maps()).apply(empty, IMAGES)) == (
        "Maps must return logits (b, k) for images of shape (4, 4, 4, 3), it returned an array of shape (4, 4, 4, 3)"
    )
    assert message(lambda: models.nnx(Two()).apply(empty, IMAGES)) == (
        "Two must return logits (b, k) for images of shape (4, 4, 4, 3), it returned a tuple"
    )
