"""Explanations from pixel gradients: quadrature, completeness, baselines, SmoothGrad, against plain NumPy and worked
cases."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from tests.laws import message
from topgap_jax import explain, models, pool
from topgap_jax.explain.gradient import quadrature
from topgap_jax.rewrite import canonical_convs, zero_images
from topgap_jax.rules import guided, softplus
from topgap_jax.types import Cost, Explain

random = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
IMAGES = jnp.asarray(random.uniform(size=(8, 6, 6, 3)), jnp.float32)
LABELS = jnp.arange(8) % 3
KEYS = jax.random.split(jax.random.key(0), 8)
FIRST, LAST = draw(3, 3, 3, 5) / 3, draw(5, 3)
MEAN, STD = jnp.array([0.5, 0.4, 0.3]), jnp.array([0.2, 0.3, 0.4])


def predict(images, keys=None):
    """A normalisation, a strided convolution, ReLU, a mean and a dense layer."""
    x = (images - MEAN) / STD
    x = lax.conv_general_dilated(x, FIRST, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jax.nn.relu(x).mean((1, 2)) @ LAST


def smooth_predict(images, keys=None):
    return jnp.tanh(images.reshape(len(images), -1) @ WEIGHTS) @ LAST


WEIGHTS = draw(108, 5) / 4
label_logit = lambda f, images: np.take_along_axis(np.asarray(f(images)), np.asarray(LABELS)[:, None], 1)[:, 0]


@pytest.mark.parametrize(
    ("rule", "second", "third"),
    [
        ("riemann_right", 1.2, 1.32),
        ("riemann_middle", 1, 0.99),
        ("riemann_trapezoid", 1, 1.03125),
        ("gausslegendre", 1, 1),
    ],
)
def test_quadrature(rule, second, third):
    """Baselines 13.1: five nodes on 2 a and 3 a^2."""
    nodes, weights = quadrature(rule, 5)
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose([weights @ (2 * nodes), weights @ (3 * nodes**2)], [second, third], rtol=1e-6)
    for steps in (2, 7, 50):
        nodes, weights = quadrature(rule, steps)
        assert nodes.shape == weights.shape == (steps,) and weights.sum() == pytest.approx(1)
        assert 0 <= nodes.min() and nodes.max() <= 1


def test_nodes():
    nodes, weights = quadrature("gausslegendre", 5)
    np.testing.assert_allclose(nodes, [0.046910, 0.230765, 0.5, 0.769235, 0.953090], atol=1e-6)
    np.testing.assert_allclose(weights, [0.118463, 0.239314, 0.284444, 0.239314, 0.118463], atol=1e-6)
    np.testing.assert_allclose(quadrature("riemann_trapezoid", 3)[1], [0.25, 0.5, 0.25])


@pytest.mark.parametrize(
    ("rule", "due"),
    [("riemann_right", (1.6, -0.4)), ("riemann_middle", (1.2, -0.3)), ("gausslegendre", (1.284444, -0.321111))],
)
def test_a_kink(rule, due):
    """Baselines 13.1: f = relu(2 x1 - x2 - .5) at (1, .5) from 0 with five nodes; exact (4/3, -1/3)."""
    f = lambda images, keys=None: jax.nn.relu(images[:, 0] @ jnp.array([2.0, -1]) - 0.5)
    x = jnp.array([1.0, 0.5]).reshape(1, 1, 2, 1)
    method = explain.integrated(steps=5, rule=rule, baseline=0, reduce="sum")
    np.testing.assert_allclose(
        method(None, lambda images: f(images[..., 0])[:, None], x, jnp.array([0])).ravel(), due, atol=1e-6
    )


def test_gradient_and_its_reductions():
    values = np.asarray(jax.grad(lambda x: jnp.take_along_axis(predict(x), LABELS[:, None], 1).sum())(IMAGES))
    for reduce, due in {
        "max_abs": np.abs(values).max(-1),
        "sum": values.sum(-1),
        "sum_abs": np.abs(values.sum(-1)),
        "abs_sum": np.abs(values).sum(-1),
        "sum_relu": np.maximum(values.sum(-1), 0),
    }.items():
        maps = explain.gradient(reduce=reduce)(KEYS, predict, IMAGES, LABELS)
        np.testing.assert_allclose(maps, due, atol=1e-6)
    np.testing.assert_array_equal(
        explain.gradient()(KEYS, predict, IMAGES, LABELS),
        explain.gradient(reduce="max_abs")(KEYS, predict, IMAGES, LABELS),
    )


def test_completeness():
    """On a smooth network the signed maps add up to the difference of the logits; (viii): also on a softplus twin."""
    for f, method, tolerance in [
        (smooth_predict, explain.integrated(steps=12, baseline=0.5, reduce="sum"), 1e-4),
        (
            predict,
            explain.integrated(steps=200, rule="riemann_middle", baseline=0.5, reduce="sum", rules=softplus(5)),
            1e-3,
        ),
    ]:
        maps = jax.jit(lambda images, f=f, method=method: method(KEYS, f, images, LABELS))(IMAGES)
        if f is predict:
            bend = lambda z: jax.nn.softplus(5 * z) / 5
            f = lambda images: bend(hidden(images)).mean((1, 2)) @ LAST
        difference = label_logit(f, IMAGES) - label_logit(f, jnp.full_like(IMAGES, 0.5))
        assert np.abs(difference).max() > 0.01
        np.testing.assert_allclose(maps.sum((1, 2)), difference, atol=tolerance * np.abs(difference).max())


def hidden(images):
    return lax.conv_general_dilated(
        (images - MEAN) / STD, FIRST, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def test_integrated_is_the_average_along_the_path():
    """Node by node, with the default baseline; the default map is the absolute value of the sum over channels."""
    nodes, weights = quadrature("gausslegendre", 3)
    slope = lambda x: jax.grad(lambda x: jnp.take_along_axis(predict(x), LABELS[:, None], 1).sum())(x)
    average = sum(w * slope(MEAN + a * (IMAGES - MEAN)) for a, w in zip(nodes, weights))
    for options, due in [
        ({}, np.abs(((IMAGES - MEAN) * average).sum(-1))),
        ({"multiply_by_inputs": False, "reduce": "sum"}, average.sum(-1)),
        ({"baseline": (0.5, 0.4, 0.3), "reduce": "sum"}, ((IMAGES - MEAN) * average).sum(-1)),
        ({"baseline": np.broadcast_to(MEAN, (1, 6, 6, 3)), "reduce": "sum"}, ((IMAGES - MEAN) * average).sum(-1)),
    ]:
        maps = explain.integrated(steps=3, **options)(KEYS, predict, IMAGES, LABELS)
        np.testing.assert_allclose(maps, due, atol=1e-6)
    assert explain.integrated(steps=3).cost(predict, IMAGES) == Cost(0, 3) and explain.integrated().cost(
        predict, IMAGES
    ) == Cost(0, 50)


def test_what_normalisation_maps_to_zero():
    head = models.map_head(pool.gap())
    model = models.classifier(models.resnet20(), head, classes=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), variables)
    bound = models.bind(model, zeros)
    for f in (predict, jax.jit(predict), bound, jax.jit(bound)):
        np.testing.assert_allclose(zero_images(f, IMAGES), jnp.broadcast_to(MEAN, IMAGES.shape), atol=1e-6)
    traced = jax.jit(lambda mean, images: zero_images(lambda x: smooth_predict(2 * (x - mean)), images))
    np.testing.assert_allclose(traced(MEAN, IMAGES), jnp.broadcast_to(MEAN, IMAGES.shape), atol=1e-6)
    for f, due in [
        (lambda x: smooth_predict(x / 0.5 - 1), 0.5),
        (lambda x: smooth_predict((0.25 - x).astype(jnp.bfloat16).astype(jnp.float32)), 0.25),
        (lambda x: smooth_predict(3 + x * 4), -0.75),
        (lambda x: smooth_predict(x * jnp.array([1.0, 0, 1]) - 0.25), (0.25, 0, 0.25)),  # a channel that is not used
        (smooth_predict, 0),  # no normalisation: black
        (lambda x: smooth_predict(x - x.mean((1, 2), keepdims=True)), 0),  # its own mean is no constant
        (lambda x: smooth_predict(x - 0.5) + smooth_predict(x), 0),
        (lambda x: smooth_predict(x * x - 0.5), 0),
    ]:
        np.testing.assert_allclose(zero_images(f, IMAGES), jnp.broadcast_to(jnp.float32(due), IMAGES.shape), atol=1e-6)


def test_smooth_averages_before_it_reduces():
    """Per-example noise in units of the image's own range, not clipped; signed values are averaged."""
    samples, sigma = 3, 0.2
    spread = sigma * np.ptp(np.asarray(IMAGES), (1, 2, 3), keepdims=True)
    noise = lambda i: jnp.stack(
        [jax.random.normal(jax.random.split(jax.random.fold_in(key, i))[0], IMAGES.shape[1:]) for key in KEYS]
    )
    slope = lambda x: jax.grad(lambda x: jnp.take_along_axis(smooth_predict(x), LABELS[:, None], 1).sum())(x)
    values = np.mean([slope(IMAGES + spread * noise(i)) for i in range(samples)], 0)
    maps = explain.smooth(explain.gradient(), samples=samples, sigma=sigma)(KEYS, smooth_predict, IMAGES, LABELS)
    np.testing.assert_allclose(maps, np.abs(values).max(-1), atol=1e-6)
    summed = explain.smooth(explain.gradient(reduce="sum"), samples=samples, sigma=sigma)
    np.testing.assert_allclose(summed(KEYS, smooth_predict, IMAGES, LABELS), values.sum(-1), atol=1e-6)
    without = explain.smooth(explain.gradient(), samples=2, sigma=0)(KEYS, predict, IMAGES, LABELS)
    np.testing.assert_allclose(without, explain.gradient()(KEYS, predict, IMAGES, LABELS), atol=1e-6)
    assert explain.smooth(explain.integrated(steps=5), samples=4).cost(predict, IMAGES) == Cost(0, 20)
    assert explain.smooth(explain.grad_cam("x"), samples=4).cost(predict, IMAGES) == Cost(0, 4)
    own = Explain(lambda keys, predict, images, labels: images.sum(-1), lambda predict, images: Cost(1, 0))
    method = explain.smooth(own, samples=samples, sigma=sigma)
    noisy = np.mean([IMAGES + spread * noise(i) for i in range(samples)], 0)
    np.testing.assert_allclose(method(KEYS, smooth_predict, IMAGES, LABELS), noisy.sum(-1), atol=1e-5)
    assert method.cost(predict, IMAGES) == Cost(samples, 0)


