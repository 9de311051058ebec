"""Rules for ReLU and max pooling in networks nobody edited, against the worked cases of `papers/guided_nonlinearity.md`
11."""

import collections
import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from topgap_jax import explain, models, pool
from topgap_jax.build import build
from topgap_jax.errors import UserError
from topgap_jax.mesh import data_mesh
from topgap_jax.rewrite import fast_convs, name, read, tap, with_rules
from topgap_jax.rewrite.operations import OPERATIONS, operations
from topgap_jax.rules import VALUES, guided, guided_backprop, guided_upsampled, softplus
from topgap_jax.types import Rule

SLOW = pytest.mark.slow
MESH, SPEC = data_mesh(), PartitionSpec("data")
relu = jax.nn.relu
random = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
IMAGES = jnp.asarray(random.uniform(size=(2, 8, 8, 3)), jnp.float32)
LABELS = jnp.array([1, 2])
Z, G = jnp.array([1.0, -2, 3, 0, 2]), jnp.array([2.0, 1, -1, 4, 0])


def back(f, z, g, **rules):
    """The gradient that arrives at z."""
    return jax.vjp(with_rules(f, **rules) if rules else f, z)[1](g)[0]


def message(f, *args, **kwargs):
    with pytest.raises(UserError) as raised:
        f(*args, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def my_jvp(body):
    """A function with a derivative of its own, ten times too large."""
    f = jax.custom_jvp(body)
    f.defjvp(lambda primals, tangents: (body(*primals), 10 * tangents[0]))
    return f


def my_vjp(body):
    f = jax.custom_vjp(body)
    f.defvjp(lambda z: (body(z), None), lambda _, g: (10 * g,))
    return f


def scanned(z):
    return lax.scan(lambda total, row: (total + 1, relu(row) * (total - 4)), 5.0, z, reverse=True)[1]


def looped(z):
    return lax.while_loop(lambda state: state[0] < 3, lambda state: (state[0] + 1, relu(state[1])), (0, z))[1]


# Ways in which a network may hold a ReLU; `scanned` multiplies by 5, 4, 3, 2, 1 from the end.
RELUS = {
    "relu": relu,
    "nnx": nnx.relu,
    "maximum": lambda z: jnp.maximum(z, 0),
    "maximum of zeros": lambda z: jnp.maximum(z, jnp.zeros_like(z)),
    "jit": jax.jit(relu),
    "jit in jit": jax.jit(lambda z: jax.jit(lambda z: jnp.maximum(z, 0.0))(z)),
    "remat": jax.checkpoint(relu),
    "cond": lambda z: lax.cond(jnp.abs(z).sum() > 0, relu, lambda z: -z, z),
    "custom_jvp": my_jvp(lambda z: relu(z)),
    "custom_vjp": my_vjp(lambda z: jnp.maximum(z, 0)),
    "bf16": lambda z: relu(z.astype(jnp.bfloat16)).astype(jnp.float32),
}


@pytest.mark.parametrize("kind", RELUS)
def test_relu_rules(kind):
    """T1; deconvnet is a rule of two words."""
    f = RELUS[kind]

    @jax.jit
    def found(z, g):
        guide, two = with_rules(f, **guided_backprop), (jnp.stack([z, -z]), jnp.stack([g, -g]))
        deconvnet = with_rules(f, relu=Rule(backward=lambda operation, g, z: relu(g)))
        each = back(jax.vmap(lambda z: with_rules(f, **guided)(z)), *two)
        same = back(with_rules(f, relu=Rule()), z, g)[:3]
        return guide(z), back(guide, z, g), back(deconvnet, z, g), same, each, back(jax.checkpoint(guide), z, g)

    due = [1, 0, 3, 0, 2], [2, 0, 0, 0, 0], [2, 1, 0, 4, 0], [2, 0, -1], [[2, 0, 0, 0, 0], [0] * 5], [2, 0, 0, 0, 0]
    assert tuple(value.tolist() for value in found(Z, G)) == due


@pytest.mark.parametrize("kind", ["relu", *(pytest.param(kind, marks=SLOW) for kind in RELUS if kind != "relu")])
def test_relu_rules_eagerly_and_around_jit(kind):
    for jitted in (lambda h: h, jax.jit):
        guide = jitted(with_rules(RELUS[kind], **guided_backprop))
        assert guide(Z).tolist() == [1, 0, 3, 0, 2]
        assert back(guide, Z, G).tolist() == [2, 0, 0, 0, 0]


def test_relu_in_loops():
    assert with_rules(scanned, **guided)(Z).tolist() == scanned(Z).tolist() == [5, 0, 9, 0, 2]
    for jitted in (lambda f: f, jax.jit):
        assert back(jitted(with_rules(scanned, **guided)), Z, G).tolist() == [10, 0, 0, 0, 0]
    doubled = {"relu": Rule(forward=lambda relu, z: 2 * relu(z))}
    assert with_rules(looped, **doubled)(Z).tolist() == [8, 0, 24, 0, 16]
    assert with_rules(looped, **guided)(Z).tolist() == looped(Z).tolist()


def test_relu6():
    z, g = jnp.array([-1.0, 3, 7, 3]), jnp.array([2.0, 2, 2, -2])
    assert back(jax.nn.relu6, z, g, **guided).tolist() == [0, 2, 0, 0]
    # A softplus twin of relu6 is smooth at 6, too, and keeps its bound.
    twin = with_rules(jax.nn.relu6, **softplus(20))
    np.testing.assert_allclose(
        twin(jnp.array([-1.0, 0, 3, 6, 9])), [0, np.log(2) / 20, 3, 6 - np.log(2) / 20, 6], atol=1e-6
    )


@pytest.mark.parametrize(
    "f",
    [
        jax.nn.softplus,
        lambda z: jnp.clip(z, 0, 1),
        lambda z: jnp.clip(z, min=0),
        jax.nn.celu,
        jax.nn.hard_sigmoid,
        jax.nn.hard_swish,
        lambda z: jnp.logaddexp(z, 0),
        my_jvp(lambda z: jnp.maximum(z, 0)),
        lambda z: jnp.maximum(z.astype(int), 0).astype(float),
        lambda z: jnp.maximum(0.0, z),
        lambda z: lax.max(z, -z),
        lambda z: nn.LayerNorm(use_scale=False, use_bias=False).apply({}, z),
    ],
    ids=[
        "softplus",
        "clip",
        "clip min",
        "celu",
        "hard sigmoid",
        "hard swish",
        "logaddexp",
        "custom_jvp",
        "whole",
        "variance",
        "abs",
        "layer norm",
    ],
)
def test_what_is_no_relu_stays(f):
    assert (
        message(with_rules(f, **guided_backprop), Z)
        == "with_rules: the function has no functions named relu or relu6 and maximum(x, 0)"
    )
    both = lambda z: (f(z), relu(z))
    seven = with_rules(both, relu=Rule(forward=lambda relu, z: 7 * z))
    np.testing.assert_array_equal(*compiled(lambda z: (seven(z)[0], f(z)), Z))


def pooled(window, stride, padding="VALID"):
    """Max pooling of a vector."""
    return lambda z: nn.max_pool(z[None, :, None], (window,), (stride,), padding)[0, :, 0]


@pytest.mark.parametrize(
    ("f", "z", "g", "plain", "route", "upsampled"),
    [
        (pooled(3, 2), (1, 2, 5, 0, 3), (2, -1), (0, 0, 1, 0, 0), (0, 0, 2, 0, 0), (0, 0, 1, 0, 0)),
        (pooled(3, 2), (1, 2, 5, 0, 3), (-1, 2), (0, 0, 1, 0, 0), (0, 0, 2, 0, 0), (0, 0, 0, 0, 0)),
        (pooled(3, 2), (1, 2, 5, 0, 3), (2, 1), (0, 0, 3, 0, 0), (0, 0, 3, 0, 0), (0, 0, 3, 0, 0)),
        (pooled(3, 2, ((1, 1),)), (1, 5, 2, 4), (1, -2), (0, -1, 0, 0), (0, 1, 0, 0), (0, -1, 0, 0)),
        (pooled(3, 2, ((1, 1),)), (1, 5, 2, 4), (-1, 2), (0, 1, 0, 0), (0, 2, 0, 0), (0, 0, 0, 0)),
        (pooled(2, 2), (3, 3, 0, 0), (1, 2), (1, 0, 2, 0), (1, 0, 2, 0), (1, 0, 2, 0)),  # of equals the first
    ],
)
def test_max_pool_rules(f, z, g, plain, route, upsampled):
    """T3 and T3c."""
    z, g = jnp.array(z, jnp.float32), jnp.array(g, jnp.float32)
    rules = [None, guided["max_pool"], guided_upsampled["max_pool"]]
    ruled = [with_rules(f, max_pool=rule) if rule else f for rule in rules]
    values, gradients = compiled(lambda z, g: ([f(z) for f in ruled], [back(f, z, g) for f in ruled]), z, g)
    for value, gradient, due in zip(values, gradients, (plain, route, upsampled)):
        assert value.tolist() == values[0].tolist() and gradient.tolist() == list(due)


def test_max_pool_without_overlap():
    """T3b: the two rules agree, and each is a clip after routing."""
    z = jnp.array([[1.0, 3, 2, 0], [0, 2, 4, 1], [5, 1, 0, 2], [2, 0, 1, 7]])[None, :, :, None]
    g = jnp.array([[1.0, -2], [-3, 4]])[None, :, :, None]
    f = lambda z: nn.max_pool(z, (2, 2), (2, 2))
    assert f(z)[0, :, :, 0].tolist() == [[3, 4], [5, 7]]
    plain, *ruled = (back(f, z, g, **rules)[0, :, :, 0] for rules in ({}, guided, guided_upsampled))
    due = np.zeros((4, 4))
    due[0, 1], due[1, 2], due[2, 0], due[3, 3] = 1, -2, -3, 4
    np.testing.assert_array_equal(plain, due)
    for found in ruled:
        np.testing.assert_array_equal(found, np.maximum(due, 0))


def ig(f, x, steps=50, rule="gausslegendre", method=explain.integrated, **options):
    """Signed integrated gradients of the scalar f at the vector x, from 0."""
    predict = lambda images, keys=None: jax.vmap(lambda image: f(image.ravel()))(images)[:, None]
    images = jnp.asarray(x, jnp.float32).reshape(1, 1, -1, 1)
    chosen = method(steps=steps, rule=rule, reduce="sum", baseline=0, **options)
    return compiled(lambda images: chosen(None, predict, images, jnp.array([0])), images).ravel()


close = lambda found, due: np.testing.assert_allclose(found, due, atol=1e-5)


def test_one_hidden_layer():
    """T4: the clip acts on the output weights alone, so that guided maps are those of f+ = [w]+ relu(Wx + b)."""
    f = lambda x: jnp.array([2.0, -3]) @ relu(jnp.array([[1.0, -1], [1, 2]]) @ x + jnp.array([-0.5, 0]))
    x = jnp.array([2.0, 1])
    assert f(x) == -11
    close(jax.grad(f)(x), (-1, -8))
    close(jax.grad(with_rules(f, **guided))(x), (2, -2))
    for steps, rule in ((4, "gausslegendre"), (4, "riemann_right"), (4, "riemann_middle")):
        close(ig(f, x, steps, rule), (-4, -7))
        close(ig(f, x, steps, rule, rules=guided), (2, -1))
    close(ig(f, x, 5, "riemann_trapezoid"), (-3.75, -6))
    close(ig(f, x, 5, "riemann_trapezoid", rules=guided), (1.5, -0.75))
    close(ig(f, x, 1, "riemann_right"), (-2, -8))
    close(ig(f, x, 1, "riemann_right", rules=guided), (4, -2))
    close(ig(f, x, multiply_by_inputs=False, rules=guided), (1, -1))


def test_two_hidden_layers():
    """T5 and T6: completeness fails, up to an all-zero map of a network that is not zero."""
    first, second = jnp.array([[1.0, -1], [-1, 1], [1, 1]]), jnp.array([[1.0, -1, 0], [-1, 0, 1]])
    f = lambda x: jnp.array([1.0, -1]) @ relu(second @ relu(first @ x))
    deconvnet = Rule(backward=lambda operation, g, z: relu(g))
    for x, value, plain, clipped, deconv, maps in [
        ((2.0, 1), -1, (1, -3), (1, -1), (1, -1), ((2, -3), (2, -1))),
        ((1.0, 2), -3, (-1, -1), (0, 0), (1, -1), ((-1, -2), (0, 0))),
    ]:
        x = jnp.array(x)
        assert f(x) == value
        close(jax.grad(f)(x), plain)
        close(jax.grad(with_rules(f, **guided))(x), clipped)
        close(jax.grad(with_rules(f, relu=deconvnet))(x), deconv)
        close(ig(f, x), maps[0])
        close(ig(f, x, rules=guided), maps[1])
    f = lambda x: relu(relu(x[0]) - relu(x[1]))
    close(ig(f, (3, 1)), (3, -1))
    close(ig(f, (3, 1), rules=guided), (3, 0))


def test_two_ways_to_write_a_maximum():
    """T7: rules see how a function is written."""
    x = jnp.array([3.0, 1])
    by_pool = lambda x: -nn.max_pool(x[None, :, None], (2,), (2,))[0, 0, 0]
    by_relu = lambda x: -(x[1] + relu(x[0] - x[1]))
    for f, due in ((by_pool, (0, 0)), (by_relu, (0, -1))):
        close(jax.grad(f)(x), (-1, 0))
        close(jax.grad(with_rules(f, **guided))(x), due)


def vgg(params, activation=relu):
    """Convolution, ReLU, pooling without overlap, twice; two dense layers."""

    def predict(images, keys=None):
        x = images
        for kernel in params["kernels"]:
            x = activation(
                lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            )
            x = name(nn.max_pool(x, (2, 2), (2, 2)), f"stage{kernel.shape[-1]}")
        return activation(x.reshape(len(x), -1) @ params["hidden"]) @ params["last"]

    return predict


PARAMS = {"kernels": [draw(3, 3, 3, 6) / 3, draw(3, 3, 6, 8) / 5], "hidden": draw(32, 16) / 4, "last": draw(16, 3)}
loss = lambda f: lambda images: jnp.take_along_axis(f(images), LABELS[:, None], 1).sum()
compiled = lambda f, *args: jax.jit(f)(*args)  # eager calls would compile each of many small steps


def test_properties_on_a_vgg():
    """(i), (ii), (iii), (v) and (vi) of the specification."""
    predict = vgg(PARAMS)
    plain = compiled(jax.grad(loss(predict)), IMAGES)
    only_relu = compiled(jax.grad(loss(with_rules(predict, **guided_backprop))), IMAGES)
    assert np.abs(only_relu - plain).max() > 0.1 and np.abs(only_relu).max() > 0.1
    standard = with_rules(predict, relu=Rule(), max_pool=Rule())
    np.testing.assert_allclose(compiled(jax.grad(loss(standard)), IMAGES), plain, atol=1e-6)
    logits = compiled(predict, IMAGES)
    for rules in (guided_backprop, guided, guided_upsampled):

        def summed(images, rules=rules):
            values = with_rules(predict, **rules)(images)
            return loss(lambda _: values)(images), values

        gradient, values = compiled(jax.grad(summed, has_aux=True), IMAGES)
        np.testing.assert_allclose(values, logits, rtol=1e-6, atol=1e-6)
        # Under every pool lies a ReLU, so that the rule of the pool has nothing to clip.
        np.testing.assert_allclose(gradient, only_relu, atol=1e-5)
    upper = {key: jax.tree.map(jnp.abs, PARAMS[key]) for key in ("hidden", "last")}
    upper["kernels"] = [PARAMS["kernels"][0], jnp.abs(PARAMS["kernels"][1])]
    method = lambda rules: explain.integrated(rules=rules, reduce="sum", steps=4)
    signed, guided_maps = (
        compiled(lambda images: method(rules)(None, vgg(upper), images, LABELS), IMAGES) for rules in (None, guided)
    )
    np.testing.assert_allclose(guided_maps, signed, rtol=1e-4, atol=1e-4)


def test_overlapping_pools_differ():
    weights = draw(48, 3)
    f = lambda images: nn.max_pool(images, (3, 3), (2, 2), "SAME").reshape(2, -1) @ weights
    route, upsampled, plain = (
        compiled(jax.grad(loss(with_rules(f, max_pool=rule))), IMAGES)
        for rule in (guided["max_pool"], guided_upsampled["max_pool"], Rule())
    )
    assert np.abs(route - upsampled).max() > 0.1 and np.abs(route - plain).max() > 0.1 and (route >= 0).all()


def test_a_dummy_input_gets_nothing():
    """(vii)"""
    f = lambda images: vgg(PARAMS)(images * jnp.array([1.0, 0, 1]))
    maps = compiled(jax.grad(loss(with_rules(f, **guided))), IMAGES)
    assert (maps[..., 1] == 0).all() and (maps[..., 0] != 0).any()


@jax.custom_vjp
def guided_relu(z):
    return jnp.where(z > 0, z, 0)


guided_relu.defvjp(lambda z: (guided_relu(z), z > 0), lambda positive, g: (jnp.where(positive & (g > 0), g, 0),))


def handwritten(model, variables, activation):
    """The same Linen network, traced with another function in the place of `nn.relu`."""

    def predict(images, keys=None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn, "relu", activation)
            return model.apply(variables, images).logits

    return predict


@pytest.mark.parametrize("jitted", [True, pytest.param(False, marks=SLOW)], ids=["jit", "eager"])
def test_guided_backprop_is_the_handwritten_twin_of_resnet20(jitted):
    head = models.map_head(pool.gap())
    model = models.classifier(models.resnet20(), head, classes=10, mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.1))
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    # Kernels, biases, means, and the positive ones: scales and variances.
    positive = lambda path: any(word in jax.tree_util.keystr(path) for word in ("scale", "var"))
    values = lambda s: draw(*s.shape) / max(np.prod(s.shape[:-1]), 9) ** 0.5
    fill = lambda path, s: jnp.abs(1 + values(s)) if positive(path) else values(s)
    variables = jax.tree_util.tree_map_with_path(fill, shapes)
    predict, twin = models.bind(model, variables), handwritten(model, variables, guided_relu)
    expected = compiled(jax.grad(loss(twin)), IMAGES)
    scale = float(np.abs(expected).max())
    assert not jitted or np.abs(compiled(jax.grad(loss(predict)), IMAGES) - expected).max() > 0.1 * scale
    ruled = jax.grad(loss(with_rules(predict, **guided_backprop)))
    maps = compiled(ruled, IMAGES) if jitted else ruled(IMAGES)
    np.testing.assert_allclose(maps / scale, expected / scale, atol=1e-6)


