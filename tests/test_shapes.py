"""The embedded data set: its ground truth is exact, its background goes with the class as often as it says."""

import jax
import numpy as np
import pytest

from topgap_jax import data
from topgap_jax.build import build
from topgap_jax.data.shapes import BACKGROUNDS, CLASSES, EXTENT, SIZE, box_of, outline, texture
from topgap_jax.errors import UserError


@pytest.fixture(scope="module")
def train():
    return data.resident(data.shapes(train=1200)("train"), (SIZE, SIZE))


def test_an_image_depends_on_seed_split_and_index_only():
    image = lambda splits, split, i: splits(split)[i]["image"]
    few, many = data.shapes(train=20), data.shapes(train=90, test=7)
    np.testing.assert_array_equal(image(few, "train", 13), image(many, "train", 13))
    np.testing.assert_array_equal(image(few, "train[10:]", 3), image(many, "train", 13))
    pictures = [
        image(few, "train", 0),
        image(few, "train", 1),
        image(few, "test", 0),
        image(data.shapes(1), "train", 0),
    ]
    pictures += [image(few, "test_shifted", 0), image(few, "validation", 0)]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_splits_and_offers():
    splits = data.shapes(train=30, validation=4, test=5)
    assert [len(splits(name)) for name in ("train", "validation", "test", "test_shifted")] == [30, 4, 5, 5]
    source = splits("train")
    assert (source.classes, source.image_size, source.offers) == (CLASSES, (64, 64), ("box", "region", "group"))
    with pytest.raises(
        UserError, match=r"shapes\(\) has no split 'tests'; did you mean 'test'\? choose from test, test_shifted"
    ):
        splits("tests")
    with pytest.raises(UserError, match=r"shapes\(\) split 'validation' is empty"):
        data.shapes(validation=0)("validation")
    with pytest.raises(UserError, match=r"config.source: shapes: correlation must be a number in \[0, 1\], got 9"):
        build("shapes(correlation=9)", data.TABLE, {}, "config.source")


def test_the_background_agrees_in_nine_of_ten(train):
    """Within four standard deviations of a binomial."""
    assert abs(train["group"].mean() - 0.1) < 4 * (0.1 * 0.9 / 1200) ** 0.5
    shifted = data.resident(data.shapes(test=1200)("test_shifted"), (SIZE, SIZE))
    assert abs(shifted["group"].mean() - 5 / 6) < 4 * (5 / 36 / 1200) ** 0.5
    assert (np.abs(np.bincount(train["label"]) - 200) < 4 * (1200 * 5 / 36) ** 0.5).all()


def test_objects_cover_a_seventh_of_the_image(train):
    assert abs(train["region"].mean() - 0.14) < 0.01
    assert set(np.unique(train["region"])) == {0, 1}


def test_boxes_are_tight_and_objects_inside(train):
    for region, box in zip(train["region"][:200], train["box"]):
        top, left, bottom, right = (box * SIZE).astype(int)
        assert region[top:bottom, left:right].sum() == region.sum()
        assert region[top, left:right].any() and region[bottom - 1, left:right].any()
        assert region[top:bottom, left].any() and region[top:bottom, right - 1].any()
    edge = np.concatenate([train["region"][:, [0, -1]].ravel(), train["region"][:, :, [0, -1]].ravel()])
    assert not edge.any()


def test_the_object_differs_in_colour_and_the_noise_is_what_it_says(train):
    """Mean colour in- and outside at least .15 apart a channel (.4 U(.6, 1), cut at 0 and 1), residual noise .05
    inside."""
    image = train["image"].astype(np.float64) / 255
    inside, outside = train["region"] == 1, train["region"] == 0
    for i in range(100):
        here, there = image[i][inside[i]], image[i][outside[i]]
        assert (np.abs(here.mean(0) - there.mean(0)) > 0.15).all()
    middle = image[np.arange(1200)[train["label"] == 0][0]]  # a disc: its centre is plain colour and noise
    y, x = np.argwhere(train["region"][train["label"] == 0][0]).mean(0).astype(int)
    patch = middle[y - 4 : y + 5, x - 4 : x + 5]
    assert 0.03 < np.median(patch.std((0, 1))) < 0.07


@pytest.mark.parametrize("name", CLASSES)
def test_outlines_have_the_area_of_their_formula_and_keep_to_their_extent(name):
    """Area in units of radius^2; the radius is found from the same draw."""
    formula = {
        "disc": np.pi,
        "square": 4 * 0.8**2,
        "triangle": 3 * 3**0.5 / 4 * 1.25**2,
        "cross": 2 * (2 * 0.925 * 0.76) - 0.76**2,
        "ring": np.pi * (1 - 0.5**2),
        "star": 10 * 0.5 * 1.2 * 0.6 * np.sin(np.pi / 5),
    }[name]
    for seed in range(8):
        radius = float(np.exp(np.random.default_rng(seed).uniform(np.log(10), np.log(22))))
        distance = outline(np.random.default_rng(seed), name)
        assert abs(np.clip(0.5 - distance, 0, 1).sum() / radius**2 - formula) < 0.02 * formula
        rows, columns = np.nonzero(distance < 0)
        spread = max(np.ptp(rows), np.ptp(columns)) + 1
        assert spread <= 2 * radius * EXTENT[name] + 1


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_textures_have_equal_power(name):
    for seed in range(5):
        values = texture(np.random.default_rng(seed), name)
        np.testing.assert_allclose([values.mean(), values.std()], [0, 0.5], atol=1e-9)
        assert np.abs(values).max() < 1.2


def test_texture_spectra_tell_the_backgrounds_apart():
    """The strongest frequency lies on the axis (stripes) or off both (diagonals) that the name says."""
    spectrum = lambda name: np.abs(np.fft.fft2(texture(np.random.default_rng(1), name)))
    peak = lambda name: np.array(np.unravel_index(spectrum(name)[:, :32].argmax(), (64, 32)))
    assert peak("horizontal")[1] == 0 and peak("vertical")[0] == 0
    assert 0 < peak("rising")[0] < 32 and peak("rising")[1] > 0  # phase grows with x and with y
    assert 32 < peak("falling")[0] < 64 and peak("falling")[1] > 0


def test_box_of_a_region():
    region = np.zeros((4, 8), np.uint8)
    region[1:3, 2:7] = 1
    assert box_of(region).tolist() == [0.25, 0.25, 0.75, 0.875]


def test_shapes_batches_hold_all_that_is_offered(train):
    batch = jax.jit(data.gather, static_argnums=3)(train, np.arange(4), np.ones(4, bool), 6)
    assert {key: value.shape for key, value in batch.items()} == {
        "image": (4, 64, 64, 3),
        "targets": (4, 6),
        "label": (4,),
        "id": (4,),
        "mask": (4,),
        "box": (4, 4),
        "region": (4, 64, 64),
        "group": (4,),
    }