def test_smooth_keys():
    """Noise differs between examples and samples, follows the key, and not the neighbours."""
    method = explain.smooth(explain.gradient(), samples=2)
    alike = jnp.broadcast_to(IMAGES[:1], IMAGES.shape)
    maps = method(KEYS, smooth_predict, alike, jnp.zeros(8, int))
    assert len(np.unique(np.asarray(maps)[:, 0, 0])) == 8
    np.testing.assert_array_equal(method(KEYS, smooth_predict, alike, jnp.zeros(8, int)), maps)
    one = method(KEYS[3:4], smooth_predict, alike[:1], jnp.zeros(1, int))
    np.testing.assert_allclose(one[0], maps[3], atol=1e-6)


def test_canonical_convs():
    """Convolutions of every kind and layout, through jit and remat; in the compiled loop none has a transposed
    kernel."""
    grouped = draw(3, 3, 1, 6)

    def f(images):
        x = hidden(images)
        x = x + jax.jit(lambda x: nn.Conv(5, (3, 3), kernel_dilation=2).apply({"params": KERNEL}, x))(x)
        x = jax.checkpoint(lambda x: lax.conv_transpose(x, DOWN, (2, 2), "SAME"))(x)
        x = lax.conv_general_dilated(
            x.transpose(0, 3, 1, 2),
            grouped,
            (1, 2),
            "VALID",
            dimension_numbers=("NCHW", "HWIO", "NCHW"),
            feature_group_count=3,
        )
        return jnp.tanh(x).mean((2, 3))

    size = lambda f: lambda images: (f(images) ** 2).sum()
    np.testing.assert_allclose(canonical_convs(f)(IMAGES), f(IMAGES), atol=1e-5)
    twice = jax.jit(canonical_convs(jax.grad(lambda x: (jax.grad(size(f))(x) ** 2).sum())))
    expected = jax.jit(jax.grad(lambda x: (jax.grad(size(f))(x) ** 2).sum()))(IMAGES)
    np.testing.assert_allclose(twice(IMAGES), expected, rtol=1e-4, atol=1e-4)
    method = explain.integrated(steps=4)
    text = jax.jit(lambda images: method(KEYS, predict, images, LABELS)).lower(IMAGES).compile().as_text()
    assert "while" in text and "convolution" in text and "01oi" not in text
    # The derivative of the maps, as an attack on them takes it, loops as well.
    twin = explain.integrated(steps=4, rules=softplus(5))
    slope = jax.grad(lambda images: (twin(KEYS, predict, images, LABELS) ** 2).sum())
    text = jax.jit(canonical_convs(slope)).lower(IMAGES).compile().as_text()
    assert "while" in text and "convolution" in text and "01oi" not in text
    np.testing.assert_allclose(jax.jit(canonical_convs(slope))(IMAGES), jax.jit(slope)(IMAGES), rtol=1e-4, atol=1e-4)


