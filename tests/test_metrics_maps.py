"""Spread, ranks, energy, deletion and insertion: worked values of the papers, SciPy, and NumPy written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import convolve, gaussian_filter

from topgap_jax import baselines, metrics
from topgap_jax.build import build
from topgap_jax.errors import UserError
from topgap_jax.metrics import perturbation, ranks, structure
from topgap_jax.types import Cost

KEYS = jax.random.split(jax.random.key(0), 2)


@jax.jit
def spread_of(maps):
    return metrics.gini()(None, None, maps, {}) | metrics.extent()(None, None, maps, {})


def spread(values):
    rows = spread_of(jnp.asarray(values, jnp.float32)[None, None])
    return {name: float(row[0]) for name, row in rows.items()}


# How wide a map is: sgdrop 12, T11.


@pytest.mark.parametrize(
    "values, effective_share, gini, area50, area90, above_half",
    [
        ((1, 1, 1, 1), 1, 0, 0.5, 1, 1),
        ((1, 0, 0, 0), 0.25, 0.75, 0.25, 0.25, 0.25),
        ((4, 2, 1, 1), 0.840896, 0.3125, 0.25, 1, 0.5),
        ((8, 4, 2, 2, 0, 0, 0, 0), 0.420448, 0.65625, 0.125, 0.5, 0.25),
    ],
)
def test_spread_has_the_worked_values(values, effective_share, gini, area50, area90, above_half):
    expected = {"effective_share": effective_share, "gini": gini, "area50": area50, "area90": area90}
    assert spread(values) == pytest.approx(expected | {"above_half": above_half}, abs=1e-6)
    # Scale changes nothing, up to the ends of float32; negative values count as 0.
    for factor in (1e-30, 1e30):
        assert spread(np.float32(factor) * np.float32(values)) == pytest.approx(spread(values), abs=1e-6)
    assert spread((*values, 0)) == pytest.approx(spread((*values, -3)))


@pytest.mark.parametrize("values, gini", [((1, 2, 3, 4), 0.25), ((1.2, 0.2, 0, 0, 0.7, 0), 0.658730)])
def test_gini_has_the_worked_values(values, gini):
    """norm_regularised 11.7."""
    assert spread(values)["gini"] == pytest.approx(gini, abs=1e-6)


# Few sizes: each is a program of its own.
LISTS = st.sampled_from([2, 9, 30]).flatmap(lambda n: st.lists(st.integers(0, 100), min_size=n, max_size=n))


@given(LISTS.filter(any))
def test_spread_equals_numpy(values):
    p = np.sort(np.float64(values))[::-1] / np.sum(values)
    n = len(p)
    difference = np.abs(p[:, None] - p[None, :]).sum() / (2 * n)  # Gini is half the mean difference over the mean
    filled = p[p > 0]
    held = np.cumsum(p) + 1e-6
    expected = {"gini": difference, "effective_share": np.exp(-(filled * np.log(filled)).sum()) / n}
    expected |= {"area50": (np.argmax(held >= 0.5) + 1) / n, "area90": (np.argmax(held >= 0.9) + 1) / n}
    expected |= {"above_half": np.mean(np.array(values) >= max(values) / 2)}
    assert spread(values) == pytest.approx(expected, abs=1e-5)


def test_total_variation_has_the_worked_value():
    """baselines 13.18: 7 vertical and 6 horizontal, by 6 cells of at most 4."""
    maps = jnp.array([[[4, 2, 0], [1, 1, 3]], [[4, 2, -5], [1, 1, 3]], [[3, 3, 3], [3, 3, 3]], -jnp.ones((2, 3))])
    found = metrics.total_variation()(None, None, maps, {})["total_variation"]
    np.testing.assert_allclose(found, [13 / 24, 13 / 24, 0, np.nan])


def test_a_map_without_a_positive_value_has_no_spread_and_no_energy():
    assert np.isnan(list(spread((0, 0, -1, -2)).values())).all()
    batch = {"image": jnp.zeros((1, 2, 2, 3)), "region": jnp.array([[[1, 0], [0, 0]]])}
    found = metrics.energy()(None, None, -jnp.ones((1, 2, 2)), batch)
    assert np.isnan(found["energy"]).all() and np.isnan(found["energy_lift"]).all()


def test_energy_has_the_worked_value():
    """baselines 13.13: map [[1, 2, 0], [3, 4, 0], [0, 0, 10]], box 2x2; -9 outside changes nothing, and unsure is on no
    side."""
    maps = jnp.array([[[1, 2, -9], [3, 4, 0], [0, 0, 10.0]]])
    box = {"image": jnp.zeros((1, 3, 3, 3)), "box": jnp.array([[0, 0, 2 / 3, 2 / 3]])}
    region = {"image": box["image"], "region": jnp.array([[[1, 1, 0], [1, 1, 0], [0, 0, 2]]])}
    found, certain = (metrics.energy()(None, None, maps, batch) for batch in (box, region))
    np.testing.assert_allclose([found["energy"][0], found["energy_lift"][0]], [0.5, 0.5 * 9 / 4], rtol=1e-6)
    np.testing.assert_allclose([certain["energy"][0], certain["energy_lift"][0]], [1, 8 / 4], rtol=1e-6)


# How far two maps agree: art 15, T7.

S, CHANGED = jnp.array([[[5.0, 4, 3], [2, 1, 0]]]), jnp.array([[[4.0, 5, 1], [2, 3, 0]]])


def test_ranks_have_the_worked_values():
    assert [float(metrics.ranks.topk_intersection(S, CHANGED, k)[0]) for k in (1, 2, 3)] == pytest.approx([0, 1, 2 / 3])
    assert float(ranks.kendall_tau_b(S, CHANGED)[0]) == pytest.approx(0.46666667)
    assert float(ranks.spearman(S, CHANGED)[0]) == pytest.approx(0.71428571)
    tied, other = jnp.array([[1.0, 2, 2, 3]]), jnp.array([[1.0, 2, 3, 3]])
    assert float(ranks.kendall_tau_b(tied, other)[0]) == pytest.approx(0.8)
    assert float(ranks.spearman(tied, other)[0]) == pytest.approx(0.83333333)
    masked = [values * jnp.array([[[1, 1, 1], [0, 0, 0]]]) for values in (S, CHANGED)]
    assert float(ranks.kendall_tau_b(*masked)[0]) == pytest.approx(0.83333333)
    # baselines 13.19
    a, b = jnp.array([[1.0, 2, 2, 3, 5]]), jnp.array([[2.0, 1, 3, 3, 4]])
    found = [float(f(a, b)[0]) for f in (ranks.spearman, ranks.kendall_tau_b, ranks.cosine)]
    assert found == pytest.approx([0.763158, 0.666667, 0.952353], abs=1e-6)
    assert float(ranks.topk_intersection(a, b, 3)[0]) == pytest.approx(2 / 3)


@given(st.integers(0, 10**6), st.sampled_from([2, 9, 150]), st.sampled_from([2, 5, 10**6]))
def test_rank_correlations_equal_scipy(seed, n, values):
    """With few values, many ties; 150 is more than one block of the comparison."""
    random = np.random.default_rng(seed)
    a, b = random.integers(0, values, (2, 1, n)).astype(np.float32)
    tau, rho = compiled()(a, b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert np.isnan(tau).all() and np.isnan(rho).all()
    else:
        assert float(tau[0]) == pytest.approx(scipy.stats.kendalltau(a[0], b[0]).statistic, abs=1e-5)
        assert float(rho[0]) == pytest.approx(scipy.stats.spearmanr(a[0], b[0]).statistic, abs=1e-5)


@functools.cache
def compiled():
    return jax.jit(lambda a, b: (ranks.kendall_tau_b(a, b), ranks.spearman(a, b)))


@given(st.integers(0, 10**6), st.integers(1, 12))
def test_topk_equals_numpy(seed, k):
    """Stable: of equal values the first in reading order; k may be one for each pair."""
    random = np.random.default_rng(seed)
    a, b = random.integers(0, 4, (2, 3, 3, 4)).astype(np.float32)
    top = lambda values: set(np.argsort(-values.ravel(), kind="stable")[:k])
    expected = [len(top(x) & top(y)) / k for x, y in zip(a, b)]
    np.testing.assert_allclose(ranks.topk_intersection(a, b, k), expected, rtol=1e-6)
    np.testing.assert_allclose(ranks.topk_intersection(a, b, jnp.full(3, k)), expected, rtol=1e-6)


def test_maps_that_are_not_finite_agree_with_nothing():
    broken = S.at[0, 0, 0].set(jnp.nan)
    for measure in (lambda a, b: ranks.topk_intersection(a, b, 2), ranks.kendall_tau_b, ranks.spearman):
        assert np.isnan(measure(broken, broken)).all() and np.isnan(measure(S, broken)).all()


def test_cosine_of_small_and_of_empty_maps():
    a = jnp.array([[1e-25, 0], [0, 0], [1e30, 1e30]])
    np.testing.assert_allclose(ranks.cosine(a, a), [1, 0, 1], rtol=1e-6)


# Structure.


def test_ssim_has_the_worked_value():
    """baselines 13.19: half of the map inverted."""
    i, j = np.indices((16, 16))
    first = jnp.asarray((i + j)[None] / 30, jnp.float32)
    second = jnp.where(i < 8, first, 1 - first)
    np.testing.assert_allclose(structure.ssim(first, second), [0.094046], atol=1e-6)
    np.testing.assert_allclose(structure.ssim(first, first), [1], rtol=1e-6)
    with pytest.raises(UserError, match=r"maps must have one shape of at least 11x11 positions, got \(1, 7, 7\)"):
        structure.ssim(first[:, :7, :7], first[:, :7, :7])


# Deletion and insertion.


def test_the_blur_has_the_worked_values():
    """guided_nonlinearity 11, T13."""
    kernel = np.outer(baselines.blur_kernel(), baselines.blur_kernel())
    assert kernel.sum() == pytest.approx(1) and kernel[5, 5] == pytest.approx(0.0088326, abs=1e-7)
    assert kernel[0, 0] == pytest.approx(0.0077366, abs=1e-7) and kernel[0, 5] == pytest.approx(0.00826649, abs=1e-7)
    pulse = np.zeros((11, 11))
    pulse[5, 5] = 1
    np.testing.assert_allclose(kernel, gaussian_filter(pulse, 5), atol=1e-12)


def test_blurred_equals_a_convolution():
    images = np.random.default_rng(0).uniform(size=(2, 14, 9, 3)).astype(np.float32)
    colour = np.float32([0.2, 0.4, 0.6])
    kernel = np.outer(baselines.blur_kernel(), baselines.blur_kernel())[None, :, :, None]
    expected = colour + convolve(images - colour, kernel, mode="constant")
    np.testing.assert_allclose(baselines.blurred(jnp.asarray(images), colour), expected, atol=1e-5)


def test_areas_have_the_worked_values():
    """guided_nonlinearity 11, T13; baselines 13.14."""
    assert float(perturbation.area_under(np.array([0.9, 0.5, 0.2, 0.1, 0]))) == pytest.approx(0.3125)
    assert float(perturbation.area_under(np.array([1, 0.8, 0.5, 0.1]))) == pytest.approx(0.616667, abs=1e-6)


IMAGES = jnp.asarray(np.random.default_rng(3).uniform(size=(2, 4, 5, 3)), jnp.float32)
LABELS = jnp.array([0, 1])
WEIGHTS = jnp.asarray(np.random.default_rng(4).normal(size=(60, 2)) / 4, jnp.float32)


MEAN = np.float32([0.45, 0.5, 0.55])


def predict(images, keys=None):
    """A linear model of normalised images."""
    return ((images - MEAN) / 0.25).reshape(len(images), -1) @ WEIGHTS


@pytest.mark.parametrize(
    "row", ["deletion(steps=6, substrate=(.1, .2, .3))", "insertion(steps=6)", "deletion(steps=3)"]
)
def test_deletion_and_insertion_equal_numpy(row):
    """Every image by hand: replaced in the order of the map, which has no ties."""
    steps = 3 if "3)" in row[-2:] else 6
    maps = np.random.default_rng(5).permutation(40).reshape(2, 4, 5).astype(np.float32)
    metric = build(row, metrics.TABLE)
    found = metric(KEYS, predict, jnp.asarray(maps), {"image": IMAGES, "label": LABELS})
    images = np.asarray(IMAGES)
    for i in range(2):
        if "insertion" in row:
            other = np.asarray(baselines.blurred(IMAGES, MEAN))[i]
        else:
            other = np.broadcast_to([0.1, 0.2, 0.3] if "(.1" in row else MEAN, images[i].shape)
        order, scores = np.argsort(-maps[i].ravel()), []
        for step in range(steps + 1):
            taken = order[: round(step * 20 / steps)]
            first, second = (other, images[i]) if "insertion" in row else (images[i], other)
            changed = first.reshape(20, 3).copy()
            changed[taken] = second.reshape(20, 3)[taken]
            logits = ((changed - MEAN) / 0.25).ravel() @ np.asarray(WEIGHTS)
            scores.append(np.exp(logits[i]) / np.exp(logits).sum())
        area = (sum(scores) - scores[0] / 2 - scores[-1] / 2) / steps
        name = row.split("(")[0]
        assert float(found[name][i]) == pytest.approx(area, abs=1e-5)
        np.testing.assert_allclose(found[f"{name}_curve"][i], scores, atol=1e-5)
    assert metric.cost(None, None) == Cost(steps + 1, 0)


def test_ties_are_shuffled_by_the_key():
    """A constant map has no order: its deletion is that of a random one, decided by the example's key alone."""
    metric, batch = metrics.deletion(steps=5), {"image": IMAGES, "label": LABELS}
    constant = jnp.ones((2, 4, 5))
    found, again = (metric(KEYS, predict, constant, batch)["deletion"] for _ in range(2))
    np.testing.assert_array_equal(found, again)
    other = metric(KEYS.at[1].set(jax.random.key(9)), predict, constant, batch)["deletion"]
    assert found[0] == other[0] and found[1] != other[1]
    # A strictly increasing change of the map changes nothing.
    maps = jnp.asarray(np.random.default_rng(5).permutation(40).reshape(2, 4, 5), jnp.float32)
    first, second = (metric(KEYS, predict, m, batch)["deletion"] for m in (maps, maps**3 - 7))
    np.testing.assert_array_equal(first, second)


