"""Laws of names: what `tap`, `read` and `layers` do to Linen models, plain functions and everything JAX wraps around
them."""

import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from topgap_jax import explain, models, pool
from topgap_jax.errors import UserError
from topgap_jax.rewrite import default_layer, layers, name, naming, read, tap
from topgap_jax.rewrite.names import NAMING

IMAGES = jax.random.uniform(jax.random.key(0), (4, 6, 6, 3))
LABELS = jnp.arange(4)


class Block(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Conv(self.features, (3, 3))(x))


class Net(nn.Module):
    """Three convolutions, named class maps and a pool that loops."""

    @nn.compact
    def __call__(self, x):
        x = Block(4, name="stage1")(x)
        x = Block(6, name="stage2")(x)
        return pool.top_gap(k=3)(name(nn.Conv(5, (3, 3), name="head")(x), "maps"))


@pytest.fixture(scope="module")
def net():
    model = models.linen(Net())
    variables = jax.jit(model.init)(jax.random.key(1), IMAGES)
    return model, variables, models.bind(model, variables)


@pytest.fixture
def compilations():
    """A function that counts what its argument makes XLA compile."""
    seen = []
    listen = lambda event, duration, **kwargs: seen.append(event) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(listen)

    def count(f):
        seen.clear()
        jax.block_until_ready(f())
        return len(seen)

    yield count
    jax.monitoring.unregister_event_duration_listener(listen)


def plain(x):
    """An ordinary function with two names."""
    y = name(jnp.sin(x), "inner/sine")
    return name(2.0 * y, "double").sum()


def message(f, *args):
    with pytest.raises(UserError) as raised:
        f(*args)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_layers(net):
    assert [(x.name, x.shape, x.calls, x.reachable) for x in layers(net[2], IMAGES)] == [
        ("stage1/Conv_0", (4, 6, 6, 4), 1, True),
        ("stage1", (4, 6, 6, 4), 1, True),
        ("stage2/Conv_0", (4, 6, 6, 6), 1, True),
        ("stage2", (4, 6, 6, 6), 1, True),
        ("head", (4, 6, 6, 5), 1, True),
        ("maps", (4, 6, 6, 5), 1, True),
    ]
    assert [x.name for x in layers(plain, IMAGES)] == ["inner/sine", "double"]
    assert default_layer(net[2], IMAGES) == "stage2"  # not the class maps


def test_read_is_the_layers_output(net):
    model, variables, predict = net
    convolution = variables["params"]["stage1"]["Conv_0"]
    expected = nn.relu(nn.Conv(4, (3, 3)).apply({"params": convolution}, IMAGES))
    logits, features = read(predict, "stage1")(IMAGES)
    np.testing.assert_allclose(features, expected, atol=1e-6)
    np.testing.assert_allclose(logits, predict(IMAGES), atol=1e-6)
    _, before = read(predict, "stage1/Conv_0")(IMAGES)
    assert (np.asarray(before) < 0).any() and not (np.asarray(features) < 0).any()
    np.testing.assert_allclose(pool.top_gap(k=3)(read(predict, "maps")(IMAGES)[1]), logits, atol=1e-6)


def test_tap_replaces_the_value(net):
    model, variables, predict = net
    halved = tap(predict, "stage2", lambda z: z / 2)(IMAGES)
    _, features = read(predict, "stage2")(IMAGES)
    head = {"params": variables["params"]["head"]}
    np.testing.assert_allclose(halved, pool.top_gap(k=3)(nn.Conv(5, (3, 3)).apply(head, features / 2)), atol=1e-6)
    np.testing.assert_allclose(tap(predict, "stage2", lambda z: z)(IMAGES), predict(IMAGES), atol=1e-6)
    # A replacement of another type is cast, and a NumPy array will do.
    np.testing.assert_allclose(
        tap(predict, "stage2", lambda z: np.asarray(z / 2, np.float64))(IMAGES), halved, atol=1e-6
    )


