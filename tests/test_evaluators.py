"""Evaluators: laws that hold for every row of the table, and each one's numbers on cases that can be done by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import laws
from tests.laws import CLASSES, MODEL, SIZE, VARIABLES
from topgap_jax import evaluators
from topgap_jax.attacks import attack as attacked
from topgap_jax.attacks import fgsm, fmn, pgd, topk_attack
from topgap_jax.balls import l2, linf
from topgap_jax.errors import UserError
from topgap_jax.evaluators.localisation import random_boxes
from topgap_jax.explain import cam, gradient
from topgap_jax.metrics import deletion, energy, extent, gini, iou_curve
from topgap_jax.rewrite import name
from topgap_jax.types import Check, Cost, Curve, Explain, Gallery, Measure, Model, Output, Robustness

N = 10
RNG = np.random.default_rng(0)
DATA = {
    "image": RNG.uniform(size=(N, SIZE, SIZE, 3)).astype(np.float32),
    "label": RNG.integers(0, CLASSES, N).astype(np.int32),
    "id": np.arange(N, dtype=np.int32),
    "box": np.tile(np.float32([0.25, 0.125, 0.75, 1]), (N, 1)),
    "region": RNG.choice(3, (N, SIZE, SIZE), p=[0.5, 0.4, 0.1]).astype(np.uint8),
    "group": RNG.integers(0, 2, N).astype(np.int32),
}
DATA["region"][3] = 0  # an image without an object
TRAINING = {
    "image": RNG.integers(0, 256, (8, SIZE, SIZE, 3)).astype(np.uint8),
    "label": np.arange(8) % CLASSES,
    "region": np.tile(DATA["region"][:1], (8, 1, 1)),
}

MADE = {
    "accuracy": evaluators.accuracy(),
    "adcc": evaluators.adcc(cam()),
    "agreement": evaluators.agreement(cam(), gradient()),
    "arcc": evaluators.arcc(cam()),
    "attributional_robustness": evaluators.attributional_robustness(
        gradient(), topk_attack(cam(), linf(0.1), steps=2, restarts=1)
    ),
    "background_reliance": evaluators.background_reliance(cam()),
    "cluster": evaluators.cluster(cam(), least=3),
    "completeness": evaluators.completeness(gradient(reduce="sum")),
    "coverage": evaluators.coverage("maps"),
    "infidelity": evaluators.infidelity(cam(), samples=3),
    "localisation": evaluators.localisation(cam()),
    "measures": evaluators.measures(cam(), gini(), energy(), deletion(steps=4), iou_curve((0.3, 0.5))),
    "receptive_field": evaluators.receptive_field(k=2),
    "regions": evaluators.regions(),
    "stability": evaluators.stability(cam(), samples=3),
    "trust": evaluators.trust(cam(), stages=2, steps=2),
}


# The laws of `trust`, many programs to compile, run in `make test-all`; its own tests (test_trust.py) are quick.
KINDS = [pytest.param(kind, marks=pytest.mark.slow) if kind == "trust" else kind for kind in MADE]


def batch_of(rows, width=None):
    """The examples `rows`, padded with zeros to a width."""
    width = width or len(rows)
    pad = lambda value: np.concatenate([value[rows], np.zeros((width - len(rows), *value.shape[1:]), value.dtype)])
    return {key: jnp.asarray(pad(value)) for key, value in DATA.items()} | {"mask": jnp.arange(width) < len(rows)}


def keys_of(batch):
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(5)))(batch["id"])


@functools.cache
def jitted(evaluator):
    return jax.jit(evaluator.rows, static_argnums=1)


def rows_of(evaluator, batch, model=MODEL, variables=VARIABLES, training=TRAINING, classes=CLASSES):
    """The rows of a batch without its padding, as `measure` makes them."""
    prepared = evaluator.prepare(training, classes) if evaluator.prepare else {}
    rows = jax.device_get(jitted(evaluator)(keys_of(batch), model, variables, batch, prepared))
    kept = {key: value[np.asarray(batch["mask"])] for key, value in rows.items()}
    return kept if evaluator.host is None else evaluator.host(kept)


def values(summary):
    """{name: value, or the curve}"""
    return {measure: one.value if isinstance(one, Measure) else one for measure, one in summary.items()}


def measured(*arguments, **options):
    """The values of an evaluator on a batch."""
    return values(arguments[0].summary(rows_of(*arguments, **options)))


def whole(evaluator, parts):
    return evaluator.summary({key: np.concatenate([part[key] for part in parts]) for key in parts[0]})


def flat(summary):
    def numbers(one):
        if isinstance(one, Gallery):
            return np.concatenate([np.ravel(tile) for tile in one.tiles]) / 1e6  # to 10 of 255
        if isinstance(one, Check):
            return [one.statistic, one.threshold, one.n]
        return [one.value, one.low, one.high, one.n] if isinstance(one, Measure) else [*one.x, *one.y]

    return np.array([number for one in summary.values() for number in numbers(one) if number is not None], np.float64)


def test_every_row_of_the_table_is_made_here():
    assert set(evaluators.TABLE) == set(MADE) | {"audit", "robust", "curve"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_evaluator(kind):
    """Batches and padding change no sum; every measure says what it is; it has a cost."""
    evaluator = MADE[kind]
    parts = [rows_of(evaluator, batch_of(rows, 4)) for rows in (np.arange(4), np.arange(4, 8), np.arange(8, N))]
    split = whole(evaluator, parts)
    parts = [rows_of(evaluator, batch_of(rows, 4)) for rows in (np.arange(2), np.arange(2, 6), np.arange(6, N))]
    again = whole(evaluator, parts)
    assert list(again) == list(split)
    np.testing.assert_allclose(flat(again), flat(split), rtol=1e-4, atol=1e-5)
    for measure, one in split.items():
        if isinstance(one, Check):
            assert one.id == measure and one.sentence and (one.statistic is None) == (one.status == "skipped")
            continue
        assert isinstance(one, Measure | Curve | Gallery) and one.label, measure
        if isinstance(one, Measure):
            assert (one.value is None) == bool(one.reason) and one.n is not None and one.n <= N
            assert one.better in ("higher", "lower", None)
            if one.low is not None:
                assert one.low <= one.value + 1e-12 and one.value - 1e-12 <= one.high
        elif isinstance(one, Gallery):
            assert len(one.tiles) == len(one.captions) and {tile.dtype for tile in one.tiles} == {np.dtype(np.uint8)}
        else:
            assert len(one.x) == len(one.y) and all(one.axes)
    assert next(iter(split.values())).main, "the first measure stands for the row"
    cost = evaluator.cost(laws.PREDICT, jax.ShapeDtypeStruct((4, SIZE, SIZE, 3), jnp.float32))
    assert isinstance(cost, Cost) and sum(cost) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_neighbours(kind):
    evaluator = MADE[kind]
    batch = batch_of(np.arange(4))
    other = batch | {"image": batch["image"].at[1:].set(0.2), "label": batch["label"].at[1:].set(0)}
    first, second = rows_of(evaluator, batch), rows_of(evaluator, other)
    for key in first:
        np.testing.assert_allclose(second[key][0], first[key][0], rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("kind", [kind for kind in MADE if MADE[kind].prepare])
def test_without_a_training_split_what_needs_one_is_absent_with_a_reason(kind):
    evaluator = MADE[kind]
    with_one = evaluator.summary(rows_of(evaluator, batch_of(np.arange(4))))
    without = evaluator.summary(rows_of(evaluator, batch_of(np.arange(4)), training=None))
    assert set(without) <= set(with_one)
    absent = {measure for measure, one in without.items() if isinstance(one, Measure) and one.value is None}
    assert absent and all("training split" in without[measure].reason and without[measure].n == 0 for measure in absent)
    for measure in set(without) - absent:
        assert without[measure] == with_one[measure]


NAN = Explain(lambda keys, predict, images, labels: jnp.full(images.shape[:3], jnp.nan), lambda *_: Cost(1, 0))


@pytest.mark.parametrize(
    "evaluator",
    [
        evaluators.localisation(NAN, centre=0.5),
        evaluators.measures(NAN, gini(), extent(), energy(), deletion(steps=2), iou_curve((0.5,))),
        evaluators.agreement(NAN, cam()),
        evaluators.stability(NAN, samples=1),
        evaluators.adcc(NAN),
        evaluators.background_reliance(NAN),
        evaluators.completeness(dataclasses.replace(NAN, signed="against")),
        evaluators.attributional_robustness(NAN, topk_attack(cam(), linf(0.1), steps=1, restarts=1)),
    ],
)
def test_maps_that_are_not_finite_count_in_no_measure_of_them(evaluator):
    batch = batch_of(np.arange(4))
    batch["label"] = jnp.argmax(laws.PREDICT(batch["image"]), -1).astype(jnp.int32)
    summary = evaluator.summary(rows_of(evaluator, batch))
    of_the_image = ("centre", "full", "random", "success", "attacked", "chance", "constant", "left_out")
    for measure, one in summary.items():
        if isinstance(one, Measure) and not measure.startswith(of_the_image):
            # An attack that moves nothing leaves agreement 1, whatever the map.
            assert (one.value is None and one.reason and one.n == 0) or "attributional" in str(evaluator.rows), name


# Accuracy.


def constant(logits):
    """A model whose logits are the first values of the image."""
    return Model(
        None, lambda variables, images, **_: Output(images.reshape(len(images), -1)[:, : logits.shape[1]], {}, {})
    )


def test_accuracy_by_hand():
    """baselines.md 20, logits as log-probabilities."""
    logits = np.log(np.float32([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]))
    batch = {"image": jnp.asarray(logits)[:, None, None, :], "label": jnp.array([0, 1, 1, 2])}
    batch |= {"group": jnp.array([0, 0, 2, 2]), "mask": jnp.ones(4, bool), "id": jnp.arange(4)}
    summary = MADE["accuracy"].summary(rows_of(MADE["accuracy"], batch, constant(logits)))
    found = values(summary)
    assert found["accuracy"] == 0.75 and found["worst_group_accuracy"] == 0.5
    assert found["group_0_accuracy"] == 0.5 and found["group_2_accuracy"] == 1 and summary["group_2_accuracy"].n == 2
    assert found["nll"] == pytest.approx(0.636483, abs=1e-6) and found["calibration_error"] == pytest.approx(
        0.175, abs=1e-6
    )
    accuracy = summary["accuracy"]
    assert (accuracy.low, accuracy.high) == pytest.approx((0.3006, 0.9544), abs=1e-3) and accuracy.better == "higher"
    assert summary["worst_group_accuracy"].n == 2, "of the worst group's images"


# Localisation.


def looks_at_red(images):
    """Two classes whose maps are the red and the green channel: CAM of label 0 is the red channel."""
    return Output(name(images[..., :2], "maps").mean((1, 2)), {}, {})


RED = Model(None, lambda variables, images, **_: looks_at_red(images))


def red_square(region=True):
    """Two images with a red object: rows 2..4, columns 1..5 of 8 x 8; the second lights up elsewhere."""
    image = np.zeros((2, 8, 8, 3), np.float32)
    image[0, 2:5, 1:6, 0] = 1
    image[1, 7, 7, 0] = 1
    inside = np.zeros((2, 8, 8), np.uint8)
    inside[:, 2:5, 1:6] = 1
    batch = {
        "image": jnp.asarray(image),
        "label": jnp.zeros(2, jnp.int32),
        "mask": jnp.ones(2, bool),
        "id": jnp.arange(2),
    }
    box = np.tile(np.float32([2 / 8, 1 / 8, 5 / 8, 6 / 8]), (2, 1))
    return batch | ({"region": jnp.asarray(inside)} if region else {"box": jnp.asarray(box)})


@pytest.mark.parametrize("region", [True, False])
def test_localisation_by_hand(region):
    evaluator = evaluators.localisation(cam(), centre=(0.5, 0.75))
    found = measured(evaluator, red_square(region), RED, {})
    assert found["iou"] == 0.5 and found["best_iou"] == 0.5
    # Rows 2..5, columns 1..6 (published: one too far) of the first image; nothing of the second.
    assert found["max_box_accuracy"] == 0.5
    # The centre box is rows 2..6, columns 1..7, 35 pixels; the object's, rows 2..5 and columns 1..6, 24.
    assert found["centre_box_accuracy"] == 1 and found["full_box_accuracy"] == 0
    assert found["centre_iou"] == pytest.approx(15 / 24) and found["full_iou"] == pytest.approx(15 / 64)
    assert found["in_region"] == 0.5 and found["lift"] == pytest.approx(0.5 * 64 / 15)
    # The second image points beside the object; places at random hit as often as the object is large.
    assert (found["pointing"], found["pointing_centre"]) == (0.5, 1) and found["pointing_chance"] == 15 / 64
    # The first map is right at every IoU; the centre box has IoU 24 / 35, the full image 24 / 64.
    assert found["max_box_accuracy_v2"] == 0.5
    assert found["centre_box_accuracy_v2"] == pytest.approx(2 / 3) and found["full_box_accuracy_v2"] == pytest.approx(
        1 / 3
    )
    if region:
        # From the top 15 of 16 pixels are right, then 30 of 128; the centre box holds 15 of its 24 pixels in each image.
        assert found["pxap"] == pytest.approx((15 / 16 + 30 / 128) / 2)
        assert found["full_pxap"] == 30 / 128 and found["centre_pxap"] == 15 / 24
    else:
        assert found["pxap"] is found["full_pxap"] is None


@pytest.mark.parametrize("region", [True, False])
def test_an_image_without_an_object_has_no_box(region):
    """Nor a map without a box the place (0, 0) that would stand for both."""
    pair, evaluator = red_square(region), evaluators.localisation(cam(), centre=(0.5, 0.75))
    third = {key: jnp.concatenate([value, value[:1]]) for key, value in pair.items()}
    third["image"] = third["image"].at[2].set(0)
    third["region" if region else "box"] = third["region" if region else "box"].at[2].set(0)
    found, alone = (measured(evaluator, batch, RED, {}) for batch in (third, pair))
    boxes = [name for name in found if "box" in name and "random" not in name]
    assert len(boxes) > 5 and {name: found[name] for name in boxes} == {name: alone[name] for name in boxes}
    training = {"region": np.stack([np.zeros((8, 8)), np.ones((8, 8))]), "label": np.zeros(2, int)}
    assert evaluators.localisation(cam()).prepare(training, 2)["centre"].tolist() == [[0, 0, 1, 1]]


def test_random_boxes_are_boxes():
    boxes = np.asarray(random_boxes(jax.random.split(jax.random.key(0), 200)))
    assert (boxes[:, :2] <= boxes[:, 2:]).all() and (boxes >= 0).all() and (boxes <= 1).all()
    # Sides of two uniform points are a third on average.
    assert (boxes[:, 2:] - boxes[:, :2]).mean(0) == pytest.approx([1 / 3, 1 / 3], abs=0.05)


def test_localisation_without_boxes():
    evaluator, whole = evaluators.localisation(cam(), boxes=False), evaluators.localisation(cam())
    found, all_of_it = (measured(e, red_square(), RED, {}) for e in (evaluator, whole))
    assert found == {name: all_of_it[name] for name in found} and not any("box" in name for name in found)
    assert "iou" in found


def test_labels_of_the_maps():
    """Image 0 is predicted as 0 (red); with label 1 the true class's map is the green channel, which is constant."""
    batch = red_square() | {"label": jnp.ones(2, jnp.int32)}
    true, predicted = evaluators.localisation(cam()), evaluators.localisation(cam(), labels="predicted")
    assert measured(true, batch, RED, {})["iou"] == 0
    assert measured(predicted, batch, RED, {})["iou"] == 0.5
    assert true.cost(None, None) == Cost(1, 0) and predicted.cost(None, None) == Cost(2, 0)


