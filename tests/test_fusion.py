"""`fold_batch_norm` and `fused`: the same numbers with fewer passes over memory, and hands off where they do not
apply."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from topgap_jax import attacks, balls, explain, models, pool
from topgap_jax.engine import available
from topgap_jax.engine import explain as explain_paths
from topgap_jax.rewrite import fast_convs, fold_batch_norm, fused, tap
from topgap_jax.scores import cross_entropy

RANDOM = np.random.default_rng(0)
IMAGES = jnp.asarray(RANDOM.uniform(size=(8, 16, 16, 3)), jnp.float32)
LABELS = jnp.arange(8) % 4
KEYS = jax.random.split(jax.random.key(0), 8)


def draw(*shape):
    return jnp.asarray(RANDOM.standard_normal(shape), jnp.float32)


class Block(nn.Module):
    """A residual block; where the stride is 2 the shortcut is a convolution with batch norm of its own."""

    stride: int = 1

    @nn.compact
    def __call__(self, x, train=False):
        norm = lambda: nn.BatchNorm(use_running_average=not train)
        y = nn.relu(norm()(nn.Conv(8, (3, 3), self.stride, use_bias=False)(x)))
        y = norm()(nn.Conv(8, (3, 3))(y))
        if self.stride != 1:
            x = norm()(nn.Conv(8, (1, 1), self.stride)(x))
        return nn.relu(y + x)


class Net(nn.Module):
    strides: tuple = (2, 1)

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3))((x - 0.5) / 0.25)))
        for stride in self.strides:
            x = Block(stride)(x, train)
        return pool.top_gap(k=3)(nn.Conv(4, (1, 1))(x))


def drawn(model):
    """Variables with statistics that are not 0 and 1."""
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    return jax.tree.map(lambda a: a + 0.1 * jnp.abs(draw(*a.shape)), variables)


MODEL, ONE_BLOCK = models.linen(Net()), models.linen(Net((2,)))
VARIABLES = drawn(MODEL)


def predict(images):
    return models.bind(MODEL, VARIABLES)(images)


def quick(images):
    return fold_batch_norm(fast_convs(predict))(images)


def counted(f, *args):
    """How often each primitive stands in f, at any depth."""
    found = collections.Counter()

    def count(jaxpr):
        for eqn in jaxpr.eqns:
            found[eqn.primitive.name] += 1
        for body in jax.extend.core.subjaxprs(jaxpr):
            count(body)

    count(jax.make_jaxpr(f)(*args).jaxpr)
    return found


def assert_same(a, b, tolerance=2e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1e-6, float(jnp.abs(y).max())))


def summed(f):
    return lambda images: cross_entropy(f(images), LABELS).sum()


FOLDED = {
    "before fast_convs": lambda f: fast_convs(fold_batch_norm(f)),
    "after fast_convs": lambda f: fold_batch_norm(fast_convs(f)),
    "alone": fold_batch_norm,
}


def twice(f):
    return jax.grad(lambda x: (jax.grad(summed(f))(x) ** 2).sum())


@pytest.fixture(scope="module")
def plain():
    """The plain network's logits, and its gradients by the images, of first and second order."""
    return jax.jit(lambda x: (predict(x), jax.grad(summed(predict))(x), twice(predict)(x)))(IMAGES)


@pytest.mark.parametrize(
    "order",
    [
        "after fast_convs",
        pytest.param("before fast_convs", marks=pytest.mark.slow),
        pytest.param("alone", marks=pytest.mark.slow),
    ],
)
def test_folding_keeps_the_function(order, plain):
    """Logits and derivatives of second order, with engine or lax convolutions."""
    f = FOLDED[order](predict)
    logits, second = jax.jit(lambda x: (f(x), twice(f)(x)))(IMAGES)
    assert_same(logits, plain[0])
    assert_same(second, plain[2], 1e-4)


def test_folding_keeps_the_gradient_of_the_parameters():
    variables = drawn(ONE_BLOCK)
    by_params = lambda transform: lambda variables: summed(transform(models.bind(ONE_BLOCK, variables)))(IMAGES)
    found, expected = (jax.jit(jax.grad(by_params(f)))(variables) for f in (fold_batch_norm, lambda f: f))
    assert_same(found, expected, 1e-4)


