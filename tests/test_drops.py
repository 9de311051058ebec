"""Drops against the numbers of the specification and NumPy, and the laws that every drop keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from topgap_jax import drops, pool
from topgap_jax.build import build
from topgap_jax.errors import UserError
from topgap_jax.mesh import data_mesh, split

SLOW = pytest.mark.slow
# The worked case: two by two positions, two channels, two classes, global average pooling and a dense layer.
Z = jnp.array([[[[1.0, 2], [0, 4]], [[3, 1], [2, 0]]]])
W, BIAS = jnp.array([[2.0, -1], [1, 3]]), jnp.array([0.5, -0.5])
GAP = lambda z: z.mean((1, 2)) @ W + BIAS
TARGETS = jnp.eye(2)[:, None]  # of class 0 and of class 1, one example each


def apply(drop, z=Z, targets=TARGETS[0], head=GAP, keys=None, step=None):
    return drop.apply(keys, (z, head), z, targets, step)


def test_attribution_of_the_worked_case():
    np.testing.assert_allclose(GAP(Z), [[5.25, 3.25]])
    first, second = (drops.attribution((Z, GAP), target)[0] for target in TARGETS)
    np.testing.assert_allclose(first, [[[0.5, 0.5], [0, 1]], [[1.5, 0.25], [1, 0]]], atol=1e-6)
    np.testing.assert_allclose(first.sum(-1), [[1, 1], [1.75, 1]], atol=1e-6)
    np.testing.assert_allclose(second, [[[-0.25, 1.5], [0, 3]], [[-0.75, 0.75], [-0.5, 0]]], atol=1e-6)
    np.testing.assert_allclose(second.sum(-1), [[1.25, 3], [0, -0.5]], atol=1e-6)
    np.testing.assert_allclose([first.sum(), second.sum()], [4.75, 3.75], atol=1e-6)


WORKED = [
    ("element", 0, 0.25, [(1, 0, 0)], 0.125, (3.75, 4.0)),
    ("element", 0, 0.5, [(0, 1, 1), (1, 0, 0), (1, 1, 0)], 0.375, (1.75, 1.5)),
    ("element", 0, 0.2, [(1, 0, 0)], 0.125, (3.75, 4.0)),
    ("element", 1, 0.25, [(0, 0, 1), (0, 1, 1)], 0.25, (3.75, -1.25)),
    ("element", 1, 0.75, [(0, 0, 1), (0, 1, 1), (1, 0, 1)], 0.375, (3.5, -2.0)),
    ("location", 0, 0.25, [(1, 0, 0), (1, 0, 1)], 0.25, (3.5, 3.25)),
]


@pytest.mark.parametrize("granularity, label, rate, dropped, realised, logits", WORKED)
def test_what_the_worked_case_drops(granularity, label, rate, dropped, realised, logits):
    kept = np.ones((1, 2, 2, 2))
    for place in dropped:
        kept[(0, *place)] = 0
    features, share = apply(drops.sgdrop(rate=rate, granularity=granularity), targets=TARGETS[label])
    np.testing.assert_array_equal(features, Z * kept)
    np.testing.assert_allclose(share, [realised], atol=1e-6)
    np.testing.assert_allclose(GAP(features), [logits], atol=1e-6)


@pytest.mark.parametrize(
    "rate, loss, gradient, zero",
    [(0.25, 0.8259395, (-0.4216324, 0.2810883), [(1, 0, 0)]), (0.0, 0.1269280, (-0.0894022, 0.0596015), [])],
)
def test_loss_and_gradient_of_the_worked_case(rate, loss, gradient, zero):
    """The gradient of the features is that of the head, and zero where they were dropped: nothing flows through the
    saliency."""

    def cross_entropy(z):
        return optax.softmax_cross_entropy(GAP(apply(drops.sgdrop(rate=rate), z)[0]), TARGETS[0])[0]

    found = jax.value_and_grad(cross_entropy)(Z)
    expected = np.tile(np.float32(gradient), (1, 2, 2, 1))
    for place in zero:
        expected[(0, *place)] = 0
    np.testing.assert_allclose(found[0], loss, atol=1e-6)
    np.testing.assert_allclose(found[1], expected, atol=1e-6)


def test_the_head_may_give_anything_of_the_label():
    """Of probabilities: dp_0/dz = p_0 (W[:, 0] - W p) / 4."""
    found = drops.attribution((Z, lambda z: jax.nn.softmax(GAP(z))), TARGETS[0])
    np.testing.assert_allclose(found, Z * jnp.array([0.0787452, -0.0524968]), atol=1e-6)


@pytest.mark.parametrize(
    "k, label, expected, total",
    [
        (1, 0, {(1, 0): (6, 1)}, 7),
        (2, 0, {(1, 0): (3, 0.5), (0, 0): (1 / 3, 1 / 3), (0, 1): (0, 2 / 3), (1, 1): (2 / 3, 0)}, 5.5),
        (2, 1, {(0, 0): (-0.5, 3), (0, 1): (0, 6)}, 8.5),
    ],
)
def test_attribution_under_top_gap(k, label, expected, total):
    """Closed form: features * W[:, y] * weight of the position in the pool; three positions tie at 4.5 and share
    evenly."""
    found = drops.attribution((Z, lambda z: pool.top_gap(k=k)(z @ W + BIAS)), TARGETS[label])
    values = np.zeros((1, 2, 2, 2))
    for place, value in expected.items():
        values[(0, *place)] = value
    np.testing.assert_allclose(found, values, atol=1e-6)
    np.testing.assert_allclose(found.sum(), total, atol=1e-5)
    weights = pool.top_weights(Z @ W + BIAS, k)[..., label, None]
    np.testing.assert_allclose(found, Z * W[:, label] * weights, atol=1e-6)


@pytest.mark.parametrize(
    "n, rate, count",
    [
        (10, 0.2, 2),
        (8192, 0.1, 820),
        *(
            pytest.param(*case, marks=SLOW)
            for case in [
                (16, 0.25, 4),
                (9, 0.25, 2),
                (8, 0.25, 2),
                (100, 0.1, 10),
                (25088, 0.1, 2509),
                (31, 0.1, 3),
                (31, 0.3, 9),
            ]
        ),
    ],
)
@pytest.mark.parametrize("schedule", [False, pytest.param(True, marks=SLOW)], ids=["number", "schedule"])
def test_how_many_are_dropped(n, rate, count, schedule):
    """ceil((n - 1) rate) of distinct values, the largest."""
    z = jnp.arange(n, dtype=jnp.float32)[None, None, None] + 1
    given_rate = (lambda step: jnp.float32(rate)) if schedule else rate
    features, share = apply(drops.sgdrop(rate=given_rate), z, jnp.ones((1, 1)), lambda z: z.sum((1, 2, 3))[:, None])
    np.testing.assert_array_equal(features[0, 0, 0] == 0, np.arange(n) >= n - count)
    np.testing.assert_allclose(share, [count / n], atol=1e-6)


def test_zeros_are_never_dropped():
    z = jnp.zeros((1, 1, 1, 10)).at[..., 3].set(5.0)
    share = apply(drops.sgdrop(rate=0.2), z, jnp.ones((1, 1)), lambda z: z.sum((1, 2, 3))[:, None])[1]
    np.testing.assert_allclose(share, [0.1])


random = np.random.default_rng(0)
B, H, CHANNELS, CLASSES = 6, 4, 5, 3
FEATURES = jnp.asarray(random.normal(size=(B, H, H, CHANNELS)), jnp.float32)
KERNELS = [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((H * H * CHANNELS, 7), (7, CLASSES))]
MIXED = jnp.asarray(random.dirichlet(np.ones(CLASSES), B), jnp.float32)
KEYS = jax.random.split(jax.random.key(0), B)


def mlp(z):
    """A head whose gradient depends on the position and on z."""
    return jax.nn.relu(z.reshape(z.shape[0], -1) @ KERNELS[0]) @ KERNELS[1]


@given(st.integers(0, 2**31), st.floats(0, 1), st.sampled_from(drops.GRANULARITIES), st.integers(1, 9))
def test_the_mask_is_that_of_the_interpolated_quantile(seed, rate, granularity, levels):
    """Against NumPy's quantile and the closed form of the gradient, with ties."""
    z = np.random.default_rng(seed).integers(-levels, levels + 1, size=(2, 3, 3, 4)).astype(np.float32)
    w = np.arange(-3, 9, dtype=np.float32).reshape(4, 3)
    head = lambda z: z.sum((1, 2)) @ w
    scores = z * (MIXED[:2] @ w.T)[:, None, None]
    axes = {"element": (), "location": (3,), "channel": (1, 2)}[granularity]
    scores = np.maximum(np.asarray(scores).sum(axes, keepdims=True), 0)
    rate = round(rate, 3)
    limit = np.quantile(scores.reshape(2, -1).astype(np.float64), 1 - rate, axis=1)[:, None, None, None]
    dropped = np.broadcast_to(scores > limit, z.shape)
    near = np.isclose(scores, limit, rtol=1e-5, atol=0) & (scores != limit)  # equal but for rounding
    found, share = apply(drops.sgdrop(rate=rate, granularity=granularity), jnp.asarray(z), MIXED[:2], head)
    if not near.any():
        np.testing.assert_array_equal(found, np.where(dropped, 0, z))
        np.testing.assert_allclose(share, dropped.reshape(2, -1).mean(1), atol=1e-6)


