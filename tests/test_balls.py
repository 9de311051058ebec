"""Laws of every ball: feasible and idempotent projections, starts inside, steepest ascent, dual norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from topgap_jax import balls
from topgap_jax.errors import UserError

SHAPE = (3, 2, 2, 3)
radii = lambda eps, b=SHAPE[0]: jnp.full(b, eps, jnp.float32)
SIZES = {
    "linf": lambda delta: np.abs(delta).max((1, 2, 3)),
    "l2": lambda delta: np.sqrt((np.float64(delta) ** 2).sum((1, 2, 3))),
    "l1": lambda delta: np.abs(np.float64(delta)).sum((1, 2, 3)),
}
DUALS = {"linf": SIZES["l1"], "l2": SIZES["l2"], "l1": SIZES["linf"]}
rows = pytest.mark.parametrize("name", balls.TABLE)


def images_of(seed, shape=SHAPE):
    """Pixels in [0, 1], some exactly 0 or 1."""
    return np.clip(np.random.default_rng(seed).uniform(-0.3, 1.3, shape), 0, 1).astype(np.float32)


def noise_of(seed, shape=SHAPE, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def test_every_row_is_here():
    assert set(SIZES) == set(balls.TABLE)


@rows
@given(st.integers(0, 10**6), st.floats(0.001, 3), st.floats(0.01, 3))
def test_projection_is_feasible_and_idempotent(name, seed, eps, scale):
    ball, images = balls.TABLE[name](eps), images_of(seed)
    once = ball.project(images, noise_of(seed + 1, scale=scale), radii(eps))
    points = np.asarray(images + once)
    assert points.min() >= 0 and points.max() <= 1
    assert (SIZES[name](once) <= eps + 1e-6).all()
    np.testing.assert_allclose(ball.size(once), SIZES[name](once), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(ball.project(images, once, radii(eps)), once, atol=1e-6)


def test_projection_formulas():
    images, delta = images_of(0), noise_of(1)
    np.testing.assert_allclose(
        balls.linf(0.3).project(images, delta, radii(0.3)),
        np.clip(images + np.clip(delta, -0.3, 0.3), 0, 1) - images,
        atol=1e-6,
    )
    shrunk = delta * np.minimum(1, 0.3 / SIZES["l2"](delta))[:, None, None, None]
    np.testing.assert_allclose(
        balls.l2(0.3).project(images, delta, radii(0.3)), np.clip(images + shrunk, 0, 1) - images, atol=1e-6
    )
    # What is inside both already stays.
    small = (0.003 * delta * ((images > 0.1) & (images < 0.9))).astype(np.float32)
    for ball in (balls.linf(0.3), balls.l2(0.3), balls.l1(0.3)):
        np.testing.assert_allclose(ball.project(images, small, radii(0.3)), small, atol=1e-7)


def project_l1(image, delta, eps):
    rows = lambda values: np.reshape(np.float32(values), (1, 1, 1, -1))
    return np.asarray(balls.project_l1(rows(image), rows(delta), np.float32([eps]))).ravel()


@pytest.mark.parametrize(
    "image, delta, eps, expected",
    [
        ([0.2, 0.9, 0.5, 0.05], [1, 0.8, -0.6, -0.4], 1, [0.633333, 0.1, -0.233333, -0.033333]),
        ([0.5] * 4, [0.4, -0.3, 0.1, 0], 0.5, [0.3, -0.2, 0, 0]),
        ([0.5] * 4, [0.1, -0.1, 0.1, 0], 0.5, [0.1, -0.1, 0.1, 0]),
        ([0.9, 0.9, 0.1], [1, 1, -1], 1, [0.1, 0.1, -0.1]),
        ([0, 1, 0.5], [-0.5, 0.5, 0.25], 0.1, [0, 0, 0.1]),
        ([0.5, 0.5], [0.3, 0.2], 0, [0, 0]),
    ],
)
def test_worked_l1_projections(image, delta, eps, expected):
    """attacks 15.3."""
    np.testing.assert_allclose(project_l1(image, delta, eps), expected, atol=1e-6)


def test_the_l1_projection_is_the_nearest_point():
    """attacks 15.3: no point that SLSQP finds is nearer; d = p - q with p, q >= 0 makes the ball linear."""
    random = np.random.default_rng(0)
    for _ in range(200):
        n = random.integers(2, 7)
        image = np.clip(random.uniform(-0.3, 1.3, n), 0, 1)
        delta, eps = random.normal(size=n) * random.choice([0.3, 1, 3]), random.uniform(0.05, 2)
        ours = project_l1(image, delta, eps)
        distance = lambda pq: ((pq[:n] - pq[n:] - delta) ** 2).sum()
        slope = lambda pq: np.concatenate([2 * (pq[:n] - pq[n:] - delta), -2 * (pq[:n] - pq[n:] - delta)])
        theirs = scipy.optimize.minimize(
            distance,
            np.zeros(2 * n),
            jac=slope,
            method="SLSQP",
            bounds=[*zip(np.zeros(n), 1 - image), *zip(np.zeros(n), image)],
            constraints=[{"type": "ineq", "fun": lambda pq: eps - pq.sum(), "jac": lambda pq: -np.ones(2 * n)}],
            options={"maxiter": 200, "ftol": 1e-12},
        )
        assert theirs.success
        assert np.abs(ours).sum() <= eps * (1 + 1e-6) and ((image + ours >= -1e-7) & (image + ours <= 1 + 1e-7)).all()
        assert ((np.float64(ours) - delta) ** 2).sum() <= theirs.fun + 1e-5 * (1 + theirs.fun)


def test_the_l1_projection_spends_its_budget_on_a_picture():
    """3,072 entries in float32: the length is eps to 1e-6, unlike clipping after the projection onto the ball."""
    images, delta = images_of(5, (2, 32, 32, 3)), noise_of(6, (2, 32, 32, 3))
    np.testing.assert_allclose(SIZES["l1"](balls.project_l1(images, delta, radii(12, 2))), 12, rtol=2e-6)


def test_sparse_sign():
    """attacks 15.13: the reference keeps n - floor(.8 n) entries; ties keep more; the zeros of a gradient stay."""
    gradient = noise_of(7, (2, 1, 2, 5))
    kept = np.asarray(balls.sparse_sign(gradient, jnp.array([2, 5])))
    np.testing.assert_array_equal((kept != 0).sum((1, 2, 3)), [2, 5])
    np.testing.assert_allclose(np.abs(kept).sum((1, 2, 3)), 1, rtol=1e-6)
    np.testing.assert_array_equal(np.sign(kept), np.sign(gradient) * (kept != 0))
    assert np.abs(gradient[0][kept[0] != 0]).min() > np.abs(gradient[0][kept[0] == 0]).max()
    tied = np.array([3.0, -2, 2, 1, 0], np.float32).reshape(1, 1, 1, 5)
    np.testing.assert_allclose(balls.sparse_sign(tied, 2).ravel(), [1 / 3, -1 / 3, 1 / 3, 0, 0], rtol=1e-6)
    assert not np.asarray(balls.sparse_sign(jnp.zeros((2, 1, 1, 4)), 2)).any()


def test_an_l1_step_does_not_push_against_the_box():
    images = np.float32([0.5] * 150 + [0] * 50 + [1] * 100).reshape(1, 10, 10, 3)
    gradient = np.float32([1] * 149 + [3] + [-9] * 50 + [8] * 100).reshape(1, 10, 10, 3)
    way = np.asarray(balls.l1(3).direction(images, jnp.zeros_like(images), gradient)).ravel()
    assert way[149] > 0 and not way[150:].any()  # a hundredth of 300 is 3; the 149 others are tied for the second place


@rows
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_ascent_attains_the_dual_norm(name, scale):
    """<g, ascent(g)> = dual_norm(g), of unit size, and no random direction of unit size does better, whatever the
    gradient's scale."""
    ball, gradient = balls.TABLE[name](0.1), noise_of(2, scale=scale)
    direction = ball.ascent(gradient)
    np.testing.assert_allclose(SIZES[name](direction), 1, rtol=1e-5)
    step = ball.direction(jnp.full(SHAPE, 0.5), jnp.zeros(SHAPE), gradient)
    np.testing.assert_allclose(SIZES[name](step), 1, rtol=1e-5)
    assert name == "l1" or np.array_equal(step, direction)
    np.testing.assert_allclose(ball.dual_norm(gradient), DUALS[name](np.float64(gradient)), rtol=1e-5)
    along = (np.float64(gradient) * direction).sum((1, 2, 3))
    np.testing.assert_allclose(along, DUALS[name](np.float64(gradient)), rtol=1e-5)
    for seed in range(50):
        other = noise_of(100 + seed)
        other = np.sign(other) * np.abs(other) ** 0.1 / SIZES[name](np.abs(other) ** 0.1)[:, None, None, None]
        assert ((np.float64(gradient) * other).sum((1, 2, 3)) <= along * (1 + 1e-6)).all()


