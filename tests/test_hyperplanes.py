"""The smallest step onto a hyperplane inside the pixel box: worked values, optimality, independence of examples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize

from topgap_jax import balls

HYPERPLANES = {name: ball(0.1).hyperplane for name, ball in balls.TABLE.items()}
ORDERS = {"linf": np.inf, "l2": 2, "l1": 1}
names = pytest.mark.parametrize("name", HYPERPLANES)
compiled = functools.cache(lambda name: jax.jit(HYPERPLANES[name]))


def step(name, point, w, b):
    """The step of one example with a flat image."""
    array = lambda values: jnp.asarray(values, jnp.float32).reshape(1, -1, 1, 1)
    return np.asarray(compiled(name)(array(point), array(w), jnp.array([b], jnp.float32))).ravel()


MIDDLE, CORNER, OPPOSITE = (0.5, 0.5, 0.5), (0.9, 0.05, 0.2), (0.1, 0.9, 0.05)


@pytest.mark.parametrize(
    "name, point, b, norm, expected",
    [
        ("linf", MIDDLE, 1, 9 / 38, (-9 / 38, 9 / 38, -9 / 38)),
        ("l2", MIDDLE, 1, 4.5 / 13, (-0.079882, 0.106509, -0.319527)),
        ("l1", MIDDLE, 1, 0.375, (0, 0, -0.375)),
        # The box is active.
        ("linf", CORNER, 1, 1.5 / 7, (-1.5 / 7, 1.5 / 7, -0.2)),
        ("l2", CORNER, 1, 0.13**0.5, (-0.18, 0.24, -0.2)),
        ("l1", CORNER, 1, 0.575, (0, 0.375, -0.2)),
        # From the other side.
        ("linf", OPPOSITE, 1, 0.194737, (0.194737, -0.194737, 0.194737)),
        ("l2", OPPOSITE, 1, 0.284615, (0.065680, -0.087574, 0.262722)),
        ("l1", OPPOSITE, 1, 0.308333, (0, 0, 0.308333)),
        # Out of reach: the corner.
        ("linf", MIDDLE, 20, 0.5, (0.5, -0.5, 0.5)),
        ("l2", MIDDLE, 20, 0.75**0.5, (0.5, -0.5, 0.5)),
        ("l1", MIDDLE, 20, 1.5, (0.5, -0.5, 0.5)),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_worked_values(name, point, b, norm, expected, scale):
    """attacks 15.1; the hyperplane scale * w does not depend on the scale."""
    delta = step(name, point, scale * np.array([3.0, -4, 12]), scale * b)
    np.testing.assert_allclose(delta, expected, atol=2e-6)
    assert np.linalg.norm(delta, ORDERS[name]) == pytest.approx(norm, abs=2e-6)


def smallest(name, point, w, b):
    """The smallest norm, by SciPy."""
    n, bounds = len(point), list(zip(-point, 1 - point))
    if name == "l2":
        start = linprog(np.zeros(n), A_eq=[w], b_eq=[b - w @ point], bounds=bounds).x
        equal = {"type": "eq", "fun": lambda d: w @ (point + d) - b, "jac": lambda d: w}
        solution = minimize(lambda d: d @ d, start, jac=lambda d: 2 * d, bounds=bounds, constraints=[equal], tol=1e-12)
        return solution.fun**0.5
    # minimise t or sum t with |d_i| <= t or t_i
    parts = 1 if name == "linf" else n
    ties = np.ones((n, 1)) if name == "linf" else np.eye(n)
    return linprog(
        [0] * n + [1] * parts,
        A_ub=np.block([[np.eye(n), -ties], [-np.eye(n), -ties]]),
        b_ub=np.zeros(2 * n),
        A_eq=[[*w, *[0] * parts]],
        b_eq=[b - w @ point],
        bounds=bounds + [(0, None)] * parts,
    ).fun


@names
@settings(max_examples=25)
@given(st.integers(0, 10**6), st.floats(0.02, 0.98))
def test_no_step_is_smaller(name, seed, share):
    """Pixels at 0 and 1, zeros and equal numbers in w; the hyperplane is met, in the box, and SciPy finds nothing
    shorter."""
    random = np.random.default_rng(seed)
    point = np.clip(random.uniform(-0.3, 1.3, 12), 0, 1).astype(np.float32).astype(np.float64)
    w = np.round(random.normal(size=12), 1)
    least, most = np.minimum(w, 0).sum(), np.maximum(w, 0).sum()
    b = float(np.float32(least + share * (most - least)))
    delta = np.float64(step(name, point, w, b))
    assert (point + delta).min() >= -1e-6 and (point + delta).max() <= 1 + 1e-6
    assert np.float32(w) @ (point + delta) == pytest.approx(b, abs=2e-5)
    assert np.linalg.norm(delta, ORDERS[name]) == pytest.approx(
        smallest(name, point, np.float64(np.float32(w)), b), abs=5e-5
    )


@names
def test_nothing_to_do(name):
    """A point on the hyperplane stays, a zero w moves nothing, and no sort is compiled."""
    assert not step(name, (0.25, 0.5, 1), (1, 2, -1), 0.25).any()
    assert not step(name, MIDDLE, (0, 0, 0), 1).any()
    assert not step(name, MIDDLE, (0, 0, 0), -1).any()
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(2, 4, 4, 3), (2, 4, 4, 3), (2,)]]
    assert "sort" not in str(jax.make_jaxpr(HYPERPLANES[name])(*shapes))


@names
def test_each_example_by_itself(name):
    random = np.random.default_rng(0)
    points, w = random.uniform(size=(4, 5, 5, 3)), random.normal(size=(4, 5, 5, 3))
    points, w, b = (jnp.asarray(x, jnp.float32) for x in (points, w, (w * points).sum((1, 2, 3)) - [0.1, -2, 5, 1e3]))
    delta = compiled(name)(points, w, b)
    one = jax.vmap(lambda *row: HYPERPLANES[name](*(x[None] for x in row))[0])(points, w, b)
    np.testing.assert_allclose(one, delta, atol=1e-6)
    again = compiled(name)(*(x[::-1].at[0].set(x[0]) for x in (points, w, b)))
    np.testing.assert_array_equal(again[0], delta[0])