# What the region decides.


def reads(side):
    """Two classes by the mean brightness of one side of the square in `halves`."""

    def apply(variables, images, **_):
        half = images[:, :, :4] if side == 1 else images[:, :, 4:]
        bright = half.mean((1, 2, 3)) - 0.5
        return Output(jnp.stack([-bright, bright], 1), {}, {})

    return Model(None, apply)


def halves(n=64):
    """Objects fill the left half; object and background both show the class by their brightness."""
    label = np.arange(n) % 2
    image = np.where(label == 1, 0.503, 0.497)[:, None, None, None] * np.ones((n, 8, 8, 3))
    region = np.zeros((n, 8, 8), np.uint8)
    region[:, :, :4] = 1
    batch = {
        "image": jnp.asarray(image, jnp.float32),
        "label": jnp.asarray(label, jnp.int32),
        "region": jnp.asarray(region),
    }
    return batch | {"mask": jnp.ones(n, bool), "id": jnp.arange(n)}


def test_regions_of_models_that_read_one_side():
    """The object's reader: sensitivity > 0, no background gap; the background's: the reverse (topgap.md 8b)."""
    evaluator = evaluators.regions(fill=0.499)
    region = np.zeros((2, 8, 8), np.uint8)
    region[:, :, :4] = 1
    grey = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (100, 150)])
    training = {"image": grey, "label": np.arange(2), "region": region}
    found = {side: measured(evaluator, halves(), reads(side), {}, training, classes=2) for side in (0, 1)}
    for side, seen, hidden in ((1, "foreground", "background"), (0, "background", "foreground")):
        assert found[side][f"{seen}_noise_accuracy"] < 1 and found[side][f"{hidden}_noise_accuracy"] == 1
        # Of a grey half the reader learns nothing: it says class 0, which half of the images are.
        assert found[side][f"{seen}_accuracy"] == 1 and found[side][f"{hidden}_accuracy"] == 0.5
    assert found[1]["foreground_sensitivity"] == pytest.approx(1) and found[0][
        "foreground_sensitivity"
    ] == pytest.approx(-1)
    assert found[1]["background_gap"] == 0 and found[0]["background_gap"] == 1
    assert found[1]["sensitivity_curve"].x == [0.1, 0.2, 0.4] and found[1]["left_out"] == 0


