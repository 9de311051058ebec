"""`linen`, `nnx` and `bind`: what a user's module is told, what it may return, and that a call leaves nothing
behind."""

import collections
import dataclasses

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from topgap_jax import cli, drops, models, pool
from topgap_jax.errors import UserError
from topgap_jax.models.switches import in_training
from topgap_jax.rewrite import layers, read, tap, with_drop

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


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("train training is_training is_train train_mode isTraining phase_train do_train update_batch_stats", True),
        ("eval is_eval eval_mode test testing inference deterministic use_running_average is_inference", False),
        ("train_size pretrained test_cases mode x evaluator retrain trainable return_features", None),
    ],
)
def test_what_a_switch_is(words, value):
    assert [in_training(word) for word in words.split()] == [value] * len(words.split())


class Switched(nn.Module):
    """Batch norm under a switch of this name."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(use_running_average=not train, momentum=0.5)(x.mean((1, 2)))


class PassingOn(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, x, **kwargs):
        return self.inner(x, **kwargs)


class Popping(nn.Module):
    @nn.compact
    def __call__(self, x, **kwargs):
        return Switched()(x, kwargs.pop("is_training", False))


class OtherWord(nn.Module):
    @nn.compact
    def __call__(self, x, is_eval: bool = True):
        return Switched()(x, not is_eval)


class Field(nn.Module):
    deterministic: bool = True

    @nn.compact
    def __call__(self, x):
        return Switched()(x, not self.deterministic)


class Around(nn.Module):
    parts: tuple

    @nn.compact
    def __call__(self, x):
        return self.parts[0](x)


class InADict(nn.Module):
    parts: dict

    @nn.compact
    def __call__(self, x):
        return self.parts["a"](x)


class Strict(nn.Module):
    """Takes any keyword and refuses what it does not know in words of its own."""

    @nn.compact
    def __call__(self, x, **kwargs):
        if set(kwargs) - {"train"}:
            raise ValueError(f"unknown arguments {set(kwargs)}")
        return Switched()(x, kwargs.get("train", False))


class OpenField(Field):
    deterministic: bool | None = None


class NNXSwitched(nnx.Module):
    def __init__(self):
        self.norm, self.training = nnx.BatchNorm(3, rngs=nnx.Rngs(0)), False

    def __call__(self, x):
        return self.norm(x.mean((1, 2)), use_running_average=not self.training)


class NNXPassingOn(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, x, **kwargs):
        return self.norm(x.mean((1, 2)), **kwargs)


@pytest.mark.parametrize(
    "module",
    [
        *(Switched(), PassingOn(Switched()), PassingOn(PassingOn(OtherWord())), Popping(), OtherWord()),
        *(Field(), OpenField(), Around((Field(),)), PassingOn(Field()), InADict({"a": Field()}), Strict()),
        *(nn.Sequential([Switched()]), NNXSwitched(), NNXPassingOn()),
    ],
    ids=lambda module: type(module).__name__,
)
def test_the_switch_is_found_where_authors_put_it(module):
    """Statistics move in training and not in evaluation, which normalises by the running ones."""
    model = models.nnx(module) if isinstance(module, nnx.Module) else models.linen(module)
    variables = model.init(jax.random.key(0), IMAGES)
    pooled = IMAGES.mean((1, 2))
    for _ in range(2):  # the second call goes by what the first one has found
        trained = model.apply(variables, IMAGES, train=True)
        assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(trained.batch_stats)) > 0
        np.testing.assert_allclose(trained.logits, (pooled - pooled.mean(0)) / pooled.std(0), rtol=1e-3, atol=1e-3)
        evaluated = model.apply(variables, IMAGES)
        assert evaluated.batch_stats is variables["batch_stats"]
        np.testing.assert_allclose(evaluated.logits, pooled / np.sqrt(1 + 1e-5), rtol=1e-5)
    assert isinstance(module, nnx.Module) or module == type(module)(**module_fields(module))  # it is as it was


def module_fields(module):
    return {name: getattr(module, name) for name in type(module).__dataclass_fields__ if name not in ("parent", "name")}


class Options(nn.Module):
    """A norm of its own, as PyTorch's has it, and dropout that may be left out: options of both modes."""

    track_running_stats: bool = True
    use_dropout: bool = False

    @nn.compact
    def __call__(self, x, train=False, step=3):
        x = x.mean((1, 2)) * step
        mean = self.variable("batch_stats", "mean", jnp.zeros, (3,))
        if train:
            mean.value = x.mean(0)
        x = x - (x.mean(0) if train or not self.track_running_stats else mean.value)
        return nn.Dropout(0.5, deterministic=not train)(x) if self.use_dropout else x