def test_softplus_is_the_handwritten_twin():
    """To second order: the gradient of the squared input gradient."""
    twin, ruled = (
        vgg(PARAMS, lambda z: jnp.log1p(jnp.exp(-5 * jnp.abs(z))) / 5 + jnp.maximum(z, 0)),
        with_rules(vgg(PARAMS), **softplus(5)),
    )
    smooth = vgg(PARAMS, lambda z: jnp.logaddexp(5.0 * z, 0.0) / 5.0)
    np.testing.assert_allclose(compiled(ruled, IMAGES), compiled(twin, IMAGES), atol=1e-5)
    size = lambda f: lambda images: (jax.grad(loss(f))(images) ** 2).sum()
    for outer in (loss, size):
        expected = compiled(jax.grad(outer(smooth)), IMAGES)
        scale = np.abs(expected).max()
        assert scale > 0.1
        np.testing.assert_allclose(compiled(jax.grad(outer(ruled)), IMAGES) / scale, expected / scale, atol=1e-5)


def test_softplus():
    """Values and derivatives to third order: T1 of `papers/art.md`."""
    for beta, z, *due in [
        (
            50,
            (0.0, 0.02, -0.1),
            (0.01386294, 0.02626523, 1.34307e-4),
            (0.5, 0.73105858, 0.00669285),
            (12.5, 9.83059666, 0.33240283),
        ),
        (1, (0.1,), (0.74439666,), (0.52497919,), (0.24937604,)),
    ]:
        f, z = with_rules(relu, **softplus(beta)), jnp.array(z)
        slope = lambda f: lambda z: jax.grad(lambda z: f(z).sum())(z)
        found = compiled(lambda z: (f(z), slope(f)(z), slope(slope(f))(z), slope(slope(slope(f)))(z)), z)
        np.testing.assert_allclose(found[:3], due, rtol=2e-5)
        s = np.array(due[1])
        np.testing.assert_allclose(found[3], beta**2 * s * (1 - s) * (1 - 2 * s), atol=1e-2)


