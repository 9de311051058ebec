"""Attacks that follow the gradient: `fgsm`, `r_fgsm`, `pgd` and `mim`."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from topgap_jax.attacks import state as states
from topgap_jax.attacks.naming import named, options_in_name
from topgap_jax.attacks.state import (
    FINISHED,
    RUNNING,
    State,
    aim,
    check_ball,
    check_score,
    check_step,
    evaluate,
    move,
    run_keys,
    runs_of,
    where,
)
from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.keys import normal
from topgap_jax.scores import cross_entropy
from topgap_jax.types import Array, Attack, Ball, Cost, Score

STARTS = ("random", None)


@options_in_name("score", "steps")
def pgd(
    ball: Ball,
    *,
    score: Score = cross_entropy,
    steps: int = 20,
    step_size: float | None = None,
    start: str | None = "random",
    optimizer: optax.GradientTransformation | None = None,
    targets: int = 0,
    restarts: int = 1,
    samples: int | None = None,
) -> Attack:
    """Projected steepest ascent of `score` inside `ball` (Madry et al. 2018, arXiv 1706.06083).

    x <- P(x + step_size * direction(gradient)); `step_size` is in the ball's own norm, 2.5 eps / steps if not given.
    `start` is a "random" point of the ball, or None, the clean image. An example that is misclassified when clean is
    returned unchanged.

    optimizer: any optax transformation, x <- P(x + its update for the gradient of -score), with a state for each
    example. optax.adam(optax.piecewise_constant_schedule(.1, {20: .1, 30: .01}), eps=1e-9), 40 steps of `margin`: the
    evaluation of Gowal et al. 2020 (arXiv 2010.03593). optax.sgd(.1, momentum=.9) has momentum; `mim` has it in sign
    steps.
    targets: for a targeted score, how many of the classes with the largest clean logits are aimed at in turn; an
    example is broken by any other class. pgd(ball, score=targeted_margin, targets=9) is the multi-targeted attack
    (Gowal et al. 2019, arXiv 1910.09338).
    samples: of a model that draws at random, passes for each step, whose gradients, scores and logits are averaged.

    Where signs of the gradient decide the steps (linf, without an optimizer or samples), a run that comes back to an
    iterate would go round for ever, and is FINISHED (arXiv 2503.19347): the same verdict, earlier.
    """
    check_number("steps", steps, 1, whole=True)
    check_score(score, targets, moved=start is not None or samples is not None)
    if step_size is not None:
        check_step(step_size)
        if optimizer is not None:
            raise UserError("step_size and optimizer exclude each other: the optimizer has a learning rate")
    if not (optimizer is None or isinstance(optimizer, optax.GradientTransformation)):
        raise UserError(f"optimizer must be an optax transformation such as optax.adam(.1), got {optimizer!r}")
    runs = runs_of(targets, restarts, samples)
    begin, cycles = starting(ball, start), ball.p == math.inf and optimizer is None and samples is None

    def init(keys, predict, images, labels, logits, *, run=None, eps=None):
        state = begin(keys, images, labels, logits, run, eps)
        if cycles:
            state = state._replace(search=Orbit(state.delta))
        if optimizer is not None:
            state = state._replace(search=jax.vmap(optimizer.init)(state.delta))
        return aim(state, jnp.minimum(state.run // restarts, targets - 1)) if targets else state

    def step(predict, state):
        state, gradient = evaluate(predict, score, state, targeted=targets > 0, samples=samples)
        state = finish_cycles(state) if cycles else state
        if optimizer is None:
            size = 2.5 * state.eps[:, None, None, None] / steps if step_size is None else step_size
            update, search = size * ball.direction(state.images, state.delta, gradient), state.search
        else:
            update, search = jax.vmap(optimizer.update)(-gradient, state.search, state.delta)
        return move(state, ball.project(state.images, state.delta + update, state.eps), search)

    name = f"{named(f'pgd-{steps}', score)}, {ball.name}"
    cost = lambda predict, images: Cost(0, samples or 1)
    return Attack(init, step, steps, cost, name, "label", runs, samples, ball.norm, score=score)


class Orbit(NamedTuple):
    """An earlier iterate of each example, for Brent's search for cycles."""

    delta: Array  # (b, h, w, c): of step 0, 1, 2, 4, 8, ...


def finish_cycles(state: State) -> State:
    """FINISHED where the iterate is the kept one again; a cycle of length L, entered at step m, is seen by 3 max(L, m).

    Only of a step that the iterate alone decides: then all later ones have been evaluated.
    """
    again = (state.delta == state.search.delta).all((1, 2, 3)) & (state.count > 0)
    keep = (state.count & (state.count - 1)) == 0  # at powers of two
    return state._replace(
        status=jnp.where(again & (state.status == RUNNING), FINISHED, state.status),
        search=Orbit(where(keep, state.delta, state.search.delta)),
    )


