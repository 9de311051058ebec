"""Explanations from the gradient with respect to the pixels: `gradient`, `integrated` along a path, `smooth` over
noise."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.keys import fold_in, split
from topgap_jax.rewrite import with_rules, zero_images
from topgap_jax.rewrite.rules import checked
from topgap_jax.rewrite.speed import sum_over
from topgap_jax.scores import logit
from topgap_jax.types import Array, Cost, Explain, Rules

REDUCTIONS: dict[str, tuple[Callable[[Array], Array], str | None]] = {
    "max_abs": (lambda values: jnp.abs(values).max(-1), None),
    "sum": (lambda values: values.sum(-1), "lowers the class's logit"),
    "sum_abs": (lambda values: jnp.abs(values.sum(-1)), None),
    "abs_sum": (lambda values: jnp.abs(values).sum(-1), None),
    "sum_relu": (lambda values: jax.nn.relu(values.sum(-1)), None),
}
"""(b, h, w, c) -> (b, h, w), and what a negative value means; named in the order of the operations: "sum_abs" is
|sum|."""


def gradient(*, rules: Rules | None = None, reduce: str = "max_abs") -> Explain:
    """max over channels of |d z_y / d x|, maps (b, h, w) (Simonyan et al. 2014, arXiv 1312.6034).

    `rules` change the backward pass: `gradient(rules=guided_backprop)` is guided backprop. `reduce`, how channels
    become one map: "max_abs", "sum" (signed), "sum_abs" (|sum|), "abs_sum" (sum of |.|) or "sum_relu". With backward
    rules a map is the gradient of no function and has no derivative.
    """
    checked(rules)

    def pixels(keys, predict, images, labels):
        return _gradient(_ruled(predict, rules), images, labels)

    return _explanation(pixels, reduce, 1, rules)


def integrated(
    *,
    steps: int = 50,
    rule: str = "gausslegendre",
    baseline: float | Sequence[float] | Array | None = None,
    rules: Rules | None = None,
    multiply_by_inputs: bool = True,
    reduce: str = "sum_abs",
) -> Explain:
    """Integrated gradients: |sum over channels of (x - x') mean over t of d z_y / d x at x' + t (x - x')|, maps (b, h,
    w).

    Sundararajan et al. 2017, arXiv 1703.01365. With `rules=guided` it is integrated gradients with guided non-linearity
    (Kwon et al., ICPR 2020), whose `max_pool` rule is open in that paper: `guided_upsampled` is the official code's.
    Signed maps (`reduce="sum"`) of the plain method add up to z_y(x) - z_y(x'), up to the quadrature; those under
    backward rules do not.

    rule: "gausslegendre", "riemann_right", "riemann_middle" or "riemann_trapezoid" (weights 1 / (steps - 1), halved at
    the ends). A ReLU network's gradient jumps along the path, so that no rule converges faster than the jumps allow.
    baseline x': a number, one per channel, or an array that broadcasts to the images; by default what the network's
    normalisation maps to zero, the mean of (x - mean) / std (`rewrite.zero_images`; a network without normalisation:
    black). multiply_by_inputs: False leaves the factor (x - x') out. reduce: as in `gradient`.

    The steps run one after another, so that memory is that of one gradient. Compiled anew by each eager call: use
    `jax.jit`.
    """
    checked(rules)
    nodes, weights = quadrature(rule, steps)

    def pixels(keys, predict, images, labels):
        start = zero_images(predict, images) if baseline is None else _broadcast(baseline, images)
        f = _ruled(predict, rules)
        at = lambda node, weight: weight * _gradient(f, start + node * (images - start), labels)
        mean = sum_over(at, (nodes, weights), images)
        return (images - start) * mean if multiply_by_inputs else mean

    return _explanation(pixels, reduce, steps, rules)


def smooth(explain: Explain, *, samples: int = 32, sigma: float = 0.15) -> Explain:
    """Mean of an explanation over images with Gaussian noise (SmoothGrad, Smilkov et al. 2017, arXiv 1706.03825).

    sigma is in units of each image's own range, max - min; the noisy images are not clipped to [0, 1].
    `smooth(gradient())` and `smooth(integrated())` average the signed values of every channel and reduce them after
    that. The samples run one after another. Noise comes from the example's own key.
    """
    Explain.single("smooth", explain)
    check_number("samples", samples, 1, whole=True)
    check_number("sigma", sigma, 0)
    one = explain.pixels or explain.maps

    def mean(keys, predict, images, labels):
        spread = sigma * jnp.ptp(images, (1, 2, 3), keepdims=True)

        def at(sample):
            noise_keys, map_keys = split(fold_in(keys, sample))
            noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(noise_keys)
            return one(map_keys, predict, images + spread * noise, labels) / samples

        return sum_over(at, (np.arange(samples),), images)

    if explain.pixels is None:
        maps, pixels = mean, None
    else:
        maps, pixels = (lambda *arguments: explain.reduce(mean(*arguments))), mean
    cost = lambda predict, images: samples * explain.cost(predict, images)
    return dataclasses.replace(explain, maps=maps, pixels=pixels, cost=cost)


def quadrature(rule: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes (steps,) in [0, 1] and weights (steps,) that sum to 1."""
    check_number("steps", steps, 2 if rule == "riemann_trapezoid" else 1, whole=True)
    if rule == "gausslegendre":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return np.float32((nodes + 1) / 2), np.float32(weights / 2)
    weights = np.full(steps, 1 / steps)
    if rule == "riemann_right":
        nodes = np.arange(1, steps + 1) / steps
    elif rule == "riemann_middle":
        nodes = (np.arange(steps) + 0.5) / steps
    elif rule == "riemann_trapezoid":
        nodes, weights = np.linspace(0, 1, steps), np.full(steps, 1 / (steps - 1))
        weights[[0, -1]] /= 2
    else:
        raise UserError(
            f"rule must be 'gausslegendre', 'riemann_right', 'riemann_middle' or 'riemann_trapezoid', got {rule!r}"
        )
    return np.float32(nodes), np.float32(weights)


def _explanation(pixels: Callable, reduce: str, gradients: int, rules: Rules | None) -> Explain:
    """The explanation whose maps are the reduced values (b, h, w, c) of `pixels`."""
    if reduce not in REDUCTIONS:
        raise UserError(f"reduce must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduce!r}")
    to_map, signed = REDUCTIONS[reduce]
    return Explain(
        maps=lambda *arguments: to_map(pixels(*arguments)),
        cost=lambda predict, images: Cost(0, gradients),
        pixels=pixels,
        reduce=to_map,
        signed=signed,
        rules=tuple((rules or {}).items()),
    )


def _ruled(predict, rules):
    return with_rules(predict, **rules) if rules else predict


def _gradient(f: Callable, images: Array, labels: Array) -> Array:
    """d z_y / d x, (b, h, w, c). The sum over the batch is of examples that do not see each other."""
    return jax.grad(lambda points: logit(f(points), labels).sum())(images)


def _broadcast(baseline: Any, images: Array) -> Array:
    try:
        return jnp.broadcast_to(jnp.asarray(baseline, images.dtype), images.shape)
    except (TypeError, ValueError):
        shape = getattr(baseline, "shape", None)
        what = f"an array of shape {shape}" if shape is not None else repr(baseline)
        raise UserError(
            f"integrated: baseline must be a number, one per channel or an array for images of shape {images.shape},"
            f" got {what}"
        ) from None


TABLE = table(gradient, integrated, smooth)