def test_a_softplus_network_differentiated_twice():
    """T6 of `papers/art.md`: the loss of its input gradients, with derivatives by weights and input."""
    x = jnp.array([0.6, 0.2])
    weights = {"W": jnp.array([[1.0, -1], [0.5, 1]]), "V": jnp.array([[1.0, -0.5], [-1, 1]])}
    network = lambda w, x: w["V"] @ relu(w["W"] @ x)

    def loss(w, x, anchor, beta=2.0):
        f = with_rules(network, **softplus(beta)) if beta else network
        p, n = (jax.grad(lambda x: f(w, x)[k])(x) for k in (0, 1))
        distance = lambda a, b: 1 - a @ b / jnp.sqrt((a @ a) * (b @ b))
        return jax.nn.softplus(distance(anchor, p) - distance(anchor, n)), (p, n)

    (value, (p, n)), by_weights = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights, x, x)
    close(with_rules(network, **softplus(2))(weights, x), (0.25723491, 0.07108051))
    close(p, (0.50720984, -1.05550377))
    close(n, (-0.32444519, 1.42103306))
    close(value, 0.67887867)
    close(by_weights["V"], [[-0.1348695, -0.269739], [0.17467255, 0.17467255]])
    close(by_weights["W"], [[-0.6011448, -0.21483], [0.4772754, 0.15415303]])
    close(jax.grad(lambda x: loss(weights, x, x)[0])(x), (-0.59837294, 1.82749849))
    close(jax.grad(lambda x: loss(weights, x, jnp.array([0.6, 0.2]))[0])(x), (-0.10868319, 0.35842922))
    close(jax.grad(lambda x: loss(weights, x, jnp.array([0.6, 0.2]), beta=None)[0])(x), (0, 0))


