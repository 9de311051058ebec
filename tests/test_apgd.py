"""APGD against its equations in plain NumPy, worked values, target classes, samples of random models."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from tests.laws import CLASSES, IMAGES, KEYS, LABELS, PREDICT, B
from topgap_jax import attacks, balls, scores
from topgap_jax.attacks.apgd import apgd, apgd_t, stages, with_momentum
from topgap_jax.attacks.state import BROKEN, FINISHED, RUNNING
from topgap_jax.errors import UserError
from topgap_jax.types import Cost


def iterates(attack, predict, images, labels, keys=KEYS, **options):
    """The states before each step and the last one, booked: every leaf (steps + 1, b, ...)."""
    state = attack.init(keys[: len(images)], predict, images, labels, predict(images), **options)
    last, states = lax.scan(lambda state, _: (attack.step(predict, state), state), state, None, length=attack.steps)
    last = attacks.finish(predict, last, attack.samples)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), states, last)


def linear_model(images, keys=None):
    """attacks 15: z = (0, w . x + b), w = (3, -4, 12), b = -1; the label is 1."""
    score = images.reshape(images.shape[0], 3) @ jnp.array([3.0, -4, 12]) - 1
    return jnp.stack([jnp.zeros_like(score), score], -1)


MIDDLE, ONE = jnp.full((1, 1, 1, 3), 0.5), jnp.array([1])


@pytest.mark.parametrize(
    "steps, at",
    [
        (100, [22, 41, 57, 70, 80, 87, 93, 99]),
        (50, [11, 21, 30, 38, 45]),
        (20, [4, 7, *range(9, 21)]),
        (10, range(2, 11)),
    ],
)
def test_checkpoints_and_halvings(steps, at):
    """attacks 15.4 and 15.5: on a linear model the first step reaches the best corner, so that every check halves; the
    check after the last step, which changes nothing, is left out."""
    run = functools.partial(iterates, apgd(balls.linf(0.1), steps=steps), linear_model, MIDDLE, ONE)
    states = jax.jit(run)()
    np.testing.assert_allclose(
        (states.images + states.delta)[1:, 0].reshape(-1, 3), [[0.4, 0.6, 0.4]] * steps, atol=1e-6
    )
    step_size = np.asarray(states.search.step_size)[:-1, 0] / 0.2
    expected = [0.5 ** sum(check < count for check in at) for count in range(steps)]
    np.testing.assert_allclose(step_size, expected, rtol=1e-6)
    assert float(states.score[-1, 0]) == pytest.approx(0.0716447, abs=1e-6) and int(states.status[-1, 0]) == RUNNING


def test_momentum():
    """attacks 15.6, a pixel whose gradient changes its sign, and a turn in l2; the first step has no momentum."""
    peak = lambda images, keys=None: -jnp.square(images.reshape(-1, 1) - 0.55) * jnp.array([1.0, 0])
    attack = apgd(balls.linf(0.1), score=lambda logits, labels, clean: logits[:, 0])
    image, label = jnp.full((1, 1, 1, 1), 0.5), jnp.array([0])
    state = attack.init(KEYS[:1], peak, image, label, peak(image))
    delta = jnp.full((1, 1, 1, 1), 0.02)
    state = state._replace(delta=delta, search=state.search._replace(before=delta))
    for x in (0.6, 0.47):
        state = attack.step(peak, state)
        assert (image + state.delta).item() == pytest.approx(x, abs=1e-6)

    second = lambda images, keys=None: images.reshape(1, 2)
    attack = apgd(balls.l2(0.3), score=lambda logits, labels, clean: logits[:, 1])
    image = jnp.full((1, 1, 1, 2), 0.5)
    state = attack.init(KEYS[:1], second, image, label, second(image))
    delta = jnp.array([0.3, 0]).reshape(1, 1, 1, 2)
    state = state._replace(delta=delta, search=state.search._replace(before=delta))
    for expected in ([0.134164, 0.268328], [0.022186, 0.299179]):
        state = attack.step(second, state)
        np.testing.assert_allclose(state.delta.ravel(), expected, atol=2e-6)


@pytest.mark.parametrize("history, rises", [("autoattack", 3), ("paper", 2)])
def test_rises(history, rises):
    """attacks 15.7: scores 1.5 at the start, then 1.0, 1.2, 1.1, 1.3."""
    begin, advance, _ = with_momentum(balls.linf(0.1), 100, 0.75, history)
    state = begin(attacks.state.start(KEYS, IMAGES, LABELS, PREDICT(IMAGES), eps=0.1))
    for value in (1.5, 1.0, 1.2, 1.1, 1.3):
        state = advance(state, jnp.full(B, value), PREDICT(IMAGES), IMAGES)
    np.testing.assert_array_equal(state.search.rises, rises)


def test_starts():
    """attacks 15.15: on the surface of the ball; the box may cut it afterwards."""
    grey, logits = jnp.full_like(IMAGES, 0.5), PREDICT(IMAGES)
    for name in ("linf", "l2", "l1"):
        ball = balls.TABLE[name](0.4)
        state = apgd(ball).init(KEYS, PREDICT, grey, LABELS, logits)
        np.testing.assert_allclose(ball.size(state.delta), 0.4, rtol=1e-5)
        assert len(np.unique(np.asarray(state.delta), axis=0)) == B


def plain_apgd(value_and_gradient, x, start, eps, steps, norm):
    """One example of APGD in linf or l2 as the paper's algorithm 1 with the code's checkpoints: all iterates."""
    if norm == "linf":
        way, project = np.sign, lambda p: np.clip(np.clip(p, x - eps, x + eps), 0, 1)
    else:
        way = lambda g: g / np.linalg.norm(g)
        project = lambda p: np.clip(x + (p - x) * min(1, eps / np.linalg.norm(p - x)), 0, 1)
    points, eta, k, since, red, history = [start], 2 * eps, max(int(0.22 * steps), 1), 0, True, [0.0]
    now, before = start, start
    best_value, gradient = value_and_gradient(now)
    best, best_gradient, checked = now, gradient, best_value
    for i in range(steps):
        a = 1 if i == 0 else 0.75
        ahead = project(now + eta * way(gradient))
        now, before = project(now + a * (ahead - now) + (1 - a) * (now - before)), now
        points.append(now)
        value, gradient = value_and_gradient(now)
        history.append(value)
        if value > best_value:
            best, best_value, best_gradient = now, value, gradient
        since += 1
        if since == k:
            rises = sum(b > a for a, b in zip(history[-k - 1 : -1], history[-k:]))
            red, checked = rises <= 0.75 * k or (not red and checked >= best_value), best_value
            if red:
                eta, now, gradient = eta / 2, best, best_gradient
            since, k = 0, max(k - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return points


def plain_project(x, delta, eps):
    """The l1 projection by bisection on the threshold."""
    room = np.where(delta > 0, 1 - x, x)
    shrink = lambda t: np.sign(delta) * np.clip(np.abs(delta) - t, 0, room)
    low, high = 0.0, np.abs(delta).max()
    if np.abs(shrink(0)).sum() <= eps:
        return shrink(0)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.abs(shrink(middle)).sum() > eps else (low, middle)
    return shrink(high)


def plain_l1(value_and_gradient, x, start, eps, plan, larger_radii):
    """One example of APGD in l1: all points that are evaluated, of every stage its start first."""
    points, n, begin = [], x.size, start
    for factor, steps in plan:
        radius, k, since = factor * eps, max(int(0.04 * steps), 1), 0
        now = plain_project(x, begin, radius)
        points.append(now)
        best_value, gradient = value_and_gradient(x + now)
        best, best_gradient, eta = now, gradient, radius
        share, changed = ((now != 0).sum() / n / 1.5, (now != 0).sum()) if larger_radii else (0.2, n)
        for _ in range(steps):
            smallest = np.sort(np.abs(gradient).ravel())[int(np.clip((1 - share) * n, 0, n - 1))]
            sign = np.sign(gradient) * (np.abs(gradient) >= smallest)
            now = plain_project(x, now + eta * sign / np.abs(sign).sum(), radius)
            points.append(now)
            value, gradient = value_and_gradient(x + now)
            if value > best_value:
                best, best_value, best_gradient = now, value, gradient
            since += 1
            if since == k:
                fewer = (best != 0).sum() / changed < 0.95
                changed, since = (best != 0).sum(), 0
                share = changed / n / 1.5
                eta = np.clip(radius if fewer else eta / 1.5, radius / 10, radius)
                now, gradient = (best, best_gradient) if fewer else (now, gradient)
        begin = best
    return points


def scored(score, i):
    """(score, gradient) of example i of the laws' network at a point (h, w, c), float64 NumPy in and out."""
    call = jax.jit(
        jax.value_and_grad(lambda p: score(PREDICT(p[None]), LABELS[i : i + 1], PREDICT(IMAGES[i : i + 1]))[0])
    )
    return lambda point: jax.tree.map(np.float64, call(jnp.asarray(point, jnp.float32)))


