"""Laws of every pool, the worked values of the specification, and Top-GAP against two independent formulas in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from topgap_jax import mesh, pool
from topgap_jax.build import build
from topgap_jax.errors import UserError
from topgap_jax.order import kth_largest
from topgap_jax.training import schedules

# One instance of every row of the table, and of every form of top_gap.
ROWS = [
    "gap()",
    "gmp()",
    "lse(2)",
    "top_gap(k=3)",
    "top_gap(k=2.5)",
    "top_gap(fraction=.3)",
    "top_gap(k=linear(9, 2, 100))",
    "top_gap(fraction=cosine(1, .1, 100))",
]
STEP = 60  # of the schedules above
X = np.array([[4, 1, 0], [2, 3, -1], [5, -2, 6]], np.float32)


def make(row):
    return build(row, {**pool.TABLE, **schedules.TABLE})


def maps_of(seed, shape=(8, 3, 3, 2)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def one(values):
    """A single map (h, w) as a batch (1, h, w, 1)."""
    return jnp.asarray(values, jnp.float32)[None, :, :, None]


def numpy_weights(row, values):
    """What d logit / d values is, for values (n,) without ties; for all pools but lse it is also how they enter."""
    n = len(values)
    if row.startswith("lse"):
        weights = np.exp(2 * (values - values.max()))
        return weights / weights.sum()
    u = STEP / 100
    count = {
        "gap()": n,
        "gmp()": 1,
        "top_gap(k=3)": 3,
        "top_gap(k=2.5)": 2.5,
        "top_gap(fraction=.3)": np.floor(0.3 * n + 0.5),
        "top_gap(k=linear(9, 2, 100))": 9 - 7 * u,
        "top_gap(fraction=cosine(1, .1, 100))": n * (0.1 + 0.9 * (1 + np.cos(np.pi * u)) / 2),
    }[row]
    rank = np.argsort(np.argsort(-values))
    return np.clip(count - rank, 0, 1) / count


def numpy_pool(row, values):
    if row.startswith("lse"):
        return np.log(np.mean(np.exp(2 * values.astype(np.float64)))) / 2
    return (numpy_weights(row, values) * values).sum()


def per_map(function, maps):
    """function over the flattened (h * w,) values of every map (b, h, w, k)."""
    return np.apply_along_axis(function, 1, maps.reshape(maps.shape[0], -1, maps.shape[-1]))


def test_every_row_is_here():
    assert {row.split("(")[0] for row in ROWS} == set(pool.TABLE)


@functools.cache
def compiled(row):
    """(maps (8, 3, 3, 2), cotangent (8, 2)) -> logits, gradient, and logits of the maps in bf16 and of these in
    float32.

    One program a row for all laws.
    """
    pooled = make(row)

    def of(maps, cotangent):
        logits, back = jax.vjp(lambda maps: pooled(maps, STEP), maps)
        half = maps.astype(jnp.bfloat16)
        return logits, back(cotangent)[0], pooled(half, STEP), pooled(half.astype(jnp.float32), STEP)

    return jax.jit(of)


def logits_of(row, maps):
    return np.asarray(compiled(row)(maps, np.ones((8, 2), np.float32))[0])


@pytest.mark.parametrize("row", ROWS)
def test_value_and_gradient(row):
    maps, cotangent = maps_of(0), maps_of(1, (8, 2))
    logits, gradient, half, half_in_float32 = compiled(row)(maps, cotangent)
    assert logits.shape == (8, 2) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, per_map(lambda values: numpy_pool(row, values), maps), atol=1e-6)
    expected = per_map(lambda values: numpy_weights(row, values), maps) * cotangent[:, None, :]
    np.testing.assert_allclose(gradient, expected.reshape(maps.shape), atol=1e-6)
    # Maps in bf16 are pooled in float32.
    assert half.dtype == jnp.float32
    np.testing.assert_array_equal(half, half_in_float32)


@pytest.mark.parametrize(
    "row", [row if row == "top_gap(k=3)" else pytest.param(row, marks=pytest.mark.slow) for row in ROWS]
)
def test_eagerly_it_is_the_same(row):
    maps, pooled = jnp.asarray(maps_of(0)), make(row)
    weighted = lambda maps: (pooled(maps, STEP) ** 2).sum()
    np.testing.assert_allclose(pooled(maps, STEP), jax.jit(pooled)(maps, STEP), atol=1e-6)
    np.testing.assert_allclose(jax.grad(weighted)(maps), jax.jit(jax.grad(weighted))(maps), atol=1e-6)


@pytest.mark.parametrize("row", ROWS)
def test_between_gap_and_gmp_shift_and_permutation(row):
    """A pool is a weighted mean of positions: between mean and maximum, free of their order, moved as the maps are."""
    maps = maps_of(2)
    logits = logits_of(row, maps)
    assert (logits_of("gmp()", maps) >= logits - 1e-6).all() and (logits >= logits_of("gap()", maps) - 1e-6).all()
    np.testing.assert_allclose(logits_of(row, maps + 2), logits + 2, atol=1e-5)
    shuffled = np.random.default_rng(3).permutation(maps.reshape(8, 9, 2), axis=1).reshape(maps.shape)
    np.testing.assert_allclose(logits_of(row, shuffled), logits, atol=1e-6)


@pytest.mark.parametrize("row", ROWS)
def test_ties_share_evenly(row):
    _, gradient, *_ = compiled(row)(np.ones((8, 3, 3, 2), np.float32), np.ones((8, 2), np.float32))
    np.testing.assert_allclose(gradient, 1 / 9, atol=1e-6)


@pytest.mark.parametrize("row", ROWS)
def test_a_nan_shows_in_its_class_only(row):
    maps = maps_of(5)
    maps[3, 1, 1, 0] = np.nan
    bad = np.isnan(logits_of(row, maps))
    assert bad[3, 0] and bad.sum() == 1


def test_k_one_is_gmp_and_k_all_is_gap():
    maps = maps_of(6)
    for least in (pool.top_gap(k=1), pool.top_gap(k=1.0), pool.top_gap(fraction=1e-6), pool.top_gap(k=lambda step: 0)):
        np.testing.assert_allclose(least(maps), pool.gmp()(maps), atol=1e-6)
    for most in (
        pool.top_gap(k=9),
        pool.top_gap(fraction=1),
        pool.top_gap(k=lambda step: 1000),
        pool.top_gap(fraction=lambda step: 1),
    ):
        np.testing.assert_allclose(most(maps), pool.gap()(maps), atol=1e-6)
    np.testing.assert_allclose(pool.lse(r=1e-3)(maps), pool.gap()(maps), atol=2e-3)
    np.testing.assert_allclose(pool.lse(r=1e4)(maps), pool.gmp()(maps), atol=1e-3)


def test_worked_values():
    """14.1, 14.2: integer and real k, and lse, on one map."""
    for k, value in {1: 6, 2: 5.5, 3: 5, 4: 4.5, 5: 4, 9: 2, 1.5: 5.6666667, 2.5: 5.2, 3.25: 4.8461538}.items():
        assert float(pool.top_gap(k)(one(X))[0, 0]) == pytest.approx(value, abs=1e-6)
    for r, value in {0.01: 2.0333311, 0.5: 3.4487128, 1: 4.2613271, 2: 4.9740944, 5: 5.5619072, 10: 5.7802821}.items():
        # At r = .01 the logarithm's rounding is divided by r.
        assert float(pool.lse(r)(one(X))[0, 0]) == pytest.approx(value, abs=2e-5 if r < 0.1 else 1e-6)
    np.testing.assert_allclose(pool.top_weights(one(X), 3)[0, :, :, 0], np.isin(X, [6, 5, 4]) / 3, atol=1e-7)
    np.testing.assert_allclose(
        pool.top_weights(one(X), 2.5)[0, :, :, 0], (0.4 * np.isin(X, [6, 5]) + 0.2 * (X == 4)), atol=1e-7
    )


def test_worked_ties():
    """14.3, and zeros of either sign are equal."""
    slopes = jax.jit(jax.grad(lambda maps: pool.top_gap(k=2)(maps)[0, 0]))
    for values, weights in {
        (2, 2, 2, 1): (1 / 3, 1 / 3, 1 / 3, 0),
        (3, 2, 2, 2): (1 / 2, 1 / 6, 1 / 6, 1 / 6),
        (0, 0, 0, 0): (0.25,) * 4,
        (0.0, -0.0, -0.0, -1): (1 / 3, 1 / 3, 1 / 3, 0),
    }.items():
        gradient = slopes(one([values]))
        np.testing.assert_allclose(gradient[0, 0, :, 0], weights, atol=1e-6)


def test_worked_loss():
    """14.4: two classes, cross-entropy, its gradient on the maps, and the second derivative of a squared logit."""
    maps = jnp.stack([jnp.array([[1.0, 3], [2, 0]]), jnp.array([[-1.0, 0], [4, 2]])], -1)[None]
    for k, logits in {2: [2.5, 3.0], 1: [3, 4], 4: [1.5, 1.25]}.items():
        np.testing.assert_allclose(pool.top_gap(k)(maps)[0], logits, atol=1e-6)
    loss = lambda maps: optax.softmax_cross_entropy_with_integer_labels(pool.top_gap(2)(maps), jnp.array([0]))[0]
    value, gradient = jax.jit(jax.value_and_grad(loss))(maps)
    assert float(value) == pytest.approx(0.9740770, abs=1e-6)
    np.testing.assert_allclose(gradient[0, ..., 0], [[0, -0.3112297], [-0.3112297, 0]], atol=1e-6)
    np.testing.assert_allclose(gradient[0, ..., 1], [[0, 0], [0.3112297, 0.3112297]], atol=1e-6)
    chosen = np.isin(X, [6, 5, 4]).ravel()
    squared = lambda values: pool.top_gap(3)(values.reshape(1, 3, 3, 1))[0, 0] ** 2
    hessian = jax.jit(jax.hessian(squared))(jnp.asarray(X.ravel()))
    np.testing.assert_allclose(hessian, np.outer(chosen, chosen) * 2 / 9, atol=1e-6)


def test_fraction_to_k():
    """14.9, and the case where floating point would round down."""
    for n, counts in {49: [1, 2, 5, 12, 25, 49], 784: [1, 39, 78, 196, 392, 784], 64: [1, 3, 6, 16, 32, 64]}.items():
        assert [pool.positions(fraction, n) for fraction in (0.001, 0.05, 0.1, 0.25, 0.5, 1)] == counts
    assert pool.positions(0.145, 100) == 15


def test_schedules_of_k():
    """14.10, in one map of 784 positions whose pooled value says what k was; without a step, the schedule's end."""
    ramp = jnp.arange(784, 0, -1.0).reshape(1, 28, 28, 1)  # the mean of the k largest is 784.5 - k / 2 for whole k
    steps = (0, 25, 50, 75, 100, 150)
    for name, counts in {
        "linear": (784, 607.5, 431, 254.5, 78, 78),
        "cosine": (784, 680.608694, 431, 181.391306, 78, 78),
        "geometric": (784, 440.312179, 247.289306, 138.883281, 78, 78),
    }.items():
        schedule = schedules.TABLE[name](784, 78, 100)
        np.testing.assert_allclose([float(schedule(step)) for step in steps], counts, rtol=1e-6)
        pooled = pool.top_gap(k=schedule)
        for step, count in ((0, 784), (100, 78), (150, 78), (None, 78)):
            np.testing.assert_allclose(pooled(ramp, step), 784.5 - count / 2, rtol=1e-5)