def test_no_second_derivative_through_a_backward_rule():
    f = with_rules(lambda z: (relu(z) ** 2).sum(), **guided)
    text = (
        "with_rules: no second derivative through a backward rule, whose result is the gradient of no function; "
        "a forward rule such as softplus(50) has derivatives of any order"
    )
    for twice in (lambda z: jax.grad(lambda z: jax.grad(f)(z).sum())(z), jax.hessian(f), jax.jit(jax.hessian(f))):
        assert message(twice, Z) == text
    maps = lambda images: explain.integrated(rules=guided, steps=2)(None, vgg(PARAMS), images, LABELS).sum()
    assert message(jax.grad(maps), IMAGES) == text


def test_an_nnx_model():
    class Net(nnx.Module):
        def __init__(self, activation):
            rngs = nnx.Rngs(0)
            self.first, self.norm = nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
            self.last, self.activation = nnx.Linear(4, 3, rngs=rngs), activation

        def __call__(self, x):
            x = nnx.max_pool(self.activation(self.norm(self.first(x))), (3, 3), (2, 2), "SAME")
            return self.last(self.activation(x - 0.3).mean((1, 2)))

    predict, twin = (
        models.bind(model, model.init(None, IMAGES))
        for model in (models.nnx(Net(nnx.relu)), models.nnx(Net(guided_relu)))
    )

    def maps(f):
        cam = explain.grad_cam("first")
        return jax.jit(lambda images: (jax.grad(loss(f))(images), cam(None, f, images, LABELS)))(IMAGES)

    expected = maps(twin)
    for f in (predict, jax.jit(predict)):
        for found, due in zip(maps(with_rules(f, **guided_backprop)), expected):
            np.testing.assert_allclose(found, due, atol=1e-6)


