"""Laws of every explanation, and class activation maps against the identities that tie them together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.laws import CLASSES, IMAGES, KEYS, OTHERS, PREDICT, B, assert_transformed, make, network, parameters
from topgap_jax import explain, pool
from topgap_jax.errors import UserError
from topgap_jax.rewrite import name
from topgap_jax.types import Cost, Explain

LABELS = jnp.arange(B, dtype=jnp.int32) % CLASSES
# One instance of every row of the table, and the size of its maps; the options make it small.
ROWS = {
    "cam()": (3, 3),
    "grad_cam()": (3, 3),
    "grad_cam('features')": (3, 3),
    "field()": (6, 6),
    "field('features', position='corner', channel='sum')": (6, 6),
    "field(position='top', k=2)": (6, 6),
    "gradient()": (6, 6),
    "gradient(rules=guided_backprop)": (6, 6),
    "integrated(steps=4, reduce='sum_abs')": (6, 6),
    "integrated(steps=4, baseline=0.5, rules=softplus(20))": (6, 6),
    "input_x_gradient(score=cross_entropy)": (6, 6),
    "integrated(steps=2, baseline='blur')": (6, 6),
    "expected_gradients(references, samples=3)": (6, 6),
    "smooth_taylor(samples=3, adaptive=1)": (6, 6),
    "grad_cam_plus_plus()": (3, 3),
    "smooth_grad_cam_plus_plus(samples=2)": (3, 3),
    "xgrad_cam(relu=False)": (3, 3),
    "hires_cam(relu=False)": (3, 3),
    "elementwise_grad_cam()": (3, 3),
    "layer_cam()": (3, 3),
    "eigen_cam()": (3, 3),
    "eigen_grad_cam(relu=False)": (3, 3),
    "shapley_cam()": (3, 3),
    "finer_cam(relu=False)": (3, 3),
    "score_cam()": (3, 3),
    "ablation_cam(relu=False)": (3, 3),
    "recipro_cam()": (3, 3),
    "zoom_cam('features', 'maps')": (3, 3),
    "refine(elementwise_grad_cam(), recipro_cam())": (3, 3),
    "lrp()": (6, 6),
    "lrp(epsilon_gamma_box)": (6, 6),
    "excitation_backprop()": (3, 3),
    "smooth(gradient(), samples=2)": (6, 6),
    "occlusion(window=3, stride=2)": (6, 6),
    "feature_ablation(2, baseline='blur')": (6, 6),
    "rise(masks=1501, cells=3, debias=True, chunk=50)": (6, 6),
    "mfpp(2, 3, masks=6)": (6, 6),
    "lime(2, samples=9)": (6, 6),
    "smooth(gradient(), samples=3, average='variance')": (6, 6),
    "normalise(gradient(reduce='sum'))": (6, 6),
    "ensemble(gradient(), grad_cam('features'))": (6, 6),
    "contrast(grad_cam('features'), targeted(grad_cam('features'), 'runner_up'))": (3, 3),
    "targeted(gradient(), 'runner_up')": (6, 6),
    "smooth(grad_cam('features'), samples=2, sigma=0.05)": (3, 3),
    "edges()": (6, 6),
    "salience()": (6, 6),
}
RIVALS = ("edges()", "salience()")  # of the image alone: they know no class and no network
rows = pytest.mark.parametrize("row", ROWS)
random = np.random.default_rng(0)


@functools.cache
def compiled(row):
    """The one program of a row: (params, images, labels) -> maps."""
    return jax.jit(lambda params, images, labels: make(row)(KEYS, network(params), images, labels))


def test_every_row_is_here():
    # A family is more than one map (test_cam.py), and LeGrad needs attention, which the laws' network has not
    # (test_legrad.py).
    assert {row.split("(")[0] for row in ROWS} | {"family", "legrad"} == set(explain.TABLE)


@rows
def test_shape_finite_and_what_it_says_of_itself(row):
    method = make(row)
    maps = np.asarray(compiled(row)(parameters(1), IMAGES, LABELS))
    assert maps.shape == (B, *ROWS[row]) and maps.dtype == np.float32
    assert np.isfinite(maps).all() and (np.ptp(maps, (1, 2)) > 0).sum() >= B - 2
    cost = method.cost(PREDICT, jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype))
    assert isinstance(cost, Cost) and sum(cost) >= (row not in RIVALS)
    assert method.signed or (maps >= 0).all()
    assert hash(method) == hash(method) and method.names == ()
    if method.pixels:
        pixels = jax.jit(lambda: method.pixels(KEYS, PREDICT, IMAGES, LABELS))()
        assert pixels.shape == IMAGES.shape
        np.testing.assert_allclose(method.reduce(pixels), maps, atol=1e-6)


@rows
def test_each_image_by_itself(row):
    """The map of image 2 depends on neither its neighbours nor their labels, bit for bit; on its own label it does."""
    maps = compiled(row)(parameters(1), IMAGES, LABELS)
    noise = OTHERS.at[2].set(IMAGES[2])
    others = compiled(row)(parameters(1), noise, (LABELS + 1).at[2].set(LABELS[2]) % CLASSES)
    np.testing.assert_array_equal(others[2], maps[2])
    if "channel='sum'" not in row and not row.startswith(("eigen_cam", "targeted", *RIVALS)):  # which know no class
        relabelled = compiled(row)(parameters(1), IMAGES, LABELS.at[2].set((LABELS[2] + 1) % CLASSES))
        different = (np.asarray(relabelled) != np.asarray(maps)).any((1, 2))
        np.testing.assert_array_equal(different, np.arange(B) == 2)


@pytest.mark.parametrize("row", [row for row in ROWS if row not in RIVALS])
def test_other_parameters_give_another_map(row):
    maps, others = (np.asarray(compiled(row)(parameters(seed), IMAGES, LABELS)) for seed in (1, 2))
    pairs = [(a, b) for a, b in zip(maps, others) if a.std() > 0 and b.std() > 0]
    correlations = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs]
    assert np.abs(maps - others).max() > 0.05 * np.abs(maps).max() and np.median(np.abs(correlations)) < 0.95


@pytest.mark.parametrize(
    "row", [row if i % 4 == 0 else pytest.param(row, marks=pytest.mark.slow) for i, row in enumerate(ROWS)]
)
def test_no_later_call_is_changed(row):
    text = str(jax.make_jaxpr(PREDICT)(IMAGES))
    jax.eval_shape(lambda: make(row)(KEYS, PREDICT, IMAGES, LABELS))
    assert str(jax.make_jaxpr(PREDICT)(IMAGES)) == text


@pytest.mark.parametrize("row", ["grad_cam('features')", *(pytest.param(row, marks=pytest.mark.slow) for row in ROWS)])
def test_a_jitted_network_gives_the_same_map(row):
    jitted = jax.jit(PREDICT)
    jitted(IMAGES)
    maps = jax.jit(lambda images: make(row)(KEYS, jitted, images, LABELS))(IMAGES)
    np.testing.assert_allclose(maps, compiled(row)(parameters(1), IMAGES, LABELS), atol=1e-6)
    assert jitted._cache_size() == 1


@pytest.mark.parametrize("row", ["grad_cam('features')", *(pytest.param(row, marks=pytest.mark.slow) for row in ROWS)])
def test_transformations(row):
    assert_transformed(lambda *arrays: make(row)(arrays[0], PREDICT, *arrays[1:]), KEYS, IMAGES, LABELS)


def test_a_family_is_refused_where_one_map_is_needed():
    several = Explain(lambda *_: (), lambda *_: Cost(), names=("a", "b"))
    for consumer in ("smooth", "topk_attack", "localisation", "measures", "attributional_robustness"):
        text = f"{consumer}: the explanation is a family of 2 maps; give one of them"
        with pytest.raises(UserError) as raised:
            Explain.single(consumer, several)
        assert str(raised.value) == text
    with pytest.raises(UserError, match="family of 2 maps"):
        explain.smooth(several)


def test_cam_is_the_labels_map():
    features = jax.nn.relu(
        lax.conv_general_dilated(
            IMAGES, parameters(1)["first"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        + parameters(1)["bias"]
    )
    maps = np.asarray(features) @ np.asarray(parameters(1)["last"]) + np.asarray(parameters(1)["last_bias"])
    cam = explain.cam()(KEYS, PREDICT, IMAGES, LABELS)
    np.testing.assert_allclose(cam, np.stack([m[..., y] for m, y in zip(maps, LABELS)]), atol=1e-5)


@pytest.mark.parametrize("pooling", [pool.gap(), pool.top_gap(k=3), pool.gmp()], ids=["gap", "top_gap", "gmp"])
def test_cam_is_grad_cam_up_to_relu_and_scale(pooling):
    """topgap 7: on the maps relu(M / n), on the features under them relu((M - bias) / n), for every k."""
    predict = network(parameters(1), pooling)
    cam = explain.cam()(KEYS, predict, IMAGES, LABELS)
    np.testing.assert_allclose(
        9 * explain.grad_cam("maps")(KEYS, predict, IMAGES, LABELS), np.maximum(cam, 0), atol=1e-5
    )
    bias = parameters(1)["last_bias"][LABELS][:, None, None]
    on_features = explain.grad_cam("features")(KEYS, predict, IMAGES, LABELS)
    np.testing.assert_allclose(9 * on_features, np.maximum(cam - bias, 0), atol=1e-5)


def test_worked_head():
    """topgap 14.7."""
    features = jnp.array([[[1.0, 0], [0, 1]], [[2, 1], [3, 2]]])[None]

    def predict(images, keys=None):
        scores = name(images, "features") @ jnp.array([[1.0, 0], [-2, 0]]) + jnp.array([0.5, 0])
        return pool.top_gap(k=2)(name(scores, "maps"))

    assert float(predict(features)[0, 0]) == 1.0
    np.testing.assert_allclose(
        explain.cam().maps(None, predict, features, jnp.array([0]))[0], [[1.5, -1.5], [0.5, -0.5]]
    )
    grad_cam = explain.grad_cam("features").maps(None, predict, features, jnp.array([0]))
    np.testing.assert_allclose(grad_cam[0], [[0.25, 0], [0, 0]], atol=1e-7)


def test_bf16_features_are_weighted_in_float32():
    head = jnp.asarray(random.normal(size=(5, CLASSES)), jnp.bfloat16)
    features = jnp.asarray(random.normal(size=(B, 3, 3, 5)), jnp.bfloat16)
    predict = lambda images, keys=None: (name(images, "features").mean((1, 2)) @ head).astype(jnp.float32)
    maps = explain.grad_cam("features").maps(None, predict, features, LABELS)
    assert maps.dtype == jnp.float32
    weights = np.float32(head)[:, np.asarray(LABELS)].T / 9
    sums = lambda f, w: np.einsum("bhwc,bc->bhw", f, w)
    rounding = 2**-8 * sums(np.abs(np.float32(features)), np.abs(weights))  # the gradient is bf16
    assert (np.abs(maps - np.maximum(sums(np.float32(features), weights), 0)) <= rounding).all()


def test_errors():
    plain = lambda images, keys=None: name(images, "pixels").mean((1, 2))
    bare = lambda images, keys=None: images.mean((1, 2))
    for method, predict, text in [
        (
            explain.cam(),
            plain,
            (
                "cam: the model has no class maps named 'maps' (use map_head, pyramid_head or rewrite.with_pool): no"
                " layer 'maps'; layers: pixels"
            ),
        ),
        (explain.grad_cam("stage9"), plain, "no layer 'stage9'; layers: pixels"),
        (
            explain.grad_cam(),
            bare,
            "no named (b, h, w, c) value in this function: name one with topgap_jax.rewrite.name(value, 'features')"
            " (the layers of an NNX module have names in models.nnx(module))",
        ),
    ]:
        with pytest.raises(UserError) as raised:
            method(KEYS, predict, IMAGES, LABELS % 3)
        assert str(raised.value) == text