@options_in_name("score")
def fgsm(ball: Ball, *, score: Score = cross_entropy, samples: int | None = None) -> Attack:
    """One full step from the clean image: x + eps * ascent(gradient) (Goodfellow et al. 2015, arXiv 1412.6572).

    samples: of a model that draws at random, passes whose gradients, scores and logits are averaged.
    """
    begin = starting(ball, None)
    check_score(score, moved=samples is not None)
    runs_of(0, 1, samples)

    def init(keys, predict, images, labels, logits, *, run=None, eps=None):
        return begin(keys, images, labels, logits, run, eps)

    def step(predict, state):
        state, gradient = evaluate(predict, score, state, samples=samples)
        full = state.eps[:, None, None, None] * ball.ascent(gradient)
        return move(state, ball.project(state.images, full, state.eps))

    cost = lambda predict, images: Cost(0, samples or 1)
    name = f"{named('fgsm', score)}, {ball.name}"
    return Attack(init, step, 1, cost, name, samples=samples, norm=ball.norm, score=score)


@options_in_name("score")
def r_fgsm(ball: Ball, *, score: Score = cross_entropy, samples: int | None = None) -> Attack:
    """A random half step, then half a step along the gradient there: R+FGSM (Tramer et al. 2018, arXiv 1705.07204).

    x0 = P(x + eps/2 * ascent(N(0, I))), then P(x0 + eps/2 * ascent(gradient at x0)). In `linf` both ascents are signs;
    two half steps never leave the ball. samples: as in `fgsm`.
    """
    check_ball(ball)
    check_score(score)
    runs_of(0, 1, samples)

    def init(keys, predict, images, labels, logits, *, run=None, eps=None):
        state = states.start(keys, images, labels, logits, eps=ball.eps if eps is None else eps, run=run)
        noise = normal(run_keys(state), images)
        return state._replace(delta=ball.project(images, half(state) * ball.ascent(noise), state.eps))

    def step(predict, state):
        state, gradient = evaluate(predict, score, state, samples=samples)
        delta = state.delta + half(state) * ball.ascent(gradient)
        return move(state, ball.project(state.images, delta, state.eps))

    half = lambda state: 0.5 * state.eps[:, None, None, None]
    cost = lambda predict, images: Cost(0, samples or 1)
    name = f"{named('r+fgsm', score)}, {ball.name}"
    return Attack(init, step, 1, cost, name, samples=samples, norm=ball.norm, score=score)


class Momentum(NamedTuple):
    """What an attack with momentum remembers."""

    momentum: Array  # (b, h, w, c)


@options_in_name("score", "steps")
def mim(
    ball: Ball, *, score: Score = cross_entropy, steps: int = 10, decay: float = 1.0, samples: int | None = None
) -> Attack:
    """MI-FGSM: m <- decay m + g / |g|_1, x <- P(x + eps / steps * direction(m)) (Dong et al. 2018, arXiv 1710.06081).

    The start is the clean image. Its examples transfer to other models; `decay=0` makes it iterated FGSM.
    """
    check_number("steps", steps, 1, whole=True)
    check_number("decay", decay, 0)
    check_score(score, moved=samples is not None)
    runs_of(0, 1, samples)
    begin = starting(ball, None)

    def init(keys, predict, images, labels, logits, *, run=None, eps=None):
        return begin(keys, images, labels, logits, run, eps)._replace(search=Momentum(jnp.zeros_like(images)))

    def step(predict, state):
        state, gradient = evaluate(predict, score, state, samples=samples)
        length = jnp.abs(gradient).sum((1, 2, 3), keepdims=True)
        momentum = decay * state.search.momentum + gradient / jnp.maximum(length, 1e-30)
        way = ball.direction(state.images, state.delta, momentum)
        delta = state.delta + state.eps[:, None, None, None] / steps * way
        return move(state, ball.project(state.images, delta, state.eps), Momentum(momentum))

    cost = lambda predict, images: Cost(0, samples or 1)
    name = f"{named(f'mim-{steps}', score)}, {ball.name}"
    return Attack(init, step, steps, cost, name, samples=samples, norm=ball.norm, score=score)


def starting(ball: Ball, where: str | None):
    """(keys, images, labels, logits, run, eps) -> the state at a "random" point of the ball, or (None) at the clean
    image.

    Every run draws from keys of its own; the first from the examples' keys themselves.
    """
    check_ball(ball)
    if where not in STARTS:
        raise UserError(f"start must be 'random' or None (the clean image), got {where!r}")

    def begin(keys, images, labels, logits, run, eps):
        state = states.start(keys, images, labels, logits, eps=ball.eps if eps is None else eps, run=run)
        if where is None:
            return state
        return state._replace(delta=ball.project(images, ball.start(run_keys(state), images, state.eps), state.eps))

    return begin


TABLE = table(fgsm, r_fgsm, pgd, mim)
