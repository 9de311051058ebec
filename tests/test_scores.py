"""Scores against worked values and float64 NumPy; confident images keep their gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from topgap_jax import scores
from topgap_jax.errors import UserError

Z = jnp.array([[3.0, 2, 5, 1]])


def of_each_label(score, logits):
    """score for every label of one row of logits."""
    k = logits.shape[-1]
    return np.asarray(score(jnp.repeat(logits, k, 0), jnp.arange(k)))


SCORES = scores.VALUES


def other(logits, labels):
    """A target for each label: the next class."""
    return (jnp.asarray(labels) + 1) % logits.shape[-1]


def numpy_score(name, z, y, clean):
    """The textbook formula, one example, float64."""
    z, clean = z.astype(np.float64), clean.astype(np.float64)
    ranked, others = np.sort(z)[::-1], np.delete(z, y)
    if name == "logit":
        return z[y]
    if name == "cross_entropy":
        return np.log(np.exp(z - z.max()).sum()) + z.max() - z[y]
    if name == "margin" or (name == "dlr" and len(z) == 2):
        return others.max() - z[y]
    if name == "dlr":
        return (others.max() - z[y]) / (ranked[0] - ranked[2] + 1e-12)
    if name == "kl":
        p, q = (np.exp(v - v.max()) / np.exp(v - v.max()).sum() for v in (clean, z))
        return (p * np.log(p / q)).sum()
    if name == "probability":
        return np.exp(z[y] - z.max()) / np.exp(z - z.max()).sum()
    if name == "residual_softmax":
        return 2 * z[y] - z.max() - np.log(np.exp(z - z.max()).sum())
    if name == "probability_margin":
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        return np.delete(p, y).max() - p[y]
    t = (y + 1) % len(z)
    divide = name == "targeted_dlr" and len(z) > 3
    return (z[t] - z[y]) / (ranked[0] - (ranked[2] + ranked[3]) / 2 + 1e-12 if divide else 1)


def test_worked_values():
    """attacks 15.8."""
    np.testing.assert_allclose(of_each_label(scores.dlr, Z), [0.666667, 1, -0.666667, 1.333333], atol=1e-6)
    np.testing.assert_allclose(of_each_label(scores.dlr, 10 * Z + 7), [0.666667, 1, -0.666667, 1.333333], atol=1e-6)
    np.testing.assert_allclose(of_each_label(scores.dlr, jnp.array([[2.0, 1, -1]])), [-1 / 3, 1 / 3, 1], atol=1e-6)
    assert float(scores.cross_entropy(Z, jnp.array([2]))[0]) == pytest.approx(0.185182, abs=1e-6)
    # logsumexp(z) - z_y is exactly 0 here in float32.
    assert float(scores.cross_entropy(10 * Z, jnp.array([2]))[0]) == pytest.approx(2.0612e-9, rel=1e-4)
    for target, value in {0: -0.571429, 1: -0.857143, 3: -1.142857}.items():
        values = scores.targeted_dlr(Z, jnp.array([2]), Z, jnp.array([target]))
        assert float(values[0]) == pytest.approx(value, abs=1e-6)
    # breadth_attacks 4
    score = lambda z: scores.probability_margin(z, jnp.array([0]))[0]
    value, gradient = jax.value_and_grad(score)(jnp.array([[2, 1.5, -1]]))
    assert float(value) == pytest.approx(-0.237557, abs=1e-6)
    np.testing.assert_allclose(gradient[0], [-0.460324, 0.453184, 0.007141], atol=1e-6)


def test_the_class_of_a_rank():
    """attacks 5: the classes by their clean logits without the label's; a rank beyond them is the last."""
    logits, labels = jnp.repeat(jnp.array([[3.0, 2, 5, 1]]), 4, 0), jnp.array([2, 2, 0, 1])
    np.testing.assert_array_equal(scores.class_of_rank(logits, labels, jnp.array([0, 2, 1, 9])), [0, 3, 1, 3])
    np.testing.assert_array_equal(
        scores.class_of_rank(logits[:, :2], jnp.array([0, 1, 0, 1]), jnp.zeros(4, int)), [1, 0, 1, 0]
    )
    assert float(scores.kl(Z, jnp.array([2]), Z)[0]) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("name", SCORES)