def test_folding_removes_the_products(plain):
    """Nothing of full size is multiplied any more, forward or backward, under jit and remat too."""
    full = lambda f: [
        eqn.primitive.name
        for eqn in jax.make_jaxpr(f)(IMAGES).jaxpr.eqns
        if eqn.primitive.name in ("mul", "sub")
        and eqn.outvars[0].aval.shape[-1] == 8
        and eqn.outvars[0].aval.size > 1000
    ]
    assert len(full(predict)) >= 12 and not full(quick) and not full(jax.grad(summed(quick)))
    whole = fold_batch_norm(jax.jit(jax.checkpoint(predict)))
    assert_same(jax.jit(whole)(IMAGES), plain[0])
    assert counted(whole, IMAGES)["mul"] == counted(fold_batch_norm(predict), IMAGES)["mul"]


def test_training_mode():
    """What the statistics use stays, and is normalised by one product and one sum: same numbers, statistics and
    gradients."""

    model, variables = ONE_BLOCK, drawn(ONE_BLOCK)

    def loss(f):
        def of(params):
            out = f({**variables, "params": params}, IMAGES, train=True)
            return cross_entropy(out.logits, LABELS).sum(), out.batch_stats

        return jax.jit(jax.value_and_grad(of, has_aux=True))

    folded = fold_batch_norm(model.apply)
    found, expected = (jax.tree.leaves(loss(f)(variables["params"])) for f in (folded, model.apply))
    for x, y in zip(found, expected, strict=True):  # behind a batch norm a bias has a gradient of 0, but for rounding
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * max(1.0, float(jnp.abs(y).max())))
    count = lambda f: counted(lambda x: f(variables, x, train=True).logits, IMAGES)
    assert count(folded)["sub"] == count(model.apply)["sub"]  # of vectors now
    full = lambda f: [
        eqn.primitive.name
        for eqn in jax.make_jaxpr(lambda x: f(variables, x, train=True).logits)(IMAGES).jaxpr.eqns
        if eqn.primitive.name in ("mul", "sub") and eqn.outvars[0].aval.shape[1:] in ((16, 16, 8), (8, 8, 8))
    ]
    assert collections.Counter(full(model.apply))["sub"] == 4 and "sub" not in full(folded)


def test_what_is_not_folded():
    """A step behind a result that something else uses, a factor per pixel, a bias alone, and what is named."""
    w, v, pixels = draw(3, 3, 3, 5), draw(5), draw(16, 16, 1)
    convolve = lambda x: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    for f in (
        lambda x: (y := convolve(x)) * v - y,
        lambda x: convolve(x) * pixels,
        lambda x: convolve(x) + v,  # a bias alone
        lambda x: (y := convolve(x)) / y.std((0, 1, 2)),
    ):
        assert_same(*jax.jit(lambda x, f=f: (fold_batch_norm(f)(x), f(x)))(IMAGES))
        assert counted(fold_batch_norm(f), IMAGES) == counted(f, IMAGES)
    # One row and column, where a branch looks like a factor per channel to the other: one takes the sum, both are
    # right.
    pixel, a, b = IMAGES[:1, :1, :1], draw(5), draw(5)
    for f in (lambda x: convolve(x) * a + convolve(x * 2) * b, lambda x: convolve(x) * convolve(x + 1)):
        assert_same(*jax.jit(lambda x, f=f: (fold_batch_norm(f)(x), f(x)))(pixel))
    half = lambda x: lax.conv_general_dilated(
        x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"), preferred_element_type=jnp.float32,
    ) * v  # fmt: skip
    assert_same(*jax.jit(lambda x: (fold_batch_norm(half)(x), half(x)))(IMAGES))
    edited = lambda f: tap(f, "Conv_0", lambda value: value * 2)
    assert_same(jax.jit(edited(fold_batch_norm(predict)))(IMAGES), jax.jit(edited(predict))(IMAGES))


def test_every_form_of_the_factors():
    """Sums, differences and quotients in any order, one value per channel or in all, in any order of the axes."""
    w, a, b = draw(3, 3, 3, 5), draw(5), draw(1, 5, 1, 1)
    numbers = ("NCHW", "HWIO", "NCHW")
    convolve = lambda x: lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=numbers)
    x = IMAGES.transpose(0, 3, 1, 2)
    f = lambda x: (3 - ((convolve(x) - b) / a[:, None, None] * 2 + b)) * -1.5 + 0.25
    g = fold_batch_norm(f)
    assert_same(g(x), f(x), 1e-5)
    assert not [
        e
        for e in jax.make_jaxpr(g)(x).jaxpr.eqns
        if e.primitive.name in ("mul", "div", "sub") and e.outvars[0].aval.size > 1000
    ]
    grouped = lambda x: (
        lax.conv_general_dilated(
            x, draw(3, 3, 1, 6), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3
        )
        * a[0]
    )
    state = RANDOM.bit_generator.state
    expected = grouped(IMAGES)
    RANDOM.bit_generator.state = state
    assert_same(fold_batch_norm(grouped)(IMAGES), expected)


