"""FMN: the worked case, and what one run says about every radius."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.laws import IMAGES, KEYS, LABELS, PREDICT, make
from topgap_jax import attacks, balls
from topgap_jax.attacks import norms
from topgap_jax.attacks.state import BROKEN, RUNNING
from topgap_jax.errors import UserError

# breadth_attacks 1: the case.
WEIGHTS, BIAS = jnp.array([[2, -1, 0.5], [0.5, 1, -0.5]]), jnp.array([0.1, -0.2])
LINEAR = lambda images, keys=None: jnp.matmul(images.reshape(-1, 3), WEIGHTS.T, precision="highest") + BIAS
IMAGE, LABEL = jnp.array([0.6, 0.3, 0.5]).reshape(1, 1, 1, 3), jnp.array([0])


def states_of(attack, predict, images, labels):
    """The states before each step, and the last."""
    state = attack.init(KEYS[: len(images)], predict, images, labels, predict(images))
    last, states = lax.scan(lambda state, _: (attack.step(predict, state), state), state, None, length=attack.steps)
    return states, last


@pytest.mark.parametrize(
    "ball, exact, farthest, first",
    [
        ("linf", 0.244444, 0.7, [-0.244444, 0.244444, -0.244444]),
        ("l2", 0.408530, 1.048809, [-0.227586, 0.303448, -0.151724]),
        ("l1", 0.55, 1.8, [-0.182152, 0.367848, 0]),
    ],
)
def test_worked_case(ball, exact, farthest, first):
    attack = attacks.fmn(balls.TABLE[ball](0.1), steps=10)
    assert (attack.aim, attack.steps) == ("norm", 11)
    states, last = jax.jit(lambda: states_of(attack, LINEAR, IMAGE, LABEL))()
    assert float(norms(jax.tree.map(lambda x: x[0], states))[0]) == np.inf
    np.testing.assert_allclose(states.delta[1].ravel(), first, atol=1e-6)
    np.testing.assert_allclose(states.search.radius[1], exact, atol=1e-6)
    assert float(balls.TABLE[ball](1).size(jnp.maximum(IMAGE, 1 - IMAGE))[0]) == pytest.approx(farthest, abs=1e-6)
    assert float(norms(last)[0]) == pytest.approx(exact, abs=1e-3)
    assert int(LINEAR(last.best).argmax()) == 1
    if ball == "l1":
        deltas, radii = states.delta.reshape(11, 3), states.search.radius.ravel()
        np.testing.assert_allclose(radii[2:4], [0.595538, 0.568548], atol=1e-6)
        np.testing.assert_allclose(deltas[2], [-0.114323, 0.481215, 0], atol=1e-6)
        np.testing.assert_allclose(deltas[3], [-0.016758, 0.551790, 0], atol=1e-6)
        best = -np.asarray(states.score).ravel()
        assert best[3] == pytest.approx(0.595538, abs=1e-6) and best[10] == pytest.approx(0.550037, abs=2e-6)
        np.testing.assert_allclose(last.best.ravel(), [0.6, 0.850037, 0.5], atol=2e-6)


@pytest.mark.parametrize("ball", balls.TABLE)
def test_norms_are_those_of_the_best_points(ball):
    """Misclassified when clean: 0; what is found is misclassified at its norm; smaller with each step; the last iterate
    is evaluated too."""
    attack = attacks.fmn(balls.TABLE[ball](0.1), steps=12)
    states, last = jax.jit(lambda: states_of(attack, PREDICT, IMAGES, LABELS))()
    smallest = np.asarray(norms(last))
    assert (smallest[-2:] == 0).all() and np.isfinite(smallest).all() and (smallest[:-2] > 0).all()
    np.testing.assert_allclose(smallest, balls.TABLE[ball](1).size(last.best - IMAGES), atol=1e-6)
    assert attacks.misclassified(PREDICT(last.best), LABELS).all()
    assert 0 <= float(last.best.min()) and float(last.best.max()) <= 1
    assert (states.score[1:] >= states.score[:-1]).all()
    assert float(states.score[0, -1]) == 0, "a misclassified image is known before the first step"
    # Every evaluated iterate counts, the twelve that steps made and the clean one, and nothing else.
    wrong = np.stack([attacks.misclassified(PREDICT(IMAGES + delta), LABELS) for delta in states.delta])
    sizes = np.stack([balls.TABLE[ball](1).size(delta) for delta in states.delta])
    np.testing.assert_allclose(smallest, np.where(wrong, sizes, np.inf).min(0), atol=1e-6)
    np.testing.assert_array_equal(last.broken_at, wrong.argmax(0))


def test_not_found_is_infinity():
    """A network that never changes its mind, with no gradient: no norm, the clean image, nothing that is not a
    number."""
    constant = lambda images, keys=None: jnp.stack([0 * images.sum((1, 2, 3)) + 1, 0 * images.sum((1, 2, 3))], -1)
    attack = attacks.fmn(balls.l2(0.1), steps=3)
    _, last = states_of(attack, constant, IMAGES, jnp.zeros(len(IMAGES), jnp.int32))
    assert (np.asarray(norms(last)) == np.inf).all() and (np.asarray(last.status) == RUNNING).all()
    np.testing.assert_array_equal(last.best, IMAGES)
    assert np.isfinite(last.delta).all()


def test_one_run_is_the_whole_curve():
    """mean(norms > eps), against PGD at each radius: within one image of eight, and the driver gives the same state."""
    attack = attacks.fmn(balls.linf(0.1), steps=60)
    state = jax.jit(lambda: attacks.attack(attack, KEYS, PREDICT, IMAGES, LABELS))()
    assert (np.asarray(state.status) == BROKEN).all()
    pgd = attacks.pgd(balls.linf(0.1), steps=40)

    @jax.jit
    def broken(eps):
        first = pgd.init(KEYS, PREDICT, IMAGES, LABELS, PREDICT(IMAGES), eps=eps)
        return attacks.finish(PREDICT, lax.fori_loop(0, 40, lambda _, s: pgd.step(PREDICT, s), first)).status == BROKEN

    for eps in (0.01, 0.03, 0.06, 0.1):
        by_norm = np.asarray(norms(state)) <= eps
        assert abs(int(by_norm.sum()) - int(broken(jnp.full(len(IMAGES), eps)).sum())) <= 1


def test_mistakes():
    with pytest.raises(UserError, match=r"^fmn: steps must be a whole number of at least 1, got 0$"):
        make("fmn(linf(.1), steps=0)")