def test_regions_leave_out_what_has_no_two_sides():
    evaluator = MADE["regions"]
    assert measured(evaluator, batch_of(np.arange(4)))["left_out"] == 1
    empty = evaluator.summary(rows_of(evaluator, batch_of(np.array([3]), 4)))
    for measure in ("foreground_sensitivity", "foreground_accuracy", "background_accuracy", "background_gap"):
        assert empty[measure] == empty[measure]._replace(value=None, n=0, reason="every region is empty or full")


def test_sensitivity_where_noise_changes_nothing_is_undefined():
    """Every image right under both noises: 0 / 0, and no measure."""
    sure = Model(None, lambda variables, images, **_: Output(jnp.ones((len(images), 2)) * jnp.array([1.0, 0]), {}, {}))
    batch = halves(8) | {"label": jnp.zeros(8, jnp.int32)}
    found = evaluators.regions().summary(rows_of(evaluators.regions(), batch, sure, {}, None))
    assert found["foreground_sensitivity"].value is None
    assert found["foreground_sensitivity"].reason == "under noise every image is right, or none is"


def test_background_bank():
    images = np.arange(5 * 4 * 3).reshape(5, 2, 2, 3).astype(np.uint8)
    regions = np.zeros((5, 2, 2), np.uint8)
    regions[:, 0, 0], regions[:, 0, 1] = 1, 2
    regions[4] = 0  # no object: not used
    bank = evaluators.background_bank(images, regions, np.array([0, 1, 1, 1, 0]), 2, n=2)
    assert bank.shape == (2, 2, 2, 2, 3)
    np.testing.assert_array_equal(bank[0, 0], bank[0, 1])  # one image, repeated
    np.testing.assert_array_equal(bank[1, 1][1], images[2][1])
    np.testing.assert_array_equal(bank[1, 1][0], np.tile(np.round(images[2][1].mean(0)), (2, 1)))