needs_onednn = pytest.mark.skipif(not available(), reason="no oneDNN here")


@needs_onednn
def test_fused_numbers(plain):
    """Logits, input gradients, and an attack in a loop; what is computed again under remat stays so."""
    gradient = lambda f: jax.grad(summed(f))
    start = jax.jit(lambda x, logits: attack().init(KEYS, predict, x, LABELS, logits))(IMAGES, plain[0])
    loop = lambda f: lambda state: lax.fori_loop(0, 2, lambda _, state: attack().step(f, state), state)
    assert_same(jax.jit(fused(lambda x: (quick(x), gradient(quick)(x))))(IMAGES), plain[:2])
    assert_same(jax.jit(fused(loop(quick)))(start).delta, jax.jit(loop(predict))(start).delta)
    again = fused(gradient(jax.checkpoint(quick)))
    barriers = lambda f: jax.jit(f).lower(IMAGES).as_text().count("optimization_barrier")
    assert barriers(again) == barriers(gradient(jax.checkpoint(quick))) > 0


def attack():
    return attacks.pgd(balls.linf(8 / 255), steps=2)


@needs_onednn
@pytest.mark.slow
def test_fused_numbers_of_other_programs(plain):
    """Of a jitted function, of second order, one step of an attack, eagerly, and under remat."""
    gradient = lambda f: jax.grad(summed(f))
    assert_same(jax.jit(fused(gradient(jax.jit(quick))))(IMAGES), plain[1])
    assert_same(jax.jit(fused(twice(quick)))(IMAGES), plain[2], 1e-4)
    start = jax.jit(lambda x, logits: attack().init(KEYS, predict, x, LABELS, logits))(IMAGES, plain[0])
    step = lambda f: lambda state: attack().step(f, state)
    assert_same(jax.jit(fused(step(quick)))(start).delta, jax.jit(step(predict))(start).delta)
    assert_same(fused(quick)(IMAGES), plain[0])
    assert_same(jax.jit(fused(gradient(jax.checkpoint(quick))))(IMAGES), plain[1])


@needs_onednn
def test_fused_leaves_no_pass():
    """7 convolutions with 5 ReLUs, and back: every ReLU, mask, sum and bias is in one of the calls.

    Of the gradients, the images' has nothing behind it, and that of one of two branches is added to the other's.
    """
    text = str(jax.make_jaxpr(fused(jax.grad(summed(quick))))(IMAGES))
    assert text.count("topgap_fused_convolution[") == 7 + 5 and text.count("topgap_convolution_input_gradient[") == 2
    sums = [line for line in text.splitlines() if "add_any" in line and ",8] =" in line]
    assert "topgap_convolution[" not in text and not sums
    assert text.count("bias=True") == 7 and text.count("relu=True") == text.count("mask=True") == 5
    assert text.count("residual=True") == 2 + 2


@needs_onednn
def test_relus_behind_batch_statistics_are_computed_once():
    """In training each of 3 ReLUs is stored, and its mask read off what is stored; the same loss and gradients, ReLU6
    too, and NaN stays NaN."""
    model, variables = ONE_BLOCK, drawn(ONE_BLOCK)
    quick = models.fast(model)

    def loss(params, images, model=quick):
        out = model.apply({**variables, "params": params}, images, train=True)
        return cross_entropy(out.logits, LABELS).sum()

    step = jax.jit(fused(jax.value_and_grad(loss)))
    assert str(step.trace(variables["params"], IMAGES).jaxpr).count("= topgap_stored ") == 3
    ours, plain = step(variables["params"], IMAGES), jax.jit(jax.value_and_grad(loss))(variables["params"], IMAGES)
    jax.tree.map(lambda a, b: assert_same(a, b, 1e-4), ours, plain)
    assert jnp.isnan(step(variables["params"], IMAGES.at[0, 0, 0, 0].set(jnp.nan))[0])
    w = draw(3, 4)
    f = lambda x: jax.nn.relu6(9 * x * x.mean((0, 1, 2)) - 1).mean((1, 2)) @ w
    (value, slope), (same, expected) = (jax.jit(g(jax.value_and_grad(summed(f))))(IMAGES) for g in (fused, lambda g: g))
    assert_same((value, slope), (same, expected))