def test_one_compilation_for_every_step():
    """14.13: k is traced, so that annealing it compiles once; and no gradient flows into it."""
    pooled = jax.jit(pool.top_gap(k=lambda step: 9 - step))
    for step in (0.0, 0.5, 2.0, 3.25, 6.5, 8.0):
        rank = np.arange(9)
        expected = (np.clip(9 - step - rank, 0, 1) / (9 - step) * np.sort(X.ravel())[::-1]).sum()
        np.testing.assert_allclose(pooled(one(X), step)[0, 0], expected, atol=1e-6)
    assert pooled._cache_size() == 1
    assert float(jax.grad(lambda k: pool.top_gap(k=lambda step: k)(one(X))[0, 0])(2.5)) == 0


@pytest.fixture(scope="module")
def real_k():
    """Top-GAP of a map of 12 with k given at run time: (logit, gradient)."""
    pooled = lambda values, k: pool.top_gap(k=lambda step: step)(values.reshape(1, 3, 4, 1), k)[0, 0]
    return jax.jit(jax.value_and_grad(pooled))


@given(
    st.lists(st.integers(-4, 4).map(float) | st.floats(-1e3, 1e3, width=32), min_size=12, max_size=12),
    st.floats(1, 12, width=32) | st.integers(1, 12).map(float),
)
def test_the_smallest_upper_bound(real_k, values, k):
    """P_k(x) = min over tau of tau + sum_i max(x_i - tau, 0) / k (a minimiser is one of the x_i), and the weights sum
    to 1."""
    logit, weights = real_k(np.array(values, np.float32), k)
    x = np.array(values, np.float32).astype(np.float64)
    bound = min(tau + np.maximum(x - tau, 0).sum() / k for tau in x)
    scale = 1 + np.abs(x).max()
    assert abs(float(logit) - bound) <= 1e-5 * scale
    assert abs(float(weights.sum()) - 1) <= 1e-5 and float(weights.max()) <= 1 / k + 1e-6 and float(weights.min()) >= 0
    for tied in np.unique(x):
        assert np.ptp(weights[x == tied]) == 0


