"""Stand-ins on the backward pass: which rounding, signs and thresholds are found, what their rules pass on, what stays
as it is, and attacks through them. `papers/breadth_attacks.md` 5."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.laws import IMAGES, KEYS, LABELS, PARAMS, PREDICT, B, make, network
from tests.test_models import BACKBONES
from topgap_jax import attacks, balls, models, pool
from topgap_jax.errors import UserError
from topgap_jax.measure.robust import attack_split
from topgap_jax.measure.splits import resident_split
from topgap_jax.rewrite import fused, with_rules
from topgap_jax.rewrite.operations import operations
from topgap_jax.rules import straight_through
from topgap_jax.types import Model, Output

X = jnp.array([0.2, 0.3, -0.04, -0.1, 1.7])
MEAN, RADIUS = 0.1, 0.3 * 0.5  # of MeanSparse: |x - mean| < tau sd
sparse = lambda x: jnp.where(jnp.abs(x - MEAN) < RADIUS, MEAN, x)
ONES, NONE = [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]


def bumps(x, at, by=1.0):
    """`by` times the derivative of the sigmoid of 10 (x - at)."""
    s = 1 / (1 + np.exp(-10 * (np.asarray(x, float) - at)))
    return by * 10 * s * (1 - s)


# name: (f, which operation it is, its own derivative, that of the rule), at X
FOUND = {
    "round": (lambda x: jnp.round(x * 8) / 8, "round", NONE, ONES),
    "decimals": (lambda x: jnp.round(x, 2), "round", NONE, ONES),
    "lax.round": (lambda x: lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO), "round", NONE, ONES),
    "floor": (jnp.floor, "floor", NONE, ONES),
    "ceil": (lambda x: jnp.ceil(3 * x), "floor", NONE, [3] * 5),
    "trunc": (jnp.trunc, "floor", NONE, ONES),
    "uint8": (lambda x: (x * 255).astype(jnp.uint8).astype(jnp.float32) / 255, "floor", NONE, ONES),
    "uint8, int32": (lambda x: x.astype(jnp.uint8).astype(jnp.int32) * 2.0, "floor", NONE, [2] * 5),
    "x // c": (lambda x: x // 0.25, "floor", NONE, [4] * 5),
    "x // 2": (lambda x: x // 2, "floor", NONE, [0.5] * 5),
    "sign": (lambda x: jnp.sign(x), "sign", NONE, [1, 1, 1, 1, 0]),
    "number": (lambda x: (x > 0.1).astype(jnp.float32), "step", NONE, bumps(X, 0.1)),
    "whole number": (lambda x: 2.0 * (x <= 0.1).astype(int), "step", NONE, bumps(X, 0.1, -2)),
    "masked": (lambda x: x * (x >= 0.1), "step", [1, 1, 0, 0, 1], np.array([1, 1, 0, 0, 1]) + X * bumps(X, 0.1)),
    "binarised": (lambda x: jnp.where(x > 0.1, 1, -1) * 1.0, "step", NONE, bumps(X, 0.1, 2)),
    "two levels": (lambda x: jnp.where(x < 0.1, 0.25, jnp.arange(5.0)), "step", NONE, bumps(X, 0.1, np.arange(5) - 0.25)),
    "attention": (lambda x: jnp.where(x > 0.1, 3.0, -jnp.inf), "step", NONE, NONE),
    "MeanSparse": (sparse, "threshold", [0, 1, 0, 1, 1], ONES),
    "centred": (lambda x: jnp.where(jnp.abs(x - MEAN) < RADIUS, 0, x - MEAN) + MEAN, "threshold", [0, 1, 0, 1, 1], ONES),
    "two sides": (
        lambda x: jnp.where((x > MEAN - RADIUS) & (x < MEAN + RADIUS), MEAN, x), "threshold", [0, 1, 0, 1, 1], ONES,
    ),
    "lax.select": (
        lambda x: lax.select(jnp.abs(x) > 0.15, x, jnp.zeros_like(x)), "threshold", [1, 1, 0, 0, 1], ONES,
    ),
    "k largest": (lambda x: jnp.where(x >= lax.top_k(x, 2)[0][-1], x, 0), "threshold", [0, 1, 0, 0, 1], ONES),
    "by its own mean": (lambda x: jnp.where(x > x.mean(), x, lax.stop_gradient(x.mean())), "threshold", [0, 0, 0, 0, 1], ONES),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_the_gradient_that_goes_through(name):
    """Forward bit for bit the operation; under jit, vmap and in a loop."""
    f, operation, plain, due = FOUND[name]
    assert operations(jax.make_jaxpr(f)(X).jaxpr) & set(straight_through) == {operation}
    ruled, one = with_rules(f, **straight_through), jnp.ones(5)

    @jax.jit
    def computed(x):
        back = lambda f, x: jax.vjp(f, x)[1](one)[0]
        looped = lambda x: lax.scan(lambda x, _: (x, ruled(x)), x, None, length=2)[1][1]
        each = jax.vmap(lambda x: back(ruled, x))(jnp.stack([x, x]))
        return ruled(x), f(x), back(f, x), back(ruled, x), each[1], back(looped, x)

    value, exact, own, *found = computed(X)
    np.testing.assert_array_equal(value, exact)
    np.testing.assert_allclose(own, plain, atol=1e-6)
    for gradient in found:
        np.testing.assert_allclose(gradient, due, rtol=1e-4, atol=1e-5)


STAYS = {
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "leaky relu": jax.nn.leaky_relu,
    "hard tanh": jax.nn.hard_tanh,
    "hard swish": jax.nn.hard_swish,
    "relu6": jax.nn.relu6,
    "gelu": jax.nn.gelu,
    "clip": lambda x: jnp.clip(x, 0, 1),
    "a ReLU": lambda x: jnp.where(x > 0, x, 0),
    "a maximum": lambda x: jnp.where(x > 0.3, x, 0.3),
    "a minimum of arrays": lambda x, limit=X[::-1]: jnp.where(x < limit, x, limit),
    "huber": lambda x: jnp.where(jnp.abs(x) < 0.3, x * x, jnp.abs(x) * 2),
    "nan_to_num": jnp.nan_to_num,
    "softmax": jax.nn.softmax,
    "logsumexp": jax.nn.logsumexp,  # whose sign nobody reads
    "dropout": lambda x: nn.Dropout(0.5, deterministic=False).apply({}, x, rngs={"dropout": jax.random.key(0)}),
    "bfloat16": lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
    "a mask of another": lambda x: jnp.where(jnp.arange(5) > 2, x, 0),
    "behind stop_gradient": lambda x: x * (lax.stop_gradient(x) > 0.3),
    "of a constant": lambda x: x * jnp.round(X),
    "top_gap": lambda x: pool.top_gap(k=2)(x.reshape(1, 5, 1, 1)),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_has_a_gradient_stays(name):
    assert not operations(jax.make_jaxpr(STAYS[name])(X).jaxpr) & set(straight_through)


@pytest.mark.parametrize(
    "name", ["resnet20", *(pytest.param(name, marks=pytest.mark.slow) for name in BACKBONES if name != "resnet20")]
)
def test_ordinary_networks_have_none(name):
    backbone = getattr(models, name)()
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(backbone.init, jax.random.key(0), images)
    traced = jax.make_jaxpr(backbone.apply)(variables, images)
    assert not operations(traced.jaxpr) & set(straight_through)


def quantised(images, levels=8):
    return jnp.round(images * levels) / levels


@jax.custom_vjp
def handwritten(images):
    return quantised(images)


handwritten.defvjp(lambda images: (quantised(images), None), lambda _, gradient: (gradient,))


def shattered(quantise=quantised):
    """The network behind eight levels, as a model."""

    def apply(variables, images, **options):
        return Output(network(variables["params"])(quantise(images)), {}, {})

    return Model(None, apply)


VARIABLES = {"params": PARAMS, "batch_stats": {}}
SHATTERED = models.bind(shattered(), VARIABLES)


def test_a_quantised_network_is_its_handwritten_twin():
    """The gradient of a loss: as it is, and fast and fused as `measure/` has it."""
    gradient = lambda f: jax.jit(fused(jax.grad(lambda images: (f(images) ** 2).sum())))(IMAGES)
    due = gradient(models.bind(shattered(handwritten), VARIABLES))
    assert not np.asarray(gradient(SHATTERED)).any() and np.abs(due).max() > 0.1
    for predict in (SHATTERED, jax.jit(SHATTERED), models.bind(models.fast(shattered()), VARIABLES)):
        np.testing.assert_allclose(gradient(with_rules(predict, **straight_through)), due, atol=1e-5)


def test_an_attack_through_the_levels():
    """As on the handwritten twin, whose values are the same; without it the gradient is zero and nothing breaks."""
    attack = make("pgd(linf(.2), steps=4, start=None)")
    labels = SHATTERED(IMAGES).argmax(-1).astype(jnp.int32)
    run = lambda attack, predict: jax.jit(lambda: attacks.attack(attack, KEYS, predict, IMAGES, labels))()
    through = make("bpda(pgd(linf(.2), steps=4, start=None), straight_through)")
    found, due = run(through, SHATTERED), run(attack, models.bind(shattered(handwritten), VARIABLES))
    np.testing.assert_array_equal(found.status, due.status)
    np.testing.assert_allclose(found.best, due.best, atol=1e-6)
    assert (found.status == attacks.state.BROKEN).sum() > B / 2
    assert not (run(attack, SHATTERED).status == attacks.state.BROKEN).any()
    assert through.name == "BPDA of pgd-4, linf(0.2), start=None"


def test_in_the_queue():
    """The attack sees the stand-ins, the verdict is the network's."""
    data = resident_split({"image": np.uint8(255 * IMAGES), "label": np.asarray(LABELS)}, classes=4, batch=4)
    plain, through = (
        attack_split(shattered(), VARIABLES, data, make(f"robust({text})"), progress=False).measures
        for text in ("pgd(linf(.2), steps=4)", "bpda(pgd(linf(.2), steps=4), straight_through)")
    )
    assert through["robust_accuracy"].value < plain["robust_accuracy"].value - 0.2
    assert through["clean_accuracy"] == plain["clean_accuracy"] and through["unconfirmed"].value == 0


