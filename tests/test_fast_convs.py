"""`fast_convs` on models nobody edited: the same numbers, names and taps, only engine convolutions, fast loops."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from topgap_jax import attacks, balls, engine, explain, models, pool, rewrite, rules
from topgap_jax.engine import onednn
from topgap_jax.rewrite import fast_convs
from topgap_jax.scores import cross_entropy

IMAGES = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 17, 17, 3)), jnp.float32)
LABELS = jnp.array([0, 1, 2, 3])
KEYS = jax.random.split(jax.random.key(0), 4)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        y = nn.Conv(8, (3, 3), (2, 2), use_bias=False, name="conv")(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not train)(y))
        return y + nn.Conv(8, (1, 1), (2, 2))(x)


class Net(nn.Module):
    """A strided residual network with batch norm, remat and dropout, as its author would write it."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.Conv(6, (5, 5), padding="VALID")(x))
        x = nn.remat(Block, static_argnums=(2,))()(x, train)
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(4, name="head")(x.mean((1, 2)))


class Small(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 5, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.head = nnx.Linear(5, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def plain(images):
    """NCHW, an uncommon order of axes, groups, dilation, and three kinds that the engine leaves alone."""
    random = np.random.default_rng(1)
    w = lambda *shape: jnp.asarray(random.standard_normal(shape) / 5, jnp.float32)
    x = lax.conv_general_dilated(images.transpose(0, 3, 1, 2), w(4, 3, 3, 3), (1, 2), "SAME")
    x = lax.conv_general_dilated(x, w(3, 3, 4, 4), (1, 1), "VALID", dimension_numbers=("NCHW", "HWIO", "NHWC"))
    x = jax.jit(lambda x: jnp.tanh(x))(x)
    numbers = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(x, w(3, 3, 2, 4), (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=2)
    x = lax.conv_general_dilated(x, w(3, 3, 4, 4), (1, 1), "SAME", dimension_numbers=numbers, rhs_dilation=(2, 2))
    x = x + lax.conv_general_dilated(x, w(2, 2, 4, 4), (2, 2), ((1, 1), (1, 1)), (2, 2), dimension_numbers=numbers)
    x = x + lax.conv_general_dilated(
        jnp.concatenate([x, x]), w(1, 1, 4, 4), (1, 1), "SAME", dimension_numbers=numbers, batch_group_count=2
    )
    x = x + lax.conv_general_dilated(
        x.reshape(4, -1, 4), w(3, 4, 4), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    ).reshape(x.shape)
    return x.mean((1, 2))


def linen_model():
    model = models.linen(Net())
    return model, jax.jit(model.init)(jax.random.key(0), IMAGES)


def nnx_model():
    model = models.nnx(Small(nnx.Rngs(0)))
    return model, model.init(jax.random.key(0), IMAGES)


def predictors():
    for model, variables in (linen_model(), nnx_model()):
        yield models.bind(model, variables)
    yield plain


def assert_same(a, b, tolerance=2e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1.0, float(jnp.abs(y).max())))


@pytest.mark.parametrize("which", [0, 1, 2], ids=["linen", "nnx", "function"])
def test_same_numbers(which):
    """Logits, input gradients, double backprop, a Hessian-vector product; eager and jitted, of a jitted function."""
    predict = list(predictors())[which]
    loss = lambda f: lambda x: cross_entropy(f(x), LABELS).sum()
    derived = [
        lambda f: f,
        lambda f: jax.grad(loss(f)),
        lambda f: jax.grad(lambda x: (jax.grad(loss(f))(x) ** 2).sum()),
        lambda f: lambda x: jax.jvp(jax.grad(loss(f)), (x,), (jnp.cos(x),))[1],
    ]
    every = lambda f: jax.jit(lambda x: [of(f)(x) for of in derived])(IMAGES)
    expected = every(predict)
    assert_same(every(fast_convs(predict)), expected)
    assert_same(jax.jit(fast_convs(jax.jit(predict)))(IMAGES), expected[0])
    if which == 2:
        assert_same(fast_convs(predict)(IMAGES), expected[0])


@pytest.mark.parametrize("make", [linen_model, pytest.param(nnx_model, marks=pytest.mark.slow)])
def test_training_mode(make):
    """The whole `apply`: logits, batch statistics and parameter gradients with dropout, keys and keyword arguments."""
    model, variables = make()
    fast = model._replace(apply=fast_convs(model.apply))

    def loss(model, params):
        out = model.apply({**variables, "params": params}, IMAGES, train=True, keys=KEYS)
        return cross_entropy(out.logits, LABELS).sum(), out.batch_stats

    expected = jax.jit(jax.grad(lambda params: loss(model, params), has_aux=True))(variables["params"])
    assert_same(jax.jit(jax.grad(lambda params: loss(fast, params), has_aux=True))(variables["params"]), expected)
    text = str(jax.make_jaxpr(jax.grad(lambda params: loss(fast, params)[0]))(variables["params"]))
    assert "conv_general_dilated" not in text and "topgap_convolution_weight_gradient" in text


def test_other_rewrites_work_through_it():
    """`with_pool`, `tap`, `read`, `with_rules`, `layers` and Grad-CAM, inside and outside of it."""
    model, variables = linen_model()
    predict = models.bind(model, variables)
    assert rewrite.layers(fast_convs(predict), IMAGES) == rewrite.layers(predict, IMAGES)
    edit = lambda value: value * 2
    pool_of = lambda apply: models.bind(
        rewrite.with_pool(model._replace(apply=apply), dense="head", pool=pool.top_gap(k=3)), variables
    )
    pooled, outside = pool_of(model.apply), pool_of(fast_convs(model.apply))
    ruled = lambda f: rewrite.with_rules(f, **rules.guided)
    cam = lambda f: lambda x: explain.cam()(KEYS, f, x, LABELS)
    grad_cam = lambda f: lambda x: explain.grad_cam(layer="Conv_0")(KEYS, f, x, LABELS)
    summed = lambda f: jax.grad(lambda x: f(x).sum())
    every = lambda functions: jax.jit(lambda x: [f(x) for f in functions])(IMAGES)
    ours = [
        *(outside, fast_convs(pooled), cam(outside), cam(fast_convs(pooled))),
        *(fast_convs(rewrite.tap(predict, "Conv_0", edit)), rewrite.tap(fast_convs(predict), "Conv_0", edit)),
        rewrite.read(fast_convs(predict), "Conv_0"),
        *(summed(fast_convs(ruled(predict))), summed(ruled(fast_convs(predict)))),
        grad_cam(fast_convs(predict)),
    ]
    plain = [
        *(pooled, pooled, cam(pooled), cam(pooled)),
        *[rewrite.tap(predict, "Conv_0", edit)] * 2,
        rewrite.read(predict, "Conv_0"),
        *[summed(ruled(predict))] * 2,
        grad_cam(predict),
    ]
    assert_same(every(ours), every(plain))


ATTACK = attacks.pgd(balls.linf(8 / 255), steps=4)


def looped(predict):
    """A PGD in a scan, compiled, without a convolution that XLA's CPU runs as naive loops."""

    def attacked(images):
        state = ATTACK.init(KEYS, predict, images, LABELS, predict(images))
        return lax.scan(lambda state, _: (ATTACK.step(predict, state), None), state, None, length=4)[0]

    compiled = jax.jit(attacked).lower(IMAGES).compile()
    available, text = onednn.available(), compiled.as_text()
    assert "while" in text and (onednn.TARGET in text) == available
    naive = ("01oi", "rhs_reversal")
    assert not [x for x in text.splitlines() if " convolution(" in x and any(word in x for word in naive)]
    return compiled


def test_loops():
    """The numbers of the unrolled attack."""
    predict = fast_convs(models.bind(*linen_model()))
    state = jax.jit(lambda x: ATTACK.init(KEYS, predict, x, LABELS, predict(x)))(IMAGES)
    step = jax.jit(lambda state: ATTACK.step(predict, state))
    for _ in range(4):
        state = step(state)
    assert_same(looped(predict)(IMAGES).delta, state.delta)


def test_loops_of_the_other_path(monkeypatch):
    predict = fast_convs(models.bind(*linen_model()))
    monkeypatch.setattr(onednn, "available", lambda: False)
    jax.clear_caches()
    try:
        looped(predict)
    finally:
        jax.clear_caches()


@pytest.mark.slow
def test_no_program_needs_more_memory(monkeypatch):
    """The buffers that XLA plans for an attack's gradient and for a training step of ResNet-20, on both paths, against
    plain JAX."""
    model = models.classifier(
        models.resnet20(), models.map_head(pool.gap()), classes=4, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    images, labels = jnp.zeros((32, 32, 32, 3)), jnp.zeros(32, int)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def planned(model, train, merged):
        def loss(variables, images):
            output = model.apply(variables, images, train=train)
            return cross_entropy(output.logits, labels).sum(), output.batch_stats

        gradient = merged(jax.grad(loss, argnums=0 if train else 1, has_aux=True))
        return jax.jit(gradient).lower(variables, images).compile().memory_analysis().temp_size_in_bytes

    without = [planned(model, train, lambda f: f) for train in (False, True)]
    assert np.less_equal([planned(models.fast(model), train, rewrite.fused) for train in (False, True)], without).all()
    monkeypatch.setattr(onednn, "available", lambda: False)
    jax.clear_caches()
    assert np.less_equal([planned(models.fast(model), train, rewrite.fused) for train in (False, True)], without).all()
    jax.clear_caches()


@pytest.mark.parametrize("check", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_inside_a_shard_map(check):
    """Somebody's own per-device program: its convolutions are found, and the sums over devices stay."""
    model, variables = linen_model()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",), axis_types=(AxisType.Auto,))
    batch, whole = PartitionSpec("data"), PartitionSpec()

    def losses(params, images):
        logits = models.bind(model, {**variables, "params": params})(images)
        return logits, lax.psum((logits**2).sum(), "data")

    f = jax.shard_map(losses, mesh=mesh, in_specs=(whole, batch), out_specs=(batch, whole), check_vma=check)
    args = variables["params"], IMAGES
    assert "conv_general_dilated" not in str(jax.make_jaxpr(fast_convs(f))(*args))
    gradients = lambda f: jax.jit(jax.grad(lambda *args: f(*args)[1], (0, 1)))
    assert_same(jax.jit(fast_convs(f))(*args), jax.jit(f)(*args))
    assert_same(gradients(fast_convs(f))(*args), gradients(f)(*args))
    assert_same(jax.jit(rewrite.fused(rewrite.fold_batch_norm(fast_convs(f))))(*args), jax.jit(f)(*args))


def test_arrays_without_a_mesh_and_the_old_partitioner():
    """Programs for several devices in which nothing says how to divide a call: the numbers of one device."""
    convolve = lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x, w = jnp.ones((4, 6, 6, 3)), jnp.ones((3, 3, 3, 4))
    wanted = convolve(x, w)
    for kind in (AxisType.Auto, AxisType.Explicit):
        with jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",), axis_types=(kind,))):
            assert_same(jax.jit(fast_convs(convolve))(x, w), wanted)
            assert_same(fast_convs(convolve)(x, w), wanted)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",), axis_types=(AxisType.Auto,))
    divided = jax.device_put(x, jax.sharding.NamedSharding(mesh, PartitionSpec("data")))
    whole = jax.device_put(w, jax.sharding.NamedSharding(mesh, PartitionSpec()))
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        assert_same(jax.jit(fast_convs(convolve))(divided, whole), wanted)
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)


def test_a_checkpoint_that_saves_convolutions_saves_these():
    def count(f):
        convolutions = ("conv_general_dilated", "topgap_convolution")
        return sum(str(jax.make_jaxpr(f)(IMAGES)).count(f"{name}[") for name in convolutions)

    def net(x):
        for _ in range(2):
            x = jnp.sin(
                nn.Conv(3, (3, 3)).apply({"params": {"kernel": jnp.ones((3, 3, 3, 3)), "bias": jnp.ones(3)}}, x)
            )
        return x.sum()

    kept = jax.checkpoint(net, policy=jax.checkpoint_policies.dots_saveable)
    assert count(jax.grad(fast_convs(kept))) == count(jax.grad(fast_convs(net))) == 2
    assert count(jax.grad(fast_convs(jax.checkpoint(net)))) > 2


def test_explain_says_where_it_could_not_go():
    convolve = lambda x: lax.conv_general_dilated(x, jnp.ones((1, 3, 3, 3)), (1, 1), "SAME")
    images = jnp.ones((4, 3, 8, 8))
    (closed,) = engine.explain(fast_convs(jax.custom_batching.sequential_vmap(convolve)), images)
    assert (closed.path, closed.why) == ("lax", "inside custom_vmap_call")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    for names in ({"a"}, {"a", "b"}):
        inside = jax.shard_map(
            convolve, mesh=mesh, in_specs=PartitionSpec("a"), out_specs=PartitionSpec("a"), axis_names=names
        )
        (found,) = engine.explain(fast_convs(inside), images)
        compiled = jax.jit(fast_convs(inside)).lower(images).compile().as_text()
        assert (found.path == "onednn") == (onednn.TARGET in compiled)
        assert found.why == (onednn.reason() or "inside a shard_map over some axes of its mesh" * (len(names) == 1))


def test_explain_lists_paths_and_reasons(monkeypatch):
    found = engine.explain(fast_convs(plain), IMAGES)
    why = [(each.path, each.why) for each in found]
    reasons = ["dilated images", "a batch in 2 groups", "1 spatial axes, not 2"]
    own = ("onednn", "") if onednn.available() else ("xla", onednn.reason())
    assert why == [own] * 4 + [("lax", reason) for reason in reasons]
    assert str(found[4]) == "convolution      (4, 15, 7, 4) (2, 2, 4, 4): lax (dilated images)"
    own = jax.custom_jvp(lambda x: plain(x))
    own.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    assert engine.explain(fast_convs(own), IMAGES)[0].why == "inside custom_jvp_call"
    assert {each.why for each in engine.explain(plain, IMAGES)} == {"not under fast_convs", *reasons}
    kinds = [each.kind for each in engine.explain(jax.grad(lambda x: fast_convs(plain)(x).sum()), IMAGES)]
    assert (
        kinds.count("convolution") == 7 + 3 and kinds.count("input gradient") == 4
    )  # lax's gradients are its convolutions
    half = engine.explain(
        lambda x: fast_convs(nn.Conv(2, (3, 3), dtype=jnp.bfloat16).apply)(
            {"params": {"kernel": jnp.ones((3, 3, 3, 2)), "bias": jnp.ones(2)}}, x
        ),
        IMAGES,
    )
    assert (half[0].path, half[0].why) == ("xla", "type bfloat16" if onednn.available() else onednn.reason())


def test_identity_elsewhere(monkeypatch):
    """On a GPU or TPU the function is called as it is."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert "conv_general_dilated" in str(jax.make_jaxpr(fast_convs(plain))(IMAGES))
