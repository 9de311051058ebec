"""Square against plain NumPy, its schedule, windows and patterns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.laws import make
from topgap_jax import attacks, balls
from topgap_jax.attacks.square import _at, _inside, _pattern_in, _scales, _window, pattern, window_sides
from topgap_jax.attacks.state import step_keys
from topgap_jax.errors import UserError
from topgap_jax.keys import fold_in
from topgap_jax.types import Cost


@pytest.mark.parametrize(
    "p, side, expected",
    [
        (np.inf, 32, [29, 20, 14, 10, 7, 5, 4, 3]),
        (np.inf, 224, [200, 142, 100, 71, 50, 35, 25, 18]),
        (2, 32, [29, 21, 15, 11, 7, 5, 5, 3]),
        (1, 32, [29, 21, 15, 11, 7, 5, 5, 3]),
    ],
)
def test_schedule(p, side, expected):
    """attacks 15.10: sides, and the candidates at which they change."""
    sides = window_sides(p, 0.8, side, side)
    assert sides[:8] == expected
    change = [0, 11, 51, 201, 501, 1001, 2001, 4001]
    assert np.asarray(_at(jnp.array(change), sides)).tolist() == expected
    assert np.asarray(_at(jnp.array(change[1:]) - 1, sides)).tolist() == expected[:-1]
    assert window_sides(p, 1.0, 12, 7)[0] == 7


def test_windows_never_reach_the_last_row_and_column():
    """attacks 15.10, coverage: where a window begins runs over 0 to h - side - 1; a side of h begins at 0."""
    bits = jnp.asarray(np.linspace(0, 2**32 - 1, 1000).astype(np.uint32)[:, None].repeat(2, 1))
    for side, last in [(3, 30), (29, 30), (32, 31)]:
        for place in _window(bits, jnp.full(1000, side), (1000, 32, 32, 3)):
            inside = np.asarray(_inside(place, jnp.full(1000, side)))
            assert (inside.sum(1) == side).all()
            assert np.flatnonzero(inside.any(0)).tolist() == list(range(last + 1))


def test_patterns():
    """attacks 15.11."""
    third = -(1 / 3) / np.sqrt(20 / 3)
    np.testing.assert_allclose(
        pattern(3, 2), [[0.136083, 0.680414, 0.136083], [third] * 3, [third, 5 * third, third]], atol=1e-6
    )
    np.testing.assert_allclose(
        pattern(3, 1),
        [[0.026316, 0.447368, 0.026316], [-0.022727] * 3, [-0.022727, -0.386364, -0.022727]],
        atol=1e-6,
    )


@pytest.mark.parametrize("p", [1, 2])
def test_a_pattern_in_its_window(p):
    """Every side from 1 to that of the image, at any place, as it is and turned, is the pattern pasted there."""
    h, w, sides = 9, 7, np.array([1, 2, 3, 4, 5, 6, 7, 7, 5])
    top, left, turned = (
        np.array([0, 7, 6, 1, 2, 3, 2, 0, 4]),
        np.array([6, 0, 3, 2, 1, 0, 0, 0, 2]),
        np.arange(9) % 2 == 1,
    )
    scales = [jnp.array(values) for values in zip(*(_scales(side, p) for side in sides))]
    rows, columns = jnp.arange(h) - top[:, None], jnp.arange(w) - left[:, None]
    pasted = _pattern_in(rows, columns, jnp.asarray(turned), jnp.asarray(sides), scales, 7, p)
    for i, side in enumerate(sides):
        expected, one = np.zeros((h, w)), pattern(side, p)
        assert (np.abs(one) ** p).sum() == pytest.approx(1)
        expected[top[i] : top[i] + side, left[i] : left[i] + side] = one.T if turned[i] else one
        np.testing.assert_allclose(pasted[i], expected, atol=1e-6)


B, SHAPE, EPS = 4, (9, 7, 3), {"linf": 0.1, "l2": 0.8, "l1": 3.0}
random = np.random.default_rng(0)
IMAGES = jnp.asarray(np.clip(random.uniform(-0.2, 1.2, (B, *SHAPE)), 0, 1), jnp.float32)
KEYS = jax.random.split(jax.random.key(3), B)
WEIGHTS = (0.1 * random.normal(size=(int(np.prod(SHAPE)), 4))).astype(np.float32)
PREDICT = lambda images, keys=None: jnp.tanh(images.reshape(len(images), -1) @ WEIGHTS)
LABELS = jnp.argmax(PREDICT(IMAGES), -1)


@functools.cache
def states_of(ball, queries):
    """The states before each step: jitted once."""
    attack = attacks.square(balls.TABLE[ball](EPS[ball]), queries=queries)
    state = attack.init(KEYS, PREDICT, IMAGES, LABELS, PREDICT(IMAGES))
    step, states = jax.jit(lambda state: attack.step(PREDICT, state)), [state]
    for _ in range(queries):
        states.append(step(states[-1]))
    return states


def ball_and_box(ball, image, delta):
    eps = EPS[ball]
    if ball == "linf":
        return np.clip(image + np.clip(delta, -eps, eps), 0, 1) - image
    if ball == "l2":
        return np.clip(image + eps * delta / (np.sqrt((delta**2).sum()) + 1e-12), 0, 1) - image
    room, eps = np.where(delta > 0, 1 - image, image), eps * (1 - 1e-6)
    lengths = lambda t: np.clip(np.abs(delta) - t, 0, room)
    low, high = 0.0, np.abs(delta).max()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if lengths(middle).sum() > eps else (low, middle)
    return np.sign(delta) * lengths(high if lengths(0).sum() > eps else 0)


def candidate(ball, image, top, bits, side):
    """attacks.md 7 with slices, float64."""
    h, w, c = SHAPE
    place = lambda i: int((bits[i] >> 8) / 2**24 * ((h, w)[i % 2] - side))
    sign = lambda i: 1.0 if bits[i] >> 31 else -1.0
    delta, first = top.copy(), (slice(place(0), place(0) + side), slice(place(1), place(1) + side))
    if ball == "linf":
        delta[first] += 2 * EPS[ball] * np.array([sign(2 + j) for j in range(c)])
        return ball_and_box(ball, image, delta)
    p = {"l2": 2, "l1": 1}[ball]
    norm = lambda values: (np.abs(values) ** p).sum((0, 1)) ** (1 / p)
    second = (slice(place(2), place(2) + side), slice(place(3), place(3) + side))
    both = np.zeros((h, w, 1))
    both[first] = both[second] = 1
    left = max(EPS[ball] ** p - (np.abs(top) ** p).sum(), 0) / c
    shape = pattern(side, p).T if bits[4] >> 31 else pattern(side, p)
    new = shape[..., None] * np.array([sign(5 + j) for j in range(c)]) + top[first] / (1e-12 + norm(top[first]))
    scale = np.sqrt(left + norm(top * both) ** 2) if p == 2 else (left + norm(top * both)) * c
    new = new / (1e-12 + norm(new)) * scale
    delta[second] = 0
    delta[first] = new
    return ball_and_box(ball, image, delta)


@pytest.mark.parametrize("ball", balls.TABLE)
def test_equals_numpy(ball):
    """The start, every candidate from the same random numbers, and which of them are accepted; on images that are not
    square."""
    states, queries = states_of(ball, 60), 60
    sides = window_sides(balls.TABLE[ball](1).p, 0.8, *SHAPE[:2])
    margin = lambda image, delta, label: (
        max(np.delete(np.tanh((image + delta).ravel() @ np.float64(WEIGHTS)), label))
        - np.tanh((image + delta).ravel() @ np.float64(WEIGHTS))[label]
    )
    accepted = 0
    for i in range(B):
        image, label = np.float64(IMAGES[i]), int(LABELS[i])
        highest, top = -np.inf, None
        for count in range(queries):
            delta = np.float64(states[count].delta[i])
            value = margin(image, delta, label)
            if value > highest or value >= 0:
                top, accepted = delta, accepted + 1
            highest = max(highest, value)
            np.testing.assert_allclose(states[count + 1].search.top[i], top, atol=1e-6)
            numbers = (2 if ball == "linf" else 5) + SHAPE[2]
            bits = [int(x) for x in jax.random.bits(step_keys(states[count])[i], (numbers,))]
            side = int(_at(states[count].count, sides)[i])
            np.testing.assert_allclose(states[count + 1].delta[i], candidate(ball, image, top, bits, side), atol=2e-6)
    assert B < accepted < B * queries


@pytest.mark.parametrize("ball", balls.TABLE)
def test_start(ball):
    """linf: columns of one sign; l2, l1: 5 x 5 tiles of the pattern, the rest of the image untouched."""
    state, images = states_of(ball, 60)[0], np.asarray(IMAGES)
    if ball == "linf":
        signs = np.sign(np.where((images > 0.1) & (images < 0.9), state.delta, np.nan))
        low, high = np.nanmin(signs, 1), np.nanmax(signs, 1)
        assert (low == high)[np.isfinite(low)].all() and 0.3 < (low[np.isfinite(low)] > 0).mean() < 0.7
        return
    touched = np.asarray(state.delta).any((0, 3))
    assert touched[2:7, 1:6].all() and touched.sum() == 25
    key = fold_in(KEYS[:1], 0)
    signs = np.where(np.asarray(jax.random.bits(key[0], (100,))) >> 31, 1.0, -1.0).reshape(5, 5, 4)[..., 1:]
    tiles = np.pad(-signs * 25 ** (-1 / 2), ((2, 2), (1, 1), (0, 0)))  # of side 1 only the lower half is there
    np.testing.assert_allclose(state.delta[0], ball_and_box(ball, images[0], tiles), atol=1e-5)


def test_one_forward_pass_and_nothing_else():
    """A step evaluates the network once, without a gradient, and sorts nothing."""
    for name, ball in balls.TABLE.items():
        attack, calls = attacks.square(ball(EPS[name])), []

        def counted(images, calls=calls):
            calls.append(images.shape)
            return PREDICT(images)

        state = jax.eval_shape(lambda attack=attack: attack.init(KEYS, PREDICT, IMAGES, LABELS, PREDICT(IMAGES)))
        text = str(jax.make_jaxpr(lambda state, attack=attack, counted=counted: attack.step(counted, state))(state))
        assert calls == [IMAGES.shape] and " sort[" not in text and text.count("dot_general") == 1
        assert attack.cost(PREDICT, IMAGES) == Cost(1, 0)


def test_it_finds_what_a_gradient_would():
    """On the linear model of attacks 15.2 with one pixel a channel: +-eps for every channel is the worst."""
    w = jnp.array([3.0, -4, 12])
    predict = lambda images, keys=None: jnp.stack([0 * images[:, 0, 0, 0], images.reshape(-1, 3) @ w - 1], -1)
    images, labels = jnp.full((1, 1, 1, 3), 0.5), jnp.array([1])
    for eps, broken in [(0.236, False), (0.238, True)]:
        attack = attacks.square(balls.linf(eps), queries=60)
        state = jax.jit(lambda attack=attack: attacks.attack(attack, KEYS[:1], predict, images, labels))()
        assert bool(state.status[0]) == broken


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: make("square(linf(.1), queries=0)"), "square: queries must be a whole number of at least 1, got 0"),
        (lambda: make("square(linf(.1), p_init=2)"), "square: p_init must be a number in [0, 1], got 2"),
        (
            lambda: make("square(l2(.1))").init(KEYS, PREDICT, IMAGES[:, :4], LABELS, PREDICT(IMAGES)),
            "square: l2(0.1) needs images of at least 5 x 5 pixels, got 4 x 7",
        ),
    ],
)
def test_mistakes(call, text):
    with pytest.raises(UserError) as raised:
        call()
    assert str(raised.value) == text
