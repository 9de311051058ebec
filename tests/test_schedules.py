"""Schedules against the values of the specification (topgap.md 14.10), optimisers against their formulas in NumPy."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topgap_jax.errors import UserError
from topgap_jax.training import optimizers, schedules
from topgap_jax.training.optimizers import adamw, sgd
from topgap_jax.training.schedules import cosine, cyclic, geometric, linear, piecewise, warmup

TIMES = (0, 25, 50, 75, 100, 150)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (linear, (784, 607.5, 431, 254.5, 78, 78)),
        (cosine, (784, 680.608694, 431, 181.391306, 78, 78)),
        (geometric, (784, 440.312179, 247.289306, 138.883281, 78, 78)),
    ],
)
def test_annealing_has_the_values_of_the_specification(schedule, expected):
    steps = [float(schedule(784, 78, 100)(time)) for time in TIMES]
    np.testing.assert_allclose(steps, expected, rtol=2e-6)
    held = jax.vmap(schedule(784, 78, 100, hold=30))(jnp.array((0, 30, *[time + 30 for time in TIMES])))
    np.testing.assert_allclose(held, (784, 784, *expected), rtol=2e-6)


@given(
    name=st.sampled_from(["linear", "cosine", "geometric"]),
    ends=st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)),
    steps=st.integers(1, 1000),
    hold=st.integers(0, 100),
)
@settings(max_examples=20)
def test_annealing_begins_and_ends_where_it_should_and_never_turns(name, ends, steps, hold):
    schedule = schedules.TABLE[name](*ends, steps, hold=hold)
    way = hold + np.linspace(0, steps, 9)
    values = np.asarray(schedule(jnp.array([0, hold / 2, *way, way[-1] + 5])))
    scale = 1e-5 * max(ends)  # float32, where a large start and a small end cancel
    np.testing.assert_allclose(values[:3], ends[0], rtol=1e-5, atol=scale)
    np.testing.assert_allclose(values[-2:], ends[1], rtol=1e-5, atol=scale)
    assert (np.diff(values) * np.sign(ends[1] - ends[0]) >= -scale).all()


def test_piecewise_cyclic_and_warmup():
    drops = piecewise(0.1, boundaries=(30, 60), factor=0.5)
    np.testing.assert_allclose(
        [drops(step) for step in (0, 29, 30, 59, 60, 1000)], [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]
    )
    triangle = cyclic(2.0, 100, peak_at=0.25)
    np.testing.assert_allclose([triangle(step) for step in (0, 10, 25, 100, 200)], [0, 0.8, 2, 0, 0], atol=1e-6)
    ramp = warmup(linear(1.0, 0.0, 100), 20)
    np.testing.assert_allclose([ramp(step) for step in (0, 10, 20, 70, 120)], [0, 0.5, 1, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose([warmup(3.0, 3)(step) for step in (1, 3, 99)], [1, 3, 3], rtol=1e-6)


@pytest.mark.parametrize("make", [linear, cosine, geometric])
def test_a_warm_up_is_taken_off_the_schedule(make):
    """As steps, and as the share of them that makes as many."""
    by_hand = warmup(make(0.1, 0.001, 220), 100)
    for schedule in (make(0.1, 0.001, 320, warmup=100), make(0.1, 0.001, 320, warmup=5 / 16)):
        assert [float(schedule(t)) for t in range(0, 330, 3)] == [float(by_hand(t)) for t in range(0, 330, 3)]
    short = make(1.0, 0.5, 6, warmup=0.01)
    np.testing.assert_allclose(
        [short(t) for t in (0, 1, 6, 9)], [0, 1, 0.5, 0.5], rtol=1e-6, err_msg="one step at least"
    )


@pytest.mark.parametrize("name", schedules.TABLE)
def test_schedules_are_the_same_under_jit(name):
    arguments = {"piecewise": ((0.1,), {"boundaries": (3, 5)}), "cyclic": ((0.1, 8), {}), "warmup": ((0.1, 8), {})}
    positional, words = arguments.get(name, ((1.0, 0.1, 8), {}))
    schedule = schedules.TABLE[name](*positional, **words)
    eager = [float(schedule(step)) for step in range(12)]
    np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(jnp.arange(12)), eager, rtol=1e-6)


def test_sgd_is_nesterov_momentum_with_decay_of_kernels_only():
    parameters = {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([3.0])}
    gradient = {"kernel": jnp.array([[0.5, 0.25]]), "bias": jnp.array([-1.0])}
    schedule = linear(0.1, 0.0, 2)
    found = _steps(sgd(schedule, momentum=0.9, weight_decay=0.01), parameters, gradient, 2)
    for name, decay in (("kernel", 0.01), ("bias", 0.0)):
        value, velocity = np.asarray(parameters[name]), 0.0
        for rate in (0.1, 0.05):
            slope = np.asarray(gradient[name]) + decay * value
            velocity = slope + 0.9 * velocity
            value = value - rate * (slope + 0.9 * velocity)
        np.testing.assert_allclose(found[name], value, rtol=1e-6)


def test_adamw_decays_kernels_only_and_apart_from_the_gradient():
    parameters = {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([3.0])}
    gradient = {"kernel": jnp.array([[0.5, 0.25]]), "bias": jnp.array([-1.0])}
    found = _steps(adamw(0.1, weight_decay=0.2), parameters, gradient, 1)
    # The first Adam step is the sign of the gradient.
    np.testing.assert_allclose(found["kernel"], [[1.0 - 0.1 * (1 + 0.2), -2.0 - 0.1 * (1 - 0.4)]], rtol=1e-5)
    np.testing.assert_allclose(found["bias"], [3.1], rtol=1e-5)


def test_clipping_bounds_the_global_norm_before_the_decay():
    parameters = {"kernel": jnp.array([[3.0, 4.0]]), "bias": jnp.array([0.0])}
    gradient = {"kernel": jnp.array([[30.0, 0.0]]), "bias": jnp.array([40.0])}
    found = _steps(sgd(1.0, momentum=0.0, nesterov=False, weight_decay=0.1, clip=5.0), parameters, gradient, 1)
    np.testing.assert_allclose(found["kernel"], [[3.0 - 3.0 - 0.3, 4.0 - 0.4]], rtol=1e-5)
    np.testing.assert_allclose(found["bias"], [-4.0], rtol=1e-5)


LONG = (
    "where a warm-up was taken off total_steps it is longer than the run: write it as a share, such as "
    "cosine(.1, 0, total_steps, warmup=.1)"
)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: linear(1, 0, 0), f"steps must be a number of at least 1, got 0; {LONG}"),
        (lambda: warmup(cosine(0.1, 0, 6 - 100), 100), f"steps must be a number of at least 1, got -94; {LONG}"),
        (
            lambda: cosine(0.1, 0, 6, warmup=100),
            "warmup=100 leaves nothing of a schedule of 6 steps; give fewer steps, or a share such as warmup=.1",
        ),
        (
            lambda: cosine(0.1, 0, 6, warmup=0.95),
            "warmup=0.95 leaves nothing of a schedule of 6 steps; give fewer steps, or a share such as warmup=.1",
        ),
        (lambda: cosine(0.1, 0, 6, warmup=-1), "warmup must be a number of at least 0, got -1"),
        (lambda: cosine(1, 0, 10, hold=-1), "hold must be a number of at least 0, got -1"),
        (lambda: cosine("a", 0, 10), "start must be a number, got 'a'"),
        (lambda: geometric(1, 0, 10), "end must be a number of at least 1e-30, got 0"),
        (lambda: piecewise(1, boundaries=(3, "b")), "boundaries must be a number of at least 0, got 'b'"),
        (lambda: cyclic(1, 10, peak_at=2), "peak_at must be a number in [0.01, 0.99], got 2"),
        (lambda: warmup("cosine", 10), "schedule must be a number, got 'cosine'"),
        (lambda: sgd(-1), "learning_rate must be a number of at least 0, got -1"),
        (lambda: sgd(1, momentum=2), "momentum must be a number in [0, 1], got 2"),
        (lambda: adamw(1, weight_decay=-1), "weight_decay must be a number of at least 0, got -1"),
        (lambda: adamw(1, clip=0), "clip must be a number of at least 1e-12, got 0"),
    ],
)
def test_bad_values_are_one_line_errors(make, text):
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == text


# `freeze` and `slower` change another optimiser: tests/test_fine_tuning.py
@pytest.mark.parametrize("name", [name for name in optimizers.TABLE if name not in ("freeze", "slower")])
def test_optimisers_lower_a_loss_under_jit(name):
    optimizer = optimizers.TABLE[name](0.1)
    assert all(
        p.kind is p.KEYWORD_ONLY for p in list(inspect.signature(optimizers.TABLE[name]).parameters.values())[1:]
    )
    loss = lambda parameters: ((parameters["kernel"] - 2) ** 2).sum() + (parameters["bias"] ** 2).sum()
    parameters = {"kernel": jnp.zeros((2, 2)), "bias": jnp.ones(2)}
    state, before = optimizer.init(parameters), loss(parameters)

    @jax.jit
    def step(parameters, state):
        updates, state = optimizer.update(jax.grad(loss)(parameters), state, parameters)
        return optax.apply_updates(parameters, updates), state

    for _ in range(10):
        parameters, state = step(parameters, state)
    assert loss(parameters) < before / 2


def _steps(optimizer, parameters, gradient, number):
    state = optimizer.init(parameters)
    for _ in range(number):
        updates, state = optimizer.update(gradient, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
    return parameters
