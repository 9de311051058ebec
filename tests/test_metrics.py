"""Metrics against the worked values of the papers, plain NumPy, and what must hold for every map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given
from hypothesis import strategies as st

from tests import laws
from topgap_jax import metrics
from topgap_jax.errors import UserError
from topgap_jax.metrics import boxes, field, localisation, summaries
from topgap_jax.types import Cost, Measure

RNG = np.random.default_rng(0)
FIELD = np.zeros((1, 9, 9), np.float32)
FIELD[0, 2:7, 2:7] = np.outer([1, 2, 3, 2, 1], [1, 2, 3, 2, 1])


def square(low, high):
    inside = np.zeros((1, 9, 9), bool)
    inside[0, low:high, low:high] = True
    return inside


def batch_of(regions, **more):
    return {"image": jnp.zeros((*np.shape(regions), 3)), "region": jnp.asarray(regions, jnp.uint8), **more}


# Receptive fields: the two all-ones 3 x 3 convolutions of topgap.md 14.6.


def test_field_measures_have_the_worked_values():
    np.testing.assert_allclose(field.rms_radius(FIELD, (4.0, 4.0)), [1.6329932], rtol=1e-6)
    np.testing.assert_allclose(field.effective_area(FIELD), [18.1745152], rtol=1e-6)
    np.testing.assert_allclose(field.luo_size(FIELD, (4.0, 4.0)), [5])


@pytest.mark.parametrize("low, high, share", [(3, 6, 49 / 81), (0, 5, 36 / 81)])
def test_field_inside_a_box_has_the_worked_values(low, high, share):
    inside = square(low, high)
    np.testing.assert_allclose(field.share_inside(FIELD, inside), [share], rtol=1e-6)


def test_a_field_of_zeros_has_no_shape():
    empty = jnp.zeros((1, 9, 9))
    measured = [field.rms_radius(empty, (4.0, 4.0)), field.luo_size(empty, (4.0, 4.0)), field.effective_area(empty)]
    assert np.isnan(np.concatenate([*measured, field.share_inside(empty, square(0, 5))])).all()


# Maps against a region.


@pytest.mark.parametrize("tau, expected", [(0.2, 4 / 7), (0.5, 1), (0.55, 0.75), (0.65, 0.5)])
def test_iou_has_the_worked_values(tau, expected):
    """topgap.md 14.8: the comparison is >=."""
    maps = jnp.array([[[0, 0.2, 0.4], [0.2, 1, 0.6], [0.1, 0.7, 0.5]]])
    region = np.zeros((1, 3, 3))
    region[0, 1:, 1:] = 1
    np.testing.assert_allclose(metrics.iou(tau)(None, None, maps, batch_of(region))["iou"], [expected], rtol=1e-6)


def test_unsure_pixels_count_on_no_side():
    maps = jnp.array([[[0.0, 1.0], [1.0, 1.0]]])
    region = np.array([[[0, 1], [2, 0]]])
    assert metrics.iou(0.5)(None, None, maps, batch_of(region))["iou"] == 0.5
    assert metrics.in_region()(None, None, maps, batch_of(region))["in_region"] == 0.5
    np.testing.assert_allclose(metrics.in_region()(None, None, maps, batch_of(region))["lift"], [1.5])


def test_without_a_region_the_box_counts():
    """A box with edges on the pixel grid covers exactly its pixels."""
    box = jnp.array([[0.25, 0.5, 0.75, 1.0]])
    maps = np.zeros((1, 4, 4), np.float32)
    maps[0, 1:3, 2:4] = 1
    batch = {"image": jnp.zeros((1, 4, 4, 3)), "box": box}
    assert metrics.iou(0.5)(None, None, jnp.asarray(maps), batch)["iou"] == 1
    with pytest.raises(
        UserError, match="localisation needs a data set with 'region' or 'box'; this one offers neither"
    ):
        metrics.iou(0.5)(None, None, jnp.asarray(maps), {"image": batch["image"]})


def test_maps_are_scaled_after_the_resize():
    maps = jnp.array([[[3.0, 5.0]], [[2.0, 2.0]]])
    full = localisation.scaled(maps, (1, 4))
    # Half-pixel centres: positions -.25, .25, .75, 1.25 of the two cells, cut at the ends.
    np.testing.assert_allclose(full, [[[0, 0.25, 0.75, 1]], [[0, 0, 0, 0]]], atol=1e-6)


SIGNED = ("single_deletion", "sensitivity_n", "sensitivity_n_curve", "road")
ONLY_OF_OBJECTS = ("in_region", "lift")


@pytest.mark.parametrize("name", metrics.TABLE)
def test_every_metric(name):
    """Within its range; row i does not depend on row j, bit for bit; NaN where the map is not finite, and there only; a
    constant map has no share in a region; what it measures says what it is."""
    metric = metrics.TABLE[name]((0.3, 0.5)) if name == "iou_curve" else metrics.TABLE[name]()
    maps = jnp.asarray(RNG.normal(size=(3, 5, 5)), jnp.float32).at[2].set(1.0)
    regions = jnp.asarray(RNG.integers(0, 3, (3, 8, 8)))
    batch = {"image": jnp.asarray(RNG.uniform(size=(3, 8, 8, 3)), jnp.float32), "label": jnp.array([0, 1, 2])}
    keys = jax.random.split(jax.random.key(0), 3)
    predict = lambda images, keys=None: 9 * images[:, :4].mean((1, 2))
    run = jax.jit(lambda maps, region: metric(keys, predict, maps, batch | {"region": region}))
    rows = run(maps, regions)
    other = run(maps.at[1].set(-7.0), regions.at[1].set(1))
    broken = [run(maps.at[1, 1, 2].set(value), regions) for value in (jnp.nan, jnp.inf)]
    assert set(rows) == set(metric.measures)
    for name, row in rows.items():
        about = metric.measures[name]
        assert about.label and (isinstance(about, Measure) or all(about.axes))
        row = np.asarray(row)
        defined = row[:2] if name in ONLY_OF_OBJECTS else row
        assert len(row) == 3 and np.isfinite(defined).all() and (defined >= (-1 if name in SIGNED else 0)).all()
        np.testing.assert_array_equal(row[[0, 2]], other[name][np.array([0, 2])])
        for without in broken:
            assert np.isnan(without[name][1]).all()
            np.testing.assert_array_equal(row[[0, 2]], without[name][np.array([0, 2])])
    cost = metric.cost(predict, batch["image"])
    assert isinstance(cost, Cost) and cost.gradients == 0


@given(st.floats(-10, 10), st.floats(0.1, 10))
def test_scale_and_shift_of_a_map_change_nothing(shift, scale):
    maps = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 4)), jnp.float32)
    np.testing.assert_allclose(
        localisation.scaled(maps * scale + shift, (8, 8)), localisation.scaled(maps, (8, 8)), atol=1e-4
    )


@pytest.mark.parametrize("tolerance, hit", [(0, 0), (2, 1), (1.9, 0), (2.5, 1)])
def test_pointing_has_the_worked_values(tolerance, hit):
    """baselines.md 13: mask rows 0-1 x columns 0-1, the largest value at (3, 1); at tolerance 2 TorchRay misses."""
    maps = jnp.zeros((1, 4, 4)).at[0, 3, 1].set(1)
    region = np.zeros((1, 4, 4))
    region[0, :2, :2] = 1
    rows = metrics.pointing(tolerance=tolerance)(None, None, maps, batch_of(region))
    assert rows["pointing"] == hit
    places = np.argwhere(np.ones((4, 4)))
    distances = np.sqrt(((places[:, None] - np.argwhere(region[0])) ** 2).sum(-1)).min(1)
    assert rows["pointing_chance"] == (distances <= tolerance).mean()


def test_pointing_is_of_pixels_that_are_sure():
    """The largest value on an unsure pixel points nowhere; no object, no game."""
    maps = jnp.array([[[0.0, 3], [2, 1]], [[0.0, 3], [2, 1]]])
    rows = metrics.pointing()(None, None, maps, batch_of([[[0, 2], [1, 0]], [[0, 0], [2, 0]]]))
    assert rows["pointing"][0] == 1 and np.isnan(rows["pointing"][1])


def test_pixel_average_precision_has_the_worked_value():
    """baselines.md 12, thresholds 0, .25, .5, .75."""
    count = lambda values: np.histogram(values, [0, 0.25, 0.5, 0.75, 1])[0]
    value = localisation.average_precision(count([0.9, 0.6, 0.3, 0.8]), count([0.1, 0.6, 0.2, 0.95, 0.3]))
    assert value == pytest.approx(0.62619048) and localisation.average_precision(np.zeros(3), np.ones(3)) is None


def test_pixels_are_counted_by_value():
    maps = jnp.array([[[0, 0.5], [0.9995, 1.0]]])
    inside, known = jnp.array([[[True, False], [True, True]]]), jnp.array([[[True, True], [True, False]]])
    true, false = localisation.pixel_counts(maps, inside, known)
    assert {int(i): int(true[0, i]) for i in np.flatnonzero(true[0])} == {0: 1, 999: 1}
    assert {int(i): int(false[0, i]) for i in np.flatnonzero(false[0])} == {500: 1}


# Boxes.


def wsol_map():
    values = np.zeros((8, 10))
    values[1, 1:8], values[4:6, 4:6], values[6, 6], values[7, 9] = 1, 0.8, 0.8, 0.3
    return (values * 255).astype(np.uint8)


@pytest.mark.parametrize("tau, box", [(0, (4, 4, 7, 7)), (0.2, (4, 4, 7, 7)), (0.5, (4, 4, 7, 7)), (0.9, (1, 1, 2, 8))])
def test_boxes_are_the_published_ones(tau, box):
    """baselines.md 12: a line of 7 pixels has contour area 0, the block beside it 1."""
    assert tuple(boxes.level_boxes(wsol_map())[int(tau * 255)][0]) == box


def test_contour_area_fills_holes():
    ring = np.zeros((8, 8), bool)
    ring[1:7, 1:7] = True
    ring[3:5, 3:5] = False
    assert boxes.contour_area(ring) == 25
    assert tuple(boxes.contour_boxes(ring)[0]) == (1, 1, 7, 7)
    assert tuple(boxes.contour_boxes(np.zeros((8, 8), bool))[0]) == (0, 0, 0, 0)


def test_all_contours_are_the_published_ones():
    """baselines.md 12, there as (left, top, right, bottom): the components', and a hole's contour round it."""
    found = boxes.level_boxes(wsol_map())[int(0.2 * 255)]
    assert sorted(map(tuple, found)) == [(1, 1, 2, 8), (4, 4, 7, 7), (7, 9, 7, 9)]
    ring = np.zeros((8, 8), bool)
    ring[1:7, 1:7] = True
    ring[3:5, 3:5] = False
    assert list(map(tuple, boxes.contour_boxes(ring))) == [(1, 1, 7, 7), (2, 2, 6, 6)]


def test_the_second_box_accuracy_takes_the_best_contour():
    ious = boxes.level_ious(wsol_map(), np.array([1, 1, 2, 8]))
    expected = [boxes.box_iou(found, np.array([1, 1, 2, 8])).max() for found in boxes.level_boxes(wsol_map())]
    np.testing.assert_allclose(ious[:, 1], expected)
    assert ious.shape == (255, 2) and ious[51, 1] == 1 and ious[51, 0] < 0.2


def test_of_equal_components_the_last_in_reading_order_wins():
    binary = np.zeros((6, 6), bool)
    binary[0:2, 0:2] = binary[0:2, 4:6] = binary[4:6, 1:3] = True
    assert tuple(boxes.contour_boxes(binary)[0]) == (4, 1, 5, 3)


@given(st.integers(0, 1000))
def test_the_euler_number_counts_components_less_holes(seed):
    binary = np.random.default_rng(seed).uniform(size=(7, 9)) < 0.55
    components = scipy.ndimage.label(binary, np.ones((3, 3)))[1]
    holes = scipy.ndimage.label(np.pad(~binary, 1, constant_values=True))[1] - 1
    assert boxes.euler_number(binary) == components - holes
    assert len(boxes.contour_boxes(binary)) == components + holes


@given(st.integers(0, 1000))
def test_level_boxes_are_the_boxes_of_every_cut(seed):
    values = np.random.default_rng(seed).choice([0, 20, 21, 100, 254, 255], (7, 6)).astype(np.uint8)
    found = boxes.level_boxes(values)
    for level in (0, 19, 20, 21, 99, 100, 253, 254):
        np.testing.assert_array_equal(found[level], boxes.contour_boxes(values > level))


def test_true_boxes_as_whole_pixels():
    """baselines.md 12: (10, 20, 300, 200) of a 500 x 375 image becomes (4, 11, 134, 119) of 224 x 224."""
    found = boxes.pixel_boxes(np.array([[20 / 375, 10 / 500, 200 / 375, 300 / 500]], np.float32), (224, 224))
    assert tuple(found[0]) == (11, 4, 119, 134)
    assert tuple(boxes.pixel_boxes(np.array([[0, 0, 1, 1]]), (4, 6))[0]) == (0, 0, 3, 5)


def test_box_iou_counts_inclusive_pixels():
    a, b = np.array([[0, 0, 0, 0], [1, 1, 3, 3], [0, 0, 1, 1]]), np.array([[0, 0, 0, 0], [2, 2, 4, 4], [5, 5, 6, 6]])
    np.testing.assert_allclose(boxes.box_iou(a, b), [1, 0.2857142857, 0])


def test_box_accuracy_is_on_the_published_grid():
    ious = np.zeros((2, 255))
    ious[0, 51:102] = 0.5
    accuracy = boxes.box_accuracy(ious)
    expected = [0.5 if 51 <= int(tau * 255) < 102 else 0 for tau in np.arange(0, 1, 0.001)]
    np.testing.assert_array_equal(accuracy, expected)


def test_boxes_of_regions():
    regions = np.zeros((2, 4, 8), np.uint8)
    regions[0, 1:3, 2:7] = 1
    regions[1] = 2
    np.testing.assert_array_equal(boxes.region_boxes(regions), [[0.25, 0.25, 0.75, 0.875], [0, 0, 0, 0]])
    assert boxes.mean_box_sides(boxes.region_boxes(regions)[:1]) == (0.5, 0.625)
    np.testing.assert_allclose(boxes.centred_boxes((0.5, 0.25), 1), [[0.25, 0.375, 0.75, 0.625]])


# Numbers of a split.


def test_calibration_has_the_worked_value():
    """baselines.md 20: p = .7, .4, .8, .4 right, right, right, wrong."""
    probabilities = np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    labels = np.array([0, 1, 1, 2])
    error, curve = summaries.calibration(probabilities.max(1), probabilities.argmax(1) == labels)
    assert error == pytest.approx(0.175)
    np.testing.assert_allclose(curve.x, [0.4, 0.7, 0.8])
    np.testing.assert_allclose(curve.y, [0.5, 1, 1])


def test_a_bin_includes_its_upper_end_and_the_first_includes_0():
    error, curve = summaries.calibration(np.array([0.0, 0.5, 1.0]), np.array([0, 0, 1]), bins=2)
    assert (curve.x, curve.y) == ([0.25, 1.0], [0.0, 1.0]) and error == pytest.approx(1 / 6)


@given(st.integers(1, 500), st.floats(0, 1))
def test_wilson_holds_the_share(n, share):
    k = round(share * n)
    low, high = summaries.wilson(k, n)
    assert 0 <= low <= k / n + 1e-12 and k / n - 1e-12 <= high <= 1 and low < high
    # Its ends solve (share - p)^2 = z^2 p (1 - p) / n.
    for p in (low, high):
        assert (k / n - p) ** 2 == pytest.approx(summaries.Z**2 * p * (1 - p) / n, abs=1e-9)


def test_mean_interval_of_one_value_is_that_value():
    assert summaries.mean_interval(np.array([2.0])) == (2, 2, 2)
    mean, low, high = summaries.mean_interval(np.array([1.0, 2.0, 3.0]))
    assert (
        mean == 2
        and high - mean == pytest.approx(1.96 / np.sqrt(3), abs=1e-3)
        and mean - low == pytest.approx(high - mean)
    )


def test_thresholds_are_checked():
    with pytest.raises(UserError, match=r"tau must be a number in \[0, 1\], got 2"):
        metrics.iou(2)


@pytest.mark.slow
@pytest.mark.parametrize("name", metrics.TABLE)
def test_every_metric_transformed(name):
    """Eagerly, one example at a time, split over devices: the same numbers."""
    metric = metrics.TABLE[name]((0.3, 0.5)) if name == "iou_curve" else metrics.TABLE[name]()

    def rows(keys, images, labels):
        batch = {"image": images, "label": labels, "region": jnp.broadcast_to(laws.REGION[:1], images.shape[:3])}
        maps = images[..., 0] - images[:, ::-1, :, 1]
        return metric(keys, laws.PREDICT, maps, batch)

    laws.assert_transformed(rows, laws.KEYS, laws.IMAGES, laws.LABELS, atol=1e-4)