def test_a_tap_changes_no_later_call(net):
    predict = net[2]
    before, text = predict(IMAGES), str(jax.make_jaxpr(predict)(IMAGES))
    tap(predict, "stage1", lambda z: 0 * z)(IMAGES)
    explain.grad_cam("stage2")(None, predict, IMAGES, LABELS)
    np.testing.assert_array_equal(predict(IMAGES), before)
    assert str(jax.make_jaxpr(predict)(IMAGES)) == text and "stage1" not in text
    assert NAMING.value is None


def test_a_jitted_predict_gives_the_same_and_stays_compiled(net, compilations):
    predict = net[2]
    jitted = jax.jit(predict)
    before = jitted(IMAGES)
    for layer in ("stage1", "maps"):
        maps = explain.grad_cam(layer)(None, predict, IMAGES, LABELS)
        np.testing.assert_allclose(explain.grad_cam(layer)(None, jitted, IMAGES, LABELS), maps, atol=1e-6)
    np.testing.assert_allclose(
        tap(jitted, "stage1", lambda z: z / 2)(IMAGES), tap(predict, "stage1", lambda z: z / 2)(IMAGES), atol=1e-6
    )
    assert jitted._cache_size() == 1
    assert compilations(lambda: jitted(IMAGES)) == 0
    np.testing.assert_array_equal(jitted(IMAGES), before)


def test_a_second_eager_call_compiles_nothing(net, compilations):
    predict = net[2]
    for call in (
        lambda: tap(predict, "stage1", lambda z: z / 3)(IMAGES),
        lambda: read(jax.jit(predict), "stage2")(IMAGES),
        lambda: explain.grad_cam("stage1")(None, predict, IMAGES, LABELS),
        lambda: explain.cam()(None, predict, IMAGES, LABELS),
    ):
        compilations(call)
        assert compilations(call) == 0


def test_compiled_grad_cam_holds_each_convolution_once(net):
    """As many as a forward pass and one transposed convolution written by hand."""
    model, variables, _ = net

    def ours(variables, images):
        return explain.grad_cam("stage2")(None, models.bind(model, variables), images, LABELS)

    def by_hand(variables, images):
        parameters = variables["params"]
        first = Block(4).apply({"params": parameters["stage1"]}, images)
        features = Block(6).apply({"params": parameters["stage2"]}, first)
        head = lambda z: pool.top_gap(k=3)(nn.Conv(5, (3, 3)).apply({"params": parameters["head"]}, z))
        gradient = jax.grad(lambda z: jnp.take_along_axis(head(z), LABELS[:, None], 1).sum())(features)
        return nn.relu(jnp.einsum("bhwc,bc->bhw", features, gradient.mean((1, 2))))

    count = lambda f: jax.jit(f).lower(variables, IMAGES).compile().as_text().count(" convolution(")
    np.testing.assert_allclose(ours(variables, IMAGES), by_hand(variables, IMAGES), atol=1e-6)
    # Three forward, and the last one's transpose.
    assert count(ours) == count(by_hand) == 4


def test_nested():
    double = tap(plain, "sine", lambda z: z + 1)
    both = tap(double, "double", lambda z: z * 10)
    np.testing.assert_allclose(both(IMAGES), (20 * (jnp.sin(IMAGES) + 1)).sum(), rtol=1e-6)
    # The outer edit comes after the inner one, on the same layer, and a read outside sees what the tap put there.
    twice = tap(double, "sine", lambda z: z * 3)
    np.testing.assert_allclose(twice(IMAGES), (6 * (jnp.sin(IMAGES) + 1)).sum(), rtol=1e-6)
    _, value = read(double, "sine")(IMAGES)
    np.testing.assert_allclose(value, jnp.sin(IMAGES) + 1, atol=1e-6)
    assert [x.calls for x in layers(both, IMAGES)] == [1, 1]


def test_read_inside_tap(net):
    """A function that reads a layer may itself be tapped at another; an edit may call the network again."""
    predict = net[2]
    features = lambda images: read(predict, "stage2")(images)[1]
    zeroed = tap(features, "stage1", lambda z: 0 * z)(IMAGES)
    np.testing.assert_allclose(zeroed, read(tap(predict, "stage1", lambda z: 0 * z), "stage2")(IMAGES)[1], atol=1e-6)
    head = lambda z: tap(predict, "stage2", lambda _: z)(IMAGES)
    scaled = tap(predict, "stage2", lambda z: z * head(z).mean())(IMAGES)
    factor = predict(IMAGES).mean()
    np.testing.assert_allclose(scaled, tap(predict, "stage2", lambda z: z * factor)(IMAGES), atol=1e-5)


