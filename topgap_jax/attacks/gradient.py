"""Attacks that follow the gradient: `fgsm`, `r_fgsm` and `pgd`."""

import jax
import jax.numpy as jnp

from topgap_jax.attacks import state as states
from topgap_jax.attacks.state import evaluate, move
from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.keys import fold_in
from topgap_jax.scores import cross_entropy
from topgap_jax.types import Attack, Ball, Cost, Score

STARTS = ("random", None)


def pgd(
    ball: Ball,
    *,
    score: Score = cross_entropy,
    steps: int = 20,
    step_size: float | None = None,
    start: str | None = "random",
) -> Attack:
    """Projected steepest ascent of `score` inside `ball` (Madry et al. 2018, arXiv 1706.06083).

    x <- P(x + step_size * ascent(gradient)); `step_size` is in the ball's own norm, 2.5 eps / steps if not given.
    `start` is a "random" point of the ball, or None, the clean image. An example that is misclassified when clean is
    returned unchanged.
    """
    check_number("steps", steps, 1, whole=True)
    if step_size is not None:
        check_number("step_size", step_size, 0)
    begin = starting(ball, start)

    def init(keys, predict, images, labels, logits, *, run=None, eps=None):
        return begin(keys, images, labels, logits, run, eps)

    def step(predict, state):
        state, gradient = evaluate(predict, score, state)
        size = 2.5 * state.eps[:, None, None, None] / steps if step_size is None else step_size
        return move(state, ball.project(state.images, state.delta + size * ball.ascent(gradient), state.eps))

    return Attack(init, step, steps, lambda predict, images: Cost(0, 1), f"pgd-{steps}, {ball.name}")


def fgsm(ball: Ball, *, score: Score = cross_entropy) -> Attack:
    """One full step from the clean image: x + eps * ascent(gradient) (Goodfellow et al. 2015, arXiv 1412.6572)."""
    begin = starting(ball, None)

    def init(keys, predict, images, labels, logits, *, run=None, eps=None):
        return begin(keys, images, labels, logits, run, eps)

    def step(predict, state):
        state, gradient = evaluate(predict, score, state)
        full = state.eps[:, None, None, None] * ball.ascent(gradient)
        return move(state, ball.project(state.images, full, state.eps))

    return Attack(init, step, 1, lambda predict, images: Cost(0, 1), f"fgsm, {ball.name}")


def r_fgsm(ball: Ball, *, score: Score = cross_entropy) -> Attack:
    """A random half step, then half a step along the gradient there: R+FGSM (Tramer et al. 2018, arXiv 1705.07204).

    x0 = P(x + eps/2 * ascent(N(0, I))), then P(x0 + eps/2 * ascent(gradient at x0)). In `linf` both ascents are signs;
    two half steps never leave the ball.
    """

    def init(keys, predict, images, labels, logits, *, run=None, eps=None):
        state = states.start(keys, images, labels, logits, eps=ball.eps if eps is None else eps, run=run)
        noise = jax.vmap(lambda key, image: jax.random.normal(key, image.shape, image.dtype))(run_keys(state), images)
        return state._replace(delta=ball.project(images, half(state) * ball.ascent(noise), state.eps))

    def step(predict, state):
        state, gradient = evaluate(predict, score, state)
        delta = state.delta + half(state) * ball.ascent(gradient)
        return move(state, ball.project(state.images, delta, state.eps))

    half = lambda state: 0.5 * state.eps[:, None, None, None]
    return Attack(init, step, 1, lambda predict, images: Cost(0, 1), f"r+fgsm, {ball.name}")


def starting(ball: Ball, where: str | None):
    """(keys, images, labels, logits, run, eps) -> the state at a "random" point of the ball, or (None) at the clean
    image.

    Every run draws from keys of its own; the first from the examples' keys themselves.
    """
    if where not in STARTS:
        raise UserError(f"start must be 'random' or None (the clean image), got {where!r}")

    def begin(keys, images, labels, logits, run, eps):
        state = states.start(keys, images, labels, logits, eps=ball.eps if eps is None else eps, run=run)
        if where is None:
            return state
        return state._replace(delta=ball.project(images, ball.start(run_keys(state), images, state.eps), state.eps))

    return begin


def run_keys(state):
    """The keys (b,) of each example's run."""
    return jnp.where(state.run == 0, state.keys, fold_in(state.keys, state.run))


TABLE = table(fgsm, r_fgsm, pgd)
