"""Occlusion, ablation, RISE, MFPP and LIME against the worked values of baselines.md 13 and additive scores."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.laws import IMAGES, KEYS, PREDICT, make
from topgap_jax import explain
from topgap_jax.data.segments import slic
from topgap_jax.errors import UserError
from topgap_jax.explain import masks, surrogate
from topgap_jax.explain.masking import mixed
from topgap_jax.grids import cell_numbers
from topgap_jax.rewrite import normalisation
from topgap_jax.types import Cost

random = np.random.default_rng(0)
LABELS = jnp.arange(8, dtype=jnp.int32) % 4
WEIGHTS = jnp.asarray(random.normal(size=(3, 4)), jnp.float32)
COUNT = jnp.arange(1.0, 17).reshape(1, 4, 4, 1) / 16


def smooth(images, keys=None):
    """Four classes that depend on the pixels in no simple way; without convolutions, which take long to compile."""
    return 8 * jnp.sin(3 * images).reshape(len(images), -1, 3).mean(1) @ WEIGHTS


def total(images, keys=None):
    """One output: 16 times the sum of the pixels."""
    return 16 * images.sum((1, 2, 3))[:, None]


def one(method, images=COUNT, predict=total):
    keys, labels = jax.random.split(jax.random.key(3), len(images)), jnp.zeros(len(images), jnp.int32)
    return run(method, keys, predict, images, labels)


def run(method, keys, predict, images, labels):
    """One program: eagerly, every operation would be compiled by itself."""
    return jax.jit(lambda keys, images: method(keys, predict, images, labels))(keys, images)


@pytest.mark.parametrize(
    "window, stride, rows",
    [
        (2, 2, [[14, 14, 22, 22], [14, 14, 22, 22], [46, 46, 54, 54], [46, 46, 54, 54]]),
        (3, 2, [[54, 54, 49.5, 45], [54, 54, 49.5, 45], [63, 63, 56.25, 49.5], [72, 72, 63, 54]]),
        ((3, 3), (1, 1), [[54, 58.5, 58.5, 63]]),
    ],
)
def test_occlusion_by_hand(window, stride, rows):
    """13.11: the last window is cut at the border, where windows overlap they are averaged."""
    maps = one(explain.occlusion(window=window, stride=stride, baseline=0.0))
    np.testing.assert_allclose(maps[0, : len(rows)], rows, rtol=1e-6)


def test_occlusion_windows_that_are_not_square():
    image = random.uniform(size=(5, 7))
    method = explain.occlusion(window=(2, 3), stride=(2, 1), baseline=0.25)
    drops, cover = np.zeros((5, 7)), np.zeros((5, 7))
    for top, left in itertools.product((0, 2, 4), range(5)):
        inside = np.zeros((5, 7), bool)
        inside[top : top + 2, left : left + 3] = True
        drops += inside * 16 * (image - 0.25)[inside].sum()
        cover += inside
    assert method.cost(total, jnp.zeros((1, 5, 7, 1))) == Cost(16, 0)
    np.testing.assert_allclose(one(method, jnp.float32(image)[None, ..., None])[0], drops / cover, rtol=1e-5)


def test_occlusion_by_default_hides_an_eighth():
    assert explain.occlusion().cost(total, jnp.zeros((1, 224, 224, 3))) == Cost(15**2 + 1, 0)  # 28 pixels every 14
    assert explain.occlusion().cost(total, jnp.zeros((1, 32, 30, 3))) == Cost(15 * 28 + 1, 0)  # 4 every 2 and 3 every 1


def test_ablation_of_segments_is_what_they_add():
    segments = random.permutation(16).reshape(4, 4) % 5 * 3 - 1  # with gaps, and from -1
    image = np.asarray(COUNT[0, ..., 0])
    expected = sum(16 * image[segments == i].sum() * (segments == i) for i in np.unique(segments))
    method = explain.feature_ablation(segments, baseline=0.0)
    np.testing.assert_allclose(one(method)[0], expected, rtol=1e-6)
    assert method.cost(total, COUNT) == Cost(6, 0)
    both = explain.feature_ablation(np.stack([segments, cell_numbers("", 2, (4, 4))]), baseline=0.0)
    maps = one(both, jnp.concatenate([COUNT, COUNT]))
    np.testing.assert_allclose(maps[0], expected, rtol=1e-6)
    np.testing.assert_allclose(maps[1], [[14, 14, 22, 22]] * 2 + [[46, 46, 54, 54]] * 2, rtol=1e-6)


def test_cells_of_a_grid_differ_by_a_pixel():
    cells = cell_numbers("", 7, (32, 30))
    counts = np.bincount(cells.ravel())
    assert len(counts) == 49 and {*counts} <= {16, 20, 25} and (np.diff(cells, axis=1) >= 0).all()


def test_additive_scores_are_explained_by_all_alike():
    """13.21: on a sum of pixels a window or segment of one pixel gives x - baseline, and so does LIME without a
    penalty."""
    values = np.asarray(COUNT[0, ..., 0]) * 16
    for method in (
        explain.occlusion(window=1, baseline=0.0),
        explain.feature_ablation(4, baseline=0.0),
        explain.lime(4, samples=200, penalty=0.0, baseline=0.0),
    ):
        np.testing.assert_allclose(one(method)[0], values, atol=3e-5)


def test_rise_mask_by_hand():
    """13.8: linear enlargement, mirrored about the centre of the cells at the border, and cropped."""
    eye = jnp.eye(2)[None]
    whole = masks._smooth_masks(eye, jnp.zeros((1, 2), jnp.int32), (8, 8))[0]
    np.testing.assert_allclose(whole[0, :6], [0.513889, 0.541667, 0.569444, 0.569444, 0.541667, 0.513889], atol=1e-6)
    crop = masks._smooth_masks(eye, jnp.array([[1, 2]]), (8, 8))[0]
    row = [0.708333, 0.708333, 0.625, 0.541667, 0.458333, 0.375, 0.291667, 0.291667]
    np.testing.assert_allclose(crop[0], row, atol=1e-6)
    np.testing.assert_allclose(crop.sum(), 32, atol=1e-5)


def test_rise_masks_at_sizes_that_do_not_divide():
    """Cells of ceil(size / s) pixels on each axis, shifts below one cell, and no pixel beyond the enlarged grid."""
    grids, shifts = masks._grids(jax.random.split(jax.random.key(0), 400), 3, 0.25, (7, 10))
    assert shifts.min() == 0 and [*shifts.max(0)] == [2, 3] and grids.mean() == pytest.approx(0.25, abs=0.03)
    pictures = masks._smooth_masks(grids, shifts, (7, 10))
    assert pictures.shape == (400, 7, 10) and pictures.min() >= 0 and pictures.max() <= 1
    # What rows of the enlarged grid a shift takes: [shift, shift + 7) of 12, of 3 values with weights that add to 1.
    np.testing.assert_allclose(masks._enlarging(3, 3).sum(1), 1, rtol=1e-6)
    expected = np.einsum(
        "hi,ij,wj->hw", masks._enlarging(3, 3)[2:9], np.asarray(grids[0]), masks._enlarging(3, 4)[1:11]
    )
    found = masks._smooth_masks(grids[:1], jnp.array([[2, 1]]), (7, 10))[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("p, debias, expected", [(0.5, False, (1.5, 2, 0.5)), (0.25, False, (1.25, 2, -0.25))])
def test_rise_of_an_additive_score(p, debias, expected):
    """13.9, all masks with their probabilities; without bias the parts themselves."""
    parts, every = np.array([1.0, 2, -1]), np.array([*itertools.product((0.0, 1), repeat=3)])
    chance = np.prod(np.where(every, p, 1 - p), 1)
    weighted = lambda debias: np.einsum(
        "n,nhw->hw", chance, masks._weighted(every @ parts, every[:, None, :], p, debias)
    )
    np.testing.assert_allclose(weighted(False)[0], expected, rtol=1e-6)
    np.testing.assert_allclose(weighted(True)[0], parts, rtol=1e-6)


def test_rise_and_mfpp_are_means_over_the_masks_of_the_keys():
    """Against a loop over the very masks: whatever the chunk, for a score that is no sum."""
    keys = KEYS[:2]
    asked = jax.jit(lambda mask: jax.nn.softmax(smooth(mask[..., None] * IMAGES[:2]))[jnp.arange(2), LABELS[:2]])
    drawn = jax.jit(lambda keys: masks._smooth_masks(*masks._grids(keys, 2, 0.25, (6, 6)), (6, 6)))
    expected = np.zeros((2, 6, 6))
    for index in range(7):
        mask = drawn(jax.vmap(jax.random.fold_in, (0, None))(keys, index))
        expected += asked(mask)[:, None, None] * mask / 0.25 / 7
    for chunk in (1, 3):
        method = explain.rise(masks=7, cells=2, p=0.25, chunk=chunk)
        np.testing.assert_allclose(run(method, keys, smooth, IMAGES[:2], LABELS[:2]), expected, rtol=1e-5)
    counted, expected = np.zeros((2, 6, 6)), np.zeros((2, 6, 6))
    for index in range(4):
        drawn = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, index), 0.5, (9,)))(keys)
        mask = np.asarray(drawn)[:, cell_numbers("", 2 + index % 2, (6, 6))]
        expected, counted = expected + np.asarray(asked(np.float32(mask)))[:, None, None] * mask, counted + mask
    found = run(explain.mfpp(2, 3, masks=4, chunk=2), keys, smooth, IMAGES[:2], LABELS[:2])
    np.testing.assert_allclose(found, expected / np.maximum(counted, 1), rtol=1e-5)


def test_mfpp_of_two_segments():
    """related 3: p = .1, .2, .6, .9 of the masks 00, 01, 10, 11 gives (.75, .55), to what chance leaves."""

    def predict(images, keys=None):
        a, b = images[:, 0, 0, 0] > 0, images[:, 0, 1, 0] > 0
        return (0.1 + 0.1 * (b & ~a) + 0.5 * (a & ~b) + 0.8 * (a & b))[:, None]

    found = one(explain.mfpp(np.array([[0, 1]]), masks=4000, baseline=0.0, chunk=200), jnp.ones((1, 1, 2, 1)), predict)
    np.testing.assert_allclose(found[0, 0], [0.75, 0.55], atol=0.02)


def test_lime_by_hand():
    """13.10 and related 5: weights of the samples, coefficients with a penalty of 1."""
    shown = jnp.array([[1.0, 1], [1, 0], [0, 1], [0, 0]])
    fit = jax.jit(lambda sums: surrogate._coefficients(tuple(part.sum(0, keepdims=True) for part in sums), 1.0))
    for y, beta in [((0.9, 0.5, 0.3, 0.1), (0.13384, 0.066868)), ((0.9, 0.7, 0.3, 0.1), (0.147287, 0.013344))]:
        sums = surrogate._sums(shown, jnp.array(y), 0.25)
        np.testing.assert_allclose(sums[0], [1, 0.50344, 0.50344, 0.000335], atol=1e-6)
        np.testing.assert_allclose(fit(sums)[0], beta, atol=2e-6)
    four = surrogate._sums(jnp.array([[1.0, 1, 0, 1]]), jnp.ones(1), 0.25)
    np.testing.assert_allclose(four[0], 0.866240, atol=1e-6)


def test_lime_is_the_regression_on_its_samples():
    """Against NumPy's least squares in float64 on the same draws."""
    method = explain.lime(2, samples=9, baseline="mean", chunk=4)
    z = np.stack(
        [
            jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, index), 0.5, (4,)))(KEYS) | (index == 0)
            for index in range(9)
        ],
        1,
    ).astype(float)
    maps = run(method, KEYS, smooth, IMAGES, LABELS)
    cells = cell_numbers("", 2, (6, 6))
    for i in range(8):
        copies = IMAGES[i] * jnp.float32(z[i][:, cells])[..., None]
        y = np.float64(jax.nn.softmax(smooth(copies))[:, LABELS[i]])
        weight = np.exp(-((1 - np.sqrt(z[i].mean(1))) ** 2) / 2 / 0.25**2)
        left, right = (values - (weight @ values) / weight.sum() for values in (z[i], y))
        beta = np.linalg.solve(left.T @ (weight[:, None] * left) + np.eye(4), left.T @ (weight * right))
        np.testing.assert_allclose(maps[i], beta[cells], atol=1e-5)