def test_an_equinox_model():
    class Net(eqx.Module):
        first: eqx.nn.Conv2d
        pool: eqx.nn.MaxPool2d
        last: eqx.nn.Linear

        def __init__(self, key):
            a, b = jax.random.split(key)
            self.first, self.pool = eqx.nn.Conv2d(3, 4, 3, key=a), eqx.nn.MaxPool2d(2, 2)
            self.last = eqx.nn.Linear(36, 3, key=b)

        def __call__(self, image, activation):
            x = activation(self.pool(activation(self.first(image.transpose(2, 0, 1)))))
            return self.last(x.ravel())

    net = Net(jax.random.key(0))
    predict = lambda activation: lambda images: jax.vmap(lambda image: net(image, activation))(images)
    due, logits = compiled(lambda images: (jax.grad(loss(predict(guided_relu)))(images), predict(relu)(images)), IMAGES)
    for jitted in (lambda f: f, eqx.filter_jit):
        ruled = with_rules(jitted(predict(relu)), **guided)
        maps, values = compiled(lambda images, ruled=ruled: (jax.grad(loss(ruled))(images), ruled(images)), IMAGES)
        np.testing.assert_allclose(maps, due, atol=1e-6)
        np.testing.assert_allclose(values, logits, rtol=1e-6)