# Receptive fields.


def test_receptive_field_by_hand():
    """Two all-ones convolutions on 9 x 9 (topgap.md 14.6); the map is constant inside, so its top is the first of the
    centre."""
    options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    convolve = lambda images: jax.lax.conv_general_dilated(images, jnp.ones((3, 3, 1, 1)), **options)
    maps = lambda images: jnp.tile(convolve(convolve(images)), (1, 1, 1, 2))
    model = Model(None, lambda variables, images, **_: Output(name(maps(images), "maps").mean((1, 2)), {}, {}))
    region = np.zeros((1, 9, 9), np.uint8)
    region[0, 3:6, 3:6] = 1
    batch = {"image": jnp.zeros((1, 9, 9, 1)).at[0, 4, 4].set(1), "label": jnp.zeros(1, jnp.int32), "id": jnp.arange(1)}
    batch |= {"mask": jnp.ones(1, bool), "region": jnp.asarray(region)}
    evaluator = evaluators.receptive_field()
    found = measured(evaluator, batch, model, {})
    expected = {
        "rms_radius": 1.6329932,
        "effective_area": 18.1745152,
        "luo_size": 5,
        "theoretical_size": 5,
        "theoretical_ratio": 1,
        "gaussian_sigma": 1.269286,  # by scipy.optimize.least_squares
        "gaussian_share": 0.983424,
        "share_inside": 49 / 81,
        "lift": 49 / 9,
    }
    expected |= {"centre_corner_ratio": 81 / 25, "empty_fields": 0, "top_lift": 49 / 9}
    assert found["gaussian_sigma"] == pytest.approx(expected.pop("gaussian_sigma"), rel=1e-3)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    centre, _, _, theoretical = found["mean_fields"].tiles
    line = np.array([0, 0, 1, 2, 3, 2, 1, 0, 0])
    np.testing.assert_array_equal(centre, np.round(255 * np.sqrt(np.outer(line, line) / 9)))
    np.testing.assert_array_equal(theoretical, 255 * np.outer(line > 0, line > 0))
    assert evaluator.cost(None, None) == Cost(0, 6)


