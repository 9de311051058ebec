"""`with_drop` at layers of models that know nothing of it: what it drops, what it leaves alone, and that it costs no
second trunk."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests import tiny_fit
from tests.own_models import CNN, NNXCNN
from tests.test_rewrite import compilations  # noqa: F401
from topgap_jax import drops, models, pool
from topgap_jax.build import build
from topgap_jax.errors import UserError
from topgap_jax.mesh import data_mesh, replicated, split
from topgap_jax.progress import read_metrics
from topgap_jax.rewrite import layers, name, read, tap, with_drop, with_pool
from topgap_jax.run.fit import _averaged, fit
from topgap_jax.setup import config as configs
from topgap_jax.setup import expressions
from topgap_jax.training import objectives
from topgap_jax.types import Output

B, CLASSES = 8, 5
IMAGES = jax.random.uniform(jax.random.key(0), (B, 12, 12, 3))
LABELS = jnp.arange(B) % CLASSES
TARGETS = jax.nn.one_hot(LABELS, CLASSES)
KEYS = jax.random.split(jax.random.key(1), B)
BATCH = {"image": IMAGES, "label": LABELS, "targets": TARGETS, "id": jnp.arange(B), "mask": jnp.ones(B, bool)}


def drawn(model, seed=0):
    """Variables of the right shapes from NumPy, positive where they are variances: nothing is compiled."""
    random = np.random.default_rng(seed)

    def fill(path, x):
        value = random.normal(size=x.shape) * 0.3 + (path[-1].key in ("var", "scale"))
        return jnp.asarray(np.abs(value) if path[-1].key == "var" else value, x.dtype)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(model.init, jax.random.key(0), IMAGES))


@pytest.fixture(scope="module", params=["linen", "nnx"])
def foreign(request):
    """(model, its last convolution, its dense layer, variables with averages that differ)."""
    if request.param == "linen":
        model, layer, dense = models.linen(CNN(num_classes=CLASSES)), "Conv_1", "Dense_0"
    else:
        model = models.nnx(nnx.jit(lambda: NNXCNN(CLASSES, rngs=nnx.Rngs(0)))())
        layer, dense = "blocks/0", "linear"
    return model, layer, dense, {**drawn(model), "ema": drawn(model, seed=1)}


def train(model, variables, images=IMAGES, **options):
    """Training mode, with everything that an objective hands on."""
    return model.apply(variables, images, **({"train": True, "keys": KEYS, "targets": TARGETS, "step": 0} | options))


def by_hand(foreign, rate=0.3, teacher=False):
    """What SGDrop keeps of the last convolution: the two networks end in ReLU, mean, dropout and a dense layer."""
    model, layer, dense, variables = foreign
    if teacher:
        f = lambda images: model.apply(variables["ema"], images).logits
    else:
        f = lambda images: train(model, variables, images=images)
    z = jax.jit(read(f, layer))(IMAGES)[1]
    kernel = np.asarray((variables["ema"] if teacher else variables)["params"][dense]["kernel"])
    scores = np.maximum(np.asarray(z), 0) * kernel[:, np.asarray(LABELS)].T[:, None, None, :]
    limit = np.quantile(np.maximum(scores, 0).reshape(B, -1), 1 - rate, axis=1)
    return scores <= limit[:, None, None, None]


slow = lambda *values, **options: pytest.param(*values, marks=pytest.mark.slow, **options)
mostly_linen = pytest.mark.parametrize("foreign", ["linen", slow("nnx")], indirect=True)


@pytest.mark.parametrize("jitted", [slow(False, id="eager"), pytest.param(True, id="jit")])
@pytest.mark.parametrize("teacher", [False, True], ids=["student", "teacher"])
def test_sgdrop_by_hand(foreign, teacher, jitted):
    """Logits (dropout of the module's own included), batch statistics, the rate, and gradients through the kept
    elements only."""
    model, layer, _, variables = foreign
    kept = by_hand(foreign, teacher=teacher)
    dropping = with_drop(model, layer, drops.sgdrop(rate=0.3, teacher=teacher))
    weights = jnp.arange(float(B * CLASSES)).reshape(B, CLASSES)

    def with_gradient(apply):
        loss = lambda params: (lambda out: ((out.logits * weights).sum(), out))(apply({**variables, "params": params}))
        run = lambda params: jax.value_and_grad(loss, has_aux=True)(params)
        (_, out), gradient = (jax.jit(run) if jitted else run)(variables["params"])
        return out, gradient

    edit = lambda value: jnp.where(kept, value, 0)
    found, gradient = with_gradient(lambda variables: train(dropping, variables))
    plain = lambda variables: tap(lambda images: train(model, variables, images), layer, edit)(IMAGES)
    out, expected = with_gradient(plain)
    np.testing.assert_allclose(found.logits, out.logits, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found.batch_stats, out.batch_stats)
    np.testing.assert_allclose(found.logs["drop_rate"], 1 - kept.reshape(B, -1).mean(1), atol=1e-6)
    assert kept.reshape(B, -1).mean() < 0.95
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient, expected)


@pytest.mark.parametrize("jit", [jax.jit, slow(lambda f: f)], ids=["jit", "eager"])
def test_eval_mode_is_the_model_itself(foreign, jit):
    """Bit for bit, and without a look at the labels."""
    model, layer, _, variables = foreign
    dropping = with_drop(model, layer, drops.sgdrop(rate=0.5, teacher=True))
    run = lambda model, targets: jit(lambda variables: model.apply(variables, IMAGES, targets=targets).logits)(
        variables
    )
    np.testing.assert_array_equal(run(dropping, TARGETS), run(model, None))
    np.testing.assert_array_equal(run(dropping, TARGETS[::-1]), run(model, None))
    assert [x.name for x in layers(models.bind(dropping, variables), IMAGES)] == [
        x.name for x in layers(models.bind(model, variables), IMAGES)
    ]


def test_a_pass_without_targets_drops_nothing(foreign):
    """An attack in training mode knows labels, but the model is not told them."""
    model, layer, _, variables = foreign
    dropping = with_drop(model, layer, drops.sgdrop(rate=0.5))
    run = lambda model: jax.jit(models.bind(model, variables, train=True))(IMAGES, KEYS)
    np.testing.assert_array_equal(run(dropping), run(model))


@mostly_linen
@pytest.mark.parametrize("row", [slow("dropout(0)"), "sgdrop(rate=0)", slow("random_matched(sgdrop(rate=0))")])
def test_rate_0_is_plain_training(foreign, row):
    model, layer, _, variables = foreign
    run = lambda model: jax.jit(lambda variables: train(model, variables))(variables)
    found, expected = run(with_drop(model, layer, build(row, drops.TABLE))), run(model)
    np.testing.assert_array_equal(found.logits, expected.logits)
    jax.tree.map(np.testing.assert_array_equal, found.batch_stats, expected.batch_stats)
    assert not found.logs["drop_rate"].any()


@pytest.mark.parametrize("rate, count", [slow(0.0, 0), (0.1, 58)])
def test_the_count_is_exact_in_a_compiled_step(rate, count):
    """XLA computes these scores twice, for the threshold and for the comparison, with other last bits."""

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(16, (3, 3), strides=2)(x)))
            return nn.Dense(CLASSES)(name(x, "features")).mean((1, 2))

    model, images, keys = models.linen(Normed()), jax.random.uniform(KEYS[0], (64, 12, 12, 3)), jnp.tile(KEYS, 8)
    variables, targets = jax.jit(model.init)(jax.random.key(1), images), jnp.tile(TARGETS, (8, 1))
    dropping = with_drop(model, "features", drops.sgdrop(rate=rate))

    def loss(params, images):
        out = dropping.apply({**variables, "params": params}, images, train=True, keys=keys, targets=targets)
        return optax.softmax_cross_entropy(out.logits, targets).mean(), out.logs["drop_rate"]

    found = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"], images)[0][1]
    np.testing.assert_allclose(found * 6 * 6 * 16, count, atol=1e-3)


@mostly_linen
def test_the_rate_follows_the_step(foreign):
    model, layer, _, variables = foreign
    dropping = with_drop(model, layer, drops.sgdrop(rate=optax.linear_schedule(0.0, 0.2, 10)))
    rate = jax.jit(lambda step: train(dropping, variables, step=step).logs["drop_rate"].mean())
    assert rate(0) == 0 < rate(3) < rate(10) == rate(None) <= 0.2


def test_examples_are_independent():
    """In a network without batch norm, what is dropped of example i is what is dropped of it alone."""

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(CLASSES)(nn.relu(nn.Conv(4, (3, 3))(x)).mean((1, 2)))

    model = models.linen(Plain())
    dropping, variables = with_drop(model, "Conv_0", drops.random_matched(drops.sgdrop(rate=0.3))), drawn(model)
    run = jax.jit(lambda *args: dropping.apply(variables, args[0], train=True, keys=args[1], targets=args[2]).logits)
    rows = IMAGES, KEYS, TARGETS
    np.testing.assert_allclose(run(*rows)[3:5], run(*(x[3:5] for x in rows)), atol=1e-6)


@mostly_linen
def test_each_layer_draws_its_own_numbers(foreign):
    """And not those of the keys themselves, from which the module's own dropout draws."""
    model, layer, _, variables = foreign
    first = {"Conv_1": "Conv_0", "blocks/0": "conv1"}[layer]
    number = jax.vmap(jax.random.uniform)
    drop = drops.Drop(lambda keys, source, features, targets, step: (features, number(keys)))
    logs = lambda variables: [train(with_drop(model, where, drop), variables).logs for where in (layer, first)]
    rates = [each["drop_rate"] for each in jax.jit(logs)(variables)]
    assert len(np.unique(np.concatenate([*rates, number(KEYS)]))) == 3 * B


def convolutions(model, variables):
    """In the compiled training step: value and gradient."""

    def loss(params, variables, images):
        out = model.apply({**variables, "params": params}, images, train=True, keys=KEYS, targets=TARGETS)
        return optax.softmax_cross_entropy(out.logits, TARGETS).mean(), out.logs

    step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(variables["params"], variables, IMAGES)
    text = step.compile().as_text()
    return text.count(" convolution(") + text.count('custom_call_target="topgap_onednn"')


@mostly_linen
def test_no_second_trunk(foreign):
    """The compiled step holds the convolutions of the plain one, and those of the head: forward and input gradient."""
    model, layer, _, variables = foreign
    plain = 2 + 3  # forward; two kernel gradients, one input gradient
    assert convolutions(with_drop(model, layer, drops.sgdrop()), variables) == plain
    # A first convolution has the second one in its head.
    first = {"Conv_1": "Conv_0", "blocks/0": "conv1"}[layer]
    assert convolutions(with_drop(model, first, drops.sgdrop()), variables) == plain + 2


@pytest.mark.slow
def test_no_second_trunk_of_other_drops(foreign):
    model, layer, _, variables = foreign
    plain = convolutions(model, variables)
    assert plain == 2 + 3
    assert convolutions(with_drop(model, layer, drops.random_matched(drops.sgdrop())), variables) == plain
    # A teacher is another network: its trunk is there once.
    assert convolutions(with_drop(model, layer, drops.sgdrop(teacher=True)), variables) == plain + 2


def small(head):
    backbone = models.small_resnet(widths=(4, 6, 8), stem=4)
    return models.classifier(backbone, head, classes=CLASSES, mean=(0.5,) * 3, std=(0.25,) * 3)


PYRAMID = models.pyramid_head(pool.gap(), width=4, levels=2)


def test_a_layer_beside_a_pyramid():
    """The head reads the branches past the layer in eval mode: a second trunk up to where the last one starts, and the
    numbers of it."""
    model = small(PYRAMID)
    variables, rate = drawn(model), 0.3
    dropping = with_drop(model, "stage3", drops.sgdrop(rate=rate))

    @jax.jit
    def by_hand(variables):
        plain = lambda images: model.apply(variables, images, train=True, keys=KEYS, targets=TARGETS, step=0)
        z = read(plain, "stage3")(IMAGES)[1]
        rest = lambda z: tap(models.bind(model, variables), "stage3", lambda _: z)(IMAGES)
        scores = jnp.maximum(jax.grad(lambda z: (rest(z) * TARGETS).sum())(z) * z, 0)
        limit = jnp.quantile(scores.reshape(B, -1), 1 - rate, axis=1)
        kept = scores <= limit[:, None, None, None] * (1 + 1e-6)
        return tap(plain, "stage3", lambda value: jnp.where(kept, value, 0))(IMAGES), kept

    expected, kept = by_hand(variables)
    found = jax.jit(lambda variables: train(dropping, variables))(variables)
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.logs["drop_rate"], 1 - kept.reshape(B, -1).mean(1), atol=1e-6)
    assert (np.asarray(found.logs["drop_rate"]) > 0.05).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found.batch_stats, expected.batch_stats)