KERNEL = {"kernel": draw(3, 3, 5, 5) / 5, "bias": draw(5)}
DOWN = draw(3, 3, 5, 3) / 5


def test_an_nnx_model():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.first((x - 0.5) / 0.25)).mean((1, 2)))

    model = models.nnx(Net(nnx.Rngs(0)))
    f = models.bind(model, model.init(None, IMAGES))
    maps = explain.integrated(steps=2, rules=guided)(KEYS, f, IMAGES, LABELS)
    named = explain.integrated(steps=2, rules=guided, baseline=0.5)(KEYS, f, IMAGES, LABELS)
    np.testing.assert_allclose(maps, named, atol=1e-6)
    assert maps.shape == (8, 6, 6) and (np.asarray(maps) > 0).any()


def test_errors():
    for call, text in [
        (
            lambda: explain.gradient(reduce="mean"),
            "reduce must be one of 'max_abs', 'sum', 'sum_abs', 'abs_sum', 'sum_relu', got 'mean'",
        ),
        (lambda: explain.integrated(steps=0), "steps must be a whole number of at least 1, got 0"),
        (
            lambda: explain.integrated(steps=1, rule="riemann_trapezoid"),
            "steps must be a whole number of at least 2, got 1",
        ),
        (
            lambda: explain.integrated(rule="simpson"),
            "rule must be 'gausslegendre', 'riemann_right', 'riemann_middle' or 'riemann_trapezoid', got 'simpson'",
        ),
        (lambda: explain.smooth(explain.gradient(), samples=0), "samples must be a whole number of at least 1, got 0"),
        (lambda: explain.smooth("x"), "smooth: give an explanation such as gradient(), got 'x'"),
        (lambda: explain.smooth(explain.gradient(), sigma=-1), "sigma must be a number of at least 0, got -1"),
        (
            lambda: explain.integrated(baseline=(0.1, 0.2))(KEYS, predict, IMAGES, LABELS),
            (
                "integrated: baseline must be 'mean', 'black', 'white', 'blur', 'noise', a number, one per channel or an"
                " array for images of shape (8, 6, 6, 3),"
                " got (0.1, 0.2)"
            ),
        ),
        (
            lambda: explain.integrated(baseline="grey"),
            (
                "integrated: baseline must be 'mean', 'black', 'white', 'blur', 'noise', a number, one per channel or an"
                " array, got 'grey'"
            ),
        ),
        (
            lambda: explain.integrated(baseline=np.zeros((5, 5)))(KEYS, predict, IMAGES, LABELS),
            (
                "integrated: baseline must be 'mean', 'black', 'white', 'blur', 'noise', a number, one per channel or an"
                " array for images of shape (8, 6, 6, 3),"
                " got an array of shape (5, 5)"
            ),
        ),
        (
            lambda: explain.gradient(rules=guided)(KEYS, smooth_predict, IMAGES, LABELS),
            (
                "with_rules: the function has no functions named relu or relu6 and maximum(x, 0), nor max pooling"
                " (reduce_window_max)"
            ),
        ),
    ]:
        assert message(call) == text
