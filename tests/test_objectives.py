"""Objectives against NumPy, what flows through them, and that training with each lowers the loss."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topgap_jax import attacks, balls, drops, models, penalties, pool, scores
from topgap_jax.build import build
from topgap_jax.errors import UserError
from topgap_jax.mesh import data_mesh, replicated, split
from topgap_jax.rewrite import name, with_drop
from topgap_jax.training import objectives, schedules

B, CLASSES = 16, 3
random = np.random.default_rng(0)
LABELS = random.integers(CLASSES, size=B).astype(np.int32)
TARGETS = np.eye(CLASSES, dtype=np.float32)[LABELS]
BATCH = {
    "image": jnp.asarray(random.uniform(size=(B, 6, 6, 3)), jnp.float32),
    "label": jnp.asarray(LABELS),
    "targets": jnp.asarray(TARGETS),
    "id": jnp.arange(B),
    "mask": jnp.ones(B, bool),
}
KEYS = jax.random.split(jax.random.key(0), B)
PGD = attacks.pgd(balls.linf(0.03), steps=2)


class Small(nn.Module):
    pool: object
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False, step=None):
        x = nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(nn.Conv(8, (3, 3), dtype=self.dtype)(x))
        return self.pool(name(nn.Conv(CLASSES, (1, 1))(nn.relu(x)), "maps"), step)


def small(pooling, dtype=jnp.float32):
    """A model and variables from NumPy."""
    model = models.linen(Small(pooling, dtype))
    shapes = jax.eval_shape(model.init, jax.random.key(0), BATCH["image"])
    random = np.random.default_rng(1)
    fill = lambda path, x: (
        jnp.asarray(0.3 * random.normal(size=x.shape), x.dtype)
        if path[-1].key in ("kernel", "bias")
        else jnp.ones(x.shape)
    )
    return model, jax.tree_util.tree_map_with_path(fill, shapes)


MODEL, VARIABLES = small(pool.top_gap(k=5))


def make(row):
    table = {**objectives.TABLE, **attacks.TABLE, **balls.TABLE, **penalties.TABLE, **schedules.TABLE}
    return build(row, table, {**scores.VALUES, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)})


def test_every_row_is_here():
    assert {row.split("(")[0] for row in LOWERS} == set(objectives.TABLE)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_standard_is_cross_entropy_of_targets(smoothing):
    """Mixed labels are rows; the logits and statistics are those of training mode."""
    mixed = jnp.asarray(0.7 * TARGETS + 0.3 * TARGETS[::-1])
    loss, metrics, stats = objectives.standard(label_smoothing=smoothing)(
        KEYS, MODEL, VARIABLES, {**BATCH, "targets": mixed}, 0
    )
    out = MODEL.apply(VARIABLES, BATCH["image"], train=True)
    z = np.asarray(out.logits, np.float64)
    logp = z - np.log(np.exp(z).sum(1, keepdims=True))
    smooth = (1 - smoothing) * np.asarray(mixed) + smoothing / CLASSES
    assert loss.shape == (B,)
    np.testing.assert_allclose(loss, -(smooth * logp).sum(1), atol=1e-5)
    np.testing.assert_array_equal(metrics["accuracy"], z.argmax(1) == LABELS)
    jax.tree.map(np.testing.assert_array_equal, stats, out.batch_stats)


@pytest.fixture(scope="module")
def adversarial_images():
    """The last iterate of the attack on the network in eval mode, made by hand."""

    @jax.jit
    def craft(variables):
        predict = models.bind(MODEL, variables)
        state = PGD.init(KEYS, predict, BATCH["image"], BATCH["label"], predict(BATCH["image"]))
        for _ in range(PGD.steps):
            state = PGD.step(predict, state)
        return state.images + state.delta

    return craft(VARIABLES)


def test_adversarial_is_standard_on_the_last_iterate(adversarial_images):
    """In value, statistics and gradient: nothing flows through the attack."""

    def run(objective):
        def mean(params, images):
            loss, metrics, stats = objective(KEYS, MODEL, {**VARIABLES, "params": params}, BATCH | {"image": images}, 0)
            return loss.mean(), (loss, stats)

        return jax.jit(jax.value_and_grad(mean, has_aux=True))

    standard = run(objectives.standard())
    ours = run(objectives.adversarial(PGD))(VARIABLES["params"], BATCH["image"])
    expected = standard(VARIABLES["params"], adversarial_images)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, expected)
    assert ours[0][0] > standard(VARIABLES["params"], BATCH["image"])[0][0]


def test_the_radius_of_the_attack_may_follow_a_schedule():
    """Without a radius it is standard training, with the attack's own what it is without a schedule."""
    warm = objectives.adversarial(PGD, eps=schedules.warmup(0.03, 4))
    losses = jax.jit(lambda step: warm(KEYS, MODEL, VARIABLES, BATCH, step)[0])
    for step, plain in {0: objectives.standard(), 4: objectives.adversarial(PGD)}.items():
        np.testing.assert_allclose(losses(step), plain(KEYS, MODEL, VARIABLES, BATCH, step)[0], atol=1e-5)