@pytest.mark.parametrize(
    "norm, eps, score", [("linf", 0.06, scores.cross_entropy), ("linf", 0.03, scores.dlr), ("l2", 0.2, scores.dlr)]
)
def test_apgd_equals_numpy(norm, eps, score):
    attack = apgd(balls.TABLE[norm](eps), score=score, steps=25)
    states = jax.jit(functools.partial(iterates, attack, PREDICT))(IMAGES, LABELS)
    points, checks = np.asarray(states.images + states.delta), 0
    for i in range(3):
        expected = plain_apgd(scored(score, i), np.float64(IMAGES[i]), np.float64(points[0, i]), eps, 25, norm)
        np.testing.assert_allclose(points[:, i], expected, atol=2e-6)
        checks += len(np.unique(np.asarray(states.search.step_size)[:, i]))
    assert checks > 6, "nothing was halved"


@pytest.mark.parametrize("larger_radii, steps", [(False, 30), (True, 26)])
def test_apgd_in_l1_equals_numpy(larger_radii, steps):
    """And with larger radii no iterate of the first stages counts."""
    attack, plan = apgd(balls.l1(1.5), steps=steps, larger_radii=larger_radii), stages(steps, larger_radii)
    states = jax.jit(functools.partial(iterates, attack, PREDICT))(IMAGES, LABELS)
    assert len(states.delta) == sum(length + 1 for _, length in plan)
    for i in range(3):
        start, one = np.float64(states.delta[0, i]), scored(scores.cross_entropy, i)
        expected = plain_l1(one, np.float64(IMAGES[i]), start, 1.5, plan, larger_radii)
        np.testing.assert_allclose(states.delta[:, i], expected, atol=5e-6)
    assert len(np.unique(np.asarray(states.search.share)[1:])) > 3
    outside = np.abs(np.asarray(states.delta)).sum((2, 3, 4)) > 1.5 + 1e-4
    assert outside.any() == larger_radii
    broken_at = np.asarray(states.broken_at)[-1]
    assert not any(outside[at, i] for i, at in enumerate(broken_at) if at > 0) and (broken_at > 0).any()


