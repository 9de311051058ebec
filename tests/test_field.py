"""Receptive fields against the worked values of topgap.md 14.6 and against a plain Jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topgap_jax.errors import UserError
from topgap_jax.explain.field import field, fields, pixel
from topgap_jax.pool import top_gap
from topgap_jax.rewrite import name

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