def test_a_head_with_a_hidden_layer():
    """One vjp is the gradient by central differences in float64."""
    kernels, z = [np.asarray(kernel, np.float64) for kernel in KERNELS], np.asarray(FEATURES, np.float64).reshape(B, -1)
    score = lambda z: (np.maximum(z @ kernels[0], 0) @ kernels[1] * np.asarray(MIXED)).sum(1)
    differences = np.stack([(score(z + step) - score(z - step)) / 2e-6 for step in 1e-6 * np.eye(z.shape[1])], 1)
    found = drops.attribution((FEATURES, mlp), MIXED)
    np.testing.assert_allclose(found.reshape(B, -1), differences * z, atol=2e-4)


def test_the_logit_falls_by_what_is_dropped():
    """Of global average pooling and a dense layer: s_y(z) - s_y(dropped z) is the sum of the dropped attributions."""
    w = jnp.asarray(random.normal(size=(CHANNELS, CLASSES)), jnp.float32)
    head, targets = lambda z: z.mean((1, 2)) @ w, jax.nn.one_hot(jnp.arange(B) % CLASSES, CLASSES)
    features, _ = apply(drops.sgdrop(rate=0.3), FEATURES, targets, head)
    fallen = ((head(FEATURES) - head(features)) * targets).sum(1)
    lost = jnp.where(features == 0, drops.attribution((FEATURES, head), targets), 0)
    np.testing.assert_allclose(fallen, lost.sum((1, 2, 3)), atol=1e-5)
    assert (fallen > 0).all()
    scaled = apply(drops.sgdrop(rate=0.3), FEATURES, targets, lambda z: 7 * head(z))[0]
    np.testing.assert_array_equal(scaled, features)


