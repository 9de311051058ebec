"""`topk_attack`: a small change of the image that moves an explanation away and keeps the label (arXiv 1710.10547)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from topgap_jax import rewrite
from topgap_jax.attacks.gradient import misclassified
from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.order import top_mask
from topgap_jax.rules import softplus
from topgap_jax.types import Array, Attack, Ball, Cost, Explain, Keys


class MapState(NamedTuple):
    """Per example: the clean image, its label, where its map is highest, the perturbation (iterate), the best point so far."""

    images: Array  # (b, h, w, c)
    labels: Array  # (b,)
    top: Array  # (b, h', w') bool: the k highest positions of the clean map
    attacked: Array  # (b,) bool: the clean prediction is right
    delta: Array  # (b, h, w, c): the iterate is images + delta
    best: Array  # (b, h, w, c): the admissible iterate with the lowest overlap, else the clean image
    overlap: Array  # (b,) int32: how many of the k are still among the k highest at `best`
    mass: Array  # (b,): the map's mass on `top` at `best`, which decides between equal overlaps
    steps: Array  # (b,) int32: steps taken
    keys: Keys  # (b,)


def topk_attack(
    explain: Explain,
    ball: Ball,
    *,
    k: int | None = None,
    steps: int = 50,
    step_size: float | None = None,
    restarts: int = 3,
    beta: float | None = 50.0,
) -> Attack:
    """The top-k attack of Ghorbani et al. 2019 (arXiv 1710.10547) on any explanation.

    D(x') = sum over `top` of M(x'), M the map divided by the sum of its absolute values times its number of positions n, `top`
    the k highest positions of the clean map. x' <- P(x' + step_size * ascent(-grad D)) from `restarts` random starts, `steps`
    steps each; `step_size` is in the ball's own norm, eps / 8 if not given (1/255 of 8/255). An iterate is admissible if the
    prediction is still the label; the one with the fewest of `top` among its own k highest is kept, equal ones by their mass
    on `top`. An image that is misclassified when clean is not attacked.

    The whole map is differentiated, where it uses gradients a second time. A ReLU network has no second derivatives: D is that
    of its twin with softplus(beta z) / beta, while every verdict is of the network itself. `beta=None` does without a twin,
    for networks that are smooth. `k` is by default 100, above 64x64 positions 1000, and at most a tenth of them.
    With step_size=0 it is the control: random points of the ball.
    """
    if not callable(explain):
        raise UserError(f"topk_attack: give an explanation such as gradient(), got {explain!r}")
    if not isinstance(ball, Ball):
        raise UserError(f"topk_attack: give a ball such as linf(8/255) after the explanation, got {ball!r}")
    rules = getattr(explain, "rules", None) or {}
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
    size = ball.eps / 8 if step_size is None else step_size
    check_number("step_size", size, 0)

    def init(keys, predict, images, labels, logits):
        maps = explain(_split(keys)[0], predict, images, labels)
        count = _count(k, maps[0].size)
        right = ~misclassified(logits, labels)
        zeros = jnp.zeros_like(right, jnp.int32)
        lowest = jnp.full_like(right, -jnp.inf, jnp.float32)
        top, delta = top_mask(maps, count), jnp.zeros_like(images)
        return MapState(images, labels, top, right, delta, images, zeros + count, lowest, zeros, keys)

    def step(predict, state):
        twin = predict if beta is None else rewrite.with_rules(predict, **softplus(beta))
        map_keys, start_keys = _split(state.keys)

        def on_top(points):
            return _mass(explain(map_keys, twin, points, state.labels), state.top).sum()

        starts = jax.vmap(lambda key, n, image: ball.start(jax.random.fold_in(key, n), image))
        fresh = ball.project(state.images, starts(start_keys, state.steps, state.images))
        delta = _where(state.steps % steps == 0, fresh, state.delta)
        direction = ball.ascent(-jax.grad(on_top)(state.images + delta))
        delta = ball.project(state.images, delta + size * direction)
        return book(predict, state._replace(delta=_where(state.attacked, delta, state.delta)))

    def book(predict, state):
        points = state.images + state.delta
        maps = explain(_split(state.keys)[0], predict, points, state.labels)
        mass = _mass(maps, state.top)
        overlap = (top_mask(maps, state.top.sum((1, 2))) & state.top).sum((1, 2))
        allowed = state.attacked & ~misclassified(predict(points), state.labels) & jnp.isfinite(maps).all((1, 2))
        # The mass of an untouched example is -inf, so a full overlap never takes the clean image's place.
        better = (overlap < state.overlap) | ((overlap == state.overlap) & (mass < state.mass))
        better &= allowed
        return state._replace(
            best=_where(better, points, state.best),
            overlap=jnp.where(better, overlap, state.overlap),
            mass=jnp.where(better, mass, state.mass),
            steps=state.steps + 1,
        )

    # Per step the gradient of a map (twice the map's own, where it has one), the map at the new point, and its logits.
    own = getattr(explain, "cost", Cost(1, 0))
    cost = Cost(own.forwards + 1, own.forwards + 3 * own.gradients)
    return Attack(init, step, restarts * steps, cost, f"top-k-{steps} x {restarts}, {ball.name}", aim="map")


def _split(keys):
    """Keys for the maps, the same at every point, and keys for the random starts."""
    return jax.vmap(jax.random.split, out_axes=1)(keys)


def _count(k, n):
    if k is None:
        return min(100 if n <= 64 * 64 else 1000, math.ceil(n / 10))
    if k > n:
        raise UserError(f"topk_attack: k={k} is more than the {n} positions of the map; give k <= {n}")
    return k


def _mass(maps, top):
    """n sum_top M / sum |M| (b,); 0 where the map is 0 everywhere."""
    maps = maps.astype(jnp.float32)
    total = jnp.abs(maps).sum((1, 2))
    return maps[0].size * (maps * top).sum((1, 2)) / jnp.where(total > 0, total, 1)


def _where(chosen, a, b):
    return jnp.where(chosen[:, None, None, None], a, b)


TABLE = table(topk_attack)
