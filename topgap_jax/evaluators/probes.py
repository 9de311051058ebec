"""What an audit asks of a network on a batch, one function a check: repeated passes, gradients, their path, noise.

Pure, per example: results (b,) or (b, ...). The names of checks (A5, ...) are those of `measure.criteria`.
"""

import jax
import jax.numpy as jnp

from topgap_jax.attacks.gradient import pgd
from topgap_jax.attacks.state import BROKEN, finish, misclassified
from topgap_jax.keys import fold_in, split
from topgap_jax.rewrite import speed
from topgap_jax.scores import cross_entropy, dlr, margin
from topgap_jax.types import Array, Attack, Ball, Keys, Predict

PASSES, DIRECTIONS, NOISES = 5, 16, 100
RAY = (1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8)
CLEARLY = 1e-4  # of the logits' range: what rounding does not explain


def repeated_passes(keys: Keys, predict: Predict, images: Array, labels: Array) -> dict[str, Array]:
    """A11: by how much five passes of the same images differ, the first without keys, the others with new ones.

    drift (b,): the largest distance of logits of length 1 from those of the first pass; changed (b,) bool: whether it
    is another verdict.
    """
    first = predict(images)
    drift, changed = jnp.zeros_like(first[:, 0]), jnp.zeros_like(labels, bool)
    for number in range(1, PASSES):
        again = predict(images, fold_in(keys, number))
        drift = jnp.maximum(drift, distance(first, again))
        changed |= misclassified(again, labels) != misclassified(first, labels)
    return {"drift": drift, "changed": changed}


def batch_coupling(predict: Predict, images: Array) -> dict[str, Array]:
    """A12: coupling (b,), the distance of logits of length 1 from those of the same images in a batch twice as large,
    the other half of which is black."""
    among_others = predict(jnp.concatenate([images, jnp.zeros_like(images)]))[: len(images)]
    return {"coupling": distance(predict(images), among_others)}


def distance(a: Array, b: Array) -> Array:
    """|a / |a| - b / |b|| of logits (b, k): (b,)."""
    unit = lambda z: z / (jnp.linalg.norm(z, axis=-1, keepdims=True) + 1e-10)
    return jnp.linalg.norm(unit(a) - unit(b), axis=-1)


def path(attack: Attack, keys: Keys, predict: Predict, images: Array, labels: Array) -> dict[str, Array]:
    """A7, A13: the attack as it goes, with a forward pass of its own on each iterate; nothing ends at a break.

    losses (b, steps + 1): cross-entropy of every iterate, the last one included; lost (b,) bool: an iterate is
    misclassified, by more than rounding, and what the attack returns (`best`) is not; last (b, h, w, c).
    """
    clear = lambda logits: margin(logits, labels) > CLEARLY * (logits.max(-1) - logits.min(-1))

    def look(losses, broken, state):
        logits = predict(state.images + state.delta)
        now = jnp.arange(attack.steps + 1) == state.count[:, None]
        return jnp.where(now, cross_entropy(logits, labels)[:, None], losses), broken | clear(logits)

    def step(carry):
        losses, broken, state = carry
        return *look(losses, broken, state), attack.step(predict, state)

    state = attack.init(keys, predict, images, labels, predict(images))
    losses = jnp.zeros_like(images[:, 0, 0, :1], jnp.float32) + jnp.zeros(attack.steps + 1)
    losses, broken, state = speed.loop(step, attack.steps, (losses, jnp.zeros_like(labels, bool), state))
    losses, broken = look(losses, broken, state)
    returned = finish(predict, state, attack.samples)
    right = ~misclassified(predict(returned.best), labels) | (returned.status != BROKEN)
    return {"losses": losses, "lost": broken & right, "last": state.images + state.delta}


def ascent(ball: Ball, keys: Keys, predict: Predict, images: Array, labels: Array) -> dict[str, Array]:
    """A6: PGD-20 with steps of eps / 20 from the clean image. not_above (b,) bool: the loss ends at most where it
    began; falls (b,): the share of steps that lower it."""
    small = pgd(ball, steps=20, step_size=ball.eps / 20, start=None)
    losses = path(small, keys, predict, images, labels)["losses"]
    return {"not_above": losses[:, -1] <= losses[:, 0], "falls": (losses[:, 1:] < losses[:, :-1]).mean(1)}


def late_improvement(losses: Array) -> Array:
    """A7: (b, n) -> (b,), the share of a path's gain that came in its last ten values (Pintor et al. 2022, arXiv
    2106.09947).

    Of the loss that the attack minimises, -losses, rescaled to [0, 1], the running minimum: by how much it falls.
    """
    low, high = losses.min(1, keepdims=True), losses.max(1, keepdims=True)
    best = jax.lax.cummax(jnp.where(high > low, (losses - low) / jnp.where(high > low, high - low, 1.0), 0.0), axis=1)
    return best[:, -1] - best[:, -min(10, losses.shape[1])]