def test_formula_gradient_and_jit(name, classes):
    """Values against NumPy, gradients against its central differences; 2 and 3 classes take the plain differences."""
    random = np.random.default_rng(classes)
    logits = (3 * random.normal(size=(6, classes))).astype(np.float32)
    labels, clean = random.integers(classes, size=6), (3 * random.normal(size=(6, classes))).astype(np.float32)
    score = SCORES[name]
    expected = [numpy_score(name, *row) for row in zip(logits, labels, clean)]
    target = other(logits, labels)
    values = score(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(clean), target)
    assert values.shape == (6,) and values.dtype == jnp.float32
    np.testing.assert_allclose(values, expected, atol=2e-6, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(score)(logits, labels, clean, target), values, atol=1e-6, rtol=1e-6)
    gradient = jax.grad(lambda z: score(z, labels, clean, target).sum())(jnp.asarray(logits))
    steps = 1e-4 * np.eye(classes)
    rises = [
        [numpy_score(name, z.astype(float) + d, y, t) - numpy_score(name, z.astype(float) - d, y, t) for d in steps]
        for z, y, t in zip(logits, labels, clean)
    ]
    np.testing.assert_allclose(gradient, np.array(rises) / 2e-4, atol=2e-5)


@pytest.mark.parametrize("gap", [1.0, 10.0, 17.0, 40.0, 80.0])
def test_cross_entropy_does_not_saturate(gap):
    """topgap 14.11: p_y - 1 is rounding noise at a margin of 16 and 0 from 17 on; this gradient is right, relative to
    its size."""
    logits = jnp.array([[gap, 0.0, -1.0]])
    exact = np.exp(np.array([0, -1.0]) - gap)
    loss, gradient = jax.value_and_grad(lambda z: scores.cross_entropy(z, jnp.array([0]))[0])(logits)
    denominator = 1 + exact.sum()
    np.testing.assert_allclose(loss, np.log1p(exact.sum()), rtol=1e-5)
    np.testing.assert_allclose(gradient[0], np.array([-exact.sum(), *exact]) / denominator, rtol=1e-5)


@pytest.mark.parametrize("name", SCORES)
def test_a_mesh_with_explicit_axes(name):
    """Values and gradients, on the kind of mesh that `jax.make_mesh` gives by default."""
    random = np.random.default_rng(0)
    logits, labels = jnp.asarray(random.normal(size=(8, 5)), jnp.float32), jnp.asarray(random.integers(5, size=8))
    gradient = jax.jit(jax.grad(lambda z, y: SCORES[name](z, y, z[:, ::-1], other(z, y)).sum()))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        split = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))) for x in (logits, labels)]
        result = jax.jit(gradient)(*split)
    np.testing.assert_allclose(result, gradient(logits, labels), atol=1e-6)


def test_bf16_logits_are_scored_in_float32():
    logits = jnp.array([[1.0, 2.0, 0.5, -3.0]], jnp.bfloat16)
    for score in SCORES.values():
        values = score(logits, jnp.array([1]), logits[:, ::-1], jnp.array([2]))
        assert values.dtype == jnp.float32
        np.testing.assert_array_equal(
            values, score(logits.astype(jnp.float32), jnp.array([1]), logits[:, ::-1], jnp.array([2]))
        )


@given(st.lists(st.integers(-30, 30), min_size=4, max_size=4), st.integers(0, 3))
def test_sign_says_misclassified(logits, label):
    """margin > 0 iff another class is ahead, dlr and probability_margin have the margin's sign, cross_entropy > ln 2 only if misclassified or
    tied."""
    z, y = jnp.array([logits], jnp.float32), jnp.array([label])
    margin = float(scores.margin(z, y)[0])
    assert (margin > 0) == (max(logits) > logits[label])
    assert np.sign(scores.dlr(z, y)[0]) == np.sign(margin)
    assert np.sign(scores.probability_margin(z, y)[0]) == np.sign(margin)
    assert float(scores.cross_entropy(z, y)[0]) >= np.log1p(np.exp(margin)) - 1e-5


def test_clean_logits_and_targets_are_needed():
    with pytest.raises(UserError) as raised:
        scores.kl(Z, jnp.array([2]))
    assert str(raised.value) == "kl needs the clean logits: kl(logits, labels, clean)"
    for score in (scores.targeted_dlr, scores.targeted_margin):
        with pytest.raises(UserError) as raised:
            score(Z, jnp.array([2]), Z)
        text = "a targeted score needs target classes: score(logits, labels, clean, target), or an attack's targets=9"
        assert str(raised.value) == text


def test_a_score_of_one_row_and_of_several_batches():
    """Under vmap, and with more axes before the classes; a number an example is no row of logits."""
    logits, labels = (
        jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32),
        jnp.zeros((2, 3), jnp.int32),
    )
    for score in (scores.logit, scores.probability, scores.residual_softmax):
        several = score(logits, labels)
        np.testing.assert_array_equal(several[1], score(logits[1], labels[1]))
        np.testing.assert_allclose(jax.vmap(score)(logits[0], labels[0]), several[0], rtol=1e-6)
        with pytest.raises(UserError, match="the network must return float logits"):
            score(logits[0, :, 0], labels[0])