@pytest.mark.slow
def test_only_a_pyramid_has_a_second_trunk():
    """A plain head on the last stage has no branch past it."""
    dropped = lambda model: with_drop(model, "stage3", drops.sgdrop())
    more = lambda model: convolutions(dropped(model), drawn(model)) - convolutions(model, drawn(model))
    assert more(small(models.map_head(pool.gap()))) == 0 and more(small(PYRAMID)) > 2


@mostly_linen
def test_a_second_eager_call_compiles_nothing(foreign, compilations):  # noqa: F811
    model, layer, _, variables = foreign
    dropping = with_drop(model, layer, drops.sgdrop())
    call = lambda: train(dropping, variables).logits
    call()
    assert compilations(call) == 0


@mostly_linen
@pytest.mark.parametrize("order", [1, slow(-1)])
def test_two_drops_and_class_maps(foreign, order):
    """`with_drop` around `with_drop` around `with_pool`; each logs its rate, and the layers can still be read."""
    model, layer, dense, variables = foreign
    first = {"Conv_1": "Conv_0", "blocks/0": "conv1"}[layer]
    pooled = with_pool(model, dense=dense, pool=pool.top_gap(k=4))
    one, other = drops.sgdrop(rate=0.2, granularity="channel"), drops.sgdrop(rate=0.2)
    inner, outer = (first, layer)[::order]
    both = with_drop(with_drop(pooled, inner, one), outer, other)
    out, after = jax.jit(lambda variables: read(lambda images: train(both, variables, images), outer)(IMAGES))(
        variables
    )
    inside, outside = out.logs["drop_rate"], out.logs[f"drop_rate/{outer}"]
    assert ((inside > 0) & (inside <= 0.25)).all() and ((outside > 0) & (outside <= 0.21)).all()
    np.testing.assert_allclose(outside, (after == 0).reshape(B, -1).mean(1), atol=1e-6)
    assert out.logits.shape == (B, CLASSES)


