"""Receptive fields against the worked values of topgap.md 14.6 and against a plain Jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topgap_jax import models
from topgap_jax.errors import UserError
from topgap_jax.explain.field import field, fields, pixel, theoretical_fields
from topgap_jax.metrics.field import gaussian_fit, rms_radius
from topgap_jax.pool import top_gap
from topgap_jax.rewrite import name, read

LABELS = jnp.array([1, 0])


def convolve(values, kernel, stride=1):
    return jax.lax.conv_general_dilated(
        values, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def two_ones(images):
    """Two all-ones 3 x 3 convolutions with one channel; two classes from maps and -maps."""
    ones = jnp.ones((3, 3, 1, 1))
    maps = name(jnp.tile(convolve(convolve(images, ones), ones), (1, 1, 1, 2)), "maps")
    return maps.mean((1, 2))


KERNELS = [0.5 * jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(3, 3, 3, 4), (3, 3, 4, 2)])]


def network(images, keys=None):
    features = name(jax.nn.relu(convolve(images, KERNELS[0], stride=2)), "features")
    return top_gap(k=2)(name(convolve(features, KERNELS[1]), "maps"))


def maps_of(images):
    return convolve(jax.nn.relu(convolve(images, KERNELS[0], stride=2)), KERNELS[1])


IMAGES = jax.random.uniform(jax.random.key(9), (2, 8, 6, 3))


def jacobian():
    """|d maps[p, label] / d image|, colours summed: (b, h', w', h, w)."""
    rows = [jax.jacrev(lambda x, y=y: maps_of(x[None])[0, :, :, y])(image) for image, y in zip(IMAGES, LABELS)]
    return np.abs(np.stack(rows)).sum(-1)


def test_worked_values_of_two_convolutions():
    images = jnp.zeros((1, 9, 9, 1))
    centre = field().maps(None, two_ones, images, jnp.array([0]))
    expected = np.zeros((9, 9))
    expected[2:7, 2:7] = np.outer([1, 2, 3, 2, 1], [1, 2, 3, 2, 1])
    np.testing.assert_array_equal(centre[0], expected)
    corner = field(position=(0, 0)).maps(None, two_ones, images, jnp.array([0]))[0]
    np.testing.assert_array_equal(corner[:3, :3], [[4, 4, 2], [4, 4, 2], [2, 2, 1]])
    assert corner.sum() == 25 and field(position="corner").maps(None, two_ones, images, jnp.array([0])).sum() == 25


@pytest.mark.parametrize("position, place", [("centre", (2, 1)), ((3, 2), (3, 2))])
def test_equals_the_jacobian(position, place):
    found = field(position=position).maps(None, network, IMAGES, LABELS)
    np.testing.assert_allclose(found, jacobian()[:, place[0], place[1]], rtol=1e-4, atol=1e-6)


def test_corner_is_the_mean_of_four():
    found = field(position="corner").maps(None, network, IMAGES, LABELS)
    np.testing.assert_allclose(found, jacobian()[:, [0, 0, 3, 3], [0, 2, 0, 2]].mean(1), rtol=1e-4, atol=1e-6)


def test_top_is_the_mean_over_what_top_gap_selects():
    found = field(position="top", k=2).maps(None, network, IMAGES, LABELS)
    maps = np.stack([maps_of(IMAGES)[i, :, :, y] for i, y in enumerate(LABELS)]).reshape(2, -1)
    rows = jacobian().reshape(2, 12, 8, 6)
    expected = [rows[i, np.argsort(-maps[i])[:2]].mean(0) for i in range(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_other_layers_and_channels():
    gradient = lambda weights: jax.vmap(
        jax.grad(lambda x: (jax.nn.relu(convolve(x[None], KERNELS[0], 2))[0, 2, 1] * weights).sum())
    )
    summed = field("features", channel="sum").maps(None, network, IMAGES, LABELS)
    np.testing.assert_allclose(summed, np.abs(gradient(jnp.ones(4))(IMAGES)).sum(-1), rtol=1e-4, atol=1e-6)
    third = field("features", channel=2).maps(None, network, IMAGES, LABELS)
    np.testing.assert_allclose(third, np.abs(gradient(jnp.eye(4)[2])(IMAGES)).sum(-1), rtol=1e-4, atol=1e-6)


def test_chunks_change_nothing():
    positions = ["centre", "corner", "top", (1, 1)]
    whole = fields(network, IMAGES, LABELS, positions, k=2)
    assert whole.shape == (8, 2, 8, 6)
    np.testing.assert_allclose(fields(network, IMAGES, LABELS, positions, k=2, chunk=3), whole, rtol=1e-5, atol=1e-7)


def test_jit_and_independence():
    run = jax.jit(lambda images: field(position="top", k=2).maps(None, network, images, LABELS))
    alone = field(position="top", k=2).maps(None, network, IMAGES, LABELS)
    np.testing.assert_allclose(run(IMAGES), alone, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(run(IMAGES.at[1].set(0.5))[0], alone[0], rtol=1e-5, atol=1e-7)


def test_where_a_position_lies_in_the_image():
    assert pixel("centre", (9, 9), (9, 9)) == (4, 4)
    assert pixel((0, 1), (4, 4), (32, 16)) == (3.5, 5.5)


def stack(n, k):
    """n convolutions with k x k equal weights, one channel."""

    def predict(images, keys=None):
        for _ in range(n):
            images = convolve(images, jnp.full((k, k, 1, 1), 1 / k**2))
        return name(images, "maps").mean((1, 2))

    return predict


@pytest.mark.parametrize("n, k", [(4, 3), (16, 3), (3, 5)])
def test_the_field_of_a_linear_stack(n, k):
    """topgap 9: variance n (k^2 - 1) / 12 along each axis, a side of n (k - 1) + 1, more and more a Gaussian."""
    images, size = jnp.zeros((1, 41, 41, 1)), n * (k - 1) + 1
    run = jax.jit(lambda images: field().maps(None, stack(n, k), images, jnp.zeros(1, jnp.int32)))
    maps = run(images)
    line = [1.0]
    for _ in range(n):
        line = np.convolve(line, np.ones(k) / k)
    expected = np.zeros((41, 41))
    inside = slice(20 - size // 2, 21 + size // 2)
    expected[inside, inside] = np.outer(line, line)
    np.testing.assert_allclose(maps[0], expected, atol=1e-7)
    theoretical = jax.jit(lambda images: theoretical_fields(stack(n, k), images, ["centre"]))(images)
    np.testing.assert_array_equal(theoretical[0], expected > 0)
    variance = n * (k**2 - 1) / 12
    np.testing.assert_allclose(rms_radius(maps, (20.0, 20.0)), np.sqrt(2 * variance), rtol=1e-5)
    sigma, share = jax.jit(lambda maps: gaussian_fit(maps, (20.0, 20.0)))(maps)
    np.testing.assert_allclose(sigma, np.sqrt(variance), rtol=0.25 / n)
    assert 1 - 0.02 / n < share[0] < 1


def test_a_gaussian_is_fitted_exactly():
    d = np.add.outer((np.arange(30) - 12.5) ** 2, (np.arange(40) - 20) ** 2)
    maps = np.float32([7 * np.exp(-d / 2 / sigma**2) for sigma in (0.6, 3.3, 11.0)] + [0 * d, d > 200])
    sigma, share = jax.jit(lambda maps: gaussian_fit(maps, (12.5, 20.0)))(maps)
    np.testing.assert_allclose(sigma, [0.6, 3.3, 11.0, np.nan, sigma[4]], rtol=1e-3)
    np.testing.assert_allclose(share[:4], [1, 1, 1, np.nan], atol=1e-5)
    assert share[4] < 0.9  # a ring is none


def branches(images, keys=None):
    """What networks are made of, but a mean over the image: the two paths have fields of their own."""
    x = jax.nn.silu(convolve(images, KERNELS[0], stride=2) * jnp.arange(4.0))  # one channel's scale is 0
    pooled = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    fine = jax.image.resize(pooled, x.shape, "nearest")
    wide = (1 + jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]) / (1e-3 + jnp.abs(x).sum(-1, keepdims=True))
    maps = name(jnp.concatenate([fine, wide], -1), "maps")
    squeezed = name(maps * jax.nn.sigmoid(maps.mean((1, 2), keepdims=True)), "squeezed")
    looped = jax.lax.scan(lambda carry, _: (carry * 2, None), maps, length=2)[0]
    return squeezed.mean((1, 2)) + name(looped, "looped").mean((1, 2))


def test_the_theoretical_field_is_what_a_change_can_reach():
    """Against changing one pixel after the other, and looking where the layer changes, with weights of either sign."""
    images = jax.random.uniform(jax.random.key(5), (1, 8, 6, 3))
    pixels = jnp.eye(48).reshape(48, 8, 6, 1)
    maps = lambda points: read(branches, "maps")(points)[1]
    amounts = jnp.array([1.0, -3.0, 50.0, 1e4])[:, None, None, None, None]
    copies = jnp.concatenate([images, (images + amounts * pixels).reshape(-1, 8, 6, 3)])
    values = np.asarray(jax.jit(maps)(copies))
    changed = (values[1:] != values[0]).reshape(4, 48, 4, 3, 8).any((0, 4)).reshape(8, 6, 4, 3).transpose(2, 3, 0, 1)
    positions = [(row, column) for row in range(4) for column in range(3)]
    reached = jax.jit(lambda images: theoretical_fields(branches, images, positions))(images)
    np.testing.assert_array_equal(np.asarray(reached).reshape(4, 3, 8, 6), changed)
    assert 0 < changed.mean() < 0.7


@pytest.mark.parametrize("layer", ["squeezed", "looped"])
def test_a_mean_over_the_image_and_a_loop_reach_all_of_it(layer):
    assert jax.jit(lambda images: theoretical_fields(branches, images, ["corner"], layer=layer))(IMAGES).all()


def test_what_does_not_depend_on_the_image_has_no_theoretical_field():
    constant = lambda images: (
        name(jnp.ones((len(images), 2, 2, 2)), "maps").mean((1, 2)) + 0 * images.mean((1, 2))[:, :2]
    )
    assert not theoretical_fields(constant, IMAGES, ["centre"]).any()


@pytest.mark.slow
@pytest.mark.parametrize("layer, side", [("stage1", 43), ("stage2", 99)])
def test_theoretical_field_of_resnet18(layer, side):
    """7 at the stem's stride 2, 11 behind its pool, 8 more a convolution at stride 4, 16 at stride 8."""
    backbone = models.resnet18()
    images = jnp.zeros((1, 224, 224, 3))
    variables = jax.eval_shape(backbone.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), variables)
    reached = theoretical_fields(lambda x: backbone.apply(variables, x), images, ["centre"], layer=layer)
    assert reached.sum() == side**2


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: field(position="middle"), "position must be 'centre', 'corner', 'top' or (row, column), got 'middle'"),
        (lambda: field(k=0), "k must be a whole number of at least 1, got 0"),
        (lambda: field(position=(9, 0)), "field: position (9, 0) lies outside the 4x3 maps"),
        (lambda: field(position="top", k=13), "field: k=13 is more than the 12 positions of 4x3 maps; give k <= 12"),
        (
            lambda: field("features"),
            "field: layer 'features' has 4 channels, not one for each of 2 classes; give channel='sum' or an index",
        ),
        (lambda: field(channel=2), "field: channel must be 'label', 'sum' or an index below 2, got 2"),
    ],
)
def test_mistakes(make, text):
    with pytest.raises(UserError) as error:
        make().maps(None, network, IMAGES, LABELS)
    assert str(error.value) == text