@rows
def test_a_zero_gradient_moves_nothing(name):
    ball = balls.TABLE[name](0.1)
    assert (
        not np.asarray(ball.ascent(jnp.zeros(SHAPE))).any() and not np.asarray(ball.dual_norm(jnp.zeros(SHAPE))).any()
    )


@rows
def test_start_is_inside_and_depends_on_the_key_alone(name):
    ball, shape = balls.TABLE[name](0.4), (64, 4, 4, 3)
    keys = jax.random.split(jax.random.key(0), 64)
    delta = ball.start(keys, images_of(0, shape), radii(0.4, 64))
    sizes = SIZES[name](delta)
    assert (sizes <= 0.4 + 1e-6).all() and len(np.unique(np.asarray(delta), axis=0)) == 64
    alone = ball.start(keys[5:6], images_of(1, shape)[5:6], radii(0.4, 1))
    np.testing.assert_array_equal(alone[0], delta[5])
    if name == "l2":  # attacks 15.15: the mean radius of a uniform point of the n-ball is n / (n + 1)
        assert sizes.mean() / 0.4 == pytest.approx(48 / 49, abs=0.01)
    elif name == "l1":  # the projection of a normal point, on the sphere
        np.testing.assert_allclose(sizes, 0.4, rtol=1e-5)
    else:
        assert np.abs(delta).mean() == pytest.approx(0.2, abs=0.01)