def test_names_survive():
    """Taps around and under the rules; Grad-CAM on a network with rules."""
    predict = vgg(PARAMS)
    ruled, halve = with_rules(predict, **guided), lambda f: tap(f, "stage6", lambda z: z / 2)
    cam = lambda f: lambda images: explain.grad_cam("stage6")(None, f, images, LABELS)

    @jax.jit
    def found(images):
        halved = halve(predict)
        values = read(ruled, "stage6")(images)[1], halve(ruled)(images), with_rules(halved, **guided)(images)
        return values, (read(predict, "stage6")(images)[1], halved(images), halved(images))

    for value, due in zip(*found(IMAGES)):
        np.testing.assert_allclose(value, due, rtol=1e-6, atol=1e-6)
    maps, plain, twin = (compiled(cam(f), IMAGES) for f in (ruled, predict, vgg(PARAMS, guided_relu)))
    np.testing.assert_allclose(maps, twin, atol=1e-5)
    assert np.abs(maps - plain).max() > 0.1


def test_a_second_eager_call_compiles_nothing():
    predict, seen = vgg(PARAMS), []
    listen = lambda event, duration, **kwargs: seen.append(event) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for rules in (guided_upsampled, softplus(50)):
            call = lambda rules=rules: jax.block_until_ready(jax.grad(loss(with_rules(predict, **rules)))(IMAGES))
            call()
            seen.clear()
            call()
            assert seen == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_inside_a_shard_map():
    mapped = jax.shard_map(relu, mesh=MESH, in_specs=SPEC, out_specs=SPEC)
    z, weights = jnp.array([-1.0, 2, -3, 4, 5, -6, 7, 8]), jnp.array([1.0, -1, 1, 1, -1, -1, 1, 1])
    gradient = lambda f: jax.jit(jax.grad(lambda z: (with_rules(f, **guided)(z) * weights).sum()))(z)
    assert gradient(mapped).tolist() == gradient(relu).tolist() == [0, 0, 0, 1, 0, 0, 1, 1]


def test_errors():
    plain, closed = lambda z: 2 * z, lambda z: lax.custom_linear_solve(relu, z, solve=lambda _, z: z)
    assert (
        message(with_rules(plain, **guided), Z)
        == "with_rules: the function has no functions named relu or relu6 and maximum(x, 0), nor max pooling"
        " (reduce_window_max)"
    )
    assert (
        message(with_rules(relu, max_pool=Rule()), Z)
        == "with_rules: the function has no max pooling (reduce_window_max)"
    )
    assert with_rules(relu, **guided)(Z).tolist() == relu(Z).tolist()  # one rule of several finds its operation
    assert (
        message(with_rules(closed, **guided), jnp.ones(8))
        == "with_rules: relu inside 'custom_linear_solve', which cannot be entered"
    )
    assert (
        message(with_rules, relu, pool=Rule())
        == "with_rules: no operation 'pool'; there are relu, max_pool, conv, dense, add, mean, conv_layer, dense_layer, softmax, attention, matmul, mul, activation, deviation, round, floor, sign, threshold, step"
    )
    assert message(with_rules, relu) == "with_rules: no rule is given, e.g. with_rules(predict, **guided)"
    assert (
        message(with_rules, relu, relu="guided") == "with_rules: relu must be a Rule(forward, backward), got 'guided'"
    )
    alone = with_rules(lambda x: x @ WEIGHTS["last"], dense=Rule(backward=lambda operation, g, x, kernel: x))
    assert message(jax.grad(lambda x: alone(x).sum()), jnp.ones((2, 4))) == (
        "with_rules: a backward rule returned 1 gradient(s) for the 2 operands of its operation; it must return a tuple,"
        " one for each"
    )
    assert message(softplus, 0) == "beta must be a number of at least 1e-06, got 0"
    assert (
        message(explain.gradient, rules=5)
        == "rules must be like guided or softplus(50), for relu, max_pool, conv, dense, add, mean, "
        "conv_layer, dense_layer, softmax, attention, matmul, mul, activation, deviation, round, floor, sign, "
        "threshold, step; got 5"
    )