def test_a_hidden_segment_of_lime_shows_its_mean_colour():
    ids = jnp.asarray(cell_numbers("", 2, (6, 6)))[None]
    means = surrogate._means(IMAGES, ids, 4)
    np.testing.assert_allclose(means[3, :3, 3:], jnp.broadcast_to(IMAGES[3, :3, 3:].mean((0, 1)), (3, 3, 3)), rtol=1e-5)


def test_a_hidden_pixel_shows_what_the_normalisation_maps_to_zero():
    mean = (0.25, 0.5, 0.75)
    predict = lambda images, keys=None: normalisation.normalise(images, mean, (0.5,) * 3).sum((1, 2))
    maps = run(explain.occlusion(window=1), KEYS, predict, IMAGES, LABELS % 3)
    expected = np.take_along_axis(2 * (IMAGES - np.float32(mean)), np.asarray(LABELS % 3)[:, None, None, None], 3)
    np.testing.assert_allclose(maps, expected[..., 0], atol=2e-5)


def test_a_mask_of_bools_takes_pixels_as_they_are():
    mask = random.uniform(size=(8, 6, 6)) < 0.5
    np.testing.assert_array_equal(mixed(jnp.asarray(mask), IMAGES, -IMAGES), np.where(mask[..., None], IMAGES, -IMAGES))


