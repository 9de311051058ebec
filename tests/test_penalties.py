"""Penalties: the worked cases, and the duality: the value is attained at the maximiser and by nothing exceeded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from topgap_jax import penalties
from topgap_jax.build import build
from topgap_jax.errors import UserError

# One instance of every row of the table, and the other forms of groups.
ROWS = [
    "l1_norm(.1)",
    "l2_norm(.1)",
    "elastic(.1, .05)",
    "elastic(0, .05)",
    "group_norm(.1, 2)",
    "group_norm(.1, 2, joint_channels=False)",
]
B, SHAPE = 5, (4, 6, 3)


def make(row):
    return build(row, penalties.TABLE)


def groups(row, values):
    """(b, groups, entries) by hand, for the rows whose norm goes by groups."""
    values = np.float64(values)
    if row.startswith("l2"):
        return values.reshape(len(values), 1, -1)
    b, h, w, c = values.shape
    tiles = [values[:, i : i + 2, j : j + 2] for i in range(0, h, 2) for j in range(0, w, 2)]
    if "False" in row:
        tiles = [tile[..., k] for tile in tiles for k in range(c)]
    return np.stack([tile.reshape(b, -1) for tile in tiles], 1)


def allowed(row, random, count):
    """`count` perturbations (count, h, w, c) of finite cost: on the rim, inside, and with single large entries."""
    delta = random.normal(size=(count, *SHAPE)) * random.choice([1e-2, 0.1, 1], size=(count, 1, 1, 1))
    delta *= random.random((count, *SHAPE)) < random.choice([0.05, 0.5, 1], size=(count, 1, 1, 1))
    if row.startswith("elastic"):
        return delta
    if row.startswith("l1"):
        return np.clip(delta, -0.1, 0.1)
    lengths = np.sqrt((groups(row, delta) ** 2).sum(2)).max(1)[:, None, None, None]
    return delta * np.minimum(1, 0.1 / np.maximum(lengths, 1e-12))


def test_every_row_is_here():
    assert {row.split("(")[0] for row in ROWS} == set(penalties.TABLE)
    assert all(make(row).name.split("(")[0] == row.split("(")[0] for row in ROWS)


G = np.array([3, -1, 0.5, 0, -2, 0.25])


@pytest.mark.parametrize(
    ("row", "value", "cost", "delta"),
    [
        ("l1_norm(.1)", 0.675, 0, [0.1, -0.1, 0.1, 0, -0.1, 0.1]),
        ("l2_norm(.1)", 0.378319, 0, [0.079298, -0.026433, 0.013216, 0, -0.052865, 0.006608]),
        ("elastic(.1, .05)", 1.390625, 0.715625, [0.4, -0.2, 0.15, 0, -0.3, 0.125]),
    ],
)
def test_worked_conjugates(row, value, cost, delta):
    """norm_regularised 11.1; and delta* is where the gradient of R returns g."""
    penalty, gradient = make(row), jnp.asarray(G, jnp.float32).reshape(1, 1, 2, 3)
    np.testing.assert_allclose(penalty.value(gradient), [value], atol=1e-6)
    np.testing.assert_allclose(penalty.maximiser(gradient).ravel(), delta, atol=1e-6)
    np.testing.assert_allclose(penalty.cost(penalty.maximiser(gradient)), [cost], atol=1e-6)
    if cost:
        back = jax.grad(lambda delta: penalty.cost(delta).sum())(penalty.maximiser(gradient))
        np.testing.assert_allclose(back, gradient, atol=1e-5)


def test_worked_groups_of_three():
    """norm_regularised 11.1 `group`: three channels of one pixel are a group; likewise the projection."""
    penalty = make("group_norm(.1, 1)")
    gradient = jnp.asarray(G, jnp.float32).reshape(1, 1, 2, 3)
    np.testing.assert_allclose(penalty.value(gradient), [0.521713], atol=1e-6)
    delta = [0.093704, -0.031235, 0.015617, 0, -0.099228, 0.012403]
    np.testing.assert_allclose(penalty.maximiser(gradient).ravel(), delta, atol=1e-6)
    outside = jnp.array([0.3, 0.4, 0, 0.01, 0.02, 0.02]).reshape(1, 1, 2, 3)
    np.testing.assert_allclose(penalty.project(outside).ravel(), [0.06, 0.08, 0, 0.01, 0.02, 0.02], atol=1e-6)
    assert np.isinf(penalty.cost(outside)).all()


@pytest.mark.parametrize("row", ["l1_norm(EPS)", "l2_norm(EPS)", "group_norm(EPS, 2)"])
def test_a_small_perturbation_of_an_image_is_inside(row):
    """(x + delta) - x in float32, as the pixel box leaves it, against a quarter of a grey level; a tenth more is
    outside."""
    penalty = make(row.replace("EPS", "0.25/255"))
    random = np.random.default_rng(3)
    images, g = (jnp.asarray(draw(size=(64, *SHAPE)), jnp.float32) for draw in (random.uniform, random.normal))
    delta = penalty.maximiser(g)
    rounded = (images + delta) - images
    assert (rounded != delta).any()
    np.testing.assert_array_equal(penalty.cost(rounded), 0)
    assert np.isinf(penalty.cost((images + 1.1 * delta) - images)).all()


def test_worked_prox():
    """norm_regularised 11.1: row 5 at v = .7, t = .5."""
    moved = make("elastic(.1, .05)").prox(jnp.full((1, 1, 1, 1), 0.7), 0.5)
    np.testing.assert_allclose(moved.ravel(), [0.2], atol=1e-6)


def test_worked_tiles():
    """norm_regularised 11.6."""
    ramp = np.arange(1, 17.0).reshape(4, 4, 1) * np.array([1.0, -1])
    gradient = jnp.asarray(ramp[None], jnp.float32)
    for row, value, first, last in (
        ("group_norm(.1, 2, joint_channels=False)", 14.1102044, 0.012309, 0.058580),
        ("group_norm(.1, 2)", 9.9774212, 0.008704, 0.041422),
    ):
        penalty = make(row)
        np.testing.assert_allclose(penalty.value(gradient), [value], rtol=1e-6)
        delta = penalty.maximiser(gradient)[0]
        np.testing.assert_allclose(delta[0, 0], [first, -first], atol=1e-6)
        np.testing.assert_allclose(delta[3, 3], [last, -last], atol=1e-6)


def test_second_order_bounds():
    """norm_regularised 11.4: the supremum of a curved loss against R*, and the loss where the closed form puts it."""
    hessian, g = np.array([[2, 0.5, 0], [0.5, 1, 0.3], [0, 0.3, -1]]), np.array([1, -2, 0.5])
    loss = lambda delta: delta @ g + 0.5 * np.einsum("...i,ij,...j", delta, hessian, delta)
    beta = np.linalg.norm(hessian, 2)
    gradient = jnp.asarray(g, jnp.float32).reshape(1, 1, 1, 3)
    corners = np.stack(np.meshgrid(*[[-1, 1]] * 3), -1).reshape(-1, 3)
    for eps, exact, first, closed in ((0.1, 0.352, 0.35, 0.352), (0.5, 1.81125, 1.75, 1.8)):
        penalty = penalties.l1_norm(eps)
        value = float(penalty.value(gradient)[0])
        delta = np.float64(penalty.maximiser(gradient)).ravel()
        # The maximum is at a corner in the coordinates of positive curvature; the third is searched.
        line = np.linspace(-eps, eps, 2001)
        best = max(
            loss(np.column_stack([np.full_like(line, a), np.full_like(line, b), line])).max()
            for a, b in eps * corners[:, :2]
        )
        assert value == pytest.approx(first, abs=1e-6) and best == pytest.approx(exact, abs=1e-6)
        assert abs(best - value) <= beta / 2 * 3 * eps**2
        assert loss(delta) == pytest.approx(closed, abs=1e-6)
    for a, exact, first in ((3, 1.150326, 0.875), (10, 0.280394, 0.2625)):  # row 4: a cost alone
        penalty = penalties.elastic(0, 1 / (2 * a))
        assert float(penalty.value(gradient)[0]) == pytest.approx(first, abs=1e-6)
        top = np.linalg.solve(a * np.eye(3) - hessian, g)
        assert loss(top) - a / 2 * top @ top == pytest.approx(exact, abs=1e-6)
        delta = np.float64(penalty.maximiser(gradient)).ravel()
        closed = loss(delta) - float(penalty.cost(penalty.maximiser(gradient))[0])
        assert closed == pytest.approx({3: 1.05, 10: 0.27825}[a], abs=1e-6)


@pytest.mark.parametrize("row", ROWS)
def test_the_value_is_attained_and_not_exceeded(row):
    """<g, d> - R(d) is R*(g) at the maximiser, which is allowed, and at most R*(g) at 20,000 other perturbations."""
    random = np.random.default_rng(0)
    gradient = random.normal(size=(B, *SHAPE)) * (random.random((B, *SHAPE)) < 0.7)
    penalty, g = make(row), jnp.asarray(gradient, jnp.float32)
    delta = penalty.maximiser(g)
    flat = lambda values: np.float64(values).reshape(len(values), -1)
    value, cost = np.float64(penalty.value(g)), np.float64(penalty.cost(delta))
    assert np.isfinite(cost).all()
    np.testing.assert_allclose((flat(g) * flat(delta)).sum(1) - cost, value, rtol=1e-5)
    near = np.float64(delta)[random.integers(B, size=10000)] + allowed(row, random, 10000) * 0.1
    candidates = np.concatenate([allowed(row, random, 10000), near])
    costs = np.float64(penalty.cost(jnp.asarray(candidates, jnp.float32)))
    assert (costs[:10000] < np.inf).all() and (costs >= 0).all()
    reached = flat(gradient) @ flat(candidates).T - costs
    assert (reached <= value[:, None] * (1 + 1e-5)).all()
    assert reached.max() > 0.2 * value.max()  # the candidates come near


@pytest.mark.parametrize("row", ROWS)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-30, 1e-8, 1.0, 1e3]), t=st.sampled_from([0.01, 0.3, 5.0]))
def test_laws(row, seed, scale, t):
    """Positive homogeneity, the fixed point of prox, the projection's own point, zeros in zeros out."""
    random = np.random.default_rng(seed)
    gradient = random.normal(size=(2, *SHAPE)) * scale
    gradient[:, :2, :2] = 0  # a whole group without gradient
    penalty, g = make(row), jnp.asarray(gradient, jnp.float32)
    delta, value = penalty.maximiser(g), penalty.value(g)
    assert delta.shape == g.shape and value.shape == (2,)
    assert np.isfinite(delta).all() and not np.asarray(delta[:, :2, :2]).any()
    if penalty.scale is None:
        np.testing.assert_allclose(penalty.value(7 * g), 7 * value, rtol=1e-5)
        np.testing.assert_allclose(penalty.maximiser(7 * g), delta, atol=1e-6)
        np.testing.assert_allclose(penalty.project(delta), delta, atol=1e-6)
    if scale <= 1:
        # delta* is the fixed point of delta -> prox(delta + t g), for a constraint of the projected ascent.
        np.testing.assert_allclose(penalty.prox(delta + t * g, t), delta, atol=1e-5)
    if scale == 1e-30 and penalty.scale is None:  # no square of these is left in float32, yet the norm is right
        np.testing.assert_allclose(value, 1e-30 * penalty.value(g * 1e30), rtol=1e-5)


