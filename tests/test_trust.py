"""`trust`: what it measures on networks whose exact answer can be written down, and what it concludes from that."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from tests import laws
from tests.laws import IMAGES, KEYS, PREDICT, parameters
from topgap_jax import evaluators, explain
from topgap_jax.evaluators.sanity import cascade, drawn_anew, layer_of_leaves, layer_on_grid, leak_behind_wall
from topgap_jax.evaluators.trust import conclusions, other_images, verdict
from topgap_jax.explain.rivals import luminance
from topgap_jax.measure import results
from topgap_jax.measure.evaluate import evaluate
from topgap_jax.measure.splits import resident_split
from topgap_jax.report import compare, report, table
from topgap_jax.rewrite import name
from topgap_jax.setup import config
from topgap_jax.setup.assembly import assemble
from topgap_jax.setup.weights import weights

LABELS = jnp.arange(len(IMAGES), dtype=jnp.int32) % laws.CLASSES

# Networks whose attribution is known (after arXiv 2310.06514; breadth_explanations.md 5).

BLACK, RED, BLUE, GREEN = np.eye(4)[:, 1:][[0, 1, 3, 2]]
ZERO = jnp.zeros(1, jnp.int32)


def detectors(images):
    """1 on pure red and 1 on pure blue, else 0: (b, h, w) each."""
    return [2 * jax.nn.relu(images @ jnp.array(weights) - 0.5) for weights in ([1.0, -1, -1], [-1.0, -1, 1])]


def counts(images, keys=None):
    """Net A: red pixels less blue pixels, beside a class of 1.5."""
    red, blue = (values.sum((1, 2)) for values in detectors(images))
    return jnp.stack([red - blue, jnp.full_like(red, 1.5)], 1)


def any_red(images, keys=None):
    """Net B: 1 if there is red, less the blue pixels: one red pixel more changes nothing."""
    red, blue = (values.sum((1, 2)) for values in detectors(images))
    return jnp.stack([jax.nn.relu(red) - jax.nn.relu(red - 1) - blue, jnp.full_like(red, 1.5)], 1)


def picture(*rows):
    return jnp.asarray(np.array(rows), jnp.float32)[None]


def truth_of(network, image):
    """Net A: +1 red, -1 blue; net B: the Shapley values, 1 / N_r for each red pixel, -1 for each blue."""
    red, blue = ((np.asarray(image[0]) == colour).all(-1) for colour in (RED, BLUE))
    return red / (max(red.sum(), 1) if network is any_red else 1) - blue


CASE = picture([RED, GREEN], [RED, BLUE])
LARGER = picture([RED, GREEN, BLACK], [RED, BLUE, BLUE], [BLACK, RED, GREEN])


@pytest.mark.parametrize("image", [CASE, LARGER])
@pytest.mark.parametrize("network", [counts, any_red])
def test_integrated_gradients_give_the_known_attribution(network, image):
    method = explain.integrated(steps=1000, rule="riemann_middle", baseline="black", reduce="sum")
    np.testing.assert_allclose(method.maps(None, network, image, ZERO)[0], truth_of(network, image), atol=2e-3)


def test_occlusion_is_right_where_the_score_adds_up_and_blind_where_it_saturates():
    occlusion = explain.occlusion(window=1, stride=1, baseline=0.0, score=lambda logits, *_: logits[:, 0])
    np.testing.assert_allclose(occlusion.maps(None, counts, LARGER, ZERO)[0], truth_of(counts, LARGER), atol=1e-6)
    np.testing.assert_allclose(occlusion.maps(None, any_red, CASE, ZERO)[0], [[0, 0], [0, -1]], atol=1e-6)


def test_gradient_times_input_is_twice_too_large_and_misses_what_saturates():
    method = explain.input_x_gradient(baseline="black")
    np.testing.assert_allclose(method.maps(None, counts, CASE, ZERO)[0], [[2, 0], [2, -2]])
    np.testing.assert_allclose(method.maps(None, any_red, CASE, ZERO)[0], [[0, 0], [0, -2]])


# The rivals.


def test_edges_of_the_worked_case():
    values = np.zeros((4, 4))
    values[:, 2:] = 1
    values[0, 2:] = 0.5
    images = jnp.asarray(np.repeat(values[None, ..., None], 3, 3), jnp.float32)
    expected = [[0, 2.549510, 2.915476, 2], [0, 3.535534, 3.807887, 2], [0, 4, 4, 0], [0, 4, 4, 0]]
    np.testing.assert_allclose(explain.edges().maps(None, None, images, None)[0], expected, atol=1e-5)


def test_salience_is_what_scipy_makes_of_it():
    y = np.asarray(luminance(IMAGES), np.float64)
    np.testing.assert_allclose(y, np.asarray(IMAGES) @ [0.299, 0.587, 0.114], atol=1e-6)
    expected = np.abs(y - np.stack([gaussian_filter(values, 6 / 8, mode="nearest") for values in y]))
    np.testing.assert_allclose(explain.salience().maps(None, None, IMAGES, None), expected, atol=1e-5)


# Parameters drawn anew.

OTHER = laws.MODEL._replace(init=lambda key, images: {"params": parameters(2), "batch_stats": {}})


def test_layers_in_the_order_of_computation():
    """The flat parameters are bias, first, last and last_bias, and the first kernel is used before its bias."""
    assert layer_of_leaves(laws.MODEL, laws.VARIABLES, IMAGES) == [0, 0, 1, 1]


def test_cascade_from_the_head_to_the_image():
    method = explain.gradient(reduce="sum")
    maps = cascade(method, KEYS, OTHER, laws.VARIABLES, IMAGES, LABELS, 2, lambda maps: maps)
    old, new = parameters(1), parameters(2)
    for stage, names in enumerate([("last", "last_bias"), tuple(new)]):
        mixed = old | {name: new[name] for name in names}
        expected = method.maps(KEYS, laws.network(mixed), IMAGES, LABELS)
        np.testing.assert_allclose(maps[stage], expected, rtol=1e-4, atol=1e-6)


def test_weights_that_no_init_draws_are_put_in_a_random_order():
    learnt = laws.MODEL._replace(has_weights=True)
    fresh = drawn_anew(learnt, laws.PARAMS, IMAGES)
    for key, old in laws.PARAMS.items():
        np.testing.assert_array_equal(np.sort(fresh[key].ravel()), np.sort(old.ravel()))
    assert not np.array_equal(fresh["first"], laws.PARAMS["first"])


# The wall.


def pooled(images, keys=None):
    """Means of 2 x 2 pixels as features, which have two names, and of which the logit is the sum."""
    b, h, w, c = images.shape
    features = name(images.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4)), "features")
    features = name(features, "backbone['features']")  # as Flax names the results of a dict once more
    return features.sum((1, 2)) @ jnp.ones((c, 2))


def test_wall_of_the_worked_case():
    """breadth 4: Grad-CAM looks through the wall with half of its map, HiResCAM does not."""
    ones = jnp.ones((1, 4, 4, 1))
    for method, expected in ((explain.grad_cam(), 0.5), (explain.hires_cam(), 0)):
        leak, hidden, maps = leak_behind_wall(method, None, pooled, ones, ZERO)
        assert float(leak[0]) == expected and float(hidden[0]) == 0.5 and maps.shape == (1, 2, 2)


@pytest.mark.parametrize("method, dark", [("gradient()", True), ("integrated(steps=2)", True), ("edges()", False)])
def test_wall_before_the_image(method, dark):
    leak, hidden, maps = leak_behind_wall(laws.make(method), KEYS, PREDICT, IMAGES, LABELS)
    zero = (np.asarray(maps) == 0).all((1, 2))  # where top_gap takes positions behind the wall alone
    assert (np.isnan(leak) == zero).all() and zero.sum() < 5
    leak = np.asarray(leak)[~zero]
    assert (leak == 0).all() if dark else (leak > 0.05).all()
    assert (np.asarray(hidden) == 0.5).all()


def test_the_wall_stands_at_the_layer_that_the_map_is_of():
    assert layer_on_grid(PREDICT, IMAGES, (3, 3)) == "features"  # the default one, not the class maps
    assert layer_on_grid(PREDICT, IMAGES, (6, 6)) is None and layer_on_grid(PREDICT, IMAGES, (2, 2)) is None


# Conclusions.


def rows(n=40, seed=0):
    """Rows of an honest explanation: what the checks ask for, with some noise."""
    draw = np.random.default_rng(seed)
    near = lambda value: np.float32(value + 0.02 * draw.normal(size=n))
    deletions = {
        f"deletion_{name}": np.stack([near(0.2), near(0.4), near(0.5)], 1) for name in ("mean", "blur", "black")
    }
    return {
        "ranks": 2 * draw.permuted(np.tile(np.arange(1, 65), (n, 1)), axis=1),
        "upper_spearman": near(0.1),
        "random_spearman": near(0.0),
        "dead": np.zeros(n, bool),
        "class_spearman": near(0.4),
        "noise_spearman": near(0.9),
        "unmoved_spearman": near(0.1),
        "mirrored_spearman": near(0.8),
        "single_deletion": np.stack([near(0.6), near(0.2), near(0.3)], 1),
        "leak": np.zeros(n, np.float32),
        "hidden": np.full(n, 0.5, np.float32),
        **deletions,
    }


def statuses(values):
    return {check: one.status for check, one in conclusions(values).items()}


def test_an_honest_explanation_passes_all():
    checks = conclusions(rows())
    assert {check.status for check in checks.values()} == {"pass"}
    assert verdict(tuple(checks.values())) == "passes 6 of 6 checks"


@pytest.mark.parametrize(
    "check, wrong",
    [
        ("T1", {"upper_spearman": 0.8}),
        ("T1", {"random_spearman": 0.8}),
        ("T2", {"class_spearman": 0.95}),
        ("T4", {"leak": 1e-5}),
        ("T6", {"unmoved_spearman": 1.0}),
    ],
)
def test_each_check_fails_alone(check, wrong):
    values = rows()
    values |= {key: np.full_like(values[key], value) for key, value in wrong.items()}
    assert statuses(values) == {f"T{i}": "fail" if check == f"T{i}" else "pass" for i in range(1, 7)}
    checks = tuple(conclusions(values).values())
    assert verdict(checks).startswith("passes 5 of 6 checks; fails '")


def test_rivals_and_substrates():
    values = rows()
    turned = lambda name: {name: values[name][:, ::-1]}  # what was the map's becomes that of salience
    assert statuses(values | turned("single_deletion"))["T3"] == "warn", "better at one, worse at another"
    both = turned("single_deletion") | turned("deletion_mean")
    assert statuses(values | both) == dict.fromkeys(("T1", "T2", "T4", "T6"), "pass") | {"T3": "fail", "T5": "fail"}
    same = {key: np.repeat(values[key][:, :1], 3, 1) for key in ("single_deletion", "deletion_mean")}
    assert statuses(values | same)["T3"] == "fail", "as good as an edge filter is not better"
    draw = np.random.default_rng(1)
    noise = {key: np.float32(0.3 + draw.normal(size=(40, 3))) for key in ("single_deletion", "deletion_mean")}
    assert statuses(values | noise)["T3"] == "warn", "the images do not decide"
    # Even with the edge filter on blur, and last there by chance alone: the images do not decide.
    near = values["deletion_blur"][:, 0] + np.float32(1e-3) * np.resize([1, -1.01], len(values["leak"]))
    undecided = {"deletion_blur": np.stack([values["deletion_blur"][:, 0], near, near], 1).astype(np.float32)}
    assert statuses(values | undecided)["T5"] == "warn"
    for check, different, alike in (("T2", "class", "noise"), ("T6", "unmoved", "mirrored")):
        near = np.float32(values[f"{alike}_spearman"] + np.resize([0.1, -0.11], len(values["leak"])))
        assert statuses(values | {f"{different}_spearman": near})[check] == "warn"


def test_without_a_finite_map_nothing_is_concluded():
    values = {
        key: np.full_like(value, np.nan) if value.dtype == np.float32 else 0 * value for key, value in rows().items()
    }
    assert set(statuses(values).values()) == {"skipped"}
    assert verdict(tuple(conclusions(values).values())) == "passes 0 of 0 checks"


def test_other_images_by_hand():
    ranks = np.array([[2, 4, 6], [6, 4, 2], [2, 4, 6], [2, 2, 2]])
    values = other_images(ranks)
    np.testing.assert_allclose(values[:3], [-1, -1, np.nan], atol=1e-6)
    assert np.isnan(values).sum() == 6, "of a constant map there is none"


# In a run.


def canned(keys, model, variables, batch, prepared):
    """The rows of guided backprop on eight images, whatever the network is."""
    n = len(batch["id"])
    values = rows(n) | {"upper_spearman": np.full(n, 0.9), "random": np.full((n, 2), 0.9)}
    values |= {"edges_spearman": np.zeros(n), "salience_spearman": np.zeros(n)}
    values |= {"picture": np.zeros((n, 6, 6, 3), np.uint8), "maps": np.zeros((n, 4, 6, 6), np.uint8)}
    return {key: jnp.asarray(value)[batch["id"]] for key, value in values.items()}


def test_checks_are_stored_and_stand_in_the_report(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": {"source": "shapes()", "train": "train"}}))
    images = np.zeros((8, laws.SIZE, laws.SIZE, 3), np.uint8)
    split = resident_split({"image": images, "label": np.arange(8) % 4}, classes=laws.CLASSES, batch=8)
    evaluator = evaluators.trust(explain.gradient(), stages=2)._replace(rows=canned)
    options = {"split": "test", "classes": laws.CLASSES, "progress": False, "workdir": folder, "weights": "w"}
    (row,) = evaluate(laws.MODEL, laws.VARIABLES, split, {"trust(gradient())": evaluator}, **options)
    assert results.read(folder / "evaluation.json").rows[0].checks == row.checks and len(row.checks) == 6
    words = "passes 5 of 6 checks; fails 'parameters drawn anew': the maps stay when layers are random"
    assert row.audit.startswith(f"checks: {words}") and row.norms == () and "T1" not in row.measures
    assert row.measures["checks_passed"].value == 5 and row.measures["random_curve"].x == [0.5, 1.0]
    page = report([folder], tmp_path / "page.html").read_text()
    assert page.count("Are these maps to be believed?") == 1 and "<h3>Audit" not in page
    assert "It passes 5 of 6 checks; fails &#39;parameters drawn anew&#39;" in page
    assert "what becomes of it in the checks of trust" in page
    text = table([row])
    assert "T1   fail     parameters drawn anew" in text and "T6   pass     the image mirrored" in text
    assert all(len(line) <= 120 for line in text.splitlines()[-20:])
    assert f"a: trust(gradient()) on test: {words}" in compare([folder])


@pytest.mark.slow
def test_a_published_network_and_what_is_known_of_the_methods(topgap_data):
    """ResNet-20: guided backprop, deconvnet and an edge filter are called what they are by T1, T2, T4 and T6, which ask
    the network; gradients and Grad-CAM pass these, but for the wall that Grad-CAM looks through."""
    loaded = config.load(Path(__file__).parents[1] / "configs" / "cifar10.py")
    source = weights(str(topgap_data / "weights" / "resnet20_cifar10.safetensors"))
    for key, value in source.settings.items():
        loaded.config[key] = value
    chosen = assemble(loaded)
    variables = source.load(chosen.model, image_shape=(32, 32, 3))
    records = [chosen.source("test[:32]")[i] for i in range(32)]
    images = np.stack([np.asarray(record["image"]) for record in records])
    split = resident_split({"image": images, "label": np.int32([r["label"] for r in records])}, classes=10, batch=32)
    fails = {
        "gradient()": (),
        "grad_cam()": ("T4",),
        "gradient(rules=guided_backprop)": ("T1", "T2"),
        "gradient(rules=deconvnet)": ("T6",),
        "edges()": ("T1", "T2", "T4"),
    }
    options = {"split": "test", "classes": 10, "progress": False}
    texts = {text: laws.make(f"trust({text}, steps=1)") for text in fails}
    for row in evaluate(chosen.model, variables, split, texts, **options):
        failed = {check.id for check in row.checks if check.status == "fail"} - {"T3", "T5"}
        assert failed == set(fails[row.evaluator]), row.audit