def test_empty_fields_are_counted():
    blind = jax.tree.map(jnp.zeros_like, VARIABLES)
    evaluator = MADE["receptive_field"]
    found = evaluator.summary(rows_of(evaluator, batch_of(np.arange(4)), variables=blind))
    assert found["empty_fields"].value == 4
    assert not any(tile.any() for tile in found["mean_fields"].tiles[:3])
    for measure in ("rms_radius", "gaussian_sigma", "centre_corner_ratio", "top_lift"):
        assert found[measure].value is None and found[measure].n == 0 and found[measure].reason


# Measures of maps, one by one and of attacked images.


def test_measures_by_hand():
    """Image 0: 15 equal pixels of 64 in the object; image 1: one pixel outside it; the third image has no red at
    all."""
    batch = red_square()
    batch = {key: jnp.concatenate([value, value[:1]]) for key, value in batch.items()}
    batch["image"] = batch["image"].at[2].set(0)
    evaluator = evaluators.measures(cam(), gini(), extent(), energy(), deletion(steps=4))
    summary = evaluator.summary(rows_of(evaluator, batch, RED, {}))
    found = values(summary)
    assert found["gini"] == pytest.approx((49 / 64 + 63 / 64) / 2) and found["energy"] == 0.5
    assert found["energy_lift"] == pytest.approx(0.5 * 64 / 15)
    assert (summary["gini"].n, summary["deletion"].n) == (2, 3), "an image without a positive value counts in no mean"
    assert found["area90"] == pytest.approx((14 / 64 + 1 / 64) / 2) and summary["gini"].low < found["gini"]
    assert evaluator.cost(None, None) == Cost(1 + 5, 0)
    none = evaluator.summary(rows_of(evaluator, {key: value[2:] for key, value in batch.items()}, RED, {}))
    assert none["gini"] == summary["gini"]._replace(value=None, low=None, high=None, n=0, reason="no image defines it")
    assert np.isfinite(none["deletion"].value)


