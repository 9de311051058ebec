"""APGD, projected gradient ascent that needs no step size: `apgd`, and `apgd_t` at the top classes.

`linf` and `l2` move with momentum, halve their step where the score stops rising, and go back to the best point (Croce
& Hein 2020, arXiv 2003.01690). `l1` moves a few pixels at a time, and the share of them adapts (Croce & Hein 2021,
arXiv 2103.01208). Schedules and quirks are those of the authors' code; every checkpoint is an example's own.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from topgap_jax.attacks import state as states
from topgap_jax.attacks.naming import named, options_in_name
from topgap_jax.attacks.state import (
    aim,
    book,
    check_ball,
    check_score,
    move,
    run_keys,
    runs_of,
    score_and_gradient,
    where,
)
from topgap_jax.balls import project_l1, sparse_sign
from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.scores import cross_entropy, targeted_dlr
from topgap_jax.targets import malt_order
from topgap_jax.types import Array, Attack, Ball, Cost, Score

HISTORIES, ORDERS = ("autoattack", "paper"), ("logits", "malt")


@options_in_name("score", "steps")
def apgd(
    ball: Ball,
    *,
    score: Score = cross_entropy,
    steps: int = 100,
    restarts: int = 1,
    rho: float = 0.75,
    history: str = "autoattack",
    larger_radii: bool = False,
    samples: int | None = None,
) -> Attack:
    """Auto-PGD on `score` (Croce & Hein 2020, arXiv 2003.01690; in l1 2021, arXiv 2103.01208).

    linf, l2: from a random point of the sphere, with a = .75 (the first time 1) and the step size eta = 2 eps,

        z = P(x_i + eta direction(gradient)),  x_{i+1} = P(x_i + a (z - x_i) + (1 - a) (x_i - x_{i-1})).

    At checkpoints after .22, .41, .57, ... of the steps eta is halved and x goes back to the best point, if at most
    `rho` of the steps since the last one have raised the score, or if neither eta nor the best score has changed since.
    history: what the first score is compared with, 0 as in the authors' code, or as in the "paper" the start's.

    l1: x <- P(x + eta sign(g) / count) on the `count` largest |g|, a fifth of all; every 4 % of the steps count becomes
    two thirds of the pixel values that the best point changes; eta = eps and x goes back to it if these have become
    fewer by 5 %, else eta is divided by 1.5, at least eps / 10. larger_radii (l1 only): the first 30 % of the steps in
    a ball of radius 3 eps, then 30 % in 2 eps.

    One gradient a step, and a forward pass for the last iterate. samples: as in `pgd`.
    """
    return _apgd("apgd", ball, score, 0, steps, restarts, rho, history, larger_radii, samples)


@options_in_name("targets", "steps", "order")
def apgd_t(
    ball: Ball,
    *,
    targets: int = 9,
    steps: int = 100,
    restarts: int = 1,
    rho: float = 0.75,
    history: str = "autoattack",
    larger_radii: bool = False,
    order: str = "logits",
    samples: int | None = None,
) -> Attack:
    """`apgd` on the targeted DLR score, in turn at the `targets` classes with the largest clean logits (Croce & Hein
    2020, arXiv 2003.01690).

    An example is broken by any other class. Of k classes at most k - 1 are aimed at; fewer than four have no such
    score, z_t - z_y takes its place. order: "malt" are the classes with the nearest linearised boundaries instead
    (`malt_order`; k - 1 more backward passes a run).
    """
    check_number("targets", targets, 1, whole=True)
    if order not in ORDERS:
        raise UserError(f"order must be 'logits' or 'malt', got {order!r}")
    return _apgd("apgd-t", ball, targeted_dlr, targets, steps, restarts, rho, history, larger_radii, samples, order)


def _apgd(method, ball, score, targets, steps, restarts, rho, history, larger_radii, samples, order="logits"):
    check_ball(ball)
    check_score(score, targets)
    check_number("steps", steps, 1, whole=True)
    check_number("rho", rho, 0, 1)
    if history not in HISTORIES:
        raise UserError(f"history must be 'autoattack' or 'paper', got {history!r}")
    if larger_radii and ball.p != 1:
        raise UserError(f"larger_radii is for l1 balls, got {ball.name}")
    runs = runs_of(targets, restarts, samples)
    if ball.p == 1:
        begin, advance, calls = with_sparse_steps(ball, steps, larger_radii)
    else:
        begin, advance, calls = with_momentum(ball, steps, rho, history)

    def init(keys, predict, images, labels, logits, *, run=None, eps=None):
        state = states.start(keys, images, labels, logits, eps=ball.eps if eps is None else eps, run=run)
        if targets:
            classes = malt_order(predict, images, labels, logits, ball) if order == "malt" else None
            state = aim(state, jnp.minimum(state.run // restarts, targets - 1), classes)
        return begin(state)

    def step(predict, state):
        return advance(state, *score_and_gradient(predict, score, state, targeted=targets > 0, samples=samples))

    name = f"{method}-{steps} x {targets}" if targets else named(f"{method}-{steps}", score)
    name += " by malt" if order == "malt" else ""
    cost = lambda predict, images: Cost(0, samples or 1)
    return Attack(init, step, calls, cost, f"{name}, {ball.name}", "label", runs, samples, ball.norm, score=score)


class Search(NamedTuple):
    """What an example's search in linf or l2 remembers. An evaluation belongs to the step that led to its iterate."""

    before: Array  # (b, h, w, c): the iterate before this one
    top: Array  # (b, h, w, c): the iterate with the highest score
    top_gradient: Array  # (b, h, w, c): the gradient there
    top_score: Array  # (b,)
    checked_score: Array  # (b,): the highest score at the last checkpoint
    last_score: Array  # (b,): of the iterate before
    step_size: Array  # (b,)
    halved: Array  # (b,) bool: at the last checkpoint
    window: Array  # (b,) int32: steps from the last checkpoint to the next
    done: Array  # (b,) int32: steps since the last checkpoint
    rises: Array  # (b,) int32: how many of them raised the score


