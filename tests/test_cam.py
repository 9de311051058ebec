"""Class activation maps against worked numbers (baselines 13.4, 13.5; breadth 1; related 2) and the identities between
them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.laws import CLASSES, IMAGES, KEYS, LABELS, PREDICT, B
from topgap_jax import explain, scores
from topgap_jax.errors import UserError
from topgap_jax.explain.cam import _first_component
from topgap_jax.keys import fold_in, normal
from topgap_jax.rewrite import features_and_head, name, read, tap, tokens
from topgap_jax.types import Cost, Explain

A = np.stack([[[1.0, 2], [0, 1]], [[1, 1], [3, 2]]], -1)[None].astype(np.float32)
G = np.stack([[[1.0, -1], [-1, 2]], [[-2, 1], [1, -2]]], -1)[None].astype(np.float32)
ZERO = jnp.zeros(1, jnp.int32)
random = np.random.default_rng(0)


def with_gradient(gradients):
    """A network that takes its images as features and has these gradients with respect to them."""
    return lambda images, keys=None: (name(images, "features") * gradients).sum((1, 2, 3))[:, None]


def linear_head(weights):
    """A network that takes its images as features: class maps and their mean."""
    return lambda images, keys=None: name(name(images, "features") @ jnp.asarray(weights), "maps").mean((1, 2))


def one_map(method, predict, images, labels=ZERO):
    return maps_of(method, predict, images, labels)[0]


def maps_of(method, predict, images, labels):
    """The maps, compiled: less than half the time of compiling every operation by itself."""
    keys = KEYS[: len(images)]
    return jax.jit(lambda images, labels: method.maps(keys, predict, images, labels))(jnp.asarray(images), labels)


WORKED = {
    "grad_cam": [[-0.25, 0], [-1.5, -0.75]],
    "hires_cam": [[-1, -1], [3, -2]],
    "elementwise_grad_cam": [[1, 1], [3, 2]],
    "layer_cam": [[1, 1], [3, 2]],
    "xgrad_cam": [[-0.035714, 0.214286], [-0.857143, -0.321429]],
    "grad_cam_plus_plus": [[0.588889, 0.955556], [0.666667, 0.811111]],
    "eigen_cam": [[1.320339, 1.727177], [2.7405, 2.233839]],
}


@pytest.mark.parametrize("method", WORKED)
def test_worked_gradients(method):
    """13.4, raw and after ReLU."""
    options = {} if method == "elementwise_grad_cam" else {"relu": False}
    raw = one_map(getattr(explain, method)("features", **options), with_gradient(G), A)
    np.testing.assert_allclose(raw, WORKED[method], atol=2e-6)
    if options:
        rectified = one_map(getattr(explain, method)("features"), with_gradient(G), A)
        np.testing.assert_array_equal(rectified, np.maximum(raw, 0))


def test_element_wise_and_layer_cam_differ_where_features_are_negative():
    features = np.array([1.0, -1]).reshape(1, 1, 2, 1)
    predict = with_gradient(np.array([-2.0, -3]).reshape(1, 1, 2, 1))
    np.testing.assert_array_equal(one_map(explain.elementwise_grad_cam("features"), predict, features), [[0, 3]])
    np.testing.assert_array_equal(one_map(explain.layer_cam("features"), predict, features), [[0, 0]])


def test_grad_cam_plus_plus_of_the_authors_code():
    method = explain.grad_cam_plus_plus("features", normalised=True, relu=False)
    np.testing.assert_allclose(one_map(method, with_gradient(G), A), A[0] @ [1.375, 1.0], atol=2e-6)


def test_grad_cam_plus_plus_has_no_unit():
    """The weights are linear in a small gradient; a threshold on g^2 would make them zero."""
    small = one_map(explain.grad_cam_plus_plus("features"), with_gradient(1e-9 * G), A)
    np.testing.assert_allclose(small, 0.5e-9 * A[0] @ np.maximum(G[0], 0).sum((0, 1)), rtol=1e-6)
    where_it_is_zero = with_gradient(np.full_like(G, -0.5))  # 2 + 4 g = 0 for the first channel
    assert np.isfinite(one_map(explain.grad_cam_plus_plus("features"), where_it_is_zero, A)).all()


def test_smooth_grad_cam_plus_plus():
    """From the same draws in NumPy; without noise it is Grad-CAM++."""
    curved = lambda images, keys=None: (name(images, "features") ** 3 * G).sum((1, 2, 3))[:, None]
    method = lambda **options: explain.smooth_grad_cam_plus_plus("features", relu=False, **options)
    plain = one_map(explain.grad_cam_plus_plus("features", relu=False), curved, A)
    np.testing.assert_allclose(one_map(method(samples=2, sigma=0), curved, A), plain, rtol=1e-5)
    noise = [0.2 * np.ptp(A) * np.asarray(normal(fold_in(KEYS[:1], i), jnp.asarray(A, jnp.float32))) for i in range(3)]
    assert 0.3 < np.std(noise) < 1.0 and (noise[0] != noise[1]).all()  # 0.2 of a range of 3
    g = np.stack([3 * (A + e) ** 2 * G for e in noise])
    d1, d2, d3 = g.mean(0), (g**2).mean(0), (g**3).mean(0)
    alpha = d2 / (2 * d2 + A.sum((1, 2)) * d3)
    expected = A[0] @ (alpha * np.maximum(d1, 0)).sum((1, 2))[0]
    np.testing.assert_allclose(one_map(method(samples=3, sigma=0.2), curved, A), expected, rtol=1e-4)


@pytest.mark.slow
def test_first_component():
    """13.4; centred as pytorch-grad-cam does it; of fewer positions than channels; and its sign."""
    centred = _first_component(jnp.asarray(A - A.mean((1, 2), keepdims=True)))[0]
    np.testing.assert_allclose(centred, [[-0.577132, -1.215768], [1.600522, 0.192377]], atol=2e-6)
    for shape in ((3, 2, 4, 5), (3, 4, 4, 5)):
        values = random.normal(size=shape).astype(np.float32)
        m = values.reshape(3, -1, 5)
        u, s, _ = np.linalg.svd(m.astype(np.float64), full_matrices=False)
        expected = s[:, :1] * u[:, :, 0]
        maps = np.asarray(_first_component(jnp.asarray(values))).reshape(3, -1)
        sign = np.sign((maps * expected).sum(1, keepdims=True))
        np.testing.assert_allclose(maps, sign * expected, atol=2e-5)
        for row, total in zip(maps, m.sum(-1)):
            assert np.corrcoef(row, total)[0, 1] > 0
        np.testing.assert_allclose(_first_component(jnp.asarray(-values)).reshape(3, -1), -maps, atol=2e-5)


def test_worked_head():
    """13.5: what the maps of a linear head have to do with each other."""
    predict = linear_head(np.array([[1.0, 0], [0.5, 0]]))
    assert float(predict(A)[0, 0]) == 1.875
    native = one_map(explain.cam(), predict, A)
    np.testing.assert_allclose(native, [[1.5, 2.5], [1.5, 2]])
    for method in (explain.grad_cam, explain.hires_cam, explain.xgrad_cam):
        np.testing.assert_allclose(4 * one_map(method("features", relu=False), predict, A), native, rtol=1e-6)
    ablated = one_map(explain.ablation_cam("features"), predict, A)
    np.testing.assert_allclose(ablated, [[1, 1.533333], [1.4, 1.466667]], atol=2e-6)
    kept = one_map(explain.recipro_cam("features", score=scores.logit), predict, A)
    np.testing.assert_allclose(kept, native / 4, rtol=1e-6)


def test_identities_of_a_linear_head():
    """Signed features, several images, each with a class of its own."""
    features = jnp.asarray(random.normal(size=(B, 3, 3, 5)), jnp.float32)
    weights = random.normal(size=(5, CLASSES)).astype(np.float32)
    predict, labels = linear_head(weights), jnp.arange(B, dtype=jnp.int32) % CLASSES
    native = maps_of(explain.cam(), predict, features / 20 + 0.5, labels)
    for method in (explain.grad_cam, explain.hires_cam, explain.xgrad_cam):
        raw = 9 * maps_of(method("features", relu=False), predict, features / 20 + 0.5, labels)
        np.testing.assert_allclose(raw, native, atol=2e-6)
    ablated = maps_of(explain.ablation_cam("features", relu=False), predict, features, labels)
    own = weights[:, np.asarray(labels)].T * np.asarray(features).mean((1, 2))
    own /= np.abs(own.sum(1, keepdims=True))
    np.testing.assert_allclose(ablated, np.einsum("bhwc,bc->bhw", features, own), rtol=1e-3, atol=1e-4)
    total = maps_of(explain.hires_cam("features", relu=False), predict, features, labels).sum((1, 2))
    np.testing.assert_allclose(total, scores.logit(predict(features), labels), atol=1e-5)


def score_network(features, channels=1):
    """Features that are given, and the sum of the pixels as the logit; the images are 2 x 2."""
    given = lambda images: name(features + 0 * images[..., :1], "features")
    return lambda images, keys=None: (images.sum((1, 2, 3)) + 0 * given(images).sum((1, 2, 3)))[:, None]


def test_score_cam():
    ones = np.ones((1, 2, 2, 1), np.float32)
    expected = np.array([[1, 1.622459], [1.132622, 1.377541]])
    np.testing.assert_allclose(one_map(explain.score_cam("features"), score_network(A), ones), expected, atol=2e-6)
    plain = one_map(explain.score_cam("features", softmax=False), score_network(A), ones)
    np.testing.assert_allclose(plain, A[0] @ [2, 1.5], rtol=1e-6)


@pytest.mark.parametrize("softmax", [True, False])
def test_score_cam_leaves_constant_channels_out(softmax):
    ones, constant = np.ones((1, 2, 2, 1), np.float32), np.full((1, 2, 2, 1), 0.1, np.float32)
    method = explain.score_cam("features", softmax=softmax)
    alone = one_map(method, score_network(A), ones)
    np.testing.assert_array_equal(one_map(method, score_network(np.concatenate([A, constant], -1)), ones), alone)
    np.testing.assert_array_equal(one_map(method, score_network(constant), ones), np.zeros((2, 2)))


def test_a_mask_is_the_channel_enlarged():
    """13.6: half-pixel centres, [[0, 1], [2, 3]] to 4 x 4; what the network is asked is the masked image."""
    features = jnp.asarray([[0.0, 1], [2, 3]]).reshape(1, 2, 2, 1)
    row = lambda images: images[0, 1].sum()
    predict = lambda images, keys=None: (row(images) + 0 * name(features + 0 * images[:, :1, :1, :1], "f").sum())[
        None, None
    ]
    method = explain.score_cam("f", softmax=False)
    weight = one_map(method, predict, np.ones((1, 4, 4, 1), np.float32))[1, 1] / 3
    np.testing.assert_allclose(weight, np.sum([0.5, 0.75, 1.25, 1.5]) / 3, rtol=1e-6)


def test_ablation_of_a_negative_logit():
    """Divided by |s|: a channel that holds the class up has a positive weight whatever the sign of the logit."""
    predict = lambda images, keys=None: linear_head(np.array([[1.0], [0.5]]))(images) - 10
    ablated = one_map(explain.ablation_cam("features"), predict, A)
    np.testing.assert_allclose(ablated, A[0] @ (np.array([1, 0.875]) / 8.125), rtol=1e-5)
    nothing = lambda images, keys=None: 0 * linear_head(np.array([[1.0], [0.5]]))(images)
    np.testing.assert_array_equal(one_map(explain.ablation_cam("features"), nothing, A), np.zeros((2, 2)))


def test_shapley_cam():
    """Breadth 1; of the plain logit of a piecewise linear head it is Grad-CAM."""
    features = np.array([[[1.0, 0], [2, 1]], [[0, 3], [1, 2]]], np.float32)[None]
    predict = linear_head(np.array([[1.0, 0, -1], [-0.5, 1, 0.5]]))
    np.testing.assert_allclose(
        one_map(explain.shapley_cam("features"), predict, features), [[0.480452, 0.588297], [0, 0]], atol=2e-6
    )
    same_score = explain.grad_cam("features", score=scores.residual_softmax)
    np.testing.assert_allclose(one_map(same_score, predict, features), [[0.4807, 0.54985], [0, 0]], atol=2e-6)
    piecewise = lambda images, keys=None: jax.nn.relu(predict(images) - 0.1)
    for logits in (predict, piecewise):
        shapley = one_map(explain.shapley_cam("features", score=scores.logit), logits, features, ZERO + 1)
        np.testing.assert_array_equal(shapley, one_map(explain.grad_cam("features"), logits, features, ZERO + 1))


Z = jnp.asarray([[3, 2.5, 1, -1, 2.8]])


@pytest.mark.parametrize(
    "weights, strength, value",
    [("uniform", 1, 0.9), ("uniform", 0.6, 1.74), ("softmax", 1, 0.472692), ("softmax", 0.6, 1.483615)],
)
def test_finer_scores(weights, strength, value):
    score = scores.finer(weights=weights, strength=strength)
    np.testing.assert_allclose(score(Z, ZERO), [value], atol=2e-6)


def test_finer_derivatives():
    derivative = lambda **options: jax.grad(
        lambda z: scores.finer(weights="softmax", strength=1, **options)(z, ZERO)[0]
    )(Z)
    np.testing.assert_allclose(derivative(), [[1, -0.388653, -0.08672, 0, -0.524627]], atol=2e-6)
    differentiated = [[1, -0.378040, 0.045728, 0, -0.667688]]
    np.testing.assert_allclose(derivative(stop_weights=False), differentiated, atol=2e-6)


def test_finer_references():
    """Of two as near the lower index; never the class itself, nor more than there are; a single output has none."""
    tied = jnp.asarray([[1.0, 3, 2, 1]])
    np.testing.assert_allclose(scores.finer(count=1, strength=1)(tied, ZERO + 2), [2 - 1.0])
    np.testing.assert_allclose(scores.finer(count=1, strength=1)(jnp.asarray([[1.0, 1, 5]]), ZERO + 1), [0.0])
    np.testing.assert_allclose(scores.finer(count=9, strength=1)(tied, ZERO), [1 - 2.0])
    np.testing.assert_allclose(scores.finer()(jnp.asarray([[4.0]]), ZERO), [4.0])


@pytest.mark.parametrize("weights", ["uniform", "softmax"])
def test_finer_cam_without_strength_is_grad_cam(weights):
    finer = maps_of(explain.finer_cam(weights=weights, strength=0), PREDICT, IMAGES, LABELS)
    np.testing.assert_array_equal(finer, maps_of(explain.grad_cam(), PREDICT, IMAGES, LABELS))


def test_finer_cam_is_linear_in_the_references():
    logit_of = lambda label: maps_of(explain.grad_cam(relu=False), PREDICT, IMAGES, label)
    logits = np.asarray(PREDICT(IMAGES))
    own = logits[np.arange(B), LABELS][:, None]
    distance = np.where(np.arange(CLASSES) == np.asarray(LABELS)[:, None], np.inf, np.abs(logits - own))
    near = np.argsort(distance, 1, kind="stable")[:, :2].astype(np.int32)
    expected = logit_of(LABELS) - 0.3 * sum(logit_of(jnp.asarray(near[:, t])) for t in range(2))
    finer = maps_of(explain.finer_cam(count=2, relu=False), PREDICT, IMAGES, LABELS)
    np.testing.assert_allclose(finer, expected, atol=1e-6)


def given(*maps):
    """An explanation of these maps for one image."""
    return [Explain(lambda *_, m=m: jnp.asarray(m, jnp.float32)[None], lambda *_: Cost(1, 0)) for m in maps]


def test_refine():
    """Breadth 1; to the image; and what one explanation finds nothing in has nothing."""
    deep, shallow = np.array([[1, 0.5], [0, 0.25]]), np.arange(16).reshape(4, 4) / 15
    refined = one_map(explain.refine(*given(2 * deep + 1, shallow)), None, np.ones((1, 8, 8, 3)))
    expected = [[0, 0.233333, 0.333333, 0.4], [0.8, 0.895833, 0.825, 0.816667]]
    expected += [[0.533333, 0.6375, 0.791667, 0.916667], [0, 0.216667, 0.7, 1]]
    np.testing.assert_allclose(refined, expected, atol=2e-6)
    at_the_image = one_map(explain.refine(*given(deep, shallow), size="image"), None, np.ones((1, 4, 4, 3)))
    np.testing.assert_allclose(at_the_image, expected, atol=2e-6)
    assert one_map(explain.refine(*given(deep, deep), size="image"), None, np.ones((1, 6, 6, 3))).shape == (6, 6)
    np.testing.assert_array_equal(one_map(explain.refine(*given(deep, -shallow)), None, A), np.zeros((4, 4)))


def two_layers(images, keys=None):
    """A shallow layer (b, 6, 6, 3) and a deep one (b, 3, 3, 5) that is computed from it."""
    shallow = name(jnp.tanh(images), "shallow")
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(2, 2, 3, 5)), jnp.float32)
    deep = lax.conv_general_dilated(shallow, weights, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.tanh(name(deep, "deep") ** 2).mean((1, 2))


def test_zoom_cam():
    """Related 2 for one layer; of two it is the larger of the scaled HiResCAMs."""
    scaled = lambda m: (m - m.min((1, 2), keepdims=True)) / np.ptp(m, (1, 2), keepdims=True)
    single = [
        np.asarray(maps_of(explain.hires_cam(layer), two_layers, IMAGES, LABELS)) for layer in ("shallow", "deep")
    ]
    enlarged = jax.image.resize(scaled(single[1]), (B, 6, 6), "linear")
    zoomed = maps_of(explain.zoom_cam("shallow", "deep"), two_layers, IMAGES, LABELS)
    np.testing.assert_allclose(zoomed, np.maximum(scaled(single[0]), enlarged), atol=2e-5)
    features = np.stack([[[1.0, 2], [0, 1]], [[2, 0], [1, 1]]], -1)[None]
    gradients = np.stack([[[0.5, -1], [1, 1]], [[1, 1], [-2, 0.5]]], -1)[None]
    twice = lambda images, keys=None: (name(name(images, "a"), "b") * gradients).sum((1, 2, 3))[:, None]
    np.testing.assert_allclose(one_map(explain.zoom_cam("a", "b"), twice, features), [[1, 0], [0, 0.6]], atol=1e-6)
    np.testing.assert_allclose(one_map(explain.grad_cam("a"), twice, features), [[0.625, 0.75], [0.125, 0.5]])


def convolutions(f, *args):
    return str(jax.make_jaxpr(f)(*args)).count("conv_general_dilated[")


def test_the_network_below_the_layer_is_run_once():
    """Also where nothing is compiled: the program holds the one convolution of the network once."""
    for method in (explain.grad_cam(), explain.family(), explain.shapley_cam(), explain.ablation_cam()):
        program = lambda images, method=method: method.maps(KEYS, PREDICT, images, LABELS)
        assert convolutions(program, IMAGES) == 1


def test_a_family_gives_what_its_methods_give():
    names = ("layer_cam", "grad_cam", "eigen_grad_cam")
    family = explain.family(*names, layer="features", relu=False)
    assert family.names == names and len(explain.family().names) == 8
    maps = maps_of(family, PREDICT, IMAGES, LABELS)
    assert isinstance(maps, tuple) and len(maps) == 3
    for word, one in zip(names, maps):
        single = maps_of(getattr(explain, word)("features", relu=False), PREDICT, IMAGES, LABELS)
        np.testing.assert_allclose(one, single, atol=1e-6)


def residual(images, keys=None, named_grid=False):
    """A transformer of one block without heads: a class token and 2 x 3 patches, read at the class token."""
    draw = np.random.default_rng(5).normal
    patches = images.reshape(images.shape[0], 6, 6) @ jnp.asarray(draw(size=(6, 4)), jnp.float32)
    x = jnp.concatenate([jnp.ones((images.shape[0], 1, 4)), patches], 1)
    y = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    if named_grid:
        grid = name(y[:, 1:].reshape(-1, 2, 3, 4), "grid")
        y = jnp.concatenate([y[:, :1], grid.reshape(-1, 6, 4)], 1)
    else:
        y = name(y, "block0/norm1")
    weights = jax.nn.softmax(y @ jnp.asarray(draw(size=(4, 4)), jnp.float32) @ y.swapaxes(1, 2))
    x = x + weights @ y
    return x[:, 0] @ jnp.asarray(draw(size=(4, 3)), jnp.float32)


@pytest.mark.parametrize("method", [explain.grad_cam, explain.ablation_cam])
def test_tokens_are_features(method):
    """As in the network that names its patches itself, round whose layer a shortcut leads."""
    images, labels = IMAGES[:2, :, :, :1], LABELS[:2] % 3
    seen = maps_of(method(tokens("norm1", (2, 3))), residual, images, labels)
    itself = maps_of(method("grid"), lambda images, keys=None: residual(images, named_grid=True), images, labels)
    assert seen.shape == (2, 2, 3)
    np.testing.assert_allclose(seen, itself, atol=1e-6)


def test_reading_and_tapping_tokens():
    images, layer = IMAGES[:2, :, :, :1], tokens("norm1", (2, 3))
    logits, values = jax.jit(read(residual, layer))(images)
    plain = jax.jit(read(residual, "norm1"))(images)[1]
    np.testing.assert_allclose(values, plain[:, 1:].reshape(2, 2, 3, 4), atol=1e-6)
    doubled = jax.jit(tap(residual, layer, lambda values: 2 * values))(images)
    by_hand = jax.jit(tap(residual, "norm1", lambda y: jnp.concatenate([y[:, :1], 2 * y[:, 1:]], 1)))(images)
    np.testing.assert_allclose(doubled, by_hand, atol=1e-6)
    assert np.abs(doubled - logits).max() > 1e-3
    zoomed = explain.zoom_cam(layer, tokens("norm1", (3, 2)))  # each seen its own way
    assert jax.eval_shape(lambda x: zoomed.maps(None, residual, x, LABELS[:2] % 3), images).shape == (2, 2, 3)


def shortcut(images, keys=None):
    """A layer that a shortcut leads round: its rest needs the trunk's convolution, and has none of its own."""
    weights = jnp.ones((3, 3, 3, 4)) / 27
    x = lax.conv_general_dilated(images, weights, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return (jax.nn.relu(name(jnp.tanh(x), "branch")) + x).mean((1, 2))


def test_head_round_which_a_shortcut_leads():
    features, head = features_and_head(shortcut, "branch", IMAGES)
    tapped = tap(shortcut, "branch", lambda x: 2 * x)
    np.testing.assert_allclose(head(2 * features), tapped(IMAGES), atol=1e-6)
    assert convolutions(head, features) == 0


def sizes(jaxpr):
    """The number of elements of every value a program computes, also inside its loops."""
    for eqn in jaxpr.eqns:
        yield from (int(np.prod(v.aval.shape)) for v in eqn.outvars)
        for value in eqn.params.values():
            for body in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(body, "eqns") or hasattr(body, "jaxpr"):
                    yield from sizes(getattr(body, "jaxpr", body))


@pytest.mark.parametrize("method", [explain.score_cam, explain.ablation_cam, explain.recipro_cam])
def test_memory_does_not_grow_with_the_layer(method):
    """No value is larger than a chunk, however many channels and positions there are."""

    def largest(channels, positions):
        def predict(images, keys=None):
            small = jax.image.resize(images, (2, positions, positions, 3), "linear")
            return jnp.tanh(name(jnp.tile(small, (1, 1, 1, channels // 3)), "features")).mean((1, 2))[:, :2]

        images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
        program = lambda images: method("features").maps(None, predict, images, jnp.zeros(2, jnp.int32))
        return max(sizes(jax.make_jaxpr(program)(images).jaxpr))

    if method is explain.score_cam:
        assert largest(24, 8) == largest(96, 8) == 16 * 64 * 64 * 3
    else:
        for channels, positions in ((96, 8), (192, 16)):  # the chunk of 64 features, for two images each
            assert largest(channels, positions) == 64 * channels * positions**2


def test_one_output():
    """A network with one output, such as a target that is a function of the outputs."""
    single = lambda images, keys=None: PREDICT(images)[:, 1:2]
    zeros, ones = jnp.zeros(B, jnp.int32), jnp.ones(B, jnp.int32)
    for method in (explain.grad_cam("features"), explain.ablation_cam("features")):
        expected = maps_of(method, PREDICT, IMAGES, ones)
        np.testing.assert_allclose(maps_of(method, single, IMAGES, zeros), expected, atol=1e-6)
    assert np.isfinite(maps_of(explain.shapley_cam("features"), single, IMAGES, zeros)).all()


def test_costs():
    images = jax.ShapeDtypeStruct(IMAGES.shape, jnp.float32)
    for method, cost in [
        (explain.grad_cam(), (0, 1)),
        (explain.family(), (0, 1)),
        (explain.smooth_grad_cam_plus_plus(samples=4), (1, 4)),
        (explain.score_cam(), (6, 0)),
        (explain.ablation_cam(), (6, 0)),
        (explain.recipro_cam(), (10, 0)),
        (explain.refine(explain.grad_cam(), explain.score_cam()), (6, 1)),
    ]:
        assert tuple(method.cost(PREDICT, images)) == cost


def test_errors():
    images = IMAGES[:2, :, :, :1]
    call = lambda method: method(None, residual, images, LABELS[:2] % 3)
    for wrong, text in [
        (
            lambda: call(explain.grad_cam("norm1")),
            (
                "layer 'block0/norm1' has shape (2, 7, 4); features (b, h, w, c) are needed, of a transformer's tokens"
                " tokens('block0/norm1', (rows, columns))"
            ),
        ),
        (
            lambda: call(explain.grad_cam(tokens("norm1", (2, 2)))),
            ("tokens: layer 'block0/norm1' has shape (2, 7, 4); a 2x2 grid with 1 tokens before it needs (b, 5, c)"),
        ),
        (lambda: call(explain.grad_cam(3)), "a layer is named by a text such as 'stage3', got 3"),
        (
            lambda: call(explain.excitation_backprop("norm1")),
            "excitation_backprop: layer 'norm1' has shape (2, 7, 4); features (b, h, w, c) are needed",
        ),
        (
            lambda: call(explain.zoom_cam("norm1", "norm1")),
            "zoom_cam: layer 'norm1' has shape (2, 7, 4); features (b, h, w, c) are needed",
        ),
        (lambda: tokens("norm1", 14), "tokens: grid must be (rows, columns), such as (14, 14), got 14"),
        (
            lambda: explain.family("grad_cam", "score_cam"),
            (
                "family: 'score_cam' cannot share one forward and one backward pass; those that can are grad_cam,"
                " grad_cam_plus_plus, xgrad_cam, hires_cam, elementwise_grad_cam, layer_cam, eigen_cam, eigen_grad_cam"
            ),
        ),
        (
            lambda: explain.zoom_cam("stage3"),
            "zoom_cam: name two or more layers, such as zoom_cam('stage2', 'stage3'); see `topgap layers`",
        ),
        (
            lambda: explain.refine(explain.grad_cam()),
            (
                "refine: give two or more explanations, such as refine(grad_cam_plus_plus('stage2'),"
                " grad_cam_plus_plus('stage3'))"
            ),
        ),
        (
            lambda: explain.refine(explain.grad_cam(), explain.family()),
            "refine: the explanation is a family of 8 maps; give one of them",
        ),
        (lambda: scores.finer(weights="mean"), "finer: weights must be 'uniform' or 'softmax', got 'mean'"),
        (lambda: explain.finer_cam(count=0), "count must be a whole number of at least 1, got 0"),
    ]:
        with pytest.raises(UserError) as raised:
            wrong()
        assert str(raised.value) == text