def test_two_metrics_of_one_name_keep_both():
    """And each says in its label what it is; a picture may stand in for the pixels."""
    picture = np.full((8, 8, 3), 0.5)
    evaluator = evaluators.measures(
        cam(), deletion(steps=2), deletion(steps=2, substrate=0.25), deletion(steps=2, substrate=picture)
    )
    summary = evaluator.summary(rows_of(evaluator, red_square(), RED, {}))
    labels = {key: summary[key].label for key in ("deletion", "deletion_2", "deletion_3")}
    assert list(labels.values()) == ["deletion (mean colour)", "deletion (colour 0.25)", "deletion (a picture)"]
    curve = summary["deletion_curve_2"]
    assert curve.x == [0, 0.5, 1] and curve.axes == ("share of pixels", "probability")
    area = (curve.y[0] + 2 * curve.y[1] + curve.y[2]) / 4
    assert summary["deletion_2"].value == pytest.approx(area, abs=1e-6)


def test_a_curve_leaves_undefined_images_out():
    """Column by column; a column that nobody defines is None."""
    evaluator = evaluators.measures(cam(), iou_curve((0.2, 0.4, 0.6)))
    nan = np.nan
    found = evaluator.summary({"ious": np.float32([[1, nan, nan], [3, nan, 2], [nan, nan, 4]])})
    assert found["ious"].y == [2, None, 3]


def test_measures_of_the_predicted_class():
    """Image 0 is predicted as 0 (red); with label 1 the map of the true class is the green channel, which is 0."""
    batch = red_square() | {"label": jnp.ones(2, jnp.int32)}
    true, predicted = (evaluators.measures(cam(), energy(), labels=word) for word in ("true", "predicted"))
    assert true.summary(rows_of(true, batch, RED, {}))["energy"].n == 0
    assert measured(predicted, batch, RED, {})["energy"] == 0.5
    assert predicted.cost(None, None) == Cost(2, 0)