def windows(steps: int) -> tuple[int, int, int]:
    """(first, shortest, by how much shorter each time): the steps between two checkpoints, as in the authors' code."""
    return max(int(0.22 * steps), 1), max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)


def with_momentum(ball: Ball, steps: int, rho: float, history: str):
    """The search in linf and l2: begin(state) -> state, advance(state, score, logits, gradient) -> state, and how often
    `advance` is called."""
    first_window, shortest, shorter = windows(steps)

    def begin(state):
        delta = ball.start(run_keys(state), state.images, state.eps)
        onto_sphere = (state.eps / jnp.maximum(ball.size(delta), 1e-30))[:, None, None, None]
        delta = ball.project(state.images, onto_sphere * delta, state.eps)
        nothing, number = jnp.zeros_like(state.score), jnp.zeros_like(state.count)
        search = Search(
            before=delta,
            top=delta,
            top_gradient=jnp.zeros_like(delta),
            top_score=state.score,
            checked_score=state.score,
            last_score=nothing,
            step_size=2 * state.eps,
            halved=number == 0,  # which leaves the second condition out of the first checkpoint
            window=number + first_window,
            done=number,
            rises=number,
        )
        return state._replace(delta=delta, search=search)

    def advance(state, values, logits, gradient):
        state, s, first = book(state, values, logits), state.search, state.count == 0
        better = first | (values > s.top_score)
        top, top_gradient = where(better, state.delta, s.top), where(better, gradient, s.top_gradient)
        top_score = jnp.where(better, values, s.top_score)
        done, rises = s.done + ~first, s.rises + (~first & (values > s.last_score))
        check = ~first & (done == s.window)
        stuck = (rises <= rho * s.window) | (~s.halved & (s.checked_score >= top_score))
        halve = check & stuck
        step_size = jnp.where(halve, s.step_size / 2, s.step_size)
        delta, gradient = where(halve, top, state.delta), where(halve, top_gradient, gradient)
        ahead = step_size[:, None, None, None] * ball.direction(state.images, delta, gradient)
        ahead = ball.project(state.images, delta + ahead, state.eps)
        a = jnp.where(first, 1.0, 0.75)[:, None, None, None]
        search = Search(
            before=delta,
            top=top,
            top_gradient=top_gradient,
            top_score=top_score,
            checked_score=jnp.where(first | check, top_score, s.checked_score),
            last_score=jnp.where(first, 0.0, values) if history == "autoattack" else values,
            step_size=step_size,
            halved=jnp.where(check, stuck, s.halved),
            window=jnp.where(check, jnp.maximum(s.window - shorter, shortest), s.window),
            done=jnp.where(check, 0, done),
            rises=jnp.where(check, 0, rises),
        )
        mixed = delta + a * (ahead - delta) + (1 - a) * (delta - s.before)
        return move(state, ball.project(state.images, mixed, state.eps), search)

    return begin, advance, steps