CONVOLVE = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
WEIGHTS = {
    "first": draw(3, 3, 3, 4) / 3, "bias": draw(4), "blocks": draw(2, 3, 3, 4, 4) / 4, "last": draw(4, 3),
    "last_bias": draw(3),
}  # fmt: skip


def block(h, kernel):
    return h + relu(lax.conv_general_dilated(h, kernel, **CONVOLVE))


# Ways in which a network may hold its two blocks.
BLOCKS = {
    "plain": lambda h, kernels: block(block(h, kernels[0]), kernels[1]),
    "jit": lambda h, kernels: jax.jit(block)(jax.jit(block)(h, kernels[0]), kernels[1]),
    "scan": lambda h, kernels: lax.scan(lambda h, kernel: (block(h, kernel), None), h, kernels)[0],
    "remat": lambda h, kernels: jax.checkpoint(block)(jax.checkpoint(block)(h, kernels[0]), kernels[1]),
}


LINEAR = eqx.nn.Linear(3, 4, key=jax.random.key(0))


def residual(blocks):
    """All operations, once or twice each; no bias is one."""

    def network(weights, images):
        h = lax.conv_general_dilated(images, weights["first"], **CONVOLVE) + weights["bias"].reshape(1, 1, 1, -1)
        h = nn.avg_pool(nn.max_pool(BLOCKS[blocks](h, weights["blocks"]), (2, 2), (2, 2)), (2, 2), (2, 2))
        return h.mean((1, 2)) @ weights["last"] + weights["last_bias"]

    return network


def identity(counts):
    """The ordinary rule of every operation, which counts how often it is used."""

    def rule(name):
        def forward(operation, *operands):
            counts[name] += 1
            return operation(*operands)

        return Rule(forward, lambda operation, gradient, *operands: jax.vjp(operation, *operands)[1](gradient))

    # A layer holds the convolution or product that is an operation by itself.
    return {name: rule(name) for name in OPERATIONS if not name.endswith("_layer")}


def value_and_gradients(f):
    return jax.jit(lambda w, x: (f(w, x), jax.grad(lambda w, x: (f(w, x) ** 2).sum(), (0, 1))(w, x)))


@functools.cache
def ordinary():
    """Values and gradients without rules: of the same numbers, however the network is written."""
    return value_and_gradients(residual("plain"))(WEIGHTS, jnp.concatenate([IMAGES] * 4))


@pytest.mark.parametrize("way", [*BLOCKS, "fast", "shard_map"])
def test_the_ordinary_rule_changes_nothing(way):
    """Of every operation, however it stands in the network; each is found, and nothing else is."""
    images, counts = jnp.concatenate([IMAGES] * 4), collections.Counter()
    plain = f = residual(way if way in BLOCKS else "plain")
    if way == "shard_map":
        f = jax.shard_map(plain, mesh=MESH, in_specs=(PartitionSpec(), SPEC), out_specs=SPEC)
    if way == "fast":
        f = fast_convs(plain)
    ruled = with_rules(f, **identity(counts))
    jax.eval_shape(ruled, WEIGHTS, images)
    due = {"conv": 3, "relu": 2, "add": 2, "max_pool": 1, "mean": 2, "dense": 1}
    assert counts == (due if way != "scan" else due | {"conv": 2, "relu": 1, "add": 1})
    found = value_and_gradients(ruled)(WEIGHTS, images)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, ordinary())


@pytest.mark.parametrize("name", ["conv", "dense", "add", "mean"])
def test_one_rule_at_a_time(name):
    """A forward rule that triples its operation, against the network written so; and of nothing there is an error."""
    images, third = IMAGES[:, :4, :4], Rule(forward=lambda operation, *operands: 3 * operation(*operands))
    f, due = {
        "conv": (lambda x: lax.conv_general_dilated(x, WEIGHTS["first"], **CONVOLVE) + WEIGHTS["bias"], 3),
        "dense": (lambda x: x @ WEIGHTS["first"][0, 0] + WEIGHTS["bias"], 3),
        "add": (lambda x: jnp.sin(x) + x[::-1] + 1, 3),
        "mean": (lambda x: x.mean((1, 2)) + 1, 3),
    }[name]
    bias = {"conv": WEIGHTS["bias"], "dense": WEIGHTS["bias"], "add": 1, "mean": 1}[name]
    np.testing.assert_allclose(with_rules(f, **{name: third})(images) - bias, due * (f(images) - bias), atol=1e-5)
    text = {"conv": "convolution", "dense": "dense layer (a product with a kernel)", "add": "sum of two of its values"}
    absent = text.get(name, "mean over positions")
    assert message(with_rules(relu, **{name: third}), images) == f"with_rules: the function has no {absent}"