def test_stages():
    """attacks 15.13."""
    assert stages(100, True) == [(3, 30), (2, 30), (1, 40)] and stages(20, True) == [(3, 6), (2, 6), (1, 8)]
    assert apgd(balls.l1(1), steps=100, larger_radii=True).steps == 102


def gradients(attack):
    """How many convolutions a step holds: 2 are a forward and a backward pass of the laws' network."""
    state = jax.eval_shape(lambda: attack.init(KEYS, PREDICT, IMAGES, LABELS, PREDICT(IMAGES)))
    return str(jax.make_jaxpr(lambda state: attack.step(PREDICT, state))(state)).count("= conv_general_dilated")


@pytest.mark.parametrize("ball", [balls.linf(0.1), balls.l2(0.1), balls.l1(0.1)])
def test_a_step_is_one_gradient(ball):
    for attack in (apgd(ball), apgd_t(ball)):
        assert attack.steps == 100 and gradients(attack) == 2 and attack.cost(PREDICT, IMAGES) == Cost(0, 1)


@pytest.mark.parametrize("attack", [apgd_t(balls.linf(0.02), targets=5, restarts=2, steps=2)])
def test_targets_and_restarts_are_runs(attack):
    """Rank-major, restart-minor; each from a start of its own; what the model has no class for is finished."""
    assert attack.runs == 10
    order = np.argsort(-np.where(np.arange(CLASSES) == LABELS[:, None], -np.inf, PREDICT(IMAGES)), 1)
    init = jax.jit(lambda run: attack.init(KEYS, PREDICT, IMAGES, LABELS, PREDICT(IMAGES), run=run))
    states = [init(jnp.full(B, run)) for run in range(10)]
    for run, state in enumerate(states):
        rank = run // 2
        np.testing.assert_array_equal(state.target, order[:, min(rank, CLASSES - 2)])
        expected = [RUNNING if rank < CLASSES - 1 else FINISHED] * (B - 2) + [BROKEN] * 2
        np.testing.assert_array_equal(state.status, expected)
    assert len(np.unique([np.asarray(state.delta[0]) for state in states], axis=0)) == 10
    last = attacks.finish(PREDICT, attack.step(PREDICT, states[-1]))
    np.testing.assert_array_equal(last.status[:-2], FINISHED)


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(classes):
    """dlr and its targeted form give way to differences of logits; the runs beyond the classes there are finished."""
    few = lambda images, keys=None: PREDICT(images)[:, :classes]
    labels = few(IMAGES).argmax(-1).astype(jnp.int32)
    for attack in (apgd(balls.linf(0.3), score=scores.dlr, steps=5), apgd_t(balls.linf(0.3), steps=5)):
        run = jax.jit(lambda attack=attack: attacks.attack(attack, KEYS, few, IMAGES, labels))
        assert (np.asarray(run().status) == BROKEN).any()