ROWS = [
    "dropout(.3)",
    "sgdrop(rate=.2)",
    "sgdrop(rate=.2, granularity='location')",
    "sgdrop(rate=.25, granularity='channel')",
    "random_matched(sgdrop(rate=.2))",
    "random_matched(sgdrop(rate=.2, granularity='location'))",
    "random_matched(sgdrop(rate=.25, granularity='channel'))",
    "random_matched(dropout(.3))",
]


def make(row):
    return build(row, drops.TABLE)


def run(drop, features=FEATURES, source=None, targets=MIXED, keys=KEYS, step=None):
    return drop.apply(keys, (features if source is None else source, mlp), features, targets, step)


def test_every_row_is_here():
    assert {name for row in ROWS for name in drops.TABLE if name in row} == set(drops.TABLE)


WEIGHTS = jnp.asarray(random.normal(size=FEATURES.shape), jnp.float32)


@pytest.mark.parametrize("row", ROWS)
def test_laws(row):
    drop = make(row)

    @jax.jit
    def found(z, source, third):
        def weighed(z, source):
            features, rate = run(drop, z, source)
            return (features * WEIGHTS).sum(), (features, rate)

        gradients, (features, rate) = jax.grad(weighed, (0, 1), has_aux=True)(z, source)
        alone = run(drop, z[third], targets=MIXED[third], keys=KEYS[third])[0]
        return features, rate, gradients, alone, run(drop, z.astype(jnp.bfloat16))

    features, rate, gradients, alone, (half, rate_half) = found(FEATURES, FEATURES, jnp.array([2]))
    assert features.shape == FEATURES.shape and features.dtype == jnp.float32
    assert rate.shape == (B,) and rate.dtype == jnp.float32
    np.testing.assert_allclose(rate, (features == 0).reshape(B, -1).mean(1), atol=1e-6)
    asked = 0.3 if "dropout" in row else 0.25 if "channel" in row else 0.2
    np.testing.assert_allclose(rate.mean(), asked, atol=0.06)
    scale = 1 / 0.7 if "dropout" in row else 1.0
    kept = features != 0
    np.testing.assert_allclose(features, jnp.where(kept, FEATURES * scale, 0), rtol=1e-6)
    np.testing.assert_array_equal(alone[0], features[2])
    np.testing.assert_allclose(gradients[0], jnp.where(kept, WEIGHTS * scale, 0), rtol=1e-6)
    assert not gradients[1].any()  # nor from the source: it says where, not how much
    assert half.dtype == jnp.bfloat16 and rate_half.dtype == jnp.float32
    np.testing.assert_allclose(rate_half, rate, atol=0.05)