def test_kth_largest_is_exact():
    wide = maps_of(7, (2, 37, 3)) * np.float32([1e-30, 1, 1e30])
    values = np.concatenate([wide, np.float32([[[-0.0, 0.0, np.inf]]] * 2)], 1)
    for k in (1, 2, 5, 37, 38):
        np.testing.assert_array_equal(kth_largest(jnp.asarray(values), k), -np.sort(-values, axis=1)[:, k - 1])


def test_input_gradient_is_the_mean_of_the_chosen_rows():
    """14.12: of a pool after a nonlinear map."""
    weights = maps_of(8, (5, 12))
    features = lambda x: jnp.tanh(x @ weights).reshape(1, 3, 4, 1)
    x = jnp.asarray(maps_of(9, (5,)))
    rows = jax.jit(jax.jacrev(lambda x: features(x).ravel()))(x)
    chosen = np.argsort(-np.asarray(features(x)).ravel())[:4]
    np.testing.assert_allclose(
        jax.jit(jax.grad(lambda x: pool.top_gap(4)(features(x))[0, 0]))(x), rows[chosen].mean(0), atol=1e-6
    )


@pytest.mark.parametrize("row", ["top_gap(k=3)"])
def test_transformations(row):
    """vmap, pmap, shard_map, a split batch and a mesh with Explicit axes give the plain result, and the plain
    gradient."""
    maps, pooled = jnp.asarray(maps_of(10)), make(row)
    function = lambda maps: (pooled(maps), jax.grad(lambda maps: (pooled(maps) ** 2).sum())(maps))
    expected = jax.jit(function)(maps)
    close = lambda found: [
        np.testing.assert_allclose(value.reshape(due.shape), due, atol=1e-6) for value, due in zip(found, expected)
    ]
    spec, auto = PartitionSpec("data"), mesh.data_mesh()
    explicit = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    close(jax.jit(jax.vmap(function))(maps.reshape(2, 4, 3, 3, 2)))
    close(jax.pmap(function)(maps[:, None]))
    close(jax.jit(jax.shard_map(function, mesh=auto, in_specs=spec, out_specs=spec))(maps))
    split = jax.jit(function, in_shardings=mesh.split(auto))(maps)
    assert len(split[0].sharding.device_set) == 8
    close(split)
    with jax.set_mesh(explicit):
        close(jax.jit(function)(jax.device_put(maps, NamedSharding(explicit, spec))))