def zero_gradients(predict: Predict, points: Array, labels: Array) -> dict[str, Array]:
    """A5: whether the gradient of cross-entropy and of DLR is exactly 0, or holds a NaN, at points (b, h, w, c) of the
    right class, and whether cross-entropy itself is 0: (b,) bool each."""

    def of(score):
        def summed(points):
            logits = predict(points)
            values = score(logits, labels)
            return values.sum(), (values, ~misclassified(logits, labels))

        gradient, (values, right) = jax.grad(summed, has_aux=True)(points)
        return right & ~(jnp.abs(gradient).max((1, 2, 3)) > 0), values

    (zero, values), (zero_dlr, _) = of(cross_entropy), of(dlr)
    return {"cross_entropy": zero, "dlr": zero_dlr, "underflow": values == 0}


def finite_differences(ball: Ball, keys: Keys, predict: Predict, images: Array, labels: Array) -> dict[str, Array]:
    """A14: by how much a random sum of the logits differs between x + t v and x - t v, 2 t v of size eps / 5, for 16
    random signs v, and what its gradient says of that: `rise`, `expected` (b, 16) (Athalye et al. 2018, arXiv
    1802.00420).

    The sum takes every logit with a random sign: unlike a loss it does not saturate, and no logit is left out.
    """
    signs = lambda keys, like: jax.vmap(lambda key, one: jax.random.rademacher(key, one.shape, jnp.float32))(keys, like)
    first = predict(images)
    weights = signs(fold_in(keys, DIRECTIONS), first)
    total = lambda points: (weights * predict(points)).sum(-1)
    gradient = jax.grad(lambda points: total(points).sum())(images)

    def along(keys):
        v = signs(keys, images)
        step = v * (ball.eps / 10 / ball.size(v))[:, None, None, None]
        return total(images + step) - total(images - step), 2 * (gradient * step).sum((1, 2, 3))

    rise, expected = speed.map_over(along, (split(keys, DIRECTIONS),))
    return {"rise": rise.T, "expected": expected.T}


def loss_under_noise(ball: Ball, keys: Keys, predict: Predict, images: Array, labels: Array) -> dict[str, Array]:
    """A15: unstable (b,), the mean of |L(x) - L(x + u)| / |L(x)|, at most 1, over 100 random points u of the ball of
    half the radius; L is cross-entropy (Pintor et al. 2022, arXiv 2106.09947)."""
    clean, half = cross_entropy(predict(images), labels), jnp.full_like(images[:, 0, 0, 0], ball.eps / 2)

    def change(keys):
        noisy = cross_entropy(predict(images + ball.project(images, ball.start(keys, images, half), half)), labels)
        return jnp.abs(noisy - clean)

    total = speed.sum_over(change, (split(keys, NOISES),), images)
    return {"unstable": jnp.minimum(total / NOISES / jnp.maximum(jnp.abs(clean), 1e-30), 1.0)}


def one_step_ray(ball: Ball, predict: Predict, images: Array, labels: Array) -> dict[str, Array]:
    """A16: points x + a d on the way of FGSM's full step d. end (b,) bool: broken at a = 1; inside (b,) bool: broken at
    one of a = 1/8, ..., 7/8 (Kim et al. 2020, arXiv 2010.01799)."""
    gradient = jax.grad(lambda points: cross_entropy(predict(points), labels).sum())(images)
    radius = jnp.full_like(images[:, 0, 0, 0], ball.eps)
    full = ball.project(images, ball.eps * ball.ascent(gradient), radius)
    broken = speed.map_over(lambda a: misclassified(predict(images + a * full), labels), (jnp.array((*RAY, 1.0)),))
    return {"inside": broken[:-1].any(0), "end": broken[-1]}


def outside(ball: Ball, clean: Array, points: Array) -> Array:
    """A18: (b,) bool, whether points leave the ball, or the pixel box, or are no numbers.

    By more than rounding: 1e-5 of the radius, and a step of float32 at 1 for every pixel, which is all that images hold
    of a small perturbation.
    """
    rounding = ball.size(jnp.full_like(clean, 2.0**-23))
    size = ball.size(points - clean)
    inside = (size <= ball.eps * (1 + 1e-5) + rounding) & ((points >= 0) & (points <= 1)).all((1, 2, 3))
    return ~inside | jnp.isnan(points).any((1, 2, 3))