def test_inside_remat():
    """The layer stands in the body of a `jax.checkpoint`: same logits, same gradient, and the rate comes out."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.relu(nn.Conv(4, (3, 3), name="last")(nn.relu(nn.Conv(4, (3, 3))(x))))

    class Net(nn.Module):
        remat: bool

        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(CLASSES)((nn.remat(Block) if self.remat else Block)(name="block")(x).mean((1, 2)))

    def run(remat):
        model = models.linen(Net(remat))
        dropping = with_drop(model, "block/last", drops.sgdrop(rate=0.3))
        variables = drawn(model)

        def loss(params):
            out = train(dropping, {**variables, "params": params})
            return optax.softmax_cross_entropy(out.logits, TARGETS).mean(), out

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    found, expected = run(True), run(False)
    assert found[0][1].logs["drop_rate"].mean() > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


class Net(nn.Module):
    pool: object
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False, step=None):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3), strides=2, dtype=self.dtype)(x))
        x = name(nn.relu(x).astype(self.dtype), "features")
        return self.pool(name(nn.Conv(CLASSES, (1, 1), dtype=self.dtype)(x), "maps"), step)


SGDROP = "sgdrop(rate=.1)"
TEACHER = "sgdrop(rate=.1, granularity='location', teacher=True)"
CONTROL = "random_matched(sgdrop(rate=.1))"


@pytest.mark.parametrize(
    "row, k, dtype",
    [
        slow(SGDROP, 36, "float32"),
        slow(SGDROP, 5, "float32"),
        slow(SGDROP, 36, "bfloat16"),
        (SGDROP, 5, "bfloat16"),
        (TEACHER, 36, "float32"),
        slow(CONTROL, 36, "bfloat16"),
        slow("dropout(.1)", 36, "float32"),
    ],
)
def test_the_loss_falls(row, k, dtype):
    """By 10 % in 20 steps on a fixed batch, with the weights' average as `fit` keeps it; k = 36 is `gap`."""
    model = models.linen(Net(pool.top_gap(k=k), jnp.dtype(dtype)))
    dropping, objective = with_drop(model, "features", build(row, drops.TABLE)), objectives.standard()
    variables, optimizer = {**drawn(model), "ema": drawn(model)}, optax.adam(0.02)

    @jax.jit
    def step(variables, state, number):
        def mean(params):
            loss, logs, stats = objective(KEYS, dropping, {**variables, "params": params}, BATCH, number)
            return loss.mean(), (stats, logs)

        (loss, (stats, logs)), gradient = jax.value_and_grad(mean, has_aux=True)(variables["params"])
        updates, state = optimizer.update(gradient, state)
        new = {"params": optax.apply_updates(variables["params"], updates), "batch_stats": stats}
        return {**new, "ema": _averaged(variables["ema"], new, 0.9, number)}, state, loss, logs

    state, losses = optimizer.init(variables["params"]), []
    for number in range(20):
        variables, state, loss, logs = step(variables, state, number)
        losses.append(float(loss))
        assert 0 < logs["drop_rate"].mean() < 0.2
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("row", [slow(SGDROP), TEACHER, slow(CONTROL)])
def test_eight_devices_agree_with_one(row):
    model, mesh = models.linen(Net(pool.top_gap(k=5))), data_mesh()
    dropping = with_drop(model, "features", build(row, drops.TABLE))
    variables = {**drawn(model), "ema": drawn(model, seed=1)}

    def mean(params, batch, keys):
        loss, logs, stats = objectives.standard()(keys, dropping, {**variables, "params": params}, batch, 0)
        return loss.mean(), (loss, logs, stats)

    function = jax.value_and_grad(mean, has_aux=True)
    one = jax.jit(function)(variables["params"], BATCH, KEYS)
    eight = jax.jit(function, in_shardings=(replicated(mesh), split(mesh), split(mesh)))(
        variables["params"], BATCH, KEYS
    )
    assert len(eight[0][1][0].sharding.device_set) == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), eight, one)