@needs_onednn
def test_operands_of_dense_layers_are_computed_once():
    f = lambda x: jax.nn.gelu(x * 2) @ jnp.ones((3, 4)) + 1
    text = jax.jit(fused(f)).lower(IMAGES).as_text()
    assert text.count("topgap_onednn") == 1
    np.testing.assert_allclose(jax.jit(fused(f))(IMAGES), f(IMAGES), rtol=1e-6)


@needs_onednn
def test_explained():
    """`engine.explain` says what is fused with what."""
    found = [str(each) for each in explain_paths(fused(jax.grad(summed(quick))), IMAGES)]
    assert found[0] == "convolution      (8, 16, 16, 3) (3, 3, 3, 8): onednn (fused with bias, relu)"
    assert found[-2:] == [
        "input gradient   (8, 8, 8, 8) (1, 1, 8, 8): onednn (fused with residual, mask)",
        "input gradient   (8, 16, 16, 8) (3, 3, 3, 8): onednn",
    ]


@needs_onednn
def test_fused_relu6():
    """Of depthwise and plain convolutions, with its mask of two comparisons; what is not a number stays none."""
    w, depthwise, b = draw(3, 3, 3, 6) / 2, draw(3, 3, 1, 6), 3 + draw(6)
    options = {"padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}

    def net(x):
        x = jax.nn.relu6(lax.conv_general_dilated(x, w, (1, 1), **options) + b)
        for strides in ((1, 1), (2, 2)):
            x = jax.nn.relu6(lax.conv_general_dilated(x, depthwise, strides, feature_group_count=6, **options) + b)
        return x

    both = lambda f: lambda x: (f(x), jax.grad(lambda x: (f(x) * jnp.cos(f(x))).sum())(x))
    ours = fused(both(fast_convs(net)))
    values, gradient = jax.jit(ours)(IMAGES)
    assert_same((values, gradient), jax.jit(both(net))(IMAGES))
    assert set(np.unique(values[values >= 5.9999])) == {6} and values.min() == 0
    text = str(jax.make_jaxpr(ours)(IMAGES))
    assert text.count("limit=6.0") == text.count("relu=True") == 9 and text.count("mask=True") == 4
    assert "onednn (fused with bias, relu6)" in str(explain_paths(ours, IMAGES)[0])
    for value in (jnp.nan, jnp.inf):
        broken = jax.jit(fused(fast_convs(net)))(IMAGES.at[0, 3, 4, 1].set(value))
        np.testing.assert_array_equal(jnp.isfinite(broken[1:]), True)
        assert not (jnp.isfinite(broken) & jnp.isnan(net(IMAGES.at[0, 3, 4, 1].set(value)))).any()
    unlike = (lambda x: (x > 0) & (x < 5), lambda x: x < 6, lambda x: (x > 0) & (x < 6))
    for mask in unlike:  # whatever the comparisons are
        f = lambda x, mask=mask: jnp.where(mask(y := fast_convs(net)(x)), jax.nn.relu6(y), mask(y))
        assert_same(jax.jit(fused(f))(IMAGES), jax.jit(f)(IMAGES))


def squared(f):
    """A gradient without labels, which need not be split."""
    return jax.grad(lambda images: (f(images) ** 2).sum())


@pytest.fixture(scope="module")
def squared_gradient():
    return jax.jit(squared(predict))(IMAGES)


@needs_onednn
@pytest.mark.parametrize("axis_type", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)])
def test_fused_on_devices(axis_type, squared_gradient):
    """A batch split over 8 devices: each computes its part, nothing is gathered or reduced."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        images = jax.device_put(IMAGES, NamedSharding(mesh, PartitionSpec("data")))
        compiled = jax.jit(fused(squared(quick))).lower(images).compile()
        got = jax.device_get(compiled(images))
    assert_same(got, squared_gradient)
    text = compiled.as_text()
    assert "all-gather" not in text and "all-reduce" not in text and "topgap_onednn" in text


@needs_onednn
def test_fused_in_a_shard_map(squared_gradient):
    split = PartitionSpec("data")
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(fused(squared(quick)), mesh=mesh, in_specs=split, out_specs=split)
    assert_same(jax.jit(mapped)(IMAGES), squared_gradient)


@needs_onednn
def test_fused_hands_off():
    """Values with other uses stay; both branches of a sum; relu6; infinity and NaN pass a fused ReLU, whatever their
    sign."""
    w, b = draw(3, 3, 3, 3) / 5, draw(3)
    convolve = fast_convs(
        lambda x: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )
    for f in (
        lambda x: (y := convolve(x) + b) + jax.nn.relu(y),
        lambda x: jax.nn.relu(convolve(x) + convolve(x * 2)),
        lambda x: (y := convolve(x)) + y,
        lambda x: jax.nn.relu6(convolve(x) * 9 + b),
        lambda x: jnp.maximum(convolve(x) + b, 0) + jnp.where(convolve(x) > 0, 1.0, 0.0),
        lambda x: jnp.where(x > 0.5, convolve(x), 0.0),
        lambda x: (jnp.maximum(y := convolve(x), 0.0), y > 0, y >= 0),
        lambda x: convolve(x) + x,
        lambda x: (y := convolve(x), jax.nn.relu(y)),
    ):
        assert_same(jax.jit(fused(f))(IMAGES), jax.jit(f)(IMAGES), 1e-6)
    relu = lambda x: jax.nn.relu(convolve(x) + b)
    endless, broken = (IMAGES.at[0, 3, 4, 1].set(value) for value in (jnp.inf, jnp.nan))
    np.testing.assert_array_equal(jnp.isinf(jax.jit(fused(relu))(endless)), jnp.isinf(convolve(endless)))
    np.testing.assert_array_equal(jnp.isnan(jax.jit(fused(relu))(broken)), jnp.isnan(relu(broken)))

    @jax.custom_jvp
    def relu(x):  # somebody's own function of that name
        return jnp.maximum(x, -1.0)

    relu.defjvp(lambda primals, tangents: (relu(*primals), tangents[0]))
    other = lambda x: relu(convolve(x) + b)
    assert_same(jax.jit(fused(other))(IMAGES), jax.jit(other)(IMAGES), 1e-6)


@needs_onednn
def test_derivatives_and_vmap_of_fused():
    """They are those of the function, though nothing in them is fused."""
    gradients = lambda f: lambda images: jax.grad(lambda images: (f(images) ** 2).sum())(images)
    ours, theirs = (h(gradients(quick)) for h in (fused, lambda f: f))
    assert "topgap_fused_convolution" in str(jax.make_jaxpr(ours)(IMAGES))
    length = lambda f: lambda images: (f(images) ** 2).sum()
    expected = jax.jit(jax.grad(length(theirs)))(IMAGES)
    with jax.numpy_rank_promotion("raise"):
        derivative = jax.jit(jax.grad(length(ours))).lower(IMAGES).compile()
    assert_same(derivative(IMAGES), expected)
    two = jnp.stack([IMAGES, IMAGES[::-1] * 0.5])
    assert_same(jax.jit(jax.vmap(ours))(two), jax.jit(jax.vmap(theirs))(two))


METHODS = {
    "grad_cam": explain.grad_cam(layer="Block_0"),
    "smooth, integrated": explain.smooth(explain.integrated(steps=2), samples=2),
    "gradient": explain.gradient(),
    "field": explain.field("Block_1", channel="sum"),
}


@needs_onednn
@pytest.mark.parametrize("method", ["grad_cam", *(pytest.param(x, marks=pytest.mark.slow) for x in list(METHODS)[1:])])
def test_fused_methods(method):
    """Explanations that tap, loop and vmap give the same maps."""
    net = models.fast(MODEL)
    f = lambda images: models.bind(net, VARIABLES)(images)
    maps = lambda f: lambda images: METHODS[method](KEYS, f, images, LABELS)
    assert_same(jax.jit(fused(maps(f)))(IMAGES), jax.jit(maps(predict))(IMAGES), 1e-4)


def test_without_onednn(monkeypatch):
    """`fused` is the function itself."""
    monkeypatch.setattr("topgap_jax.rewrite.fusion.available", lambda: False)
    assert counted(fused(quick), IMAGES) == counted(quick, IMAGES)


def test_names_that_nobody_asks_for():
    """A tap inside leaves names behind, which hold nothing up; where a tap is outside, they keep their values."""
    tapped = tap(predict, "Block_1", lambda value: value * 0.5)
    full = lambda f: [
        eqn.primitive.name
        for eqn in jax.make_jaxpr(f)(IMAGES).jaxpr.eqns
        if eqn.primitive.name in ("mul", "sub") and eqn.outvars[0].aval.size > 1000
    ]
    assert len(full(fold_batch_norm(tapped))) == len(full(fold_batch_norm(predict))) + 1
    edit = lambda value: jnp.tanh(value)
    every = lambda f: jax.jit(lambda x: [tap(f, layer, edit)(x) for layer in ("Conv_0", "Block_0/Conv_1")])
    assert_same(every(fold_batch_norm(tapped))(IMAGES), every(tapped)(IMAGES))