@pytest.mark.parametrize(
    "row", [row if row == "random_matched(sgdrop(rate=.2))" else pytest.param(row, marks=SLOW) for row in ROWS]
)
def test_every_way_to_call_it(row):
    """Eagerly, one by one under `vmap`, and with the batch split over two devices it is what it is under `jit`."""
    drop = make(row)
    features, rate = jax.jit(lambda z: run(drop, z))(FEATURES)
    two = jax.jit(lambda z: run(drop, z), in_shardings=split(data_mesh(jax.devices()[:2])))
    for again, rate_again in (two(FEATURES), run(drop)):
        np.testing.assert_array_equal(again == 0, features == 0)
        np.testing.assert_allclose(again, features, rtol=1e-6)
        np.testing.assert_allclose(rate_again, rate, atol=1e-6)
    one_by_one = jax.vmap(lambda z, t, key: run(drop, z[None], targets=t[None], keys=key[None])[0][0])
    np.testing.assert_allclose(jax.jit(one_by_one)(FEATURES, MIXED, KEYS), features, rtol=1e-6)


@pytest.mark.parametrize("row", ROWS)
def test_rate_0_is_the_identity(row):
    number, schedule = (
        build(
            row.replace(".3", zero).replace(".25", zero).replace(".2", zero),
            drops.TABLE,
            {"nothing": lambda step: 0.0 * step},
        )
        for zero in ("0", "nothing")
    )
    for features, rate in jax.jit(lambda z: (run(number, z), run(schedule, z)))(FEATURES):
        np.testing.assert_array_equal(features, FEATURES)
        assert not rate.any()


@pytest.mark.parametrize("make", [drops.dropout, lambda rate: drops.sgdrop(rate=rate)], ids=["dropout", "sgdrop"])
def test_a_schedule_of_the_rate(make):
    """Each step has its rate; without a step it is that of the end."""
    drop = make(optax.linear_schedule(0.0, 0.5, 10))
    for step, rate in {0: 0.0, 4: 0.2, 10: 0.5, None: 0.5}.items():
        np.testing.assert_array_equal(run(drop, step=step)[0], run(make(rate))[0])


@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith("random")])
def test_random_matched_drops_as_many_units_elsewhere(row):
    """Exactly as many per example, evenly over all places, as whole locations or channels."""
    control, inner = make(row), make(row[len("random_matched(") : -1])
    plain = jax.jit(lambda keys: run(inner, keys=keys))
    axes = {"element": (), "location": (3,), "channel": (1, 2)}[inner.granularity]
    places, jitted = np.zeros((H, H, CHANNELS)), jax.jit(lambda keys: run(control, keys=keys))
    for seed in range(200):
        keys = jax.random.split(jax.random.key(seed), B)
        features, rate = jitted(keys)
        places += np.asarray(features == 0).sum(0)
        if seed < 5:
            matched, expected = plain(keys)
            np.testing.assert_allclose(rate, expected, atol=1e-6)
            dropped = np.asarray(features == 0)
            np.testing.assert_array_equal(dropped.reshape(B, -1).sum(1), np.asarray(matched == 0).reshape(B, -1).sum(1))
            np.testing.assert_array_equal(dropped, np.broadcast_to(dropped.all(axes, keepdims=True), dropped.shape))
    mean = places.mean()
    assert np.abs(places - mean).max() < 5 * np.sqrt(mean)


def test_other_keys_drop_others():
    for row in ("dropout(.3)", "random_matched(sgdrop(rate=.2))"):
        drop = make(row)
        drawn = jax.jit(lambda keys, drop=drop: run(drop, keys=keys)[0])
        other = drawn(jax.random.split(jax.random.key(1), B))
        assert ((other == 0) != (drawn(KEYS) == 0)).any((1, 2, 3)).all()


def test_errors():
    for call, text in {
        lambda: drops.sgdrop(rate=1.5): "rate must be a number in [0, 1], got 1.5",
        lambda: drops.sgdrop(rate=-0.1): "rate must be a number in [0, 1], got -0.1",
        lambda: drops.dropout(2): "rate must be a number in [0, 1], got 2",
        lambda: drops.sgdrop(granularity="pixel"): "granularity must be one of element, location, channel, got 'pixel'",
        lambda: drops.sgdrop(teacher="ema"): "teacher must be True or False, got 'ema'",
        lambda: make("random_matched(dropout)"): "'dropout' must be called: dropout(rate)",
        lambda: make("random_matched(3)"): "random_matched: drop must be a value of type Drop, got 3",
        lambda: drops.random_matched(3): "random_matched needs a drop such as sgdrop(), got 3",
        lambda: run(drops.dropout(0.1), keys=None): "dropout needs keys, one per example: model.apply(..., train=True, keys=keys)",
        lambda: run(drops.random_matched(drops.sgdrop()), keys=None): "random_matched needs keys, one per example: model.apply(",
        lambda: drops.sgdrop(granularity="location").apply(None, (KERNELS[0], lambda z: z @ KERNELS[1]), KERNELS[0], jnp.ones((80, 3)), None):
            "sgdrop: features of shape (80, 7) have one location, there is none to choose",
    }.items():  # fmt: skip
        with pytest.raises(UserError) as raised:
            call()
        assert str(raised.value).startswith(text) and "\n" not in str(raised.value)
