"""The engine's convolution against plain lax: numbers, derivatives of any order, every transformation, on both of its
paths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from topgap_jax import engine
from topgap_jax.engine import convolution, forms, onednn
from topgap_jax.engine.convolution import KINDS, forward_p, input_gradient_p, weight_gradient_p
from topgap_jax.engine.library import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from topgap_jax.errors import UserError

SLOW = pytest.mark.slow
STRIDES, PADS = (2, 1), ((1, 1), (0, 2))
SHAPES = (8, 9, 7, 3), (3, 3, 3, 4)  # images and kernel


@pytest.fixture(params=["onednn", "xla"])
def path(request, monkeypatch):
    """Which of the two the convolutions of the test are compiled to."""
    if request.param == "onednn" and onednn.reason():
        pytest.skip(f"no oneDNN here: {onednn.reason()}")
    if request.param == "xla":
        jax.clear_caches()  # what is compiled already goes the other way
        monkeypatch.setattr(onednn, "available", lambda: False)
    yield request.param
    if request.param == "xla":
        jax.clear_caches()


def draw(*shapes, seed=0):
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes]


def by_lax(x, w, strides=STRIDES, pads=PADS, groups=1, dilation=(1, 1)):
    return lax.conv_general_dilated(
        *(x, w, strides, pads, None, dilation, ("NHWC", "HWIO", "NHWC")), feature_group_count=groups
    )


def ours(x, w, strides=STRIDES, pads=PADS, **options):
    return convolution(x, w, strides, pads, **options)


def assert_close(got, expected, tolerance=1e-5):
    """Relative to the largest entry of each array."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1e-30, float(jnp.abs(b).max())))


