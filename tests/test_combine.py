"""Paths and combinations of explanations against worked values and NumPy: expected gradients, SmoothTaylor, squares and
variances of SmoothGrad, other targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from tests.laws import IMAGES, KEYS, LABELS, OTHERS, PREDICT
from topgap_jax import baselines, explain
from topgap_jax.errors import UserError
from topgap_jax.explain import combine, taylor
from topgap_jax.explain.gradient import path_gradient
from topgap_jax.types import Cost, Explain

flat = lambda values: jnp.asarray(values, jnp.float32).reshape(len(values), 1, -1, 1)


def test_paths_from_references_have_the_worked_values():
    """baselines 13.2: f = x1 x2 at (2, 3), references (0, 0) and (1, 0): (2.25, 3.75), the sum 6 = f(x) - mean f(x')."""
    product = lambda images, keys=None: jnp.prod(images.reshape(len(images), -1), 1)[:, None]
    nodes = (np.arange(100) + 0.5) / 100
    start = flat([[0, 0], [1, 0]] * 100)
    t = jnp.asarray(np.repeat(nodes, 2), jnp.float32)
    values = path_gradient(product, start, t, flat([[2, 3]] * 200), jnp.zeros(200, jnp.int32))
    np.testing.assert_allclose(values.mean(0).ravel(), [2.25, 3.75], atol=1e-5)


def test_expected_gradients_draw_references_and_places():
    """The sum over pixels tends to s(x) - mean s(x'); all references alike: integrated gradients from that one."""
    one = IMAGES[:1]
    expected = explain.expected_gradients(one, samples=20)
    integrated = explain.integrated(steps=20, rule="riemann_middle", baseline=one, reduce="sum")
    a, b = (jax.jit(lambda method=method: method(KEYS, PREDICT, IMAGES, LABELS))() for method in (expected, integrated))
    assert np.abs(a - b).max() < 0.2 * np.abs(b).max() and not np.allclose(a, b, atol=1e-6)
    for references in (np.zeros((3, 5)), "train"):
        with pytest.raises(UserError, match="references must be an array"):
            explain.expected_gradients(references)
    with pytest.raises(UserError, match="do not fit images"):
        explain.expected_gradients(jnp.zeros((1, 2, 2, 3)))(KEYS, PREDICT, IMAGES, LABELS)


def test_input_x_gradient_is_one_step_of_a_path():
    for baseline in ("black", 0.25):
        a = explain.input_x_gradient(baseline=baseline)(KEYS, PREDICT, IMAGES, LABELS)
        path = explain.integrated(steps=1, rule="riemann_right", baseline=baseline, reduce="sum")
        np.testing.assert_allclose(a, path(KEYS, PREDICT, IMAGES, LABELS), atol=1e-6)


@pytest.mark.parametrize(("average", "due"), [("mean", [1, 1]), ("square", [3, 6]), ("variance", [2, 5])])
def test_averages_over_noise_have_the_worked_values(average, due, monkeypatch):
    """baselines 13.2: gradients (1, -2), (3, 0), (-1, 4), (1, 2)."""
    drawn = iter(np.float32([[0.3, 0.7], *([[1, -2], [3, 0], [-1, 4], [1, 2]])][average != "variance" :]))
    one = Explain(lambda *_: jnp.asarray(next(drawn)).reshape(1, 1, 2), lambda *_: Cost(0, 1))
    total = lambda f, rows, like: jax.tree.map(lambda *values: sum(values), *[f(i) for i in range(4)])
    monkeypatch.setattr(combine, "sum_over", total)
    method = explain.smooth(one, samples=4, average=average)
    np.testing.assert_allclose(method.maps(KEYS[:1], None, IMAGES[:1], LABELS[:1]).ravel(), due, atol=1e-6)
    assert method.cost(None, None) == Cost(0, 5 if average == "variance" else 4)


def test_taylor_has_the_worked_values(monkeypatch):
    """related 1 (a): f = sum a x^2, a = (1, -2, .5), x = (1, 2, -1), three roots at sigma .5."""
    a = jnp.array([1, -2, 0.5])
    f = lambda images, keys=None: (a * images.reshape(len(images), -1) ** 2).sum(1)[:, None]
    noise = np.float32([[1, 0, 0], [-1, 0, 0], [0, 1, -1]])
    drawn = iter(noise)
    monkeypatch.setattr(taylor, "sum_over", lambda f, rows, like: sum(f(i) for i in range(3)))
    monkeypatch.setattr(jax.random, "normal", lambda key, shape, dtype: jnp.asarray(next(drawn), dtype).reshape(shape))
    images = flat([[1, 2, -1]])
    with jax.disable_jit():
        maps = explain.smooth_taylor(samples=3, sigma=0.5 / 3).maps(KEYS[:1], f, images, LABELS[:1] * 0)
    np.testing.assert_allclose(maps.ravel(), [-1 / 3, 5 / 3, -0.25], atol=1e-5)


def test_total_variation_has_the_worked_values():
    """related 1 (b), (c)."""
    variation = lambda maps: float(taylor.average_total_variation(jnp.asarray(maps, jnp.float32)[None])[0])
    assert variation([[0, -1, 2], [3, 0, 1], [1, 2, -4]]) == pytest.approx(0.590703, abs=1e-6)
    assert variation(np.indices((4, 4)).sum(0) % 2) == pytest.approx(1.5) and variation(np.ones((4, 4))) == 0
    assert float(taylor._simpson(5) @ jnp.array([1, 0.8, 0.5, 0.3, 0.2])) == pytest.approx(2.2, abs=1e-6)
    for n in (2, 3, 4, 6):
        y = np.random.default_rng(n).normal(size=n)
        assert float(taylor._simpson(n) @ jnp.asarray(y)) == pytest.approx(scipy.integrate.simpson(y), abs=1e-5)


def test_the_walk_for_a_level_is_the_papers():
    """Against the loop written out, on a bumpy function of one number."""
    f = lambda level: (level - 0.42) ** 2 + 0.003 * np.cos(40 * level)

    def walk(level, rounds):
        rate, stops, current = 0.1, 0, f(level)
        best = (current, level)
        for _ in range(rounds):
            moved = abs(level + rate)
            if f(moved) > current:
                moved = abs(level - rate)
            after = f(moved)
            if after > current:
                if stops >= 3:
                    break
                rate, stops = 0.9 * rate, stops + 1
            else:
                stops = 0
            best, level, current = min(best, (after, moved)), moved, after
        return best[1]

    starts = np.float32([0.05, 0.3, 0.42, 0.9])
    due = [walk(start, 20) for start in starts.astype(float)]
    value = lambda level: (level - 0.42) ** 2 + 0.003 * jnp.cos(40 * level)
    np.testing.assert_allclose(taylor.adaptive_level(value, jnp.asarray(starts), 20), due, atol=1e-4)


def test_other_targets():
    gradient = explain.gradient(reduce="sum")
    maps = lambda method, labels=LABELS: np.asarray(method(KEYS, PREDICT, IMAGES, labels))
    two = jnp.full_like(LABELS, 2)
    np.testing.assert_array_equal(maps(explain.targeted(gradient, 2)), maps(gradient, two))
    others = np.where(np.arange(4) == np.asarray(LABELS)[:, None], -np.inf, np.asarray(PREDICT(IMAGES)))
    runner_up = jnp.asarray(others.argmax(1), jnp.int32)
    np.testing.assert_array_equal(maps(explain.targeted(gradient, "runner_up")), maps(gradient, runner_up))
    difference = explain.targeted(gradient, lambda logits: logits[:, 2] - logits[:, 1])
    np.testing.assert_allclose(
        maps(difference), maps(gradient, two) - maps(gradient, jnp.full_like(LABELS, 1)), atol=1e-5
    )
    # Outputs that are no logits: two numbers a position.
    boxes = lambda images, keys=None: {"boxes": jnp.stack([images[..., 0], images[..., 1]], -1)}
    method = explain.targeted(gradient, lambda outputs: outputs["boxes"][:, 1, 2, 0])
    due = np.zeros(IMAGES.shape[:3])
    due[:, 1, 2] = 1
    np.testing.assert_array_equal(method.maps(KEYS, boxes, IMAGES, LABELS), due)
    assert explain.targeted(gradient, "runner_up").cost(PREDICT, IMAGES) == Cost(1, 1)


def test_differences_and_means():
    gradient, cam = explain.gradient(reduce="sum"), explain.cam()
    call = lambda method: np.asarray(method(KEYS, PREDICT, IMAGES, LABELS))
    a, b = call(gradient), np.asarray(jax.image.resize(call(cam), (8, 6, 6), "bilinear"))
    np.testing.assert_allclose(call(explain.contrast(gradient, cam)), a - b, atol=1e-5)
    largest = lambda values: np.abs(values).max((1, 2), keepdims=True)
    np.testing.assert_allclose(call(explain.normalise(cam)), call(cam) / largest(call(cam)), atol=1e-6)
    mean = (a / largest(a) + np.asarray(jax.image.resize(call(cam) / largest(call(cam)), (8, 6, 6), "bilinear"))) / 2
    np.testing.assert_allclose(call(explain.ensemble(gradient, cam)), mean, atol=1e-5)
    zero = Explain(lambda *_: jnp.zeros((8, 2, 2)), lambda *_: Cost(1, 0))
    np.testing.assert_array_equal(call(explain.normalise(zero)), 0)


def test_what_is_refused():
    gradient = explain.gradient()
    for call, text in [
        (lambda: explain.smooth(gradient, average="median"), "average must be one of 'mean', 'square', 'variance'"),
        (lambda: explain.ensemble(gradient), "give two or more explanations"),
        (lambda: explain.targeted(gradient, "second"), "target must be a class, 'runner_up' or a function"),
        (lambda: explain.targeted(gradient, -1), "target must be a class"),
        (lambda: explain.targeted(gradient, 9)(KEYS, PREDICT, IMAGES, LABELS), "class 9 is none of a network with 4"),
        (
            lambda: explain.targeted(gradient, lambda logits: logits)(KEYS, PREDICT, IMAGES, LABELS),
            "one number an example, shape (8,), got (8, 4)",
        ),
        (
            lambda: explain.targeted(explain.cam(), lambda logits: logits[:, 1])(KEYS, PREDICT, IMAGES, LABELS),
            "cam: there are 4 class maps and 1 output(s)",
        ),
        (
            lambda: explain.targeted(gradient, lambda logits: (logits[:, 1],))(KEYS, PREDICT, IMAGES, LABELS),
            "one number an example, shape (8,), got a tuple",
        ),
        (lambda: explain.expected_gradients(255 * IMAGES), "expected_gradients: references: images must be float in"),
        (lambda: explain.targeted("x", 1), "give an explanation such as gradient()"),
    ]:
        with pytest.raises(UserError) as raised:
            call()
        assert text in str(raised.value) and "\n" not in str(raised.value)


def test_baselines():
    images = lambda baseline: np.asarray(baselines.baseline_images("b", baseline, PREDICT, IMAGES, KEYS))
    np.testing.assert_array_equal(images("black"), 0)
    np.testing.assert_array_equal(images("white"), 1)
    np.testing.assert_array_equal(images("mean"), 0)  # a network without normalisation
    np.testing.assert_array_equal(images(OTHERS), OTHERS)
    noise = images("noise")
    assert 0 <= noise.min() and noise.max() < 1 and 0.4 < noise.mean() < 0.6
    np.testing.assert_array_equal(
        noise[3], np.asarray(baselines.baseline_images("b", "noise", PREDICT, IMAGES[3:4], KEYS[3:4]))[0]
    )