class NNXOptions(nnx.Module):
    def __init__(self):
        self.norm, self.track_running_stats, self.use_dropout = nnx.BatchNorm(3, rngs=nnx.Rngs(0)), True, False

    def __call__(self, x, step=3):
        x = self.norm(x.mean((1, 2)) * step)
        self.seen = x
        assert self.track_running_stats and not self.use_dropout
        return x


def test_an_option_is_no_switch():
    """Nor is a parameter `step` of a call overwritten where there is none."""
    module = Options()
    variables = module.init(KEYS[0], IMAGES)
    model, stats = models.linen(module), {"batch_stats": {"mean": jnp.arange(3.0)}}
    np.testing.assert_array_equal(models.bind(model, {"params": {}, **stats})(IMAGES), module.apply(stats, IMAGES))
    trained = model.apply({"params": {}, **variables}, IMAGES, train=True, keys=KEYS)
    np.testing.assert_allclose(trained.logits, module.apply(variables, IMAGES, True, mutable=["batch_stats"])[0])
    model = models.nnx(NNXOptions())
    variables = model.init(KEYS[0], IMAGES)
    for _ in range(2):  # what a call keeps on its module is no state
        after = model.apply(variables, IMAGES, train=True, keys=KEYS).batch_stats
        assert jax.tree.structure(after) == jax.tree.structure(variables["batch_stats"])
        variables = {**variables, "batch_stats": after}


def test_a_stream_says_that_a_module_is_trained():
    """`has_rng`, which is asked of dropout's stream in evaluation too."""

    class Asking(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(x.mean((1, 2)))
            return 2 * x if train and self.has_rng("drop_path") else x

    model = models.linen(Asking())
    predict = models.bind(model, model.init(KEYS[0], IMAGES))
    np.testing.assert_array_equal(predict(IMAGES, KEYS), IMAGES.mean((1, 2)))
    dropped = model.apply({"params": {}, "batch_stats": {}}, IMAGES, train=True, keys=KEYS).logits
    np.testing.assert_allclose(jnp.where(dropped == 0, 0, 4 * IMAGES.mean((1, 2))), dropped, rtol=1e-6)


def test_statistics_that_do_not_move_are_told_once():
    class Deaf(nn.Module):
        @nn.compact
        def __call__(self, x, fit_now=False):
            return nn.BatchNorm(use_running_average=not fit_now)(x.mean((1, 2)))

    class DeafNNX(NNXPassingOn):
        def __call__(self, x):
            return self.norm(x.mean((1, 2)), use_running_average=True)

    for model, name in ((models.linen(Deaf()), "Deaf"), (models.nnx(DeafNNX()), "DeafNNX")):
        variables = model.init(jax.random.key(0), IMAGES)
        with pytest.warns(UserWarning) as caught:
            jax.jit(lambda v, model=model: model.apply(v, IMAGES, train=True))(variables)
        assert [str(warning.message) for warning in caught] == [
            f"{name}: in training mode its batch statistics did not move, so no switch between training and evaluation"
            " was found: its __call__ should take one, such as `train`, and pass it on"
        ]
        model.apply(variables, IMAGES, train=True)  # a second warning would be an error


def test_a_named_axis_is_the_whole_batch():
    """As it is in a `pmap` over one device; a bound axis stays what it is."""

    class Named(nn.Module):
        axis: str | None

        @nn.compact
        def __call__(self, x, train=False):
            norm = nn.BatchNorm(use_running_average=not train, axis_name=self.axis)
            return jax.lax.pmean(norm(x.mean((1, 2))), "model") if self.axis and train else norm(x.mean((1, 2)))

    named, plain = models.linen(Named("batch")), models.linen(Named(None))
    variables = plain.init(jax.random.key(0), IMAGES)
    run = lambda model: jax.jit(lambda v, x: model.apply(v, x, train=True, keys=KEYS))(variables, IMAGES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), run(named), run(plain))
    gradient = lambda model: jax.grad(lambda x: (model.apply(variables, x, train=True).logits ** 3).sum())(IMAGES)
    np.testing.assert_allclose(gradient(named), gradient(plain), atol=1e-6)
    halves = jax.vmap(lambda x: named.apply(variables, x, train=True).logits, axis_name="batch")
    np.testing.assert_allclose(halves(IMAGES.reshape(2, 2, 4, 4, 3)).reshape(4, 3), run(plain).logits, atol=1e-5)