def noisy(images, keys):
    """A model that draws: logits + N(0, 1), and a gradient that depends on the draw."""
    draws = jax.vmap(lambda key: jax.random.normal(key, (CLASSES,)))(keys)
    return PREDICT(images) * (1 + draws)


@pytest.mark.parametrize("attack", [apgd(balls.linf(0.1), samples=3), attacks.pgd(balls.linf(0.1), samples=3)])
def test_samples_are_means_over_fresh_keys(attack):
    state = attack.init(KEYS, noisy, IMAGES, LABELS, PREDICT(IMAGES))
    evaluated = functools.partial(attacks.state.score_and_gradient, noisy, scores.cross_entropy, samples=3)
    results = []
    for count, run in ((0, 0), (1, 0), (0, 1)):
        at = state._replace(count=state.count + count, run=state.run + run)
        results.append(evaluated(at))
        keys = jnp.stack([jax.random.split(jax.random.fold_in(key, 100), 3) for key in attacks.state.step_keys(at)], 1)
        passes = [noisy(IMAGES + state.delta, one) for one in keys]
        np.testing.assert_allclose(results[-1][1], np.mean(passes, 0), atol=1e-5)
        values = [scores.cross_entropy(logits, LABELS) for logits in passes]
        np.testing.assert_allclose(results[-1][0], np.mean(values, 0), atol=1e-5)
        slope = lambda points: jnp.mean(
            jnp.array([scores.cross_entropy(noisy(points, one), LABELS) for one in keys]), 0
        )
        expected = jax.grad(lambda points: slope(points).sum())(IMAGES + state.delta)
        np.testing.assert_allclose(results[-1][2], expected, atol=1e-5)
    assert all((a[1] != b[1]).all() for a, b in itertools.pairwise(results))
    assert attack.samples == 3 and attack.cost(PREDICT, IMAGES) == Cost(0, 3)
    assert gradients(attack) == 2, "the passes are a loop"
    # The last iterate is judged by a mean as well.
    last = attacks.finish(noisy, state, 3)
    np.testing.assert_array_equal(
        last.status == BROKEN, (state.status == BROKEN) | attacks.misclassified(results[0][1], LABELS)
    )


