"""FAB, the fast adaptive boundary attack: `fab`, and `fab_t` at the top classes (Croce & Hein 2020, arXiv 1907.02044).

It looks for the nearest adversarial example, whatever the radius: its iterates leave the ball, and those outside break
nothing.
"""

import math

import jax
import jax.numpy as jnp

from topgap_jax.attacks import state as states
from topgap_jax.attacks.naming import options_in_name
from topgap_jax.attacks.state import aim, book, check_ball, misclassified, move, no_nan, run_keys, where
from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.keys import normal
from topgap_jax.rewrite import speed
from topgap_jax.targets import malt_order
from topgap_jax.types import Attack, Ball, Cost

ORDERS = ("logits", "malt")
BACK, OVERSHOOT, CLEAN_SHARE = 0.9, 1.05, 0.1  # the paper's beta, eta and alpha_max


@options_in_name("steps")
def fab(ball: Ball, *, steps: int = 100, restarts: int = 1) -> Attack:
    """Steps onto the nearest linearised class boundary, of all classes; k backward passes each (Croce & Hein 2020,
    arXiv 1907.02044).

    With f_k = z_k - z_y at the iterate, s is the class of the smallest |f_k| / |grad f_k|_q (q the dual norm); d and d0
    are the smallest steps inside the box from the iterate and from the clean image onto its hyperplane f_s + <grad f_s,
    .> = 0. Then

        x <- clip((1 - a) (x + 1.05 d) + a (x_clean + 1.05 d0)),  a = min(|d| / (|d| + |d0|), .1),

    and from an adversarial x back by a tenth of the way to the clean image. The first run starts there and draws
    nothing, the others at random points of size eps / 2, uniform in linf, else Gaussian. The state's `score` is minus
    the smallest size that has been adversarial, in the ball or not. It has no `samples`: a boundary that moves with
    every pass has no distance.
    """
    check_number("restarts", restarts, 1, whole=True)

    def begin(predict, state):
        keys, images = run_keys(state), state.images
        drawn = ball.start(keys, images, state.eps) if ball.p == math.inf else normal(keys, images)
        half = 0.5 * state.eps / jnp.maximum(ball.size(drawn), 1e-12)
        start = _boxed(images, half[:, None, None, None] * drawn)
        return state._replace(delta=where(state.run > 0, start, state.delta))

    def boundary(predict, state, points):
        """The gap (b,) and gradient (b, h, w, c) of the nearest linearised boundary, one class after another."""
        logits, pull = jax.vjp(predict, points)

        def compare(nearest):
            k, least, gap, w = nearest
            target = jnp.full_like(state.labels, k)
            values = _difference(logits, target, state.labels)
            row = jax.nn.one_hot(target, logits.shape[-1]) - jax.nn.one_hot(state.labels, logits.shape[-1])
            gradient = no_nan(pull(row.astype(logits.dtype))[0])
            distance = jnp.abs(values) / (1e-12 + ball.dual_norm(gradient))
            nearer = (distance < least) & (target != state.labels)
            return (
                k + 1,
                jnp.where(nearer, distance, least),
                jnp.where(nearer, values, gap),
                where(nearer, gradient, w),
            )

        # Made of the logits and points, so that they are split over devices as these are.
        zero = jnp.zeros_like(logits[:, 0], jnp.float32)
        return speed.loop(compare, logits.shape[-1], (jnp.int32(0), zero + jnp.inf, zero, jnp.zeros_like(points)))[2:]

    cost = lambda predict, images: Cost(1, jax.eval_shape(predict, images).shape[-1])
    return _fab(f"fab-{steps}", ball, steps, restarts, begin, boundary, cost)


@options_in_name("targets", "steps", "order")
def fab_t(ball: Ball, *, targets: int = 9, steps: int = 100, order: str = "logits") -> Attack:
    """`fab` on the boundary between the label and one other class, in turn for the `targets` nearest ones; one backward
    pass a step.

    order: the nearest by their clean "logits", as in AutoAttack, or by their linearised distances ("malt", see
    `malt_order`; k - 1 more backward passes a run). Broken is what any other class than the label is predicted for. Of
    k classes at most k - 1 are targets. Draws nothing.
    """
    check_number("targets", targets, 1, whole=True)
    if order not in ORDERS:
        raise UserError(f"order must be 'logits' or 'malt', got {order!r}")

    def begin(predict, state):
        if order == "logits":
            return aim(state, state.run)
        return aim(state, state.run, malt_order(predict, state.images, state.labels, state.clean, ball))

    def boundary(predict, state, points):
        def summed(points):
            values = _difference(predict(points), state.target, state.labels)
            return values.sum(), values

        (_, gap), gradient = jax.value_and_grad(summed, has_aux=True)(points)
        return gap, no_nan(gradient)

    name = f"fab-t-{steps} x {targets}" + (" by malt" if order == "malt" else "")
    return _fab(name, ball, steps, targets, begin, boundary, lambda predict, images: Cost(1, 1))


def _fab(name, ball, steps, runs, begin, boundary, cost):
    """begin(predict, state) -> state; boundary(predict, state, points) -> z_s - z_y (b,), its gradient (b, h, w, c)."""
    check_ball(ball)
    check_number("steps", steps, 1, whole=True)

    def init(keys, predict, images, labels, logits, *, run=None, eps=None):
        if logits.shape[-1] < 2:
            raise UserError(f"{name}: the model has {logits.shape[-1]} class; give it two or more")
        state = states.start(keys, images, labels, logits, eps=ball.eps if eps is None else eps, run=run)
        return begin(predict, state)

    def step(predict, state):
        logits, size = predict(state.images + state.delta), ball.size(state.delta)
        wrong = misclassified(logits, state.labels)
        state = book(state, state.score, logits, size <= state.eps)
        state = state._replace(score=jnp.maximum(state.score, jnp.where(wrong, -size, -jnp.inf)))
        delta = where(wrong, BACK * state.delta, state.delta)
        points = state.images + delta
        gap, w = boundary(predict, state, points)
        b = (w * points).sum((1, 2, 3)) - gap
        ahead, from_clean = ball.hyperplane(points, w, b), ball.hyperplane(state.images, w, b)
        near, far = (jnp.maximum(ball.size(d), 1e-8) for d in (ahead, from_clean))
        share = jnp.minimum(near / (near + far), CLEAN_SHARE)[:, None, None, None]
        delta = (1 - share) * (delta + OVERSHOOT * ahead) + share * OVERSHOOT * from_clean
        delta = _boxed(state.images, delta)
        # Who evaluates the last iterate does not ask for its size: one outside the ball is given up.
        outside = (state.count + 1 == steps) & (ball.size(delta) > state.eps)
        return move(state, where(outside, jnp.zeros_like(delta), delta))

    return Attack(init, step, steps, cost, f"{name}, {ball.name}", runs=runs, norm=ball.norm)


def _difference(logits, target, labels):
    pick = lambda classes: jnp.take_along_axis(logits.astype(jnp.float32), classes[:, None], 1)[:, 0]
    return pick(target) - pick(labels)


def _boxed(images, delta):
    return jnp.clip(images + delta, 0.0, 1.0) - images


TABLE = table(fab, fab_t)
