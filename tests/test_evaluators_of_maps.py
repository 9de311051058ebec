"""Agreement, stability, completeness, ADCC, ARCC and background reliance: worked values and cases done by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from topgap_jax import evaluators
from topgap_jax.errors import UserError
from topgap_jax.evaluators.background import excess
from topgap_jax.evaluators.combined import coherency, harmonic_mean
from topgap_jax.evaluators.infidelity import random_squares
from topgap_jax.evaluators.stability import changes as eager
from topgap_jax.explain import gradient, integrated
from topgap_jax.grids import shrunk
from topgap_jax.types import Cost, Explain, Measure, Model, Output

changes = jax.jit(eager)
RNG = np.random.default_rng(0)
N, SIZE = 4, 12
BATCH = {
    "image": jnp.asarray(RNG.uniform(0.1, 0.9, (N, SIZE, SIZE, 3)), jnp.float32),
    "label": jnp.array([0, 1, 0, 1]),
    "id": jnp.arange(N),
    "region": jnp.zeros((N, SIZE, SIZE), jnp.uint8).at[:, :3, :3].set(1),
}
WEIGHTS = jnp.asarray(RNG.normal(size=(SIZE * SIZE * 3, 2)) / 20, jnp.float32)
AFFINE = Model(None, lambda _, images, **options: Output(images.reshape(len(images), -1) @ WEIGHTS + 0.1, {}, {}))


def shown(f, signed=None):
    """An explanation that shows f(images) -> (b, h, w), whatever the network."""
    return Explain(lambda keys, predict, images, labels: f(images), lambda *_: Cost(1, 0), signed=signed)


RED = shown(lambda images: images[..., 0])


def summary(evaluator, batch=BATCH):
    keys = jax.random.split(jax.random.key(1), len(batch["label"]))
    rows = jax.jit(lambda keys, batch: evaluator.rows(keys, AFFINE, {}, batch, {}))(keys, batch)
    return evaluator.summary(jax.device_get(rows))


def values(evaluator, batch=BATCH):
    return {name: measure.value for name, measure in summary(evaluator, batch).items()}


# Agreement.


def test_a_map_agrees_with_itself_and_not_with_its_inverse():
    same = values(evaluators.agreement(RED, shown(lambda images: 3 * images[..., 0] + 1), k=10))
    assert [same[name] for name in ("spearman", "kendall_tau_b", "topk_intersection", "ssim")] == pytest.approx([1] * 4)
    assert same["chance"] == pytest.approx(10 / SIZE**2) and same["constant"] == 0
    inverse = values(evaluators.agreement(RED, shown(lambda images: -images[..., 0])))
    assert (inverse["spearman"], inverse["kendall_tau_b"]) == pytest.approx((-1, -1)) and inverse["ssim"] < 0
    assert inverse["topk_intersection"] == 0


def test_maps_are_compared_on_the_coarser_grid():
    """A map agrees with its own averages; SSIM of 6x6 positions is absent with a reason."""
    small = shown(lambda images: shrunk(images[..., 0], (6, 6)))
    found = summary(evaluators.agreement(RED, small))
    assert found["spearman"].value == pytest.approx(1)
    assert found["ssim"].value is None and found["ssim"].reason == "a map has fewer than 11x11 positions"
    np.testing.assert_allclose(shrunk(jnp.arange(8.0).reshape(1, 2, 4), (2, 4)), jnp.arange(8.0).reshape(1, 2, 4))


def test_a_constant_map_agrees_with_nothing_and_is_counted():
    found = values(evaluators.agreement(RED, shown(lambda images: 0 * images[..., 0] + 0.7)))
    assert (found["spearman"], found["kendall_tau_b"], found["constant"]) == (0, 0, 1)


# Stability: baselines 13.17, breadth_explanations 8.


def test_changes_of_maps_have_the_worked_values():
    e, others = jnp.array([[[3.0, 4]]] * 3), jnp.array([[[3.3, 4]], [[3, 3.6]], [[2.7, 4.3]]])
    logits = jnp.ones((3, 2))
    np.testing.assert_allclose(changes(e, others, logits, 2 * logits)[0], [0.06, 0.08, 0.084853], atol=1e-6)
    e, other = jnp.array([[[1.0, 0], [2, 4]]]), jnp.array([[[1.1, 0.5], [1.8, 4]]])
    _, ours, theirs = changes(e, other, jnp.array([[2.0, 1]]), jnp.array([[1.9, 1.2]]))
    assert float(ours[0]) == pytest.approx(1.195229, abs=1e-5)
    assert float(theirs[0]) == pytest.approx(2236067.9775, rel=1e-5)
    _, _, without = changes(
        e.at[0, 0, 1].set(1), other.at[0, 0, 1].set(1), jnp.array([[2.0, 1]]), jnp.array([[1.9, 1.2]])
    )
    assert float(without[0]) == pytest.approx(0.632456, abs=1e-5)
    assert np.isnan(np.stack(changes(0 * e, other, jnp.ones((1, 2)), jnp.zeros((1, 2))))).all()


def test_the_gradient_of_an_affine_network_is_stable_and_a_map_of_the_image_is_not():
    still = values(evaluators.stability(gradient(reduce="sum"), samples=4))
    assert still["max_sensitivity"] == pytest.approx(0, abs=1e-6) and still["output_stability"] == pytest.approx(
        0, abs=1e-4
    )
    moved = values(evaluators.stability(RED, samples=4, radius=0.05))
    assert 0 < moved["mean_sensitivity"] < moved["max_sensitivity"] < 0.1
    # One sample is at most what the noise allows: |noise| <= radius on every value.
    wider = values(evaluators.stability(RED, samples=4, radius=0.1))
    assert wider["max_sensitivity"] == pytest.approx(2 * moved["max_sensitivity"], rel=0.05)
    assert evaluators.stability(RED, samples=4).cost(None, None) == Cost(10, 0)


# Completeness.


def test_path_methods_are_complete_and_others_are_not():
    """Of an affine score one node is exact; input and baseline exchanged, the sum has the wrong sign."""
    complete = values(evaluators.completeness(integrated(steps=1, reduce="sum")))
    assert complete["completeness_error"] == pytest.approx(0, abs=1e-4)
    negative = shown(lambda images: -(images * WEIGHTS[:, 0].reshape(1, SIZE, SIZE, 3)).sum(-1), signed="against")
    batch = BATCH | {"label": jnp.zeros(N, jnp.int32)}
    assert values(evaluators.completeness(negative), batch)["completeness_error"] == pytest.approx(2, rel=1e-4)
    with pytest.raises(UserError, match=r"completeness: the map has no sign, .* integrated\(reduce='sum'\)"):
        evaluators.completeness(gradient())


# Infidelity: baselines 13.17.


def test_infidelity_needs_two_samples():
    """The scale of least squares makes one alone exact, whatever the map is."""
    with pytest.raises(UserError, match="samples must be a whole number of at least 2, got 1"):
        evaluators.infidelity(gradient(), samples=1)


def test_infidelity_is_that_of_a_linear_model():
    """The gradient of an affine score predicts every change, in any unit once scaled; twice it misses by the change."""
    exact = values(evaluators.infidelity(gradient(reduce="sum"), samples=8))
    assert exact == pytest.approx(dict.fromkeys(exact, 0), abs=1e-9)
    twice = dataclasses.replace(gradient(), pixels=lambda *arguments: 2 * gradient().pixels(*arguments))
    doubled = values(evaluators.infidelity(twice, samples=8))
    assert max(doubled["infidelity_noise"], doubled["infidelity_square"]) < 1e-9
    assert min(doubled["unscaled_infidelity_noise"], doubled["unscaled_infidelity_square"]) > 1e-4
    nothing = values(evaluators.infidelity(shown(lambda images: 0 * images[..., 0]), samples=8))
    assert nothing["infidelity_noise"] == nothing["unscaled_infidelity_noise"]  # the mean of the squared changes
    assert nothing["infidelity_noise"] == pytest.approx(doubled["unscaled_infidelity_noise"], rel=1e-4)


def test_random_squares_lie_inside_the_image():
    squares = np.asarray(random_squares(jax.random.split(jax.random.key(0), 200), (9, 12)))
    sides = np.sqrt(squares.sum((1, 2)))
    assert set(sides) == {1, 2, 3} and (squares.any(1).sum(1) == sides).all() and (squares.any(2).sum(1) == sides).all()
    assert squares.any(0).all()


# ADCC and ARCC: baselines 13.15, breadth_explanations 1.


def test_harmonic_means_have_the_worked_values():
    one = lambda *terms: float(harmonic_mean(*(jnp.array([term]) for term in terms))[0])
    assert one(0.8, 0.7, 0.9) == pytest.approx(0.791623, abs=1e-6)
    assert one(0.8, 0.7, 2 * 0.25) == pytest.approx(0.641221, abs=1e-6)
    assert one(0.8, 0.0, 0.9) == 0
    mask, again = jnp.array([[[0, 0.2], [0.4, 1]]]), jnp.array([[[0.1, 0.1], [0.5, 0.8]]])
    assert float(coherency(mask, again)[0]) == pytest.approx(0.976045, abs=1e-6)
    assert float(mask.mean()) == pytest.approx(0.4) and float(coherency(mask, 0 * again)[0]) == 0


def test_adcc_equals_numpy():
    found = values(evaluators.adcc(RED))
    images, labels = np.asarray(BATCH["image"], np.float64), np.asarray(BATCH["label"])
    scaled = lambda maps: (maps - maps.min((1, 2), keepdims=True)) / np.ptp(maps, (1, 2), keepdims=True)
    softmax = lambda x: scipy.special.softmax(x.reshape(N, -1) @ np.asarray(WEIGHTS) + 0.1, 1)[np.arange(N), labels]
    mask = scaled(images[..., 0])
    masked = images * mask[..., None]
    r = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(mask, scaled(masked[..., 0]))]
    terms = (
        (np.array(r) + 1) / 2,
        1 - mask.mean((1, 2)),
        1 - np.maximum(softmax(images) - softmax(masked), 0) / softmax(images),
    )
    assert found["adcc"] == pytest.approx((3 / sum(1 / term for term in terms)).mean(), abs=1e-5)
    constant = values(evaluators.adcc(shown(lambda images: jnp.ones_like(images[..., 0]))))
    assert constant["adcc"] == 0 == constant["complexity"]


# The background.


def test_excess_has_the_worked_values():
    """breadth_explanations 7."""
    of = jax.jit(excess)
    maps = jnp.array([[[4.0, 1], [3, 2]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]])
    inside = jnp.zeros((3, 2, 2), bool).at[:, 0, 0].set(True)
    found = of(maps, inside, jnp.ones_like(inside))
    np.testing.assert_allclose(found["excess"], [0.8, 1, np.nan], rtol=1e-6)
    np.testing.assert_allclose(found["size"], 0.25)
    place = jnp.zeros((1, 8, 8), bool).at[0, 1:3, 5:7].set(True)  # its centroid is (1.5, 5.5)
    np.testing.assert_allclose(of(jnp.ones((1, 8, 8)), place, jnp.ones_like(place))["distance"], [0.5])
    corner = jnp.zeros((1, 8, 8), bool).at[0, 7, 7].set(True)
    assert 0.85 < float(of(jnp.ones((1, 8, 8)), corner, jnp.ones_like(corner))["distance"][0]) < 1
    whole = jnp.ones((1, 8, 8), bool)
    assert np.isnan(of(jnp.ones((1, 8, 8)), whole, whole)["excess"]).all()


def test_background_reliance_by_size_and_distance():
    """30 images, objects of two sizes: the map lies on the large ones and beside the small ones."""
    evaluator, n = evaluators.background_reliance(RED), 60
    small = np.arange(n) % 2 == 0
    rows = {
        "excess": np.where(small, 1.2, 0.1),
        "size": np.where(small, 0.04, 0.3),
        "distance": np.linspace(0, 1, n),
        "right": ~small,
    }
    found = evaluator.summary(rows)
    assert found["excess"].value == pytest.approx(0.65) and found["excess_by_size"].value == pytest.approx(-1)
    assert (found["excess_size_0"].value, found["excess_size_3"].value) == pytest.approx((1.2, 0.1))
    assert (found["accuracy_size_0"].value, found["accuracy_size_3"].value) == (0, 1) and found["excess_size_0"].n == 30
    assert found["excess_size_1"] == Measure(n=0, better="lower", label="excess, size 0.05 to 0.1", unit="times chance",
                                             main=False, reason="fewer than 20 images")  # fmt: skip
    assert found["excess_distance_2"].n == 36 and found["excess_distance_0"].value is None
    left_out = evaluator.summary(
        {name: np.append(row, np.nan if name == "excess" else 0) for name, row in rows.items()}
    )
    assert left_out["excess"] == found["excess"]