@pytest.mark.parametrize(
    "text",
    [
        "rise(masks={}, chunk=2)",
        *(pytest.param(text, marks=pytest.mark.slow) for text in ("lime(2, samples={})", "mfpp(2, masks={})")),
    ],
)
def test_memory_does_not_grow_with_the_masks(text):
    """XLA's own count of what the program needs beside its arguments."""

    def needed(n):
        method = make(text.format(n))
        run = jax.jit(lambda keys, images: method(keys, smooth, images, LABELS)).lower(KEYS, IMAGES).compile()
        return run.memory_analysis().temp_size_in_bytes

    few, many = needed(100), needed(4000)
    # The numbers of the masks themselves are 4 bytes each.
    assert many - few <= 2 * 4 * 3900 < IMAGES.nbytes * 10


@pytest.mark.parametrize(
    "method, text",
    [
        (lambda: explain.occlusion(window=7), "occlusion: a window of 7 x 7 is larger than images of 6 x 6"),
        (
            lambda: explain.occlusion(window=2, stride=3),
            "occlusion: a stride of 3 x 3 leaves gaps between windows of 2 x 2; give stride <= window",
        ),
        (lambda: explain.occlusion(window=(2, 2, 2)), "window must be a whole number of at least 1, got (2, 2, 2)"),
        (
            lambda: explain.occlusion(baseline="grey"),
            "occlusion: baseline must be 'mean', 'black', 'white', 'blur', 'noise', a number, one per channel or an"
            " array, got 'grey'",
        ),
        (
            lambda: explain.rise(baseline=np.zeros((5, 6, 3))),
            "rise: baseline must be 'mean', 'black', 'white', 'blur', 'noise', a number, one per channel or an array for"
            " images of shape (8, 6, 6, 3), got an array of shape (5, 6, 3)",
        ),
        (lambda: explain.rise(baseline=127.5), "rise: baseline must lie in [0, 1] as images do, got 127.5"),
        (
            lambda: explain.rise(baseline=np.full((6, 6, 3), np.uint8(9))),
            "rise: baseline must lie in [0, 1] as images do, got 9 to 9",
        ),
        (
            lambda: explain.lime(3, samples=9, penalty=0),
            "lime: 9 samples do not determine the coefficients of 9 segments without a penalty; give more samples, or a"
            " penalty",
        ),
        (lambda: explain.rise(masks=0), "masks must be a whole number of at least 1, got 0"),
        (lambda: explain.rise(p=1), "rise: p must lie between 0 and 1, got 1: masks that are all alike tell nothing"),
        (lambda: explain.rise(chunk=0), "chunk must be a whole number of at least 1, got 0"),
        (lambda: explain.lime(9), "lime: a grid of 9 x 9 cells is finer than images of 6 x 6 pixels"),
        (
            lambda: explain.feature_ablation(np.zeros((6, 6))),
            "feature_ablation: segments must be a number n (n x n cells) or an int array (h, w) or (b, h, w), got an"
            " array of shape (6, 6) and type float64",
        ),
        (
            lambda: explain.mfpp(2, np.zeros((3, 6, 6), int)),
            "mfpp: segments of shape (3, 6, 6) do not fit 8 images of 6 x 6; give (h, w) or (b, h, w)",
        ),
        (
            lambda: explain.lime("slic"),
            "lime: segments must be a number n (n x n cells) or an int array (h, w) or (b, h, w), got 'slic'",
        ),
    ],
)
def test_mistakes(method, text):
    with pytest.raises(UserError) as error:
        method()(KEYS, PREDICT, IMAGES, LABELS)
    assert str(error.value) == text


def test_slic_segments():
    pytest.importorskip("skimage", reason="the extra [superpixels] is not installed")
    images = np.zeros((2, 20, 24, 3), np.float32)
    images[:, :, 12:] = 1
    images[1, :10] = (0, 1, 0)
    ids = slic(images, 4, compactness=1)
    assert ids.shape == (2, 20, 24) and ids.dtype == np.int32 and ids.min() == 0
    for numbers, image in zip(ids, images):
        for i in np.unique(numbers):
            assert np.ptp(image[1:-1, 1:-1][numbers[1:-1, 1:-1] == i], 0).max(initial=0) <= 1


def test_slic_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    with pytest.raises(UserError) as error:
        slic(np.zeros((1, 8, 8, 3), np.float32))
    assert str(error.value) == (
        "slic: superpixels need scikit-image: pip install 'topgap-jax[superpixels]'; explanations take grids without it,"
        " such as lime(7)"
    )