def test_the_true_map_of_an_additive_score_is_the_best():
    """Of all orders the one by true contributions deletes fastest and inserts fastest."""
    own = jax.vmap(
        lambda image, label: (image - image.mean((0, 1))).ravel() * (WEIGHTS[:, label] - WEIGHTS[:, 1 - label])
    )
    contributions = own(IMAGES, LABELS).reshape(2, 4, 5, 3).sum(-1)
    batch = {"image": IMAGES, "label": LABELS}
    random = np.random.default_rng(1)
    others = jnp.stack(
        [contributions, *(jnp.asarray(random.normal(size=(2, 4, 5))) for _ in range(20)), -contributions]
    )
    run = jax.jit(
        jax.vmap(
            lambda maps: (
                metrics.deletion(steps=20)(KEYS, predict, maps, batch)["deletion"],
                metrics.insertion(steps=20, substrate="mean")(KEYS, predict, maps, batch)["insertion"],
            )
        )
    )
    deleted, inserted = (np.asarray(values) for values in run(others))
    assert (deleted.argmin(0) == 0).all() and (deleted.argmax(0) == 21).all()
    assert (inserted.argmax(0) == 0).all() and (inserted.argmin(0) == 21).all()


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: metrics.deletion(steps=0), "steps must be a whole number of at least 1, got 0"),
        (lambda: metrics.insertion(substrate="grey"), "insertion: substrate must be 'mean', 'blur', a colour or a picture in [0, 1], got 'grey'"),
        (lambda: metrics.deletion(substrate=(0, 0, 255)), "deletion: substrate must be 'mean', 'blur', a colour or a picture (h, w, c) in [0, 1]"),
        (lambda: ranks.topk_intersection(S, S, 7), "k must be a whole number in [1, 6], got 7"),
        (lambda: ranks.spearman(S, S[:, :1]), "maps to compare must have one shape, got (1, 2, 3) and (1, 1, 3)"),
    ],
)  # fmt: skip
def test_mistakes(make, text):
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == text
