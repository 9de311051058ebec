"""Other passes through ReLU and max pooling: guided backprop, guided non-linearity, the softplus twin. For
`rewrite.with_rules`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from topgap_jax.build import check_number
from topgap_jax.types import Array, Rule, Rules


def softplus(beta: float) -> Rules:
    """ReLU replaced by log(1 + exp(beta z)) / beta, forward and backward: a twin with derivatives of any order.

    It differs from ReLU by log(2) / beta at most, at 0 (Dombrowski et al. 2019, arXiv 1906.07983). Max pooling stays.
    """
    check_number("beta", beta, 1e-6)

    # The derivatives of logaddexp hold more operations, which in a second derivative cost a tenth of the time.
    @jax.custom_jvp
    def forward(z):
        return jnp.maximum(z, 0) + jnp.log1p(jnp.exp(-beta * jnp.abs(z))) / beta

    forward.defjvp(lambda primals, tangents: (forward(*primals), jax.nn.sigmoid(beta * primals[0]) * tangents[0]))
    return {"relu": Rule(forward=lambda relu, z: forward(z))}


def clip(operation: Callable, gradient: Array, z: Array) -> Array:
    """[phi'(z) g]_+: only what is positive after the ordinary backward pass goes on (Springenberg et al. 2015, arXiv
    1412.6806)."""
    (back,) = jax.vjp(operation, z)[1](gradient)
    return jax.nn.relu(back)


def route(operation: Callable, gradient: Array, z: Array) -> Array:
    """[g]_+ sent to the maximum of each window, the first of several: the positive part before the ordinary backward
    pass."""
    (back,) = jax.vjp(operation, z)[1](jax.nn.relu(gradient))
    return back


def upsampled_mask(operation: Callable, gradient: Array, z: Array) -> Array:
    """g sent to the maximum of each window, times 1[g > 0] enlarged by nearest neighbours to the size of the input.

    What the official code of guided non-linearity does (hjkwonispl/gnl): with windows that overlap it can drop a
    positive part, or let a negative sum through; without, it equals `route`.
    """
    (back,) = jax.vjp(operation, z)[1](gradient)
    mask = gradient > 0
    for axis, (size, pooled) in enumerate(zip(z.shape, gradient.shape)):
        if size != pooled:
            mask = jnp.take(mask, jnp.arange(size) * pooled // size, axis)
    return jnp.where(mask, back, 0)


def deconvolve(operation: Callable, gradient: Array, z: Array) -> Array:
    """[g]_+, whatever z is (Zeiler & Fergus 2014, arXiv 1311.2901)."""
    return jax.nn.relu(gradient)


def rect_grad(q: float = 98) -> Rules:
    """RectGrad: g passes a ReLU where a g > the q-th percentile of a g in that image and layer, a = relu(z) (Kim et al.
    2019, arXiv 1902.04893)."""
    check_number("q", q, 0)

    def backward(operation, gradient, z):
        importance = (operation(z) * gradient).astype(jnp.float32)
        threshold = jnp.percentile(importance.reshape(len(z), -1), q, axis=1).reshape(-1, *(1,) * (z.ndim - 1))
        return jnp.where(importance > threshold, gradient, 0)

    return {"relu": Rule(backward=backward)}


deconvnet: Rules = {"relu": Rule(backward=deconvolve)}
guided_backprop: Rules = {"relu": Rule(backward=clip)}
guided: Rules = {"relu": Rule(backward=clip), "max_pool": Rule(backward=route)}
guided_upsampled: Rules = {"relu": Rule(backward=clip), "max_pool": Rule(backward=upsampled_mask)}
