"""Average drop, single deletion, sensitivity-n, ROAD: worked values, NumPy written out, and what must hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from topgap_jax import metrics
from topgap_jax.errors import UserError
from topgap_jax.grids import cell_numbers
from topgap_jax.metrics.masking import changes
from topgap_jax.metrics.ranks import spearman
from topgap_jax.metrics.road import impute

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.uniform(size=(2, 8, 8, 3)), jnp.float32)
LABELS = jnp.array([0, 1])
KEYS = jax.random.split(jax.random.key(0), 2)
BATCH = {"image": IMAGES, "label": LABELS}
WEIGHTS = jnp.asarray(RNG.normal(size=(8 * 8 * 3, 2)) / 8, jnp.float32)


def affine(images, keys=None):
    return images.reshape(len(images), -1) @ WEIGHTS + 0.3


def contributions():
    """What each pixel adds to the label's logit, black being nothing: (2, 8, 8)."""
    return (IMAGES.reshape(2, -1) * WEIGHTS[:, LABELS].T).reshape(2, 8, 8, 3).sum(-1)


# Average drop: baselines 13.15.


def test_changes_have_the_worked_values():
    found = changes(jnp.array([0.8, 0.5, 0.9]), jnp.array([0.6, 0.7, 0.9]))
    means = {name: float(row.mean()) for name, row in found.items()}
    expected = {"average_drop": 8.333333, "average_increase": 33.333333, "average_gain": 13.333333}
    assert means == pytest.approx(expected, rel=1e-6)
    certain = changes(jnp.array([0.0, 1.0]), jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal([row for row in certain.values()], np.zeros((3, 2)))


def test_average_drop_multiplies_by_the_scaled_map():
    maps = jnp.asarray(RNG.uniform(size=(2, 8, 8)), jnp.float32)
    rows = metrics.average_drop()(KEYS, affine, maps, BATCH)
    mask = np.asarray((maps - maps.min((1, 2), keepdims=True)) / jnp.ptp(maps, (1, 2), keepdims=True))
    p = scipy.special.softmax(np.asarray(affine(IMAGES)), 1)[[0, 1], LABELS]
    o = scipy.special.softmax(np.asarray(affine(np.asarray(IMAGES) * mask[..., None])), 1)[[0, 1], LABELS]
    np.testing.assert_allclose(rows["average_drop"], 100 * np.maximum(p - o, 0) / p, atol=1e-3)
    np.testing.assert_allclose(rows["average_gain"], 100 * np.maximum(o - p, 0) / (1 - p), atol=1e-3)
    np.testing.assert_allclose(rows["mask_mean"], mask.mean((1, 2)), rtol=1e-5)


# Single deletion: breadth_explanations 3.


def test_single_deletion_is_spearman_of_sums_and_drops():
    a, d = jnp.array([[0.4, 0.1, 0.3, 0.2]]), jnp.array([[1.2, 0.5, 0.1, 0.3]])
    assert float(spearman(a, d)[0]) == pytest.approx(0.2)
    maps = jnp.asarray(RNG.normal(size=(2, 8, 8)), jnp.float32)
    rows = jax.jit(lambda maps: metrics.single_deletion(grid=2, substrate=0.25)(KEYS, affine, maps, BATCH))(maps)
    logits = lambda images: np.asarray(images).reshape(2, -1) @ np.asarray(WEIGHTS)
    for i in range(2):
        sums, drops = [], []
        for r in (slice(0, 4), slice(4, 8)):
            for c in (slice(0, 4), slice(4, 8)):
                changed = np.array(IMAGES)
                changed[:, r, c] = 0.25
                sums.append(np.asarray(maps)[i, r, c].sum())
                drops.append((logits(IMAGES) - logits(changed))[i, LABELS[i]])
        assert float(rows["single_deletion"][i]) == pytest.approx(scipy.stats.spearmanr(sums, drops).statistic)
    black = metrics.single_deletion(grid=2, substrate=0.0)
    true = jax.jit(lambda maps: black(KEYS, affine, maps, BATCH))(contributions())
    np.testing.assert_allclose(true["single_deletion"], 1, rtol=1e-6)


def test_a_constant_map_has_single_deletion_0_and_is_counted():
    maps = jnp.full((2, 3, 3), 0.7).at[1, 0, 0].set(0)
    rows = metrics.single_deletion(grid=2)(KEYS, affine, maps, BATCH)
    assert rows["single_deletion"][0] == 0 and rows["single_deletion"][1] != 0
    np.testing.assert_array_equal(rows["single_deletion_constant"], [1, 0])
    np.testing.assert_array_equal(np.bincount(cell_numbers("", 4, (6, 9)).ravel()).reshape(4, 4).sum(1), [18, 9, 18, 9])
    with pytest.raises(UserError, match="a grid of 4 x 4 cells is finer than images of 3 x 8 pixels"):
        cell_numbers("single_deletion", 4, (3, 8))


# Sensitivity-n: baselines 13.21.


def test_sensitivity_n_of_input_x_gradient_of_an_affine_score_is_1():
    metric = metrics.sensitivity_n(shares=(0.05, 0.5), subsets=10, substrate=0.0)
    run = jax.jit(lambda maps: metric(KEYS, affine, maps, BATCH))
    rows = run(contributions())
    np.testing.assert_allclose(rows["sensitivity_n_curve"], 1, atol=1e-4)
    np.testing.assert_allclose(run(-contributions())["sensitivity_n"], -1, atol=1e-4)
    np.testing.assert_array_equal(run(jnp.ones((2, 8, 8)))["sensitivity_n"], 0)
    np.testing.assert_allclose(run(3 * contributions())["sensitivity_n"], rows["sensitivity_n"], atol=1e-5)


# ROAD: baselines 13.16.


@functools.cache
def filled():
    """v = n^2 / 10 on 4 x 4 without some pixels, all in one program: (filled, solved)."""
    image = jnp.asarray(np.arange(16.0).reshape(4, 4, 1) ** 2 / 10, jnp.float32)
    holes = [[(1, 1)], [(0, 0)], [(1, 1), (1, 2)], [(0, 0), (0, 1), (1, 1)], [], [divmod(i, 4) for i in range(16)]]
    removed = np.zeros((len(holes), 4, 4), bool)
    for i, places in enumerate(holes):
        for place in places:
            removed[i][place] = True
    images = jnp.tile(image, (len(holes), 1, 1, 1))
    return images, removed, *jax.jit(impute)(images, removed)


@pytest.mark.parametrize(
    "hole, values",
    [(0, (3.633333,)), (1, (1.18,)), (2, (3.86, 4.96)), (3, (2.452525, 2.419192, 4.224242))],
)
def test_imputed_pixels_have_the_worked_values(hole, values):
    images, removed, found, solved = filled()
    np.testing.assert_allclose(np.asarray(found)[hole, ..., 0][removed[hole]], values, atol=1e-4)
    np.testing.assert_array_equal(found[hole][~removed[hole]], images[hole][~removed[hole]])
    assert solved[hole]


def test_no_hole_changes_nothing_and_a_hole_everywhere_is_black():
    images, removed, found, solved = filled()
    np.testing.assert_array_equal(found[4], images[4])
    np.testing.assert_array_equal(found[5], 0)
    assert solved.all()


def test_imputed_pixels_solve_the_system():
    """A dense solve of NumPy's on 8 x 8 with half of the pixels removed."""
    removed = RNG.uniform(size=(2, 8, 8)) < 0.5
    found, solved = jax.jit(impute)(IMAGES, removed)
    for i in range(2):
        matrix, target = np.eye(64), np.asarray(IMAGES[i], np.float64).reshape(64, 3).copy()
        for u in np.flatnonzero(removed[i]):
            matrix[u], target[u] = 0, 0
            for dr in (-1, 0, 1):
                for dc in (-1, 0, 1):
                    r, c = u // 8 + dr, u % 8 + dc
                    if (dr or dc) and 0 <= r < 8 and 0 <= c < 8:
                        weight = 1 / 6 if dr == 0 or dc == 0 else 1 / 12
                        matrix[u, u] += weight
                        matrix[u, r * 8 + c] -= weight
        np.testing.assert_allclose(found[i].reshape(64, 3), np.linalg.solve(matrix, target), atol=1e-4)
    assert solved.all()


def test_road_prefers_the_map_that_marks_what_counts():
    """A network that reads one corner; the map of that corner, its inverse, and a strictly increasing change of it."""
    image = jnp.asarray(RNG.uniform(0, 0.3, (1, 8, 8, 3)), jnp.float32).at[:, :3, :3].add(0.7)
    reads = lambda images, keys=None: (
        8 * jnp.stack([images[:, :3, :3].mean((1, 2, 3)), images[:, 5:, 5:].mean((1, 2, 3))], 1)
    )
    maps = jnp.asarray(RNG.permutation(64).reshape(8, 8) / 100, jnp.float32).at[:3, :3].add(1)[None]
    metric = metrics.road(shares=(0.15, 0.3), noise=0)
    batch = {"image": image, "label": jnp.array([0])}
    run = jax.jit(lambda maps: metric(KEYS[:1], reads, maps, batch))
    right, wrong, increasing = run(maps), run(-maps), run(jnp.exp(3 * maps))
    assert right["road"] > 0.1 > -0.1 > wrong["road"]
    for name, row in right.items():
        np.testing.assert_array_equal(row, increasing[name])
    np.testing.assert_allclose(right["road"], (right["road_least_curve"] - right["road_most_curve"]).mean(1) / 2)
    assert right["road_unsolved"] == 0


# What changes nothing: baselines 13.21.


@functools.cache
def ordered():
    """The rows of everything that sees only the order of the map, in one program."""
    measured = (
        metrics.deletion(steps=4),
        metrics.insertion(steps=4),
        metrics.road(shares=(0.2, 0.6)),
        metrics.pointing(),
    )
    batch = BATCH | {"region": jnp.zeros((2, 8, 8), jnp.uint8).at[:, 2:5, 2:5].set(1)}

    @jax.jit
    def rows(maps):
        return [metric(KEYS, affine, maps, batch) for metric in measured]

    return rows


@functools.cache
def scale_free():
    """The rows of everything that does not see the map's scale."""
    measured = metrics.gini(), metrics.extent(), metrics.total_variation(), metrics.energy(), metrics.average_drop()
    batch = BATCH | {"region": jnp.zeros((2, 8, 8), jnp.uint8).at[:, 2:5, 2:5].set(1)}
    return jax.jit(lambda maps: [metric(KEYS, affine, maps, batch) for metric in measured])


@pytest.mark.slow
@given(st.integers(0, 10**6), st.sampled_from([jnp.exp, lambda x: x**3 - 2, lambda x: 7 * x + 3]))
def test_strictly_increasing_changes_of_a_map_change_no_order(seed, increasing):
    maps = jnp.asarray(np.random.default_rng(seed).permutation(128).reshape(2, 8, 8) / 64 - 1, jnp.float32)
    for rows, others in zip(ordered()(maps), ordered()(increasing(maps))):
        for name, row in rows.items():
            np.testing.assert_array_equal(row, others[name], err_msg=name)


@given(st.integers(0, 10**6), st.sampled_from([0.001, 0.3, 50.0]))
def test_the_scale_of_a_map_changes_no_shape(seed, scale):
    maps = jnp.asarray(np.random.default_rng(seed).uniform(size=(2, 8, 8)), jnp.float32)
    for rows, others in zip(scale_free()(maps), scale_free()(scale * maps)):
        for name, row in rows.items():
            np.testing.assert_allclose(row, others[name], rtol=1e-4, atol=1e-3, err_msg=name)


@given(st.integers(0, 10**6))
def test_changes_of_probabilities_are_percent_and_one_sided(seed):
    before, after = np.random.default_rng(seed).uniform(size=(2, 50)).astype(np.float32)
    drop, increase, gain = (np.asarray(row) for row in changes(before, after).values())
    for row in (drop, increase, gain):
        assert (row >= 0).all() and (row <= 100).all()
    assert (drop * increase == 0).all() and (drop * gain == 0).all()
