"""`fmn`: the smallest perturbation that is adversarial, for each example, and so accuracy at every radius at once."""

from typing import NamedTuple

import jax.numpy as jnp

from topgap_jax.attacks import state as states
from topgap_jax.attacks.naming import options_in_name
from topgap_jax.attacks.state import BROKEN, RUNNING, check_ball, misclassified, move, score_and_gradient, where
from topgap_jax.build import check_number, table
from topgap_jax.norms import direction_and_length
from topgap_jax.scores import margin
from topgap_jax.types import Array, Attack, Ball, Cost

STEP, LAST_STEP = 1.0, 0.01  # Euclidean lengths
CHANGE, LAST_CHANGE = 0.05, 0.001  # of the radius, relative


class Search(NamedTuple):
    """Where each example's search is."""

    radius: Array  # (b,): what the iterate is projected to


@options_in_name("steps")
def fmn(ball: Ball, *, steps: int = 100) -> Attack:
    """Fast minimum-norm attack: ascent of the margin M in a ball that shrinks when it breaks and grows when not (Pintor
    et al. 2021, arXiv 2102.12827).

    With the smallest adversarial size r* so far (`norms(state)`; infinity at first), cosine schedules a of the step (1
    to .01) and g of the radius (.05 to .001), and q the dual norm,

        radius <- min(radius (1 - g), r*) where x is adversarial, else radius (1 + g); before the first break at least
        |x - x_clean| + |M| / |grad M|_q, the distance of the linearised boundary; never beyond the farthest corner
        x <- P(x + a grad M / |grad M|_2).

    One run gives accuracy at all radii, mean(norms(state) > eps): the radius of the `ball` plays no part, only its
    norm. A misclassified clean image has norm 0. `best` is the nearest adversarial point, `status` is BROKEN once there
    is one. `steps` moves, and one more step that evaluates the last iterate.
    """
    check_ball(ball)
    check_number("steps", steps, 1, whole=True)

    def init(keys, predict, images, labels, logits, *, run=None, eps=None):
        state = states.start(keys, images, labels, logits, eps=ball.eps if eps is None else eps, run=run)
        score = jnp.where(state.status == BROKEN, 0.0, state.score)
        return state._replace(score=score, search=Search(jnp.full_like(state.score, jnp.inf)))

    def step(predict, state):
        values, logits, gradient = score_and_gradient(predict, margin, state)
        size, wrong = ball.size(state.delta), misclassified(logits, state.labels)
        state = _book(state, size, wrong)
        fall = (1 + jnp.cos(jnp.pi * state.count / steps)) / 2
        change = LAST_CHANGE + (CHANGE - LAST_CHANGE) * fall
        length = LAST_STEP + (STEP - LAST_STEP) * fall
        radius = state.search.radius
        boundary = size + jnp.abs(values) / jnp.maximum(ball.dual_norm(gradient), 1e-12)
        # Ours: it also grows before the first break, or an iterate that lands on the boundary, a tie, stays there.
        grown = jnp.where(state.count > 0, radius, 0.0) * (1 + change)
        outside = jnp.where(state.status == BROKEN, grown, jnp.maximum(boundary, grown))
        radius = jnp.where(wrong, jnp.minimum(radius * (1 - change), -state.score), outside)
        radius = jnp.minimum(radius, ball.size(jnp.maximum(state.images, 1 - state.images)))
        way, _ = direction_and_length(gradient, (1, 2, 3))
        delta = ball.project(state.images, state.delta + length[:, None, None, None] * way, radius)
        return move(state, delta, Search(radius))

    name, cost = f"fmn-{steps}, {ball.name}", lambda predict, images: Cost(0, 1)
    return Attack(init, step, steps + 1, cost, name, aim="norm", norm=ball.norm)


def _book(state, size, wrong):
    """Keep the nearest adversarial iterate, and the step of the first one."""
    nearer = wrong & (size < -state.score)
    first = nearer & (state.status == RUNNING)
    return state._replace(
        best=where(nearer, state.images + state.delta, state.best),
        score=jnp.where(nearer, -size, state.score),
        status=jnp.where(first, BROKEN, state.status),
        broken_at=jnp.where(first, state.count, state.broken_at),
    )


TABLE = table(fmn)