class SparseSearch(NamedTuple):
    """What an example's search in l1 remembers."""

    top: Array  # (b, h, w, c): the iterate with the highest score
    top_gradient: Array  # (b, h, w, c): the gradient there
    top_score: Array  # (b,)
    step_size: Array  # (b,)
    share: Array  # (b,): of the pixel values that a step moves
    changed: Array  # (b,): pixel values that the best point changed at the last checkpoint
    done: Array  # (b,) int32: steps since the last checkpoint


def stages(steps: int, larger_radii: bool) -> list[tuple[int, int]]:
    """(radius in eps, steps) of each stage: three with larger radii, as in the authors' code.

    >>> stages(50, True)
    [(3, 15), (2, 15), (1, 20)]
    """
    if not larger_radii:
        return [(1, steps)]
    third = math.ceil(0.3 * steps)
    return [(3, third), (2, third), (1, steps - 2 * third)]


def with_sparse_steps(ball: Ball, steps: int, larger_radii: bool):
    """The search in l1, as `with_momentum`. Every stage evaluates its start: N steps are N + 1 calls of `advance`, but
    the last iterate of all is evaluated by `finish`."""
    plan = stages(steps, larger_radii)
    ends = np.cumsum([length + 1 for _, length in plan])  # counts at which a stage is over

    def stage_of(count):
        """The stage's radius in eps, that of the next one, its start, its steps, those between checkpoints: (b,)
        each."""
        number = (count[:, None] >= ends[:-1]).sum(1)
        pick = lambda values: (jnp.asarray(values) * (number[:, None] == np.arange(len(plan)))).sum(1)
        factors, lengths = zip(*plan)
        checks = [max(int(0.04 * length), 1) for length in lengths]
        return tuple(map(pick, (factors, (*factors[1:], 1), (0, *ends[:-1]), lengths, checks)))

    def begin(state):
        nothing = jnp.zeros_like(state.score)
        delta = ball.start(run_keys(state), state.images, plan[0][0] * state.eps)
        search = SparseSearch(
            delta, jnp.zeros_like(delta), state.score, nothing, nothing, nothing, jnp.zeros_like(state.count)
        )
        return state._replace(delta=delta, search=search)

    def advance(state, values, logits, gradient):
        s, n = state.search, state.images[0].size
        factor, next_factor, stage_start, length, window = stage_of(state.count)
        radius = factor * state.eps
        state = book(state, values, logits, factor == 1)
        first, over = state.count == stage_start, state.count == stage_start + length
        better = first | (values > s.top_score)
        top, top_gradient = where(better, state.delta, s.top), where(better, gradient, s.top_gradient)
        changed = (top != 0).sum((1, 2, 3)).astype(jnp.float32)
        done = s.done + 1
        check = ~first & (done == window)
        back = check & (changed / jnp.maximum(s.changed, 1) < 0.95)
        step_size = jnp.where(check, jnp.clip(s.step_size / 1.5, radius / 10, radius), s.step_size)
        step_size = jnp.where(first | back, radius, step_size)
        share = jnp.where(first | check, changed / n / 1.5, s.share)
        share = share if larger_radii else jnp.where(first, 0.2, share)
        delta, gradient = where(back, top, state.delta), where(back, top_gradient, gradient)
        kept = n - jnp.clip(jnp.floor((1 - share) * n), 0, n - 1)
        ahead = delta + step_size[:, None, None, None] * sparse_sign(gradient, kept)
        ahead = project_l1(state.images, where(over, top, ahead), jnp.where(over, next_factor, factor) * state.eps)
        before = jnp.where(first | check, changed if larger_radii else jnp.where(first, n, changed), s.changed)
        search = SparseSearch(
            top=top,
            top_gradient=top_gradient,
            top_score=jnp.where(better, values, s.top_score),
            step_size=step_size,
            share=share,
            changed=before,
            done=jnp.where(first | check, 0, done),
        )
        return move(state, ahead, search)

    return begin, advance, int(ends[-1]) - 1


TABLE = table(apgd, apgd_t)