class DropPath(nn.Module):
    """A stochastic depth that draws from a stream of its own."""

    stream: str = "drop_path"

    @nn.compact
    def __call__(self, x, deterministic: bool = True):
        if deterministic:
            return x
        return x * jax.random.bernoulli(self.make_rng(self.stream), 0.5, (x.shape[0], 1))


def test_every_stream_is_fed():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = x.mean((1, 2)) ** 2 + 1
            dropped = [DropPath(stream)(x, deterministic=not train) for stream in ("drop_path", "dropout", "mixup")]
            return jnp.concatenate([nn.BatchNorm(use_running_average=True)(x), *dropped], 1)

    model = models.linen(Net())
    variables = model.init(jax.random.key(0), IMAGES)
    many = jnp.concatenate([IMAGES] * 16)
    out = jax.jit(lambda keys: model.apply(variables, many, train=True, keys=keys).logits)
    with pytest.warns(UserWarning, match="did not move"):
        logits = out(KEYS)
    np.testing.assert_array_equal(logits, out(KEYS))
    masks = np.asarray(logits[:, 3::3] != 0)
    assert (out(OTHER) != logits).any() and 0.3 < masks.mean() < 0.7
    assert all((masks[:, i] != masks[:, j]).any() for i in range(3) for j in range(i))  # streams draw for themselves
    # Without keys random layers are left out, while the module around them is in training mode.
    still = models.bind(model, variables, train=True)(IMAGES)
    np.testing.assert_allclose(still[:, 3:6], still[:, 6:9])
    assert (still[:, 3:] > 0).all()

    class Inline(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(2)(x.mean((1, 2))) * (jax.random.uniform(self.make_rng("noise")) if train else 1)

    inline = models.linen(Inline())
    variables = inline.init(jax.random.key(0), IMAGES)
    assert message(lambda: models.bind(inline, variables, train=True)(IMAGES)) == (
        "Inline draws random numbers in training mode, and there are no keys"
    )
    assert inline.apply(variables, IMAGES, train=True, keys=KEYS).logits.shape == (4, 2)


class TakingKey(nn.Module):
    @nn.compact
    def __call__(self, x, rng, train=False):
        return x.mean((1, 2)) * (jax.random.uniform(rng) if train else 1)


class TakingKeyNNX(nnx.Module):
    def __call__(self, x, *, rngs: jax.Array, train: bool = False):
        return x.mean((1, 2)) * (jax.random.uniform(rngs) if train else 1)


@pytest.mark.parametrize("module", [TakingKey(), TakingKeyNNX()], ids=["linen", "nnx"])
def test_a_call_that_takes_a_key_gets_one(module):
    """Also where it is called `rngs` and is a key."""
    model = models.nnx(module) if isinstance(module, nnx.Module) else models.linen(module)
    variables = model.init(jax.random.key(0), IMAGES)
    np.testing.assert_allclose(model.apply(variables, IMAGES).logits, IMAGES.mean((1, 2)), atol=1e-6)
    first, again, other = (model.apply(variables, IMAGES, train=True, keys=k).logits for k in (KEYS, KEYS, OTHER))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_an_nnx_dropout_without_keys_of_its_own():
    """Whoever calls it gives it none either: it draws from `keys[0]`, and without keys it is left out."""

    class Net(nnx.Module):
        def __init__(self):
            self.first, self.second = nnx.Dropout(0.5, deterministic=False), nnx.Dropout(0.5)

        def __call__(self, x, training: bool):
            x = jnp.abs(x.mean((1, 2))) + 1
            return jnp.concatenate([drop(x, deterministic=not training) for drop in (self.first, self.second)], 1)

    model = models.nnx(Net())
    variables = model.init(jax.random.key(0), IMAGES)
    many = jnp.concatenate([IMAGES] * 8)
    out = lambda keys: model.apply(variables, many, train=True, keys=keys).logits
    np.testing.assert_array_equal(out(KEYS), out(KEYS))
    masks = np.asarray(out(KEYS) != 0)
    assert 0.3 < masks.mean() < 0.7 and (masks[:, :3] != masks[:, 3:]).any() and (out(OTHER) != out(KEYS)).any()
    still = models.bind(model, variables, train=True)(many)
    np.testing.assert_array_equal(still, model.apply(variables, many).logits)


@dataclasses.dataclass
class Plain:
    features: jax.Array
    logits: jax.Array


@flax.struct.dataclass
class ModelOutput(collections.OrderedDict):
    """As Hugging Face's: a dict whose items are the attributes."""

    logits: jax.Array = None
    hidden: jax.Array = None


Pair = collections.namedtuple("Pair", "features, logits")
RETURNS = {
    "tuple": lambda z, x: (z, x),
    "tuple of dict": lambda z, x: (z, {"pre_logits": 2 * z}),
    "list": lambda z, x: [z],
    "auxiliary": lambda z, x: (z, 2 * z, 3 * z),
    "dict": lambda z, x: {"features": x, "logits": z, "pooled": 2 * z},
    "only one in a dict": lambda z, x: {"maps": x, "head": z},
    "defaultdict": lambda z, x: collections.defaultdict(list, logits=z, a=2 * z),
    "dataclass": lambda z, x: Plain(2 * z, z),
    "struct": lambda z, x: ModelOutput(logits=z, hidden=2 * z),
    "named tuple": lambda z, x: Pair(2 * z, z),
    "nested": lambda z, x: {"maps": x, "heads": {"aux": {"logits": z}}},
    "named inside": lambda z, x: ({"logits": z, "pooled": 2 * z}, x),
    "named below others": lambda z, x: (2 * z, {"logits": z}),
    "beside integers": lambda z, x: {"order": jnp.argsort(z, 1), "z": z},
    "half": lambda z, x: z.astype(jnp.bfloat16).astype(jnp.float16),
}


@pytest.mark.parametrize("kind", RETURNS)
def test_logits_are_found_in_what_a_module_returns(kind):
    class Returning(nn.Module):
        def __call__(self, x):
            return RETURNS[kind](x.mean((1, 2)), x)

    class ReturningNNX(nnx.Module):
        def __call__(self, x):
            return RETURNS[kind](x.mean((1, 2)), x)

    for model in (models.linen(Returning()), models.nnx(ReturningNNX())):
        variables = model.init(jax.random.key(0), IMAGES)
        logits = models.bind(model, variables)(IMAGES)
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, IMAGES.mean((1, 2)), atol=0.01 if kind == "half" else 1e-6)
        layers(models.bind(model, variables), IMAGES)


