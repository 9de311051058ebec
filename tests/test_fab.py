"""FAB against plain NumPy and on models whose nearest adversarial example is known; MALT's order of the targets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.laws import IMAGES, KEYS, LABELS, PREDICT, make
from topgap_jax import attacks, balls
from topgap_jax.attacks.state import BROKEN, FINISHED, RUNNING
from topgap_jax.errors import UserError
from topgap_jax.targets import malt_order

ORDERS = {"linf": np.inf, "l2": 2, "l1": 1}
DUALS = {"linf": 1, "l2": 2, "l1": np.inf}
names = pytest.mark.parametrize("ball", balls.TABLE)


def linear(weights, bias):
    """z = W x + b of flat images, W (k, n)."""
    weights, bias = jnp.asarray(weights, jnp.float32), jnp.asarray(bias, jnp.float32)
    return lambda images, keys=None: jnp.matmul(images.reshape(len(images), -1), weights.T, precision="highest") + bias


# attacks 15: z = (0, w . x - 1), w = (3, -4, 12); the label is 1.
SCALAR = linear([[0, 0, 0], [3, -4, 12]], [0, -1])
MIDDLE, CORNER = (0.5, 0.5, 0.5), (0.9, 0.05, 0.2)


@functools.cache
def on_scalar(method, ball, steps):
    """(image, eps) -> (states before each step, the booked one)."""
    attack = attacks.TABLE[method](balls.TABLE[ball](0.1), steps=steps)

    def run(image, eps):
        images, labels = image.reshape(1, 1, 1, 3), jnp.array([1])
        state = attack.init(KEYS[:1], SCALAR, images, labels, SCALAR(images), eps=eps)
        last, states = lax.scan(lambda state, _: (attack.step(SCALAR, state), state), state, None, length=steps)
        return states, attacks.finish(SCALAR, last)

    return jax.jit(run)


@pytest.mark.parametrize("method", ["fab", "fab_t"])
@pytest.mark.parametrize("ball, smallest", [("linf", 9 / 38), ("l2", 4.5 / 13), ("l1", 0.375)])
def test_worked_iterates(method, ball, smallest):
    """attacks 15.12: the sizes of the iterates in units of the smallest."""
    states, _ = on_scalar(method, ball, 40)(jnp.array(MIDDLE), jnp.array([1.0]))
    ratio = np.linalg.norm(np.asarray(states.delta).reshape(40, 3), ORDERS[ball], axis=1) / smallest
    np.testing.assert_allclose(ratio[:5], [0, 1.05, 1.005213, 1.008701, 1.008439], atol=2e-5)
    np.testing.assert_allclose(ratio[-1], 1.008457, atol=2e-5)
    assert -float(states.score[-1, 0]) == pytest.approx(1.005213 * smallest, rel=2e-5)


@pytest.mark.parametrize("image, smallest, reached", [(MIDDLE, 9 / 38, 1.0053), (CORNER, 1.5 / 7, 1.0097)])
def test_robust_up_to_where_it_is(image, smallest, reached):
    """attacks 15.2: breaks from a little above the smallest on (at a corner of the box, where one pixel cannot
    overshoot, .97 % above it), not below; what is outside the ball breaks nothing."""
    for factor, status in [(0.999, RUNNING), (reached, BROKEN)]:
        eps = jnp.array([factor * smallest], jnp.float32)
        _, state = on_scalar("fab_t", "linf", 40)(jnp.array(image), eps)
        assert int(state.status[0]) == status
        assert float(jnp.abs(state.delta).max()) <= float(eps[0])
        if status == BROKEN:
            assert np.abs(state.best.ravel() - np.float32(image)).max() <= float(eps[0])
            assert int(jnp.argmax(SCALAR(state.best))) == 0


def plane_step(ball, point, w, gap):
    """The smallest step to gap + w . d = 0 inside the box, float64, by sorting where the box becomes active."""
    if gap < 0:
        return plane_step(ball, point, -w, -gap)
    room, slope = np.where(w > 0, point, 1 - point) * (w != 0), np.abs(w)
    if slope @ room <= gap:
        return -np.sign(w) * room
    if ball == "l1":
        length = np.zeros_like(w)
        for i in np.argsort(-slope):
            length[i] = min(room[i], max(gap - slope @ length, 0) / slope[i])
        return -np.sign(w) * length
    rate = np.ones_like(w) if ball == "linf" else slope
    bounds = np.where(rate > 0, room / np.where(rate > 0, rate, 1), 0)
    level = min(bound for bound in bounds if slope @ np.minimum(bound * rate, room) >= gap)
    free = bounds >= level
    rest = gap - slope[~free] @ room[~free]
    return -np.sign(w) * np.where(free, rest / (slope[free] @ rate[free]) * rate, room)


def fab_by_numpy(ball, x, y, weights, bias, steps, target=None):
    """The iterates of attacks.md 6 on a linear model, and the smallest adversarial norm before each."""
    x1, best, points = x.copy(), [np.inf], [x]
    size = lambda d: max(np.linalg.norm(d, ORDERS[ball]), 1e-8)
    for _ in range(steps):
        z = weights @ x1 + bias
        others = [k for k in range(len(z)) if k != y] if target is None else [target]
        gradients = {k: weights[k] - weights[y] for k in others}
        s = min(others, key=lambda k: abs(z[k] - z[y]) / (1e-12 + np.linalg.norm(gradients[k], DUALS[ball])))
        w, gap = gradients[s], z[s] - z[y]
        d1, d2 = plane_step(ball, x1, w, gap), plane_step(ball, x, w, gap + w @ (x - x1))
        alpha = min(size(d1) / (size(d1) + size(d2)), 0.1)
        x1 = np.clip((x1 + 1.05 * d1) * (1 - alpha) + (x + 1.05 * d2) * alpha, 0, 1)
        points.append(x1)
        wrong = (weights @ x1 + bias).argmax() != y
        best.append(min(best[-1], np.linalg.norm(x1 - x, ORDERS[ball])) if wrong else best[-1])
        x1 = x + 0.9 * (x1 - x) if wrong else x1
    return np.array(points), np.array(best)


@names
@pytest.mark.parametrize("method", ["fab", "fab_t"])
def test_equals_numpy(method, ball):
    """On a linear model of four classes, iterate by iterate; every run of `fab_t` aims at its class."""
    random = np.random.default_rng(3)
    weights, bias = random.normal(size=(4, 12)), random.normal(size=4)
    images = random.uniform(size=(6, 12))
    predict, z = linear(weights, bias), images @ weights.T + bias
    labels, order = z.argmax(1), np.argsort(-z, 1)
    attack = attacks.TABLE[method](balls.TABLE[ball](0.1), steps=8)
    run = jnp.arange(6, dtype=jnp.int32) % 3 if method == "fab_t" else jnp.zeros(6, jnp.int32)
    arguments = jnp.asarray(images.reshape(6, 2, 2, 3), jnp.float32), jnp.asarray(labels)

    @jax.jit
    def states_of(images, labels):
        state = attack.init(KEYS[:6], predict, images, labels, predict(images), run=run, eps=jnp.full(6, 9.0))
        return lax.scan(lambda state, _: (attack.step(predict, state), state), state, None, length=8)[1]

    states = states_of(*arguments)
    for i in range(6):
        target = order[i, 1 + int(run[i])] if method == "fab_t" else None
        points, best = fab_by_numpy(ball, images[i], labels[i], weights, bias, 7, target)
        np.testing.assert_allclose((states.images + states.delta)[:, i].reshape(8, 12), points, atol=2e-6)
        np.testing.assert_allclose(-states.score[1:, i], best[:-1], atol=2e-6)


def others_by_logit():
    order = np.argsort(-np.asarray(PREDICT(IMAGES)), 1)
    return np.stack([row[row != y] for row, y in zip(order, np.asarray(LABELS))])


def test_runs():
    """Targets beyond the last class finish at once; the first run of `fab` starts at the clean image, others do not."""
    attack = make("fab_t(linf(.06))")
    assert attack.runs == 9 and make("fab_t(linf(.06), targets=2)").runs == 2
    start = lambda attack, run: attack.init(KEYS, PREDICT, IMAGES, LABELS, PREDICT(IMAGES), run=run + 0 * LABELS)
    ranked = others_by_logit()
    for run in range(3):
        state = start(attack, run)
        np.testing.assert_array_equal(state.target, ranked[:, run])
        assert (np.asarray(state.status)[:-2] == RUNNING).all()
    state = attack.step(PREDICT, start(attack, 3))
    assert (np.asarray(state.status) == [FINISHED] * 6 + [BROKEN] * 2).all()
    assert not np.asarray(start(make("fab(linf(.06))"), 0).delta).any()
    drawn = start(make("fab(linf(.06), restarts=2)"), 1).delta
    largest = np.abs(drawn).max((1, 2, 3))
    assert (largest <= 0.03 + 1e-6).all() and (largest > 0.02).all()


def test_malt_case():
    """breadth_attacks 2: W = [[1, 0], [0, 3], [-.5, .2]], x = (.6, .1)."""
    predict = linear([[1, 0], [0, 3], [-0.5, 0.2]], [0, 0, 0])
    images, labels = jnp.array([0.6, 0.1]).reshape(1, 1, 2, 1), jnp.array([0])
    for ball in balls.TABLE.values():
        assert malt_order(predict, images, labels, predict(images), ball(0.1)).tolist() == [[1, 2]]


@names
def test_malt_is_the_linearised_distance(ball):
    """Against distances written out; no candidate beyond the most likely ones; no gradient puts a class last."""
    order = jax.jit(lambda images: malt_order(PREDICT, images, LABELS, PREDICT(images), balls.TABLE[ball](0.1)))(IMAGES)
    logits = np.asarray(PREDICT(IMAGES))
    jacobian = np.asarray(jax.jacrev(lambda images: PREDICT(images).sum(0))(IMAGES))  # (k, b, h, w, c)
    for i in range(len(IMAGES)):
        y = int(LABELS[i])
        distance = {
            t: (logits[i, y] - logits[i, t]) / np.linalg.norm((jacobian[t, i] - jacobian[y, i]).ravel(), DUALS[ball])
            for t in range(4)
            if t != y
        }
        assert order[i].tolist() == sorted(distance, key=distance.get)
    top = malt_order(PREDICT, IMAGES, LABELS, PREDICT(IMAGES), balls.TABLE[ball](0.1), candidates=1)
    np.testing.assert_array_equal(top[:, 0], others_by_logit()[:, 0])
    flat = linear([[0, 0], [0, 0], [0, 1]], [3, 2, 0])
    images, labels = jnp.full((1, 1, 2, 1), 0.5), jnp.array([0])
    assert malt_order(flat, images, labels, flat(images), balls.TABLE[ball](0.1)).tolist() == [[2, 1]]


@pytest.mark.parametrize(
    "call, text",
    [
        ("fab(linf(.1), steps=0)", "fab: steps must be a whole number of at least 1, got 0"),
        ("fab(linf(.1), restarts=0)", "fab: restarts must be a whole number of at least 1, got 0"),
        ("fab_t(linf(.1), targets=0)", "fab_t: targets must be a whole number of at least 1, got 0"),
        ("fab_t(linf(.1), order='x')", "fab_t: order must be 'logits' or 'malt', got 'x'"),
    ],
)
def test_mistakes(call, text):
    with pytest.raises(UserError) as raised:
        make(call)
    assert str(raised.value) == text


def test_one_class_has_no_boundary():
    predict = linear([[1, 0, 0]], [0])
    images = jnp.full((1, 1, 1, 3), 0.5)
    with pytest.raises(UserError, match=r"^fab-t-100 x 9: the model has 1 class; give it two or more$"):
        make("fab_t(linf(.1))").init(KEYS[:1], predict, images, jnp.array([0]), predict(images))