def test_grad_jit_vmap(net):
    predict = net[2]
    loss = lambda f: lambda images: (f(images) ** 2).sum()
    tapped = tap(predict, "stage1", lambda z: 2 * z)
    expected = jax.grad(
        lambda images: loss(lambda z: tap(predict, "stage1", lambda _: z)(images))(
            2 * read(predict, "stage1")(images)[1]
        )
    )
    np.testing.assert_allclose(jax.grad(loss(tapped))(IMAGES), expected(IMAGES), atol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(loss(tapped)))(IMAGES), jax.grad(loss(tapped))(IMAGES), atol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda image: tapped(image[None])[0])(IMAGES), tapped(IMAGES), atol=1e-5)
    np.testing.assert_allclose(
        tap(jax.vmap(lambda image: predict(image[None])[0]), "stage1", lambda z: 2 * z)(IMAGES),
        tapped(IMAGES),
        atol=1e-5,
    )


def test_names_inside_remat(net):
    variables = net[1]

    class Rematerialised(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.remat(Block)(4, name="stage1")(x)
            x = nn.remat(Block, policy=jax.checkpoint_policies.nothing_saveable)(6, name="stage2")(x)
            return pool.top_gap(k=3)(name(nn.Conv(5, (3, 3), name="head")(x), "maps"))

    predict = models.bind(models.linen(Rematerialised()), variables)
    for layer in ("stage1", "stage1/Conv_0", "stage2/Conv_0"):
        edited, expected = (tap(f, layer, lambda z: z / 2) for f in (predict, net[2]))
        np.testing.assert_allclose(edited(IMAGES), expected(IMAGES), atol=1e-6)
        np.testing.assert_allclose(read(predict, layer)(IMAGES)[1], read(net[2], layer)(IMAGES)[1], atol=1e-6)
    gradient = jax.grad(lambda images: (tap(predict, "stage1/Conv_0", lambda z: z / 2)(images) ** 2).sum())
    assert "checkpoint" in str(jax.make_jaxpr(gradient)(IMAGES)) or "remat" in str(jax.make_jaxpr(gradient)(IMAGES))
    plainly = jax.grad(lambda images: (tap(net[2], "stage1/Conv_0", lambda z: z / 2)(images) ** 2).sum())
    np.testing.assert_allclose(gradient(IMAGES), plainly(IMAGES), atol=1e-5)


def test_what_cannot_be_entered():
    def scanned(x):
        x = name(x, "before")
        return lax.scan(lambda carry, _: (name(carry * 2, "body"), None), x, length=3)[0]

    assert [(x.name, x.reachable) for x in layers(scanned, IMAGES)] == [("before", True), ("body", False)]
    assert message(tap(scanned, "body", lambda z: z), IMAGES) == (
        "layer 'body' lies inside a loop or another function that cannot be entered; layers: before, body"
    )
    np.testing.assert_allclose(tap(scanned, "before", lambda z: z + 1)(IMAGES), (IMAGES + 1) * 8, rtol=1e-6)

    conditional = lambda x: lax.cond(x.sum() > 0, lambda x: name(x, "inside"), lambda x: x, x)
    assert "'inside' lies inside a loop or another function" in message(read(conditional, "inside"), IMAGES)

    class Cell(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(3)(x), None

    class Loop(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Cell, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return nn.Dense(5)(scan(name="loop")(x, None)[0].mean((1, 2)))

    model = models.linen(Loop())
    predict = models.bind(model, jax.jit(model.init)(jax.random.key(0), IMAGES))
    assert "layer 'loop/Dense_0' lies inside a loop" in message(read(predict, "loop/Dense_0"), IMAGES)
    assert read(predict, "Dense_0")(IMAGES)[1].shape == (4, 5)


def test_unknown_twice_and_ambiguous(net):
    predict = net[2]
    everything = "stage1/Conv_0, stage1, stage2/Conv_0, stage2, head, maps"
    assert message(tap(predict, "stage9", lambda z: z), IMAGES) == f"no layer 'stage9'; layers: {everything}"
    assert (
        message(read(predict, "Conv_0"), IMAGES)
        == "layer 'Conv_0' is not unique: stage1/Conv_0, stage2/Conv_0; give more of its path"
    )
    assert message(read(lambda x: x + 1, "x"), IMAGES) == (
        "no layer 'x'; the function has no named values (the layers of an NNX module have names in models.nnx(module))"
    )
    assert message(read(lambda x: x + 1), IMAGES).startswith(
        "no named (b, h, w, c) value in this function: name one with topgap_jax.rewrite.name"
    )
    again = lambda x: name(name(x, "here") + 1, "here")
    assert (
        message(read(again, "here"), IMAGES)
        == "layer 'here' is met 2 times, so it is not clear which is meant; layers: here"
    )

    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(3, name="shared")
            return dense(dense(x)).mean((1, 2))

    model = models.linen(Shared())
    twice = models.bind(model, jax.jit(model.init)(jax.random.key(0), IMAGES))
    assert "layer 'shared' is met 2 times" in message(read(twice, "shared"), IMAGES)


def test_a_tap_keeps_the_shape(net):
    assert message(tap(net[2], "stage1", lambda z: z[:, :2]), IMAGES) == (
        "tap: 'stage1' has shape (4, 6, 6, 4), its replacement (4, 2, 6, 4); they must agree"
    )


def test_trees_of_arguments_and_results():
    """Other arguments than arrays steer the trace; results keep their structure; tuples are named by key."""

    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + 1, {"b": x * 2}

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x, mode, *, scale=None):
            a, rest = Pair(name="pair")(x)
            return {"sum": a + rest["b"], "none": None} if mode == "sum" else a * scale

    call = lambda *args, **kwargs: Outer().apply({}, *args, **kwargs)
    assert [x.name for x in layers(call, np.ones(3), "sum")] == ["pair[0]", "pair[1]['b']"]
    result = tap(call, "pair[0]", lambda z: 0 * z)(np.ones(3), "sum")
    assert result["none"] is None
    np.testing.assert_array_equal(result["sum"], [2, 2, 2])
    np.testing.assert_array_equal(
        tap(call, "pair[0]", lambda z: z)(np.ones(3), "product", scale=jnp.float32(2.5)), [5, 5, 5]
    )


def test_other_threads_are_not_named(net):
    predict, seen = net[2], {}

    def work():
        seen["context"] = NAMING.value
        seen["jaxpr"] = str(jax.make_jaxpr(predict)(IMAGES))

    with naming():
        with naming():  # nested: once is enough
            ours = str(jax.make_jaxpr(predict)(IMAGES))
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert ours.count("name=stage1]") == 1
    assert seen["context"] is None and "stage1" not in seen["jaxpr"]


def test_an_equinox_model():
    equinox = pytest.importorskip("equinox")

    class Classifier(equinox.Module):
        convolution: equinox.nn.Conv2d
        linear: equinox.nn.Linear

        def __init__(self, key):
            first, second = jax.random.split(key)
            self.convolution = equinox.nn.Conv2d(3, 4, 3, padding=1, key=first)
            self.linear = equinox.nn.Linear(4, 5, key=second)

        def __call__(self, image):
            features = jax.nn.relu(self.convolution(image.transpose(2, 0, 1)))
            return self.linear(name(features.transpose(1, 2, 0), "features").mean((0, 1)))

    predict = jax.vmap(Classifier(jax.random.key(0)))
    assert [(x.name, x.shape) for x in layers(predict, IMAGES)] == [("features", (4, 6, 6, 4))]
    maps = explain.grad_cam()(None, predict, IMAGES, LABELS)
    assert maps.shape == (4, 6, 6) and np.isfinite(maps).all() and np.asarray(maps).any()