def test_attributional_robustness_by_hand():
    """A stand-in for the attack moves the first image's map, leaves the second alone; the third is misclassified."""

    def init(keys, predict, images, labels, logits, **options):
        state = topk_attack(cam(), linf(0.5), k=2).init(keys, predict, images, labels, logits)
        return state._replace(delta=jnp.zeros_like(images).at[0, 0, 0, 0].set(0.5))

    step = lambda predict, state: state._replace(best=state.images + state.delta)
    attack = topk_attack(cam(), linf(0.5))._replace(init=init, step=step, steps=1)
    image = np.zeros((3, 2, 2, 3), np.float32)
    image[..., 0] = [[0.4, 0.3], [0.2, 0.1]]
    batch = {"image": jnp.asarray(image), "label": jnp.array([0, 0, 1]), "id": jnp.arange(3), "mask": jnp.ones(3, bool)}
    evaluator = evaluators.attributional_robustness(cam(), attack, k=2)
    # .4 becomes .9: the order stays.
    found = measured(evaluator, batch, RED, {})
    assert found["attacked"] == 2 and found["success_rate"] == 0.5 and found["chance"] == 0.5
    assert found["topk_intersection"] == 1 and found["kendall_tau_b"] == pytest.approx(1)
    a, b = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.9, 0.3, 0.2, 0.1])
    cosine = a @ b / np.sqrt((a @ a) * (b @ b))
    assert found["cosine_where_moved"] == pytest.approx(cosine, abs=1e-6)
    assert found["cosine"] == pytest.approx((1 + cosine) / 2, abs=1e-6)
    # .1 becomes .6: the lowest is the highest now, three of six pairs change their order.
    moved = attack._replace(init=lambda *a, **b: init(*a)._replace(delta=jnp.zeros_like(a[2]).at[0, 1, 1, 0].set(0.5)))
    evaluator = evaluators.attributional_robustness(cam(), moved, k=2)
    found = measured(evaluator, batch, RED, {})
    assert found["topk_intersection"] == 0.75 and found["topk_intersection_where_moved"] == 0.5
    assert found["kendall_tau_b"] == pytest.approx(0.5) and found["kendall_tau_b_where_moved"] == pytest.approx(0)
    wrong = {key: value[2:] for key, value in batch.items()} | {"label": jnp.array([1])}
    nothing = evaluator.summary(rows_of(evaluator, wrong, RED, {}))
    assert nothing["attacked"].value == 0
    for measure in ("topk_intersection", "success_rate"):
        assert nothing[measure].value is None and nothing[measure].reason == "no image is classified correctly"


def test_attributional_robustness_is_that_of_its_attack():
    """The loop inside one program keeps what the steps called one by one keep."""
    attack, batch = topk_attack(cam(), linf(0.1), k=2, steps=3, step_size=0.05, restarts=2), batch_of(np.arange(N))
    batch["label"] = jnp.argmax(laws.PREDICT(batch["image"]), -1).astype(jnp.int32)
    evaluator = evaluators.attributional_robustness(cam(), attack, k=2)
    run = jax.jit(lambda *arrays: attacked(attack, arrays[0], laws.PREDICT, *arrays[1:]))
    state = run(keys_of(batch), batch["image"], batch["label"])
    assert (np.asarray(state.search.overlap) < 2).any()
    found = measured(evaluator, batch)
    assert found["topk_intersection"] == pytest.approx(float(state.search.overlap.mean() / 2))
    assert found["chance"] == pytest.approx(2 / 9) and found["attacked"] == N


# Neuron coverage.


def test_coverage_has_the_worked_values():
    """sgdrop 12, T12: a layer (1, 2, 3) and two images; a constant layer covers nothing."""
    layer = jnp.array([[[[0, 4, 2], [0, 0, 2]]], [[[0, 1, 0], [2, 1, 0]]], [[[7, 7, 7], [7, 7, 7]]]], jnp.float32)
    model = Model(None, lambda variables, images, **_: Output(name(images, "layer").mean((1, 2)), {}, {}))
    batch = {
        "image": layer,
        "label": jnp.zeros(3, jnp.int32),
        "id": jnp.arange(3),
        "mask": jnp.array([True, True, False]),
    }
    evaluator = evaluators.coverage("layer")
    found = measured(evaluator, batch, model, {})
    assert found["neurons"] == 3 and found["neuron_coverage"] == 1 and found["image_coverage"] == pytest.approx(2 / 3)
    curve = found["neuron_coverage_curve"]
    assert (curve.x, curve.y) == ([0, 0.25, 0.5, 0.75], [1, 1, 0, 0])
    assert found["image_coverage_curve"].y == pytest.approx([2 / 3, 2 / 3, 0, 0])
    constant = {key: value[2:] for key, value in batch.items()} | {"mask": jnp.ones(1, bool)}
    assert measured(evaluator, constant, model, {})["neuron_coverage"] == 0


def test_coverage_of_several_layers():
    """Neurons of all layers together, dense ones by their units (baselines 13.20: .625 and .5 of the channels)."""
    value = jnp.array([[[[0.0, 4], [2, 0]], [[1, 0], [1, -4]]]])
    model = Model(None, lambda v, images, **_: Output(name(name(images, "first").mean((1, 2)), "logits"), {}, {}))
    batch = {"image": value, "label": jnp.zeros(1, jnp.int32), "id": jnp.arange(1), "mask": jnp.ones(1, bool)}
    found = [
        measured(e, batch, model, {})
        for e in (
            *(evaluators.coverage("first", threshold=t) for t in (0.49, 0.5, 0.65)),
            evaluators.coverage("first", "logits"),
        )
    ]
    assert [each["image_coverage"] for each in found[:3]] == [1, 0.5, 0]
    # The logits are 1 and 0, scaled to themselves.
    assert found[3]["neurons"] == 4 and found[3]["neuron_coverage_curve"].y == [0.75, 0.75, 0.5, 0.25]