def test_errors():
    for make, text in {
        lambda: pool.top_gap(): "give exactly one of k and fraction: top_gap(k=4) or top_gap(fraction=.1)",
        lambda: pool.top_gap(
            4, fraction=0.1
        ): "give exactly one of k and fraction: top_gap(k=4) or top_gap(fraction=.1)",
        lambda: pool.top_gap(k=0): "k must be a number of at least 1, got 0",
        lambda: pool.top_gap(fraction=1.5): "fraction must be a number in [1e-09, 1], got 1.5",
        lambda: pool.lse(r=0): "r must be a number of at least 1e-06, got 0",
        lambda: pool.top_gap(k=10)(one(X)): "top_gap: k=10 is more than the 9 positions of 3x3 maps; give k <= 9",
    }.items():
        with pytest.raises(UserError) as raised:
            make()
        assert str(raised.value) == text


def test_kth_largest_of_many_and_of_close_values():
    """More positions than int16 counts, and values that share their high 16 bits; against NumPy's sort."""
    random = np.random.default_rng(0)
    many = random.standard_normal((1, 40000, 2)).astype(np.float32)
    close = (1 + random.integers(-50, 50, (2, 60, 3)) * 2.0**-23).astype(np.float32)
    for values, counts in ((many, (1, 7, 39999, 40000)), (close, (1, 3, 30, 60)), (-close, (1, 3, 30, 60))):
        for k in counts:
            np.testing.assert_array_equal(kth_largest(jnp.asarray(values), k), np.sort(values, 1)[:, -k])