def test_collections_are_carried():
    """What a module keeps besides statistics is state: training moves it, evaluation leaves it; what is sown is none."""

    class Keeping(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            calls = self.variable("cache", "calls", jnp.zeros, (), jnp.int32)
            norm = self.variable("spectral", "norm", jnp.ones, (3,))
            if not self.is_initializing():
                calls.value += 1  # in evaluation, too
            if train and not self.is_initializing():
                norm.value = 2 * norm.value
            self.sow("losses", "l2", (x**2).mean())
            return nn.BatchNorm(use_running_average=not train)(x.mean((1, 2)) * norm.value)

    model = models.linen(Keeping())
    variables = model.init(jax.random.key(0), IMAGES)
    assert set(variables["batch_stats"]) == {"BatchNorm_0", "(cache)", "(spectral)"}
    step = jax.jit(lambda variables: model.apply(variables, IMAGES, train=True).batch_stats)
    for _ in range(3):
        variables = {**variables, "batch_stats": step(variables)}
    assert variables["batch_stats"]["(cache)"]["calls"] == 3
    assert variables["batch_stats"]["(spectral)"]["norm"].tolist() == [8, 8, 8]
    assert model.apply(variables, IMAGES).batch_stats is variables["batch_stats"]
    np.testing.assert_array_equal(*(model.apply(variables, IMAGES).logits for _ in range(2)))


def test_a_network_with_weights_of_its_own():
    module = nn.Dense(3)
    drawn = jax.tree.map(lambda x: x + 1, module.init(jax.random.key(7), jnp.zeros((1, 3))))

    class Net(nn.Module):
        def setup(self):
            self.dense = module.clone()

        def __call__(self, x):
            return self.dense(x.mean((1, 2)))

    own = {"params": {"dense": drawn["params"]}}
    for weights in (own, own["params"]):
        model = models.linen(Net(), weights=weights)
        assert model.has_weights and not models.linen(Net()).has_weights
        variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
        jax.tree.map(np.testing.assert_array_equal, variables["params"], own["params"])
    wrong = {"dense": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(3)}}
    assert message(lambda: models.linen(Net(), weights=wrong).init(jax.random.key(0), IMAGES)) == (
        "linen: the weights do not fit Net: ['params']['dense']['kernel'] (3, 4) where it has"
        " ['params']['dense']['kernel'] (3, 3)"
    )
    model = models.nnx(NNXSwitched())
    for changed in (model, models.fast(model), with_drop(model, "norm", drops.dropout(0.5))):
        assert changed.has_weights