def test_fit_logs_the_rate_and_keeps_the_teacher(tmp_path):
    """`fit` hands the averages on to the model, and writes the mean rate of its steps."""
    given = tiny_fit.parts()
    dropping = with_drop(given.model, "Conv_0", drops.sgdrop(rate=0.25, teacher=True))
    fit(tiny_fit.CONFIG, tmp_path / "a", given._replace(model=dropping, epochs=1), mesh=data_mesh(jax.devices()[:1]))
    rates = [row["drop_rate"] for row in read_metrics(tmp_path / "a") if row["kind"] == "train"]
    assert rates and all(0.01 < rate <= 0.25 for rate in rates)
    with pytest.raises(UserError) as raised:
        changed = given._replace(model=dropping, epochs=1, ema=0.0)
        fit(tiny_fit.CONFIG, tmp_path / "b", changed, mesh=data_mesh(jax.devices()[:1]))
    assert str(raised.value) == NO_TEACHER


NO_TEACHER = (
    "with_drop: teacher=True takes the saliency from averaged weights, and there are none; set config.ema, e.g. 0.999"
)


def test_the_average_of_the_weights():
    """d = .9, teacher 1, student 3: 1.2; d warms up as (1 + t) / (10 + t)."""
    value = lambda x: {"params": jnp.float32(x), "batch_stats": jnp.float32(x)}
    averaged = _averaged(value(1), value(3), 0.9, jnp.int32(10**6))
    np.testing.assert_allclose([averaged["params"], averaged["batch_stats"]], 1.2, rtol=1e-6)
    steps = {0: 0.1, 1: 0.1818182, 10: 0.55, 100: 0.9181818, 10000: 0.999}
    found = [1 - _averaged(value(0), value(1), 0.999, jnp.int32(step))["params"] for step in steps]
    np.testing.assert_allclose(found, list(steps.values()), atol=1e-6)