# Robustness and mistakes.


def test_robust_is_plain_data():
    first, second = fgsm(linf(0.1)), pgd(linf(0.1), steps=2)
    assert evaluators.robust(first) == Robustness((first,))
    assert evaluators.robust(first, (second, first)) == Robustness((first, second, first))
    assert evaluators.curve(first, (second,), eps=(0.1, 0.2)) == Robustness((first, second), (0.1, 0.2))


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: evaluators.robust(fgsm(linf(0.1))._replace(aim="norm")), "robust: 'fgsm, linf(0.1)' looks for the smallest perturbation, at no radius of its own; give it to curve(attack, eps=(2/255, 4/255, 8/255))"),
        (lambda: evaluators.curve(eps=(0.1,)), "curve: give one or more attacks, such as curve(pgd(linf(8/255)), eps=(2/255, 8/255))"),
        (lambda: evaluators.curve(fgsm(linf(0.1)), eps=0.1), "curve: eps must be radii such as (2/255, 4/255, 8/255), got 0.1"),
        (lambda: evaluators.curve(fgsm(linf(0.1)), eps=(0.2, 0.1)), "curve: eps must be radii above 0, each larger than the one before, got (0.2, 0.1)"),
        (lambda: evaluators.curve(fgsm(l2(0.1)), eps=(0.5, 1e20)), "eps must be a number in [0, 1e+06], got 1e+20"),
        (lambda: evaluators.curve(fgsm(linf(0.1)), fmn(l2(0.1)), eps=(0.1,)), "curve: the attacks are in several norms, linf and l2; give each a curve of its own"),
        (lambda: evaluators.robust(), "robust: give one or more attacks, such as robust(pgd(linf(8/255)))"),
        (lambda: evaluators.robust(topk_attack(cam(), linf(0.1))), "robust: 'top-k-50 x 3, linf(0.1)' keeps the label; give it to attributional_robustness(explain, attack)"),
        (lambda: evaluators.attributional_robustness(cam(), fgsm(linf(0.1))), "attributional_robustness: give an attack on maps, such as topk_attack(gradient(), linf(8/255)), got Attack(fgsm, linf(0.1))"),
        (lambda: evaluators.attributional_robustness(3, topk_attack(cam(), linf(0.1))), "attributional_robustness: give an explanation such as gradient(), got 3"),
        (lambda: evaluators.measures(cam()), "measures: give one or more metrics after the explanation, such as measures(cam(), gini())"),
        (lambda: evaluators.measures(3, gini()), "measures: give an explanation such as gradient(), got 3"),
        (lambda: evaluators.measures(cam(), gini(), labels="all"), "measures: labels must be 'true' or 'predicted', got 'all'"),
        (lambda: evaluators.coverage(), "coverage: name one or more layers, such as coverage('stage3', 'stage4'); `topgap layers` lists them"),
        (lambda: evaluators.coverage(0.5), "coverage: a layer is named by a text such as 'stage3', got 0.5"),
        (lambda: evaluators.coverage("maps", threshold=2), "threshold must be a number in [0, 1], got 2"),
        (lambda: evaluators.robust(3), "expected attacks like pgd(linf(8/255)), got 3"),
        (lambda: evaluators.localisation(0.5), "localisation: give an explanation such as gradient(), got 0.5"),
        (lambda: evaluators.localisation(cam(), labels="all"), "localisation: labels must be 'true' or 'predicted', got 'all'"),
        (lambda: evaluators.localisation(cam(), centre=2), "centre must be a number in [0, 1], got 2"),
        (lambda: evaluators.regions(fill=255), "fill must be a number in [0, 1], got 255.0"),
        (lambda: evaluators.receptive_field(k=0), "k must be a whole number of at least 1, got 0"),
        (
            lambda: evaluators.regions().rows(None, MODEL, VARIABLES, {"image": None}, {}),
            "regions needs a data set with 'region' (a mask of the object); this one offers none",
        ),
        (
            lambda: evaluators.background_bank(np.zeros((1, 2, 2, 3)), np.ones((1, 2, 2)), np.zeros(1), 1),
            "background bank: class 0 has no training image with an object and a background",
        ),
    ],
)  # fmt: skip
def test_mistakes(make, text):
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == text