@pytest.mark.parametrize("row", ROWS)
def test_the_projection_is_the_nearest_point(row):
    random = np.random.default_rng(1)
    penalty = make(row)
    far = random.normal(size=(3, *SHAPE))
    near = np.float64(penalty.project(jnp.asarray(far, jnp.float32)))
    assert np.isfinite(penalty.cost(jnp.asarray(near, jnp.float32))).all()
    if penalty.scale is not None:
        np.testing.assert_allclose(near, far, atol=1e-6)
        return
    # (far - near) makes an obtuse angle with every way into the set.
    inside = allowed(row, random, 2000)
    angle = np.einsum("bhwc,nbhwc->nb", far - near, inside[:, None] - near[None])
    assert (angle <= 1e-4).all()
    assert np.abs(far - near).max() > 0.1


@pytest.mark.parametrize("row", ROWS)
def test_by_hand_and_per_example(row):
    """R* in plain NumPy; an example's numbers do not depend on its neighbours; zero has a finite derivative."""
    random = np.random.default_rng(2)
    gradient = random.normal(size=(B, *SHAPE))
    penalty, g = make(row), jnp.asarray(gradient, jnp.float32)
    flat = np.abs(gradient).reshape(B, -1)
    if row.startswith("l1"):
        expected = 0.1 * flat.sum(1)
    elif row.startswith("elastic"):
        expected = (0.1 if "(.1" in row else 0) * flat.sum(1) + 0.05 * (flat**2).sum(1)
    else:
        expected = 0.1 * np.sqrt((groups(row, gradient) ** 2).sum(2)).sum(1)
    np.testing.assert_allclose(penalty.value(g), expected, rtol=1e-5)
    other = g.at[1:].multiply(1e6)
    fields = (penalty.value, penalty.maximiser, penalty.project, penalty.cost)
    every = jax.jit(lambda g: ([f(g) for f in fields], jax.grad(lambda g: penalty.value(g).sum())(jnp.zeros_like(g))))
    results, gradient = every(g)
    assert np.isfinite(gradient).all()
    for result, elsewhere, f in zip(results, every(other)[0], fields):
        np.testing.assert_array_equal(elsewhere[0], result[0])
        np.testing.assert_allclose(result, f(g), rtol=1e-5, atol=1e-6)


def test_errors():
    images = jnp.zeros((1, 32, 30, 3))
    for call, text in {
        lambda: make("l1_norm(-1)"): "l1_norm: eps must be a number of at least 0, got -1",
        lambda: make("elastic(.1, 0)"): "elastic: eps2 must be above 0; without its part the penalty is l1_norm(eps1)",
        lambda: make("group_norm(.1, 1.5)"): "group_norm: patch must be a whole number of at least 1, got 1.5",
        lambda: make("group_norm(.1, 4)").value(
            images
        ): "group_norm: patch=4 does not divide images of 32x30; take a divisor of both",
    }.items():
        with pytest.raises(UserError) as raised:
            call()
        assert str(raised.value) == text
