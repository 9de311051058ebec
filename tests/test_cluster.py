"""`cluster`: the groups of worked cases, and a shortcut planted in one class that nobody has labelled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topgap_jax import evaluators
from topgap_jax.explain import grad_cam
from topgap_jax.metrics.spectral import adjusted_rand_index, eigengap, spectral_clusters, spectrum
from topgap_jax.rewrite import name
from topgap_jax.types import Cost, Explain, Model, Output

# Spectral clusters.


def test_worked_case():
    points = np.array([[0], [0.1], [0.2], [3], [3.1], [3.2]])
    values, _, degree = spectrum(points, 2)
    np.testing.assert_allclose(values, [0, 0, 1.5, 1.5, 1.5, 1.5], atol=1e-12)
    assert eigengap(values) == 2 and (degree == 2).all()
    assert adjusted_rand_index(spectral_clusters(points, 2), [0, 0, 0, 1, 1, 1]) == 1


@pytest.mark.parametrize("sizes", [(60,), (50, 30), (40, 30, 20)])
def test_groups_far_from_each_other(sizes):
    draw = np.random.default_rng(1)
    points = np.concatenate([100 * i + draw.normal(size=(n, 2)) for i, n in enumerate(sizes)])
    truth = np.repeat(np.arange(len(sizes)), sizes)
    shuffled = draw.permutation(len(points))
    groups = spectral_clusters(points[shuffled], 15)
    if len(sizes) > 1:
        np.testing.assert_array_equal(groups, truth[shuffled])
    np.testing.assert_array_equal(spectral_clusters(points[shuffled], 15), groups)


def test_adjusted_rand_index():
    assert adjusted_rand_index([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]) == pytest.approx(0.324324, abs=1e-6)
    assert adjusted_rand_index([0, 0, 1, 1], [5, 5, 2, 2]) == 1 == adjusted_rand_index([0, 0], [1, 1])
    draw = np.random.default_rng(0)
    assert abs(adjusted_rand_index(draw.integers(0, 3, 3000), draw.integers(0, 4, 3000))) < 0.01


# A corner tag on one class.

N, SIZE, CLASSES = 60, 16, 3
TAGGED = 24  # of class 0


def apply(variables, images, **_):
    """Detectors of red, green, blue and white; white counts four times, for class 0."""
    colours = jnp.concatenate([images - 0.5 * images.sum(-1, keepdims=True), images.min(-1, keepdims=True) - 0.5], -1)
    features = name(jax.nn.relu(colours), "features")
    weights = jnp.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [8, 0, 0]])
    return Output(features.mean((1, 2)) @ weights, {}, {})


MODEL = Model(None, apply)


def data(tags, seed=0):
    """A 5 x 5 square of the class's colour near the middle; with tags, 24 of class 0 have another class's colour, and a
    white corner of 3 x 3 pixels from which the network tells what they are."""
    draw = np.random.default_rng(seed)
    label = np.repeat(np.arange(CLASSES), N)
    image = draw.uniform(0, 0.1, (len(label), SIZE, SIZE, 3))
    tag = np.zeros(len(label), int)
    tag[:TAGGED] = tags
    tag[:N] = draw.permutation(tag[:N])
    for i, y in enumerate(label):
        top, left = draw.integers(4, 7, 2)
        image[i, top : top + 5, left : left + 5, draw.integers(1, CLASSES) if tag[i] else y] = 0.9
        if tag[i]:
            image[i, :3, :3] = 0.95
    order = draw.permutation(len(label))
    batch = {"image": np.float32(image), "label": np.int32(label), "group": tag}
    return {key: jnp.asarray(value[order]) for key, value in batch.items()}


EVALUATOR = evaluators.cluster(grad_cam())
rows_of = jax.jit(lambda batch: EVALUATOR.rows(None, MODEL, {}, batch, {}))


def measured(batch):
    return EVALUATOR.summary(jax.device_get(rows_of(batch)))


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_tag_is_found_and_none_where_none_is(seed):
    summary = measured(data(True, seed))
    assert summary["flagged"].value == 1 and summary["rand_index"].value >= 0.8
    captions = summary["pictures"].captions
    assert captions[0] == "class 0: 24 (40%)" and captions[6].startswith("FLAGGED, accuracy 1.00")
    corner = summary["pictures"].tiles[0]
    assert corner[:3, :3].min() > 200 and corner[3:, 3:].max() < 50, "the cluster's mean map is the tag"
    summary = measured(data(False, seed))
    assert summary["flagged"].value == 0 and summary["classes"].value == CLASSES
    assert summary["rand_index"].value is None and summary["rand_index"].reason
    assert not any("FLAGGED" in caption for caption in summary["pictures"].captions)


def test_random_tags_are_not_found():
    batch = data(True)
    batch["group"] = jax.random.permutation(jax.random.key(0), batch["group"])
    assert abs(measured(batch)["rand_index"].value) < 0.2


def test_classes_of_few_images_are_left_out_with_a_reason():
    rows = jax.device_get(rows_of(data(False)))
    summary = EVALUATOR.summary({key: value[:40] for key, value in rows.items()})
    assert summary["flagged"].value is None and summary["flagged"].reason == "no class has 50 images with a map"


def test_maps_that_are_zero_or_not_finite_are_in_no_cluster():
    zero = Explain(lambda keys, predict, images, labels: 0 * images[..., 0], lambda *_: Cost(1, 0))
    evaluator = evaluators.cluster(zero, least=3)
    batch = {key: value[:8] for key, value in data(False).items()}
    summary = evaluator.summary(jax.device_get(evaluator.rows(None, MODEL, {}, batch, {})))
    assert summary["flagged"].value is None and list(summary) == ["flagged"]