def test_a_config_says_it():
    """With the model of a config file, its numbers, and a class of its own."""
    config = configs.load(Path(__file__).parent.parent / "configs" / "sgdrop.py", [("rate", ".25")]).config
    model = expressions.choice(config, "model", {}, classes=3, total_steps=10)
    variables = drawn_like(model)
    out = jax.jit(lambda v: model.apply(v, jnp.ones((2, 32, 32, 3)), train=True, keys=KEYS[:2], targets=jnp.eye(3)[:2]))(variables)  # fmt: skip
    assert isinstance(out, Output) and out.logs["drop_rate"].max() <= 0.25
    for text, words in {
        "with_drop(resnet20(), 'stage3', sgdrop())": (
            "config.model: with_drop: model must be a value of type Model, got ResNet("
        ),
        "with_drop(mine(), 'stage3', sgdrop)": (
            "config.model: 'sgdrop' must be called: sgdrop(*, rate=0.1, granularity='element', teacher=False)"
        ),
        "with_drop(mine(), 'stage3', sgdrop(rate=2))": "config.model: sgdrop: rate must be a number in [0, 1], got 2",
        "with_drop(mine(), 'stage3', gap())": (
            "config.model: with_drop: drop must be a value of type Drop or None, got "
        ),
    }.items():
        config.model = text
        with pytest.raises(UserError) as raised:
            expressions.choice(config, "model", {"mine": lambda: model}, classes=3)
        assert str(raised.value).startswith(words) and "\n" not in str(raised.value)


def test_no_drop_is_the_model_itself(foreign):
    model, layer, *_ = foreign
    assert with_drop(model, layer, None) is model


def drawn_like(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
    return jax.tree.map(lambda x: jnp.full(x.shape, 0.1, x.dtype), shapes)


def test_errors(foreign):
    model, layer, _, variables = foreign
    plain = {key: variables[key] for key in ("params", "batch_stats")}
    missing = f"no layer 'stage9'; layers: {layers(models.bind(model, variables), IMAGES)[0].name}, "
    for call, text in {
        lambda: train(with_drop(model, "stage9", drops.sgdrop()), variables): missing,
        lambda: train(with_drop(model, layer, drops.sgdrop(teacher=True)), plain): NO_TEACHER,
        lambda: with_drop(model, drops.sgdrop(), layer): f"with_drop needs a drop such as sgdrop(), got '{layer}'; usage: with_drop(model, layer, drop)",
        lambda: train(with_drop(model, layer, drops.dropout(0.1)), variables, keys=None): "dropout needs keys, one per example",
    }.items():  # fmt: skip
        with pytest.raises(UserError) as raised:
            call()
        assert str(raised.value).startswith(text) and "\n" not in str(raised.value)
