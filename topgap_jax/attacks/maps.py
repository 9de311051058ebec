"""`topk_attack`: a small change of the image that moves an explanation away and keeps the label (arXiv 1710.10547)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from topgap_jax.attacks import state as states
from topgap_jax.attacks.gradient import STARTS
from topgap_jax.attacks.state import BROKEN, check_ball, check_step, misclassified, run_keys, where
from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.keys import fold_in, split
from topgap_jax.order import top_count, top_mask
from topgap_jax.rewrite import with_rules
from topgap_jax.rules import softplus
from topgap_jax.types import Array, Attack, Ball, Cost, Explain


class Search(NamedTuple):
    """Where each example's clean map is highest, and how much of that the best point has kept."""

    top: Array  # (b, h', w') bool: the k highest positions of the clean map
    overlap: Array  # (b,) int32: how many of the k are still among the k highest at `best`
    mass: Array  # (b,): the map's mass on `top` at `best`, which decides between equal overlaps


def topk_attack(
    explain: Explain,
    ball: Ball,
    *,
    k: int | None = None,
    steps: int = 50,
    step_size: float | None = None,
    restarts: int = 3,
    start: str | None = "random",
    beta: float | None = 50.0,
) -> Attack:
    """The top-k attack of Ghorbani et al. 2019 (arXiv 1710.10547) on any explanation.

    D(x') = sum over `top` of M(x'), M the map divided by the sum of its absolute values times its number of positions
    n, `top` the k highest positions of the clean map. x' <- P(x' + step_size * ascent(-grad D)) from `restarts` points,
    each "random" in the ball or (`start=None`) the clean image, `steps` steps each; `step_size` is in the ball's own
    norm, eps / 8 if not given (1/255 of 8/255). An iterate is admissible if the prediction is still the label; the one
    with the fewest of `top` among its own k highest is kept, equal ones by their mass on `top`. An image that is
    misclassified when clean is not attacked.

    The whole map is differentiated, where it uses gradients a second time. A ReLU network has no second derivatives: D
    is that of its twin with softplus(beta z) / beta, while every verdict is of the network itself. `beta=None` does
    without a twin, for networks that are smooth. `k` is by default 100, above 64x64 positions 1000, and at most a tenth
    of them. With step_size=0 it is the control: random points of the ball.
    """
    Explain.single("topk_attack", explain)
    check_ball(ball)
    rules = dict(explain.rules)
    if any(rule.backward for rule in rules.values()):
        raise UserError("topk_attack: a map under backward rules is the gradient of no function and has no derivative")
    if "relu" in rules and beta is not None:
        raise UserError(
            "topk_attack: the explanation has a rule for relu of its own, such as softplus(50); give beta=None"
        )
    if k is not None:
        check_number("k", k, 1, whole=True)
    if beta is not None:
        check_number("beta", beta, 1e-6)
    check_number("steps", steps, 1, whole=True)
    check_number("restarts", restarts, 1, whole=True)
    if step_size is not None:
        check_step(step_size)
    if start not in STARTS:
        raise UserError(f"start must be 'random' or None (the clean image), got {start!r}")

    def init(keys, predict, images, labels, logits, *, run=None, eps=None):
        maps = explain.maps(split(keys)[0], predict, images, labels)
        state = states.start(keys, images, labels, logits, eps=ball.eps if eps is None else eps, run=run)
        search = Search(
            top=top_mask(maps, top_count(k, maps[0].size)),
            overlap=state.count + top_count(k, maps[0].size),
            mass=jnp.full_like(state.score, -jnp.inf),
        )
        return state._replace(search=search, score=-search.overlap.astype(jnp.float32))

    def step(predict, state):
        twin = predict if beta is None else with_rules(predict, **softplus(beta))
        map_keys, start_keys = split(state.keys)[0], split(run_keys(state))[1]

        def on_top(points):
            return _mass(explain.maps(map_keys, twin, points, state.labels), state.search.top).sum()

        if start is None:
            fresh = jnp.zeros_like(state.delta)
        else:
            drawn = ball.start(fold_in(start_keys, state.count), state.images, state.eps)
            fresh = ball.project(state.images, drawn, state.eps)
        delta = where(state.count % steps == 0, fresh, state.delta)
        size = state.eps[:, None, None, None] / 8 if step_size is None else step_size
        direction = ball.ascent(-jax.grad(on_top)(state.images + delta))
        delta = ball.project(state.images, delta + size * direction, state.eps)
        # An example that was misclassified when clean stays where it is.
        return judge(predict, state._replace(delta=where(state.status == BROKEN, state.delta, delta)))

    def judge(predict, state):
        """The map and the label at the point that a step has moved to."""
        points, search = state.images + state.delta, state.search
        maps = explain.maps(split(state.keys)[0], predict, points, state.labels)
        mass = _mass(maps, search.top)
        overlap = (top_mask(maps, search.top.sum((1, 2))) & search.top).sum((1, 2))
        # The mass of an untouched example is -inf, so a full overlap never takes the clean image's place.
        better = (overlap < search.overlap) | ((overlap == search.overlap) & (mass < search.mass))
        better &= (state.status != BROKEN) & ~misclassified(predict(points), state.labels)
        better &= jnp.isfinite(maps).all((1, 2))
        search = search._replace(
            overlap=jnp.where(better, overlap, search.overlap), mass=jnp.where(better, mass, search.mass)
        )
        return state._replace(
            best=where(better, points, state.best),
            score=-search.overlap.astype(jnp.float32),
            count=state.count + 1,
            search=search,
        )

    def cost(predict, images):
        # Per step the gradient of a map (twice the map's own, where it has one), the map at the new point, and its
        # logits.
        forwards, gradients = explain.cost(predict, images)
        return Cost(forwards + 1, forwards + 3 * gradients)

    return Attack(init, step, restarts * steps, cost, f"top-k-{steps} x {restarts}, {ball.name}", aim="map")


def _mass(maps, top):
    """n sum_top M / sum |M| (b,); 0 where the map is 0 everywhere."""
    maps = maps.astype(jnp.float32)
    total = jnp.abs(maps).sum((1, 2))
    return maps[0].size * (maps * top).sum((1, 2)) / jnp.where(total > 0, total, 1)


TABLE = table(topk_attack)
