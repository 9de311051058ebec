"""Optimisers as configs name them: optax chains whose weight decay leaves biases and normalisation alone; and, for
fine-tuning, what learns and how fast, by the names of layers."""

import jax
import optax

from topgap_jax.build import check_number, did_you_mean, table
from topgap_jax.errors import UserError
from topgap_jax.types import Schedule

LISTED = 40  # layers that an error spells out


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


def freeze(optimizer: optax.GradientTransformation, *layers: str) -> optax.GradientTransformation:
    """The optimizer, but the parameters of `layers` stay as they are: freeze(adamw(1e-3), 'stem', 'stage1').

    A layer is a part of a parameter's path, "stem", "backbone" or "stage1/block0". What is frozen has no optimizer
    state, its gradient is not computed, and its weights do not decay. Batch norm's statistics are no parameters: see
    `frozen_statistics`. UserError, before the training, for a layer that is not there.
    """
    _check_optimizer("freeze", optimizer, layers)
    frozen = lambda params: _inside(params, layers, "freeze")
    learning = lambda params: jax.tree.map(lambda inside: not inside, frozen(params))
    return optax.chain(optax.masked(optimizer, learning), optax.masked(optax.set_to_zero(), frozen))


def slower(optimizer: optax.GradientTransformation, factor: float, *layers: str) -> optax.GradientTransformation:
    """The optimizer with `factor` times its learning rate in `layers`, named as in `freeze`: slower(adamw(1e-3), .1,
    'backbone').

    The whole update is scaled, decay included, as a parameter group of PyTorch's with a learning rate of its own is.
    """
    _check_optimizer("slower", optimizer, layers)
    check_number("factor", factor, 0)
    return optax.chain(optimizer, optax.masked(optax.scale(factor), lambda params: _inside(params, layers, "slower")))


def _check_optimizer(name, optimizer, layers):
    if not isinstance(optimizer, optax.GradientTransformation):
        raise UserError(f"{name} needs an optimizer first, such as {name}(adamw(1e-3), ...), got {optimizer!r:.60}")
    if not layers or not all(isinstance(layer, str) and layer.strip("/") for layer in layers):
        raise UserError(f"{name} needs names of layers, such as 'stem' or 'stage1/block0', got {layers!r:.60}")


def _inside(params, layers, name):
    """True for every parameter inside one of the layers; every layer must be there."""
    paths = jax.tree.map_with_path(lambda path, _: _text(path), params, is_leaf=_is_masked)
    inside = lambda path: [layer for layer in layers if f"/{layer.strip('/')}/" in f"/{path}/"]
    seen = {layer for path in jax.tree.leaves(paths) for layer in inside(path)}
    unknown = [layer for layer in layers if layer not in seen]
    if unknown:
        parents = dict.fromkeys(path.rpartition("/")[0] for path in jax.tree.leaves(paths))
        parts = dict.fromkeys(part for parent in parents for part in parent.split("/"))
        more = f" and {len(parents) - LISTED} more" if len(parents) > LISTED else ""
        raise UserError(
            f"{name}: there is no layer '{unknown[0]}'; {did_you_mean(unknown[0], [*parts, *parents], n=1)}"
            f"the layers with parameters are {', '.join(list(parents)[:LISTED])}{more}"
        )
    return jax.tree.map(lambda path: bool(inside(path)), paths)


def _text(path):
    return "/".join(str(getattr(part, "key", part)) for part in path)


def _is_masked(value):
    return isinstance(value, optax.MaskedNode)  # of a layer that another mask took out


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


TABLE = table(sgd, adamw, freeze, slower)