@st.composite
def geometries(draw):
    """Sizes of a convolution whose result is not empty: images, kernel, and the options of `ours` and `by_lax`."""
    side = st.integers(1, 3)
    kernel = draw(st.tuples(*[st.sampled_from((1, 3, 5, 7))] * 2))
    kind = draw(st.sampled_from(("plain", "plain", "dilated", "grouped", "depthwise", "dilated and depthwise")))
    dilation = draw(st.tuples(side, side)) if "dilated" in kind else (1, 1)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation)]
    pads = tuple(draw(st.tuples(st.integers(0, k), st.integers(0, k))) for k in reach)
    size = tuple(draw(st.integers(max(1, k - sum(p)), max(14, k))) for k, p in zip(reach, pads))
    n, c, o = draw(st.integers(1, 130)), draw(st.integers(1, 64)), draw(st.integers(1, 64))
    groups = 1
    if "depthwise" in kind:
        groups, c, o = c, c, c * draw(st.sampled_from((1, 1, 2)))
    elif kind == "grouped":
        groups = draw(st.integers(2, 8))
        c, o = -(-c // groups) * groups, -(-o // groups) * groups
    if n * c * o // groups > 20000:
        n = max(1, 20000 * groups // (c * o))
    options = dict(strides=draw(st.tuples(side, side)), pads=pads, groups=groups, dilation=dilation)
    return (n, *size, c), (*kernel, c // groups, o), options


def everything(f, x, w, dy, dx, dw):
    """The result, both gradients, and the derivatives of these in the directions dx and dw: what second order is made
    of."""
    y, back = jax.vjp(f, x, w)
    gradients = lambda x, w, dy: jax.vjp(f, x, w)[1](dy)
    return y, back(dy), jax.jvp(f, (x, w), (dx, dw))[1], jax.vjp(gradients, x, w, dy)[1]((dx, dw))


@settings(max_examples=2)
@given(geometries())
def test_numbers(geometry):
    """Kernel 1 to 7, stride and dilation 1 to 3, any padding, 1 to 64 channels in any groups, batch 1 to 130: first and
    second derivatives as of lax."""
    check_numbers(geometry)


@pytest.mark.slow
@settings(max_examples=150)
@given(geometries())
def test_many_numbers(geometry):
    check_numbers(geometry)


def check_numbers(geometry):
    images, kernel, options = geometry
    f, g = (functools.partial(f, **options) for f in (ours, by_lax))
    x, w, dx, dw = draw(images, kernel, images, kernel)
    (dy,) = draw(jax.eval_shape(g, x, w).shape, seed=1)
    values = [jax.jit(functools.partial(everything, h))(x, w, dy, dx, dw) for h in (f, g)]
    assert_close(*values)


@pytest.mark.parametrize(
    "geometry",
    [
        ((2, 12, 11, 3), (7, 7, 3, 8), {"strides": (2, 2), "pads": ((3, 3), (3, 3))}),  # the stem of a network
        ((2, 8, 9, 4), (4, 3, 4, 8), {"strides": (4, 2), "pads": ((0, 0), (0, 1))}),
        ((2, 9, 8, 6), (5, 5, 1, 6), {"pads": ((2, 2), (2, 2)), "groups": 6}),  # wide depthwise kernels
        ((2, 9, 12, 6), (3, 7, 1, 6), {"pads": ((1, 1), (6, 1)), "groups": 6, "dilation": (1, 2)}),
    ],
    ids=["7x7, stride 2", "4x3, strides 4 and 2", "5x5", "3x7, dilated"],
)
def test_numbers_of_calls_in_parts(geometry):
    """Input gradients by places, depthwise weight gradients by strips of columns."""
    images, kernel, options = geometry
    f, g = (functools.partial(f, **{"strides": (1, 1), **options}) for f in (ours, by_lax))
    x, w = draw(images, kernel)
    (dy,) = draw(jax.eval_shape(g, x, w).shape, seed=1)
    assert_close(*(jax.jit(lambda x, w, dy, h=h: jax.vjp(h, x, w)[1](dy))(x, w, dy) for h in (f, g)))


@settings(max_examples=3)
@given(geometries())
def test_numbers_of_the_other_path(geometry):
    """The same of the forms that XLA compiles, one by one."""
    check_forms(geometry, forms.ON_CPU)


@pytest.mark.parametrize("form", [forms.ON_CPU, pytest.param(forms.BY_LAX, marks=SLOW)], ids=["on CPU", "by lax"])
@pytest.mark.parametrize(
    "geometry",
    [
        ((3, 7, 12, 3), (3, 5, 3, 16), (1, 1), ((0, 2), (3, 1))),  # 4 columns at once, of images and of gradients
        ((3, 7, 10, 16), (3, 3, 16, 9), (1, 1), ((1, 1), (1, 1))),  # 2
        ((3, 9, 9, 2), (3, 3, 2, 5), (2, 2), ((1, 1), (1, 1))),  # an odd number of columns, and places of a stride
        ((3, 9, 8, 2), (2, 5, 2, 5), (3, 2), ((1, 2), (3, 5))),
        ((3, 4, 6, 2), (1, 1, 2, 5), (2, 3), ((0, 3), (2, 0))),  # rows and columns of padding alone
        ((3, 9, 8, 17), (3, 3, 17, 5), (2, 1), ((1, 1), (1, 1))),  # many channels
        ((3, 9, 8, 6), (3, 5, 1, 6), (1, 1), ((1, 1), (2, 2)), 6),  # depthwise
        ((3, 9, 8, 6), (5, 3, 1, 12), (2, 3), ((2, 2), (0, 1)), 6),  # with strides, and two results a channel
        ((3, 9, 8, 6), (3, 3, 1, 6), (2, 1), ((3, 2), (0, 3)), 6, (2, 2)),
        ((3, 9, 8, 6), (3, 3, 3, 8), (1, 1), ((1, 1), (1, 1)), 2),  # groups
        ((3, 9, 8, 6), (3, 2, 3, 8), (2, 2), ((0, 1), (4, 1)), 2, (1, 3)),
        ((3, 9, 8, 6), (3, 3, 6, 8), (1, 1), ((2, 2), (2, 2)), 1, (2, 2)),  # dilation
    ],
)
def test_forms(geometry, form):
    images, kernel, *options = geometry
    check_forms((images, kernel, dict(zip(("strides", "pads", "groups", "dilation"), options))), form)


def check_forms(geometry, form):
    images, kernel, options = geometry
    sizes = engine.Geometry(images[1:3], kernel[:2], **options)
    x, w = draw(images, kernel)
    plain = functools.partial(by_lax, **options)
    (dy,) = draw(jax.eval_shape(plain, x, w).shape, seed=1)
    assert sizes.out == dy.shape[1:3]

    @jax.jit
    def both(x, w, dy):
        y, back = jax.vjp(plain, x, w)
        operands = {FORWARD: (x, w), INPUT_GRADIENT: (dy, w), WEIGHT_GRADIENT: (x, dy)}
        return [form[kind](*operands[kind], geometry=sizes) for kind in operands], [y, *back(dy)]

    assert_close(*both(x, w, dy))


def test_definition(path):
    """Against sums written in NumPy."""
    x, w = draw(*SHAPES)
    padded = np.pad(x, ((0, 0), *PADS, (0, 0)))
    y = np.stack(
        [[np.einsum("nabc,abco->no", padded[:, 2 * i : 2 * i + 3, j : j + 3], w) for j in range(7)] for i in range(5)]
    ).transpose(2, 0, 1, 3)
    np.testing.assert_allclose(ours(x, w), y, rtol=1e-4, atol=1e-4)


def together(functions):
    """One program of all functions."""
    return jax.jit(lambda *args: [f(*args) for f in functions])


@SLOW
def test_derivatives_by_differences(path):
    x, w = draw((2, 5, 4, 2), (3, 3, 2, 3))
    check_grads(ours, (x, w), 2, ["fwd", "rev"], atol=2e-2, rtol=2e-2)


LENGTHS = {
    "second": lambda f, of: jax.grad(lambda *a: (jax.grad(f, of)(*a) ** 2).sum(), (0, 1)),
    "third": lambda f, of: jax.grad(
        lambda *a: (jax.grad(lambda *a: (jax.grad(f, of)(*a) ** 2).sum(), of)(*a) ** 2).sum(), of
    ),
    "along": lambda f, of: jax.grad(lambda *a: jax.jvp(jax.grad(f, of), a, a)[1].sum(), (0, 1)),
    "hessian": lambda f, of: jax.hessian(f, of),
    "rows": lambda f, of: jax.jacrev(jax.grad(f, of), of),
}


@pytest.mark.parametrize(
    "kinds", [("third",), pytest.param([kind for kind in LENGTHS if kind != "third"], marks=SLOW)], ids=["third", "all"]
)
def test_derivatives_of_any_order(path, kinds):
    """Of the third order, which hold those of the second; all kinds of them are slow."""
    x, w = draw((2, 5, 4, 2), (3, 3, 2, 3))
    f, g = ((lambda x, w, h=h: jnp.tanh(h(x, w)).sum()) for h in (ours, by_lax))
    got, expected = (together([LENGTHS[kind](h, of) for kind in kinds for of in (0, 1)])(x, w) for h in (f, g))
    assert_close(got, expected, 2e-5)


@pytest.mark.parametrize("groups", [1, pytest.param(2, marks=SLOW), 4])
def test_vmap(path, groups):
    """Over images, kernels or both, at any axis, of the result and of its gradients; and gradients of each example."""
    x, w = draw((3, 2, 6, 5, 4), (3, 3, 4 // groups, 8, 3))

    def cases(f):
        f = functools.partial(f, groups=groups)
        gradients = lambda x, w: jax.vjp(f, x, w)[1](jnp.sin(f(x, w)))
        for h in (f, gradients):
            yield lambda x, w, h=h: jax.vmap(h, (0, None))(x, w[..., 0])
            yield lambda x, w, h=h: jax.vmap(h, (None, 4))(x[0], w)
            yield lambda x, w, h=h: jax.vmap(h, (0, 4))(x, w)
            yield lambda x, w, h=h: jax.vmap(h, (3, 2))(jnp.moveaxis(x, 0, 3), jnp.moveaxis(w, 4, 2))
        each = lambda x, w: jax.grad(lambda w: (f(x[None], w) ** 2).sum())(w)
        yield lambda x, w: jax.vmap(each, (0, None))(x[0], w[..., 0])

    assert_close(together(list(cases(ours)))(x, w), together(list(cases(by_lax)))(x, w))


@pytest.mark.parametrize("groups", [1, 3])
def test_control_flow(path, groups):
    """scan and its gradient, cond, while, fori_loop, remat, and a gradient in a loop."""
    x, w = draw((2, 6, 6, 3), (3, 3, 3 // groups, 3))
    same = dict(strides=(1, 1), pads=((1, 1), (1, 1)), groups=groups)

    def cases(f):
        f = functools.partial(f, **same)
        step = lambda x, _: (jnp.tanh(f(x, w)), x.sum())
        yield lambda x, w: lax.scan(step, x, None, length=3)
        yield jax.grad(lambda x, w: lax.scan(step, x, None, length=3)[0].sum())
        yield lambda x, w: lax.cond(x.sum() > 0, lambda: f(x, w), lambda: f(-x, w))
        yield lambda x, w: lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.tanh(f(s[1], w))), (0, x))
        yield jax.grad(lambda x, w: jax.checkpoint(lambda x: jnp.tanh(f(jnp.tanh(f(x, w)), w)).sum())(x))
        move = lambda _, x: x + 0.1 * jnp.sign(jax.grad(lambda x: jnp.tanh(f(x, w)).sum())(x))
        yield lambda x, w: lax.fori_loop(0, 3, move, x)
        yield lambda x, w: jax.linear_transpose(lambda x: f(x, w), x)(x)

    assert_close(together(list(cases(ours)))(x, w), together(list(cases(by_lax)))(x, w))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("devices", "groups"), [(8, 1), (8, 4), *(pytest.param(*pair, marks=SLOW) for pair in ((1, 1), (2, 1), (8, 2)))]
)
def test_sharded_batch(path, devices, groups, axis_type):
    """jit with a batch split over devices: the numbers of one device, no image moved, weight gradients summed once."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(axis_type,))
    x, w = draw((8, 9, 7, 4), (3, 3, 4 // groups, 4))

    def loss(f, x, w):
        return (jnp.tanh(f(x, w, groups=groups)) ** 2).sum()

    def both(f):
        gradients = jax.grad(functools.partial(loss, f), (0, 1))
        return lambda x, w: (gradients(x, w), jax.grad(lambda x, w: (gradients(x, w)[0] ** 2).sum(), (0, 1))(x, w))

    expected = jax.jit(both(by_lax))(x, w)
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        whole = jax.device_put(w, NamedSharding(mesh, PartitionSpec()))
        compiled = jax.jit(both(ours)).lower(split, whole).compile()
        got = compiled(split, whole)
    assert_close(jax.device_get(got), jax.device_get(expected))
    text = compiled.as_text()
    assert "all-gather" not in text and (path == "xla" or onednn.TARGET in text)


def test_a_batch_that_does_not_divide(path):
    """Three rows of four on two devices: what pads the second part is in no weight gradient."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
    x, w = draw((4, 5, 5, 3), (3, 3, 3, 4))
    loss = lambda f: lambda x, w: jnp.tanh(f(x[:3], w)).sum()
    expected = jax.jit(jax.grad(loss(by_lax), (0, 1)))(x, w)
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    assert_close(jax.device_get(jax.jit(jax.grad(loss(ours), (0, 1)))(split, w)), jax.device_get(expected))


def test_what_is_not_finite_stays_so(path):
    """NaN and infinity among images, gradients and weights are in every result that lax has them in, fused or not."""
    (x, w, bias), geometry = (
        draw((2, 6, 8, 3), (3, 3, 3, 3), (3,)),
        engine.Geometry((6, 8), (3, 3), (1, 1), ((1, 1), (1, 1))),
    )
    same = dict(strides=(1, 1), pads=geometry.pads)
    mask = x.reshape(2, -1) > 0

    def plain(x, w, dy):
        y, back = jax.vjp(functools.partial(by_lax, **same), x, w)
        dx, dw = back(dy)
        return y, dx, dw, jax.nn.relu(y + bias), jax.nn.relu(y + bias + x), jnp.where(mask.reshape(x.shape), dx + x, 0)

    def engines(x, w, dy):
        y, back = jax.vjp(functools.partial(ours, **same), x, w)
        fuse = functools.partial(engine.fused_convolution, geometry=geometry)
        return (
            y,
            *back(dy),
            fuse(FORWARD, x, w, (bias,), fused=engine.Fused(bias=True, relu=True)),
            fuse(FORWARD, x, w, (bias, x), fused=engine.Fused(bias=True, residual=True, relu=True)),
            fuse(INPUT_GRADIENT, dy, w, (x, mask), fused=engine.Fused(residual=True, mask=True)),
        )

    f, g = jax.jit(engines), jax.jit(plain)
    assert_close(f(x, w, x), g(x, w, x))
    spoilt = lambda a, value: a.at[0, 1, 2, 1].set(value)
    for value in (jnp.nan, jnp.inf):
        for images, kernel in ((spoilt(x, value), w), (x, spoilt(w, value))):
            results = list(zip(f(images, kernel, images), g(images, kernel, images)))
            assert sum(bool(jnp.isfinite(expected).all()) for _, expected in results) <= 1  # dw, of a bad kernel
            for got, expected in results:
                if kernel is not w:  # where it meets the padding lax makes NaN of the zeros, oneDNN does not look there
                    got, expected = (np.asarray(a)[:, 1:-1, 1:-1] for a in (got, expected))
                assert not (np.isfinite(got) & ~np.isfinite(expected)).any()
                assert np.isnan(got)[np.isnan(expected)].all()


def test_bad_operands():
    x, w = draw(*SHAPES)
    none = (x[..., :0], w[:, :, :0])
    for bad in ((x, w[:, :, :2]), (x, w.astype(bool)), (x.astype(jnp.bfloat16), w), (x[0], w), none, (x, w[..., :0])):
        with pytest.raises(UserError, match=r"convolution: give images \(n, h, w, c\) and a kernel .*, got "):
            convolution(*bad, STRIDES, PADS)
    with pytest.raises(UserError, match=r"got float32 .* in 2 groups"):
        convolution(x, w, STRIDES, PADS, groups=2)
    with pytest.raises(UserError, match="a result of"):
        convolution(x[:, :1], w, (1, 1), ((0, 0), (0, 0)))
    for bad in (((1, 1), ((-1, 0), (0, 0))), ((0, 1), PADS), (STRIDES, PADS, (0, 1))):
        with pytest.raises(
            UserError, match="convolution: give strides and dilation of at least 1 and no negative pads"
        ):
            ours(x, w, *bad[:2], **dict(zip(("dilation",), bad[2:])))


def test_types_of_results(path):
    """No weak type, and none of an empty `vmap` but an empty array."""
    w = draw(SHAPES[1])[0]
    assert not jax.eval_shape(ours, jnp.full(SHAPES[0], 0.5), w).weak_type
    empty = jax.jit(jax.vmap(ours, (0, None)))(jnp.ones((0, *SHAPES[0])), w)
    assert empty.shape == (0, 8, 5, 7, 4)
    no_images = jax.vmap(ours, (None, 0))(jnp.ones((0, *SHAPES[0][1:])), jnp.stack([w, w]))
    assert no_images.shape == (2, 0, 5, 7, 4)


@pytest.mark.parametrize("groups", [1, 4])
def test_per_device_programs(path, groups):
    """pmap, and shard_map with and without its check of what varies."""
    x, w = draw((8, 9, 7, 4), (3, 3, 4 // groups, 4))
    expected = jax.jit(jax.grad(lambda x, w: jnp.tanh(by_lax(x, w, groups=groups)).sum(), (0, 1)))(x, w)
    gradients = jax.grad(lambda x, w: jnp.tanh(ours(x, w, groups=groups)).sum(), (0, 1))
    dx, dw = jax.pmap(lambda x, w: gradients(x[None], w), in_axes=(0, None))(x, w)
    assert_close((dx[:, 0], dw.sum(0)), expected)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data"), PartitionSpec()
    summed = jax.shard_map(gradients, mesh=mesh, in_specs=spec, out_specs=spec)
    assert_close(jax.jit(summed)(x, w), expected)
    each = lambda x, w: (gradients(x, w)[0], lax.psum(gradients(x, w)[1], "data"))
    unchecked = jax.shard_map(each, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    assert_close(jax.jit(unchecked)(x, w), expected)


def test_other_types(path):
    """bfloat16 and float64 take XLA's form, with the type's own numbers."""
    x, w = (a.astype(jnp.bfloat16) for a in draw(*SHAPES))
    gradients = lambda f: jax.jit(lambda x, w: jax.vjp(f, x, w)[1](f(x, w)))(x, w)
    assert_close(*(jax.tree.map(jnp.float32, gradients(f)) for f in (ours, by_lax)), 2e-2)


def test_the_three_are_each_others_transposes():
    """Whatever is differentiated, how often, only the three remain: no convolution of lax."""
    x, w = draw(*SHAPES)
    third = jax.grad(
        lambda x: (jax.grad(lambda x: (jax.grad(lambda x: jnp.tanh(ours(x, w)).sum())(x) ** 2).sum())(x) ** 2).sum()
    )
    names = {eqn.primitive for eqn in jax.make_jaxpr(jax.grad(lambda w: third(x).sum() + ours(x, w).sum()))(w).eqns}
    assert names & set(KINDS) and "conv_general_dilated" not in {p.name for p in names}
    assert set(KINDS) == {forward_p, input_gradient_p, weight_gradient_p}