@rows
def test_every_example_has_its_radius(name):
    """The radius is an argument; 0 leaves nothing; the ball's number is the default that an attack starts from."""
    ball, images, eps = balls.TABLE[name](0.2), images_of(0), jnp.array([0.0, 0.1, 0.5])
    assert (ball.eps, ball.name) == (0.2, f"{name}(0.2)")
    keys = jax.random.split(jax.random.key(0), 3)
    for delta in (ball.project(images, noise_of(1), eps), ball.start(keys, images, eps)):
        assert not np.asarray(delta[0]).any() and (SIZES[name](delta) <= np.asarray(eps) + 1e-6).all()
    for i, one in enumerate(eps):
        alone = ball.project(images[i : i + 1], noise_of(1)[i : i + 1], one[None])
        np.testing.assert_array_equal(alone[0], ball.project(images, noise_of(1), eps)[i])


@rows
def test_transformations(name):
    """jit, and one example at a time under vmap."""
    ball, images, delta = balls.TABLE[name](0.2), jnp.asarray(images_of(3)), jnp.asarray(noise_of(4))
    for function, arguments in [
        (ball.project, (images, delta, radii(0.2))),
        (ball.ascent, (delta,)),
        (ball.direction, (images, 0 * delta, delta)),
        (ball.dual_norm, (delta,)),
        (ball.size, (delta,)),
    ]:
        np.testing.assert_allclose(jax.jit(function)(*arguments), function(*arguments), atol=1e-6)
        single = jax.vmap(lambda *one: function(*(x[None] for x in one))[0])(*arguments)
        np.testing.assert_allclose(single, function(*arguments), atol=1e-6)


@rows
def test_errors(name):
    for eps, text in {
        -1: "eps must be a number in [0, 1e+06], got -1",
        "8/255": "eps must be a number in [0, 1e+06], got '8/255'",
        1e39: "eps must be a number in [0, 1e+06], got 1e+39",  # infinite in float32: NaN starts, "broken"
    }.items():
        with pytest.raises(UserError) as raised:
            balls.TABLE[name](eps)
        assert str(raised.value) == text
