"""`norm_regularised`: training on the costliest perturbation is training with a norm of the input gradient (arXiv
2404.04647)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.models import bind
from topgap_jax.rewrite import fast_convs, fused
from topgap_jax.scores import cross_entropy
from topgap_jax.training.standard import standard
from topgap_jax.types import Array, Objective, Penalty


def norm_regularised(
    penalty: Penalty, *, solver: str = "fast", steps: int = 7, label_smoothing: float = 0.0
) -> Objective:
    """Cross-entropy at x + delta, delta the maximiser of <g, delta> - R(delta) (Gong, Dou & Farnia 2024, arXiv
    2404.04647).

    To first order this is the clean cross-entropy plus penalty.value(g), g (b, h, w, c) the gradient of an example's
    cross-entropy with respect to its pixels. Nothing flows through delta: that would double the quadratic part. solver
    "fast": delta = penalty.maximiser(g), one gradient (a forward and a backward pass) an image. solver "iterative":
    `steps` steps up loss(x + delta) - R(delta), none of which lowers it. One that would is not taken, and the step size
    of that example is a quarter from then on. For a constraint from 0, delta <- P(delta + t penalty.maximiser(g at x +
    delta)), t = 2.5/steps at first: steps + 1 gradients. For a cost from the maximiser on (from 0 where that is
    better), delta <- prox(delta + t g), t = penalty.scale at first: steps + 2 gradients. Either way no other forward
    passes. Cut by the pixel box are l1_norm, which stays exact, and every projected step.

    The network is in eval mode for g, with the pool as it is at this step. Logged beside the accuracy at x + delta:
    `penalty` (the dual's value at the clean image), `clean_loss`, and `cost` = R(delta), so that loss - cost is the
    penalised loss. Raises UserError for another solver and for `steps` below 1.
    """
    if solver not in ("fast", "iterative"):
        raise UserError(f"solver must be 'fast' or 'iterative', got {solver!r}")
    check_number("steps", steps, 1, whole=True)
    inner = standard(label_smoothing=label_smoothing)

    def objective(keys, model, variables, batch, step):
        images, labels = batch["image"], batch["label"]
        predict = fast_convs(bind(model, lax.stop_gradient(variables), step=step))  # else a loop would be slow on a CPU

        @fused
        def evaluate(points):
            def summed(points):  # the sum: a mean would scale each example's gradient by 1/b
                losses = cross_entropy(predict(points), labels)
                return losses.sum(), losses

            (_, losses), gradient = jax.value_and_grad(summed, has_aux=True)(points)
            return losses, gradient

        clean, gradient = evaluate(images)
        delta = perturbation(penalty, solver, steps, images, clean, gradient, evaluate)
        delta = lax.stop_gradient(delta)
        loss, metrics, batch_stats = inner(keys, model, variables, {**batch, "image": images + delta}, step)
        logs = {"penalty": penalty.value(gradient), "clean_loss": clean, "cost": penalty.cost(delta)}
        return loss, {**metrics, **logs}, batch_stats

    return objective


def perturbation(
    penalty: Penalty,
    solver: str,
    steps: int,
    images: Array,
    losses: Array,
    gradient: Array,
    evaluate: Callable[[Array], tuple[Array, Array]],
) -> Array:
    """delta (b, h, w, c) of `norm_regularised`. losses (b,) and gradient (b, h, w, c) are `evaluate(images)`.

    evaluate: points (b, h, w, c) -> losses (b,) there, and their gradient (b, h, w, c). "iterative" calls it `steps`
    times for a constraint, `steps + 1` times for a cost: at every place to which a step would lead.
    """
    cut = lambda delta: jnp.clip(images + delta, 0.0, 1.0) - images
    first = penalty.maximiser(gradient)
    if solver == "fast":
        return cut(first) if penalty.boxed else first
    if penalty.scale is None:
        size, trials = 2.5 / steps, steps
        move = lambda delta, gradient, t: cut(penalty.project(delta + t * penalty.maximiser(gradient)))
        first = cut(penalty.project(size * first))
    else:
        # From the maximiser: from 0, entries with a small gradient would take many steps to where R begins.
        size, trials = penalty.scale, steps + 1
        move = lambda delta, gradient, t: penalty.prox(delta + t * gradient, t)

    def step(_, state):
        delta, value, gradient, t, proposal = state
        losses, there = evaluate(images + proposal)
        proposed = losses - penalty.cost(proposal)
        better = proposed >= value  # false where either is NaN
        each = better.reshape(-1, 1, 1, 1)
        delta, gradient = jnp.where(each, proposal, delta), jnp.where(each, there, gradient)
        t = jnp.where(each, t, t / 4)
        return delta, jnp.where(better, proposed, value), gradient, t, move(delta, gradient, t)

    t = jnp.full((images.shape[0], 1, 1, 1), size, images.dtype)
    return lax.fori_loop(0, trials, step, (jnp.zeros_like(images), losses, gradient, t, first))[0]


TABLE = table(norm_regularised)