def test_the_attack_sees_the_pool_of_this_step():
    """A schedule of k: the last iterate at step 0 is the one against gap, at step 9 the one against gmp."""

    def losses(pooling):
        model, variables = small(pooling)
        objective = objectives.adversarial(PGD)
        return jax.jit(lambda step: objective(KEYS, model, variables, BATCH, step)[0])

    annealed = losses(pool.top_gap(k=lambda step: jnp.where(step < 5, 36.0, 1.0)))
    for step, fixed in {0: pool.gap(), 9: pool.gmp()}.items():
        np.testing.assert_allclose(annealed(step), losses(fixed)(step), atol=1e-5)


LOWERS = [
    "art(mean=mean, std=std, steps=1)",
    "standard()",
    "standard(label_smoothing=.1)",
    "adversarial(pgd(linf(.01), steps=2))",
    "adversarial(r_fgsm(linf(.01)))",
    "adversarial(r_fgsm(linf(.01)), eps=warmup(.01, 10))",
    "norm_regularised(l1_norm(.01))",
    "norm_regularised(elastic(.01, .02), solver='iterative', steps=2)",
    "norm_regularised(group_norm(.05, 3))",
]
POOLS = {"gap": pool.gap(), "top_gap": pool.top_gap(k=5)}
SETTINGS = list(itertools.product(POOLS, ("float32", "bfloat16"), (1, 8)))
# In these any two of pool, type and number of devices meet; the rows take turns with them, and all else is slow, as is
# ART, which tests/test_art.py trains.
QUICK = [("gap", "float32", 1), ("top_gap", "float32", 8), ("gap", "bfloat16", 8), ("top_gap", "bfloat16", 1)]
DROPPED = {
    f"standard(), {drop}": drop for drop in ("sgdrop(rate=.1)", "random_matched(sgdrop(rate=.1))", "dropout(.1)")
}
CASES = [
    pytest.param(row, *setting, marks=() if setting == QUICK[turn % 4] and turn else pytest.mark.slow)
    for turn, row in enumerate((*LOWERS, *DROPPED))
    for setting in SETTINGS
]


@pytest.mark.parametrize("row, pooling, dtype, devices", CASES)
def test_the_loss_falls(row, pooling, dtype, devices):
    """By 10 % in 20 steps on a fixed batch, each along the signs of the gradient: fewer programs than an optimiser
    has."""
    objective, (model, variables) = make(row.split(", ")[0] if row in DROPPED else row), small(POOLS[pooling], dtype)
    if row in DROPPED:
        model = with_drop(model, "BatchNorm_0", build(DROPPED[row], drops.TABLE))
    mesh = data_mesh(jax.devices()[:devices])
    whole, rows = replicated(mesh), split(mesh)

    def step(variables, batch, keys):
        def mean(params):
            loss, metrics, stats = objective(keys, model, {**variables, "params": params}, batch, 0)
            return loss.mean(), (metrics, stats)

        (loss, (metrics, stats)), gradient = jax.value_and_grad(mean, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.02 * jnp.sign(g), variables["params"], gradient)
        return {"params": params, "batch_stats": stats}, loss, metrics

    step = jax.jit(step, in_shardings=(whole, rows, rows), out_shardings=whole)
    losses = []
    for _ in range(20):
        variables, loss, metrics = step(variables, BATCH, KEYS)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    assert all(values.shape == (B,) and np.isfinite(values).all() for values in metrics.values())
    assert len(loss.sharding.device_set) == devices


@pytest.mark.parametrize(
    "row",
    [
        "adversarial(pgd(linf(.01), steps=2))",
        *(
            pytest.param(row, marks=pytest.mark.slow)
            for row in ("standard()", "norm_regularised(elastic(.01, .02))", "art(mean=mean, std=std, steps=1)")
        ),
    ],
)
def test_eight_devices_agree_with_one(row):
    objective, mesh = make(row), data_mesh()

    def mean(params, batch, keys):
        loss, metrics, stats = objective(keys, MODEL, {**VARIABLES, "params": params}, batch, 0)
        return loss.mean(), (loss, metrics, stats)

    function = jax.value_and_grad(mean, has_aux=True)
    one = jax.jit(function)(VARIABLES["params"], BATCH, KEYS)
    eight = jax.jit(function, in_shardings=(replicated(mesh), split(mesh), split(mesh)))(
        VARIABLES["params"], BATCH, KEYS
    )
    assert len(eight[0][1][0].sharding.device_set) == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), eight, one)


def test_errors():
    for call, text in {
        lambda: objectives.standard(label_smoothing=2): "label_smoothing must be a number in [0, 1], got 2",
        lambda: make("adversarial(linf(.1))"): "adversarial: attack must be a value of type Attack, got Ball(",
        lambda: make(
            "adversarial(fmn(l2(1), steps=5))"
        ): "adversarial: 'fmn-5, l2(1)' keeps to no ball; give an attack ",
        lambda: make("adversarial(transfer(l2(1), fgsm(l2(1)), 'runs/plain'))"): (
            "adversarial: 'transfer of fgsm, l2(1), from runs/plain' needs another network; give an attack such as "
        ),
    }.items():
        with pytest.raises(UserError) as raised:
            call()
        assert str(raised.value).startswith(text)