def test_an_optimizer_has_a_state_for_each_example():
    """pgd with Adam, whose rate falls after two steps, is Adam on each image alone (arXiv 2010.03593)."""
    optimizer = optax.adam(optax.piecewise_constant_schedule(0.02, {2: 0.1}), eps=1e-9)
    attack = attacks.pgd(balls.linf(0.06), score=scores.margin, steps=4, optimizer=optimizer, start=None)
    states = jax.jit(functools.partial(iterates, attack, PREDICT))(IMAGES, LABELS)
    for i in (0, 5):
        one, delta = scored(scores.margin, i), np.zeros_like(IMAGES[i])
        state = optimizer.init(delta)
        for count in range(4):
            _, gradient = one(IMAGES[i] + delta)
            update, state = optimizer.update(-jnp.float32(gradient), state)
            delta = np.clip(IMAGES[i] + np.clip(delta + update, -0.06, 0.06), 0, 1) - IMAGES[i]
            np.testing.assert_allclose(states.delta[count + 1, i], delta, atol=1e-5)


def test_mim():
    """attacks 15.9: signs of (.444, -.833, .056) after g = (4, -1, 1) and (-1, -3, -.5), which signs alone would not
    give."""
    attack = attacks.mim(balls.linf(0.2), steps=2, score=lambda logits, labels, clean: logits[:, 0])
    slopes = jnp.array([[4.0, -1, 1], [-1, -3, -0.5]])

    def predict(images, keys=None):
        x = images.reshape(1, 3)
        return jnp.stack([jnp.where(x[:, 0] > 0.55, x @ slopes[1], x @ slopes[0]), x[:, 0]], -1)

    state = attack.init(KEYS[:1], predict, MIDDLE, ONE, predict(MIDDLE))
    for expected in ([0.1, -0.1, 0.1], [0.2, -0.2, 0.2]):
        state = attack.step(predict, state)
        np.testing.assert_allclose(state.delta.ravel(), expected, atol=1e-6)
    np.testing.assert_allclose(state.search.momentum.ravel(), [0.444444, -0.833333, 0.055556], atol=1e-6)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: apgd(balls.l2(1), larger_radii=True), "larger_radii is for l1 balls, got l2(1)"),
        (lambda: apgd(balls.l2(1), history="x"), "history must be 'autoattack' or 'paper', got 'x'"),
        (lambda: apgd_t(balls.l2(1), targets=0), "targets must be a whole number of at least 1, got 0"),
        (lambda: apgd(balls.l2(1), samples=0), "samples must be a whole number of at least 1, got 0"),
        (lambda: apgd(balls.l2(1), restarts=1.5), "restarts must be a whole number of at least 1, got 1.5"),
        (
            lambda: attacks.pgd(balls.l2(1), step_size=1, optimizer=optax.sgd(1)),
            "step_size and optimizer exclude each other: the optimizer has a learning rate",
        ),
        (
            lambda: attacks.pgd(balls.l2(1), optimizer="adam"),
            "optimizer must be an optax transformation such as optax.adam(.1), got 'adam'",
        ),
    ],
)
def test_mistakes(call, text):
    with pytest.raises(UserError) as raised:
        call()
    assert str(raised.value) == text
