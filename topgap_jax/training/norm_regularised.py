"""`norm_regularised`: training on the costliest perturbation is training with a norm of the input gradient (arXiv 2404.04647)."""

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
    """Cross-entropy at x + delta, delta the maximiser of <g, delta> - R(delta) (Gong, Dou & Farnia 2024, arXiv 2404.04647).

    To first order this is the clean cross-entropy plus penalty.value(g), g (b, h, w, c) the gradient of an example's
    cross-entropy with respect to its pixels. Nothing flows through delta: that would double the quadratic part.
    solver "fast": delta = penalty.maximiser(g), one gradient. "iterative": for a constraint projected ascent from 0, `steps`
    gradients, delta <- P(delta + 2.5/steps * maximiser(g at x + delta)); for a cost from the maximiser on, steps + 1 gradients,
    delta <- prox(delta + t g), t = penalty.scale. Cut by the pixel box are l1_norm, which stays exact, and every projected ascent.

    The network is in eval mode for g, with the pool as it is at this step. Logged beside the accuracy at x + delta: `penalty`
    (the dual's value at the clean image), `clean_loss`, and `cost` = R(delta), so that loss - cost is the penalised loss.
    """
    if solver not in ("fast", "iterative"):
        raise UserError(f"solver must be 'fast' or 'iterative', got {solver!r}")
    check_number("steps", steps, 1, whole=True)
    inner = standard(label_smoothing=label_smoothing)

    def objective(keys, model, variables, batch, step):
        images, labels = batch["image"], batch["label"]
        predict = fast_convs(bind(model, lax.stop_gradient(variables), step=step))  # else a loop would be slow on a CPU

        @fused
        def gradient_at(points):
            def summed(points):  # the sum: a mean would scale each example's gradient by 1/b
                losses = cross_entropy(predict(points), labels)
                return losses.sum(), losses

            (_, losses), gradient = jax.value_and_grad(summed, has_aux=True)(points)
            return gradient, losses

        gradient, clean = gradient_at(images)
        delta = perturbation(penalty, solver, steps, images, gradient, lambda points: gradient_at(points)[0])
        delta = lax.stop_gradient(delta)
        loss, metrics, batch_stats = inner(keys, model, variables, {**batch, "image": images + delta}, step)
        logs = {"penalty": penalty.value(gradient), "clean_loss": clean, "cost": penalty.cost(delta)}
        return loss, {**metrics, **logs}, batch_stats

    return objective


def perturbation(
    penalty: Penalty, solver: str, steps: int, images: Array, gradient: Array, gradient_at: Callable[[Array], Array]
) -> Array:
    """delta (b, h, w, c) of `norm_regularised`. gradient: at the images (b, h, w, c); gradient_at: points -> gradient there."""
    cut = lambda delta: jnp.clip(images + delta, 0.0, 1.0) - images
    first = penalty.maximiser(gradient)
    if solver == "fast":
        return cut(first) if penalty.boxed else first
    if penalty.scale is not None:
        # From the maximiser: from 0, entries with a small gradient would take many steps to where R begins.
        move = lambda _, delta: penalty.prox(delta + penalty.scale * gradient_at(images + delta), penalty.scale)
        return lax.fori_loop(0, steps, move, first)
    ascend = lambda delta, direction: cut(penalty.project(delta + 2.5 / steps * direction))
    delta = ascend(jnp.zeros_like(images), first)
    climb = lambda _, delta: ascend(delta, penalty.maximiser(gradient_at(images + delta)))
    return lax.fori_loop(1, steps, climb, delta)


TABLE = table(norm_regularised)
