"""Optimisers as configs name them: optax chains whose weight decay leaves biases and normalisation alone."""

import jax
import optax

from topgap_jax.build import check_number, table
from topgap_jax.types import Schedule


def sgd(
    learning_rate: float | Schedule,
    *,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 5e-4,
    clip: float | None = None,
) -> optax.GradientTransformation:
    """Stochastic gradient descent with momentum; weight decay is added to the gradient, before momentum, as in PyTorch.

    Decay applies to kernels (more than one axis) only. `clip` bounds the global norm of the gradient, before the decay.
    """
    _check(learning_rate, weight_decay, clip)
    check_number("momentum", momentum, 0, 1)
    decay = optax.add_decayed_weights(weight_decay, mask=kernels)
    return optax.chain(_clipped(clip), decay, optax.sgd(learning_rate, momentum, nesterov))


def adamw(
    learning_rate: float | Schedule,
    *,
    weight_decay: float = 0.01,
    clip: float | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101), on kernels only.

    A kernel has more than one axis. `clip` bounds the global norm of the gradient.
    """
    _check(learning_rate, weight_decay, clip)
    check_number("b1", b1, 0, 1)
    check_number("b2", b2, 0, 1)
    check_number("eps", eps, 0)
    step = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=kernels)
    return optax.chain(_clipped(clip), step)


def kernels(params):
    """True for every parameter with more than one axis: kernels, not biases or scales."""
    return jax.tree.map(lambda value: value.ndim > 1, params)


def _clipped(clip: float | None) -> optax.GradientTransformation:
    return optax.identity() if clip is None else optax.clip_by_global_norm(clip)


def _check(learning_rate, weight_decay, clip):
    if not callable(learning_rate):
        check_number("learning_rate", learning_rate, 0)
    check_number("weight_decay", weight_decay, 0)
    if clip is not None:
        check_number("clip", clip, 1e-12)


TABLE = table(sgd, adamw)