@pytest.mark.parametrize(
    ("f", "due"),
    [
        (lambda x: x.mean((1, 2), keepdims=True), {"mean"}),
        (lambda x: x.astype(jnp.bfloat16).mean((1, 2)), {"mean"}),
        (lambda x: x.transpose(0, 3, 1, 2).sum((2, 3)) * (1 / 64), {"mean"}),
        (lambda x: nn.avg_pool(x, (3, 3), (2, 2), "SAME", count_include_pad=False), {"mean"}),
        (lambda x: x.reshape(2, 64, 3).mean(1), {"mean"}),
        (lambda x: x.sum((1, 2)), set()),
        (lambda x: x.sum((1, 2)) / 7, set()),
        (lambda x: nn.LayerNorm(use_scale=False, use_bias=False).apply({}, x), set()),
        (lambda x: nn.BatchNorm(False).init_with_output(jax.random.key(0), x)[0], set()),
        (lambda x: nn.GroupNorm(3, use_scale=False, use_bias=False).apply({}, x), set()),
        (jax.nn.gelu, set()),
        (lambda x: x + x.mean((1, 2), keepdims=True), {"mean"}),  # what is spread is a bias
        (lambda x: x + jnp.ones(x.shape), set()),
        (lambda x: jnp.einsum("bhwc,bhwd->bcd", x, x), set()),
        (lambda x: x.reshape(-1, 3) @ (x.reshape(-1, 3) * 2).T, set()),
        (lambda x: nn.Dense(4).apply({"params": {"kernel": WEIGHTS["last"].T, "bias": WEIGHTS["bias"]}}, x), {"dense"}),
        (lambda x: jax.jit(lambda x, w, b: x @ w + b)(x[:1, 0, 0], WEIGHTS["last"].T, WEIGHTS["bias"]), {"dense"}),
        (lambda x: LINEAR(x[0, 0, 0]), {"dense"}),
        (lambda x: jax.vmap(LINEAR)(x[0, 0]), {"dense"}),
    ],
)
def test_what_an_operation_is(f, due):
    traced = jax.make_jaxpr(f)(IMAGES).jaxpr
    assert operations(traced) & {"conv", "dense", "add", "mean"} == due


def test_the_kernel_is_the_second_operand():
    """However the product is written: x @ W, and W @ x as Equinox writes it."""
    kernel, seen = draw(5, 3), []
    rule = Rule(forward=lambda operation, value, kernel: (seen.append(kernel.shape), operation(value, kernel))[1])
    x = draw(2, 3) * 2
    for f in (lambda w, x: jax.vmap(lambda x: w @ jnp.tanh(x))(x), lambda w, x: jnp.tanh(x) @ w.T):
        for g in (f, jax.jit(f)):
            np.testing.assert_allclose(with_rules(g, dense=rule)(kernel, x), f(kernel, x), rtol=1e-5)
    assert {tuple(sorted(shape)) for shape in seen} == {(3, 5)} and len(seen) == 4


def epsilon(eps):
    """Relevance R of z shared out as x w / (z + eps sign z), on gradients: R / z arrives, R / x goes on."""

    def backward(operation, gradient, *operands):
        z = operation(*operands)
        return jax.vjp(operation, *operands)[1](gradient * z / (z + eps * jnp.where(z < 0, -1, 1)))

    return {name: Rule(backward=backward) for name in ("conv", "dense", "mean", "add")}


def positive_weights(operation, gradient, images, kernel):
    """The z+ rule: only positive weights pass relevance on (images are never negative)."""
    z, back = jax.vjp(lambda images: operation(images, jnp.maximum(kernel, 0)), images)
    return *back(gradient * operation(images, kernel) / jnp.maximum(z, 1e-9)), jnp.zeros_like(kernel)


def test_relevance_is_conserved():
    """LRP of a convolution, ReLU, a residual block, a mean and a dense layer without biases: the relevance of the
    pixels adds up to the logit, whatever rule the layers have, and eps absorbs a part of it."""
    weights = WEIGHTS | {"bias": jnp.zeros(4), "last_bias": jnp.zeros(3)}

    def f(images):
        h = relu(lax.conv_general_dilated(images, weights["first"], **CONVOLVE))
        return block(h, weights["blocks"][0]).mean((1, 2)) @ weights["last"]

    def relevance(**rules):
        return jax.jit(lambda images: images * jax.grad(loss(with_rules(f, **rules)))(images))(IMAGES)

    logits = f(IMAGES)[jnp.arange(2), LABELS]
    maps = [relevance(**epsilon(1e-7)), relevance(**epsilon(1e-7) | {"conv": Rule(backward=positive_weights)})]
    for each in maps:
        np.testing.assert_allclose(each.sum((1, 2, 3)), logits, rtol=1e-3)
    assert np.abs(maps[0] - maps[1]).max() > 1e-3
    absorbed = relevance(**epsilon(0.5)).sum((1, 2, 3))
    assert (np.abs(absorbed) < 0.9 * np.abs(logits)).all()


def test_rules_in_a_text():
    table = {**explain.TABLE, "softplus": softplus}
    for text in ("integrated(steps=64, rules=guided)", "gradient(rules=softplus(50))"):
        assert callable(build(text, table, VALUES))