@pytest.mark.parametrize("platform", ["cuda", "tpu", "cpu"])
def test_export(platform):
    attack = attacks.bpda(attacks.pgd(balls.linf(0.1), steps=2), straight_through)
    f = jax.jit(lambda keys, images, labels: attacks.attack(attack, keys, SHATTERED, images, labels).best)
    assert jax.export.export(f, platforms=[platform])(KEYS, IMAGES, LABELS).out_avals[0].shape == IMAGES.shape


def test_several_attacks():
    both = make("bpda(worst_of(fgsm(linf(.1)), pgd(linf(.1))), straight_through)")
    assert [attack.name for attack in both] == ["BPDA of fgsm, linf(0.1)", "BPDA of pgd-20, linf(0.1)"]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: jax.eval_shape(with_rules(PREDICT, **straight_through), IMAGES),
            "with_rules: the function has no round, nor floor, ceil or conversion to whole numbers, nor sign, nor "
            "where(..., x, constant) by a comparison of x, nor number made of a comparison",
        ),
        (
            lambda: make("bpda(fgsm(linf(.1)), softplus(5))"),
            "bpda: the rule of relu changes the forward pass; give rules that change the backward pass alone, such as "
            "straight_through",
        ),
        (lambda: attacks.bpda(attacks.fgsm(balls.linf(0.1)), None), "give rules such as straight_through"),
        (
            lambda: attacks.bpda(attacks.fgsm(balls.linf(0.1)), {"x": 1}),
            "rules must be like guided or softplus(50), for relu, max_pool, conv, dense, add, mean, "
            "conv_layer, dense_layer, softmax, attention, matmul, mul, activation, deviation, round, floor, sign, "
            "threshold, step; got {'x': 1}",
        ),
        (
            lambda: attacks.bpda(3, straight_through),
            "expected attacks like pgd(linf(8/255)), got 3",
        ),
    ],
)
def test_errors(call, text):
    with pytest.raises(UserError) as raised:
        call()
    assert str(raised.value) == text