class Asking(nn.Module):
    def __call__(self, x, labels):
        return x


class Misfit(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x.mean((1, 2)) @ jnp.ones((5, 2))


class AskingNNX(nnx.Module):
    def __call__(self, x, labels):
        return x


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (Asking(), "TypeError: Asking.__call__() missing 1 required positional argument: 'labels'"),
        (AskingNNX(), "TypeError: AskingNNX.__call__() missing 1 required positional argument: 'labels'"),
        (Misfit(), "TypeError: dot_general requires contracting dimensions to have the same shape, got (3,) and (5,)."),
    ],
    ids=["linen", "nnx", "shapes"],
)
def test_what_a_module_raises_is_one_line(module, text):
    is_nnx = isinstance(module, nnx.Module)
    model = models.nnx(module) if is_nnx else models.linen(module)
    said = []
    for call, mode in (
        (lambda: model.init(jax.random.key(0), IMAGES), "initialised"),
        (lambda: jax.jit(lambda x: model.apply(EMPTY, x).logits)(IMAGES), "called in eval mode"),
        (lambda: model.apply(EMPTY, IMAGES, train=True, keys=KEYS), "called in training mode"),
    ):
        if is_nnx and mode == "initialised":
            continue  # it is born
        with pytest.raises(UserError) as raised:
            call()
        said.append(str(raised.value))
        kind = type(module).__name__
        assert said[-1].startswith(f"{kind}, {mode} with images of shape (4, 4, 4, 3), raised {text}")
        assert "\n" not in said[-1] and raised.value.__cause__ is not None


def test_the_command_line_shows_the_rest_where_it_is_asked_for(tmp_path, capsys):
    config = tmp_path / "mine.py"
    config.write_text(
        "from tests.test_flax_modules import Misfit\nfrom tests.tiny_config import get_config as tiny\n"
        "from topgap_jax import models\n"
        "def methods(): return {'mine': lambda: models.linen(Misfit())}\n"
        "def get_config():\n    config = tiny()\n    config.model = 'mine()'\n    return config\n"
    )
    assert cli.main(["layers", "--config", str(config)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Misfit, initialised with images of shape" in said
    assert "raised TypeError: dot_general requires" in said and said.endswith("(--traceback shows where)\n")
    assert cli.main(["layers", "--config", str(config), "--traceback"]) == 2
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said and "in __call__" in said and "shows where" not in said


EMPTY = {"params": {}, "batch_stats": {}}


def test_what_is_no_module():
    class Wrapped:
        module, params = Misfit(), {}

    assert message(lambda: models.linen(Misfit)) == "linen needs an instance of a linen Module, got the class Misfit"
    assert message(lambda: models.nnx(Misfit())) == "nnx needs an instance of a nnx Module, got a Misfit"
    assert message(lambda: models.linen(Wrapped())) == (
        "linen needs an instance of a linen Module, got a Wrapped; give its .module, and weights=its .params"
    )


def test_what_has_no_logits():
    class Maps(nn.Module):
        def __call__(self, x):
            return x

    class Two(nnx.Module):
        def __call__(self, x):
            return x.mean((1, 2)), x.mean((1, 2))[:, :2]

    class Named(nn.Module):
        def __call__(self, x):
            return {"maps": x, "scale": 1.0}

    must = "must return logits (b, k) for images of shape (4, 4, 4, 3), it returned"
    for model, text in (
        (models.linen(Maps()), f"Maps {must} an array of shape (4, 4, 4, 3)"),
        (models.linen(Named()), f"Named {must} a dict of maps, scale"),
        (
            models.nnx(Two()),
            f"Two {must} several arrays, (4, 2) and (4, 3): return the logits alone, or name them logits",
        ),
    ):
        assert message(lambda model=model: model.apply(EMPTY, IMAGES)) == text
