"""Attacks that follow the gradient: `fgsm`, `r_fgsm` and `pgd`, each a pair (init, step) whose state is per example."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.scores import cross_entropy
from topgap_jax.types import Array, Attack, Ball, Cost, Keys, Predict, Score

RUNNING, BROKEN = 0, 1


class State(NamedTuple):
    """Per example: the clean image, its label, the perturbation (iterate), the best point and its score, and what is known of it."""

    images: Array  # (b, h, w, c)
    labels: Array  # (b,)
    delta: Array  # (b, h, w, c): the iterate is images + delta
    best: Array  # (b, h, w, c): the first iterate that breaks, else the clean image
    score: Array  # (b,): highest score that a step has met before the break, the breaking one included
    status: Array  # (b,) int32: 0 running, 1 broken (misclassified)
    steps: Array  # (b,) int32: steps taken
    keys: Keys  # (b,)


def pgd(ball: Ball, *, score: Score = cross_entropy, steps: int = 20, step_size: float | None = None) -> Attack:
    """Projected steepest ascent of `score` inside `ball`, from a random start (Madry et al. 2018, arXiv 1706.06083).

    x <- P(x + step_size * ascent(gradient)); `step_size` is in the ball's own norm, 2.5 eps / steps if not given. An example
    that is misclassified when clean is returned unchanged.
    """
    check_number("steps", steps, 1, whole=True)
    size = 2.5 * ball.eps / steps if step_size is None else step_size
    check_number("step_size", size, 0)

    def init(keys, predict, images, labels, logits):
        delta = ball.project(images, jax.vmap(ball.start)(keys, images))
        return start_state(keys, images, labels, logits, delta)

    def step(predict, state):
        state, gradient = ascend(predict, score, state)
        return move(state, ball.project(state.images, state.delta + size * ball.ascent(gradient)))

    return Attack(init, step, steps, Cost(0, 1), f"pgd-{steps}, {ball.name}")


def fgsm(ball: Ball, *, score: Score = cross_entropy) -> Attack:
    """One full step from the clean image: x + eps * ascent(gradient) (Goodfellow et al. 2015, arXiv 1412.6572)."""

    def init(keys, predict, images, labels, logits):
        return start_state(keys, images, labels, logits, jnp.zeros_like(images))

    def step(predict, state):
        state, gradient = ascend(predict, score, state)
        return move(state, ball.project(state.images, ball.eps * ball.ascent(gradient)))

    return Attack(init, step, 1, Cost(0, 1), f"fgsm, {ball.name}")


def r_fgsm(ball: Ball, *, score: Score = cross_entropy) -> Attack:
    """A random half step, then half a step along the gradient there: R+FGSM (Tramer et al. 2018, arXiv 1705.07204).

    x0 = P(x + eps/2 * ascent(N(0, I))), then P(x0 + eps/2 * ascent(gradient at x0)). In `linf` both ascents are signs; two half
    steps never leave the ball.
    """

    def init(keys, predict, images, labels, logits):
        noise = jax.vmap(lambda key, image: jax.random.normal(key, image.shape, image.dtype))(keys, images)
        delta = ball.project(images, 0.5 * ball.eps * ball.ascent(noise))
        return start_state(keys, images, labels, logits, delta)

    def step(predict, state):
        state, gradient = ascend(predict, score, state)
        return move(state, ball.project(state.images, state.delta + 0.5 * ball.eps * ball.ascent(gradient)))

    return Attack(init, step, 1, Cost(0, 1), f"r+fgsm, {ball.name}")


def attack(chosen: Attack, keys: Keys, predict: Predict, images: Array, labels: Array) -> Any:
    """The whole attack in one call, unrolled: for training steps and notebooks. Its state: `State`, or its own (`MapState`).

    >>> # adversarial = attack(pgd(linf(8 / 255)), jax.random.split(key, b), predict, images, labels).best
    """
    state = chosen.init(keys, predict, images, labels, predict(images))
    for _ in range(chosen.steps):
        state = chosen.step(predict, state)
    # An attack on maps books the point that it has moved to, so nothing is left to book.
    return finish(predict, state) if chosen.aim == "label" else state


def start_state(keys: Keys, images: Array, labels: Array, logits: Array, delta: Array) -> State:
    """State before the first step; what is misclassified when clean is broken with the clean image."""
    status = jnp.where(misclassified(logits, labels), BROKEN, RUNNING).astype(jnp.int32)
    score = jnp.full_like(
        logits[:, 0], -jnp.inf, jnp.float32
    )  # made like the logits, so that it is split over devices as they are
    return State(images, labels, delta, images, score, status, jnp.zeros_like(status), keys)


def ascend(predict: Predict, score: Score, state: State) -> tuple[State, Array]:
    """Evaluate the iterate and book it; its gradient (b, h, w, c)."""

    def summed(points):
        logits = predict(points)
        values = score(logits, state.labels)
        return values.sum(), (values, logits)

    (_, (values, logits)), gradient = jax.value_and_grad(summed, has_aux=True)(state.images + state.delta)
    return book(state, values, logits), gradient


def book(state: State, values: Array, logits: Array) -> State:
    """Keep the first iterate that breaks, and the highest score."""
    newly = misclassified(logits, state.labels) & (state.status == RUNNING)
    return state._replace(
        best=jnp.where(newly[:, None, None, None], state.images + state.delta, state.best),
        score=jnp.where(state.status == RUNNING, jnp.maximum(state.score, values), state.score),
        status=jnp.where(newly, BROKEN, state.status),
    )


def move(state: State, delta: Array) -> State:
    """The next iterate. A broken example moves on too: training uses the last iterate, its verdict is already booked."""
    return state._replace(delta=delta, steps=state.steps + (state.status == RUNNING))


def finish(predict: Predict, state: State) -> State:
    """Evaluate the last iterate and book its verdict: every driver ends with this one forward pass."""
    return book(state, state.score, predict(state.images + state.delta))


def misclassified(logits: Array, labels: Array) -> Array:
    """Whether the first maximal logit is another class's; NaN logits count as broken. (b, k), (b,) -> (b,) bool."""
    return (jnp.argmax(logits, -1) != labels) | jnp.isnan(logits).any(-1)


def as_runs(runs: Any) -> tuple[Attack, ...]:
    """An attack, or a tuple of attacks and tuples, as one flat tuple."""
    if isinstance(runs, Attack):
        return (runs,)
    if not isinstance(runs, tuple | list):
        raise UserError(f"expected attacks like pgd(linf(8/255)), got {runs!r}")
    return tuple(attack for item in runs for attack in as_runs(item))


TABLE = table(fgsm, r_fgsm, pgd)
