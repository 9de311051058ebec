"""`fast`, `sum_over`, `map_over` and `loop`: a Python loop's numbers, under jit, on many devices, and through
derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from topgap_jax import mesh
from topgap_jax.rewrite import fast, loop, map_over, sum_over, tap

IMAGES = jax.random.uniform(jax.random.key(0), (8, 5, 5, 2))
KERNEL = jax.random.normal(jax.random.key(1), (3, 3, 2, 2))
NODES = np.float32([0.1, 0.5, 0.2, 0.7, 0.9])
WEIGHTS = jax.random.normal(jax.random.key(2), (5, 2))


def convolved(images):
    return jnp.tanh(
        lax.conv_general_dilated(images, KERNEL, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )


def slope(images, node, weight):
    """A gradient by the images, as the explanations loop over: its convolution is the one that XLA's CPU has no fast
    loop for."""
    return jax.grad(lambda z: (convolved(z * node) * weight).sum())(images)


def summed(images, rows=(NODES, WEIGHTS)):
    return sum_over(lambda node, weight: slope(images, node, weight), rows, images)


def mapped(images, rows=(NODES, WEIGHTS), chunk=1):
    return map_over(lambda node, weight: slope(images, node, weight), rows, chunk)


def one_by_one(images, rows=(NODES, WEIGHTS)):
    return [slope(images, *row) for row in zip(*rows)]


def descended(images, n=3):
    return loop(lambda z: z - 0.1 * slope(z, 0.5, WEIGHTS[0]), n, images)


FORMS = {
    "sum_over": (summed, lambda images: sum(one_by_one(images))),
    "map_over": (mapped, lambda images: jnp.stack(one_by_one(images))),
    "map_over by chunks": (lambda images: mapped(images, chunk=3), lambda images: jnp.stack(one_by_one(images))),
    "loop": (descended, lambda images: _repeated(images)),
}


def _repeated(images):
    for _ in range(3):
        images = images - 0.1 * slope(images, 0.5, WEIGHTS[0])
    return images


@pytest.mark.parametrize("form", FORMS)
def test_equals_a_python_loop_under_jit_and_in_derivatives(form):
    ours, expected = FORMS[form]
    both = lambda f: jax.jit(lambda z: (f(z), jax.grad(lambda z: (f(z) ** 2).sum())(z)))(IMAGES)
    for a, b in zip(both(ours), both(expected)):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_many_devices(form):
    """Images split over devices give results split over devices, by the partitioner and inside `shard_map`."""
    ours, _ = FORMS[form]
    devices = mesh.data_mesh()
    spec = P(None, "data") if form.startswith("map_over") else P("data")
    expected = jax.jit(ours)(IMAGES)
    split = jax.device_put(IMAGES, jax.sharding.NamedSharding(devices, P("data")))
    out = jax.jit(ours)(split)
    if form != "map_over by chunks":  # whose sharding the partitioner loses, as the docstring says
        assert out.sharding.is_equivalent_to(jax.sharding.NamedSharding(devices, spec), out.ndim)
    mapped = jax.shard_map(ours, mesh=devices, in_specs=P("data"), out_specs=spec)
    for result in (out, jax.jit(mapped)(IMAGES)):
        np.testing.assert_allclose(result, expected, atol=1e-5)


def transposed(text):
    """The convolutions of a jaxpr that are not NHWC by HWIO."""
    convolutions = [part for part in text.split("conv_general_dilated[")[1:]]
    return [part for part in convolutions if "rhs_spec=(3, 2, 0, 1)" not in part.split("]")[0]]


@pytest.mark.parametrize("form", FORMS)
def test_convolutions_in_loops_have_the_fast_layout(form):
    assert transposed(str(jax.make_jaxpr(lambda z: slope(z, 0.5, WEIGHTS[0]))(IMAGES)))
    text = str(jax.make_jaxpr(FORMS[form][0])(IMAGES))
    assert "conv_general_dilated" in text and not transposed(text)


def test_sum_over_is_in_float32_and_takes_trees():
    half = lambda key, row: {
        "a": (jax.random.uniform(key, (8,)) * row["scale"]).astype(jnp.bfloat16),
        "b": jnp.ones((8, 2)),
    }
    keys, scales = jax.random.split(jax.random.key(0), 64), {"scale": np.arange(64.0)}
    total = sum_over(half, (keys, scales), IMAGES.astype(jnp.bfloat16))
    rows = [half(key, {"scale": scale})["a"] for key, scale in zip(keys, np.arange(64.0, dtype=np.float32))]
    assert total["a"].dtype == jnp.float32
    np.testing.assert_allclose(total["a"], np.sum([np.float32(row) for row in rows], 0), rtol=1e-5)
    np.testing.assert_array_equal(total["b"], np.full((8, 2), 64))


@pytest.mark.parametrize(
    "n, chunk, sizes", [(1, 1, 1), (1, 4, 1), (4, 4, 4), (4, 100, 4), (10, 8, 5), (7, 3, 3), (5, 1, 1)]
)
def test_map_over_computes_at_most_a_chunk(n, chunk, sizes):
    rows = jnp.arange(n, dtype=jnp.float32)
    f = lambda row: {"row": row, "square": jnp.full((2,), row) ** 2}
    out = map_over(f, (rows,), chunk)
    np.testing.assert_array_equal(out["row"], rows)
    np.testing.assert_array_equal(out["square"], np.stack([rows**2] * 2, 1))
    assert sizes <= chunk
    width = f"f32[{sizes},2]" if sizes > 1 else "f32[2]"
    text = str(jax.make_jaxpr(lambda rows: map_over(f, (rows,), chunk))(rows))
    assert f"{width} = integer_pow" in text or f"{width} = square" in text


def test_map_over_takes_keys():
    keys = jax.random.split(jax.random.key(0), 5)
    expected = jax.vmap(jax.random.uniform)(keys)
    np.testing.assert_array_equal(map_over(jax.random.uniform, (keys,)), expected)
    np.testing.assert_array_equal(map_over(jax.random.uniform, (keys,), 2), expected)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_loop_once_is_a_plain_call(n):
    step = lambda state: {"x": state["x"] * 2, "n": state["n"] + 1}
    out = loop(step, n, {"x": jnp.ones(3), "n": 0})
    np.testing.assert_array_equal(out["x"], np.full(3, 2.0**n))
    assert out["n"] == n
    text = str(jax.make_jaxpr(lambda x: loop(lambda x: x * 2, n, x))(jnp.ones(3)))
    assert n == 0 or ("scan" in text or "while" in text) == (n > 1)


def test_fast_is_the_function_itself_elsewhere(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert str(jax.make_jaxpr(fast(convolved))(IMAGES)) == str(jax.make_jaxpr(convolved)(IMAGES))


def test_fast_takes_the_engine_and_folds_batch_norm():
    """One convolution with the scale inside, of the engine; same numbers and derivatives; options other than arrays
    steer it."""
    scale = jnp.float32([2.0, 0.5])

    def network(images, *, train=False):
        plain = lax.conv_general_dilated(images, KERNEL, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return plain if train else (plain - 0.3) * scale + 1

    text = str(jax.make_jaxpr(fast(network))(IMAGES))
    assert text.count("f32[8,5,5,2] = topgap_convolution[") == text.count("f32[8,5,5,2] = add") == 1
    assert "f32[8,5,5,2] = sub" not in text and "f32[8,5,5,2] = mul" not in text
    loss = lambda f, **options: lambda images: (f(images, **options) ** 2).sum()
    for options in ({}, {"train": True}):
        ours, plain = (jax.value_and_grad(loss(f, **options))(IMAGES) for f in (fast(network), network))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, plain)


def test_fast_has_gelu_by_erf():
    """The exact GELU to float32 rounding, with its derivative, in a jit, a remat and a loop; no other erfc."""
    x = jnp.linspace(-12, 12, 4001)
    exact = lambda x: jax.nn.gelu(x, approximate=False)
    wrapped = lambda x: lax.fori_loop(0, 1, lambda _, x: jax.checkpoint(jax.jit(exact))(x), x)
    wanted = 0.5 * np.float64(x) * scipy.special.erfc(-np.float64(x) / 2**0.5)
    for f in (exact, wrapped):
        assert "erf " in (text := str(jax.make_jaxpr(fast(f))(x))) and "erfc" not in text
        error = np.abs(jax.jit(fast(f))(x) - wanted) / np.maximum(1, np.abs(x))
        assert error.max() < 2.5e-7
    ours, plain = (jax.jit(jax.vmap(jax.grad(f)))(x) for f in (fast(exact), exact))
    np.testing.assert_allclose(ours, plain, rtol=0, atol=5e-7)
    root = 0.5**0.5
    for other in (
        lambda x: lax.erfc(x),
        lambda x: 0.5 * x * lax.erfc(-x),
        lambda x: 0.5 * (x + 1) * lax.erfc(-x * root),
        lambda x: lax.erfc(-x * root) * 0.5,
        lambda x: (tail := lax.erfc(-x * root)) * (0.5 * x) + tail,
        lambda x: jax.nn.gelu(x.astype(jnp.bfloat16), approximate=False),
    ):
        assert "erfc" in str(jax.make_jaxpr(fast(other))(x))


@pytest.mark.parametrize("divide", [lambda x: x.mean((1, 2)), lambda x: x.sum((1, 2))], ids=["mean", "sum"])
def test_fast_sums_positions_before_the_dense_layer(divide):
    """One product of (b, c) where nobody sees the maps; the same numbers and derivatives, with a bias and without, in a
    remat and a loop."""
    w, b = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 4)), jnp.float32)[:, :2], jnp.arange(4.0)
    features = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 6, 2)), jnp.float32)
    for network in (
        lambda x, w: divide(jax.nn.relu(x) @ w[0] + b),
        lambda x, w: divide(jax.nn.relu(x) @ w[0]),
        lambda x, w: jax.checkpoint(jax.jit(lambda x: divide(b + x @ w[0])))(x),
        lambda x, w: lax.fori_loop(0, 1, lambda _, total: total + divide(x @ w[0] + b), jnp.zeros((3, 4))),
    ):
        assert "f32[3,5,6,4]" not in str(jax.make_jaxpr(fast(network))(features, w))
        loss = lambda f: lambda x, w: (f(x, w) ** 2).sum()
        ours, plain = (jax.jit(jax.value_and_grad(loss(f), (0, 1)))(features, w) for f in (fast(network), network))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, plain)


def test_sums_that_stay_where_they_are():
    """Maps that are returned, used twice, added to by pixel, not linear or not in float32; sums over other axes; named
    maps, where somebody asks for them."""
    w = jnp.ones((2, 4))
    for network in (
        lambda x: (maps := x @ w, maps.mean((1, 2))),
        lambda x: (maps := x @ w).mean((1, 2)) + maps.max((1, 2)),
        lambda x: (x @ w + x[..., :1]).mean((1, 2)),
        lambda x: (x @ w).mean((1, 3)),
        lambda x: jax.nn.relu(x @ w).mean((1, 2)),
        lambda x: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).mean((1, 2)),
    ):
        assert "[8,5,5,4]" in str(jax.make_jaxpr(fast(network))(IMAGES))
    network = lambda x: checkpoint_name(x @ w, "maps").mean((1, 2))
    assert "[8,5,5,4]" not in str(jax.make_jaxpr(fast(network))(IMAGES))
    logits = tap(fast(network), "maps", lambda maps: maps + 1)(IMAGES)
    np.testing.assert_allclose(logits, network(IMAGES) + 1, rtol=1e-5)
