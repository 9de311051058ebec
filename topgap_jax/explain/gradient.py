"""Explanations from the gradient with respect to the pixels: at the image, and along paths from baselines."""

import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax.baselines import Baseline, baseline_images, check_baseline
from topgap_jax.build import check_number, table
from topgap_jax.edges import check_images
from topgap_jax.errors import UserError
from topgap_jax.explain.pixels import input_gradient, pixel_explanation
from topgap_jax.keys import fold_in, split
from topgap_jax.rewrite import with_rules
from topgap_jax.rewrite.rules import checked
from topgap_jax.rewrite.speed import sum_over
from topgap_jax.scores import logit
from topgap_jax.types import Array, Cost, Explain, Rules, Score


def gradient(*, score: Score = logit, rules: Rules | None = None, reduce: str = "max_abs") -> Explain:
    """max over channels of |d s / d x|, maps (b, h, w), s the score, z_y by default (Simonyan et al. 2014, arXiv
    1312.6034).

    `rules` change the backward pass: `gradient(rules=guided_backprop)` is guided backprop. `reduce`, how channels
    become one map: "max_abs", "sum" (signed), "sum_abs" (|sum|), "abs_sum" (sum of |.|) or "sum_relu"; the values of
    every channel are the explanation's `pixels`. With backward rules a map is the gradient of no function and has no
    derivative.
    """
    checked(rules)

    def pixels(keys, predict, images, labels):
        return input_gradient(_ruled(predict, rules), images, labels, score)

    return pixel_explanation(pixels, reduce, Cost(0, 1), rules)


def input_x_gradient(
    *, baseline: Baseline = "black", score: Score = logit, rules: Rules | None = None, reduce: str = "sum"
) -> Explain:
    """Sum over channels of (x - x') d s / d x, signed maps (b, h, w): the first-order part of s(x) - s(x') (Shrikumar
    et al. 2016, arXiv 1605.01713).

    Baseline x' as of `integrated`: "black" gives x times gradient, "mean" that of the normalised image.
    """
    checked(rules)
    check_baseline("input_x_gradient: baseline", baseline)

    def pixels(keys, predict, images, labels):
        start = baseline_images("input_x_gradient: baseline", baseline, predict, images, keys)
        return (images - start) * input_gradient(_ruled(predict, rules), images, labels, score)

    return pixel_explanation(pixels, reduce, Cost(0, 1), rules)


def integrated(
    *,
    steps: int = 50,
    rule: str = "gausslegendre",
    baseline: Baseline = "mean",
    score: Score = logit,
    rules: Rules | None = None,
    multiply_by_inputs: bool = True,
    reduce: str = "sum_abs",
) -> Explain:
    """Integrated gradients: |sum over channels of (x - x') mean over t of d s / d x at x' + t (x - x')|, maps (b, h,
    w).

    Sundararajan et al. 2017, arXiv 1703.01365; s is the score, z_y by default. With `rules=guided` it is integrated
    gradients with guided non-linearity (Kwon et al., ICPR 2020), whose `max_pool` rule is open in that paper:
    `guided_upsampled` is the official code's. Signed maps (`reduce="sum"`) of the plain method add up to s(x) - s(x'),
    up to the quadrature; those under backward rules do not.

    rule: "gausslegendre", "riemann_right", "riemann_middle" or "riemann_trapezoid" (weights 1 / (steps - 1), halved at
    the ends). A ReLU network's gradient jumps along the path, so that no rule converges faster than the jumps allow.
    baseline x': "mean" (what the network's normalisation maps to zero), "black", "white", "blur" (11x11 Gaussian),
    "noise" (uniform, the example's own), a number, one per channel, or an array that broadcasts to the images.
    multiply_by_inputs: False leaves the factor (x - x') out. reduce: as in `gradient`.

    The steps run one after another, so that memory is that of one gradient. Compiled anew by each eager call: use
    `jax.jit`.
    """
    checked(rules)
    check_baseline("integrated: baseline", baseline)
    nodes, weights = quadrature(rule, steps)

    def pixels(keys, predict, images, labels):
        start = baseline_images("integrated: baseline", baseline, predict, images, keys)
        f = _ruled(predict, rules)
        at = lambda node, weight: weight * input_gradient(f, start + node * (images - start), labels, score)
        mean = sum_over(at, (nodes, weights), images)
        return (images - start) * mean if multiply_by_inputs else mean

    return pixel_explanation(pixels, reduce, Cost(0, steps), rules)


def expected_gradients(references: Array, *, samples: int = 64, score: Score = logit, reduce: str = "sum") -> Explain:
    """Mean over references x' and t ~ U(0, 1) of (x - x') d s / d x at x' + t (x - x'), signed maps (b, h, w) (Erion et
    al. 2019, arXiv 1906.10670; GradientShap without noise).

    references (n, h, w, c) in [0, 1]: images that stand for "nothing in particular", such as training images; in a
    config `references` names 64 of them. Each example draws its own, from its own key: sample m of `samples` has t = (m
    + u) / samples, u uniform. The maps add up to about s(x) - mean of s(x').
    """
    check_number("samples", samples, 1, whole=True)
    if getattr(references, "ndim", 0) != 4 or len(references) == 0:
        raise UserError(
            "expected_gradients: references must be an array (n, h, w, c) of images in [0, 1], got "
            + (f"shape {references.shape}" if hasattr(references, "shape") else repr(references))
        )

    check_images("expected_gradients: references", references)

    def pixels(keys, predict, images, labels):
        if references.shape[1:] != images.shape[1:]:
            raise UserError(
                f"expected_gradients: references of shape {references.shape[1:]} do not fit images of shape "
                f"{images.shape[1:]}"
            )
        stored = jnp.asarray(references, images.dtype)

        def at(sample):
            which, where = split(fold_in(keys, sample))
            start = stored[jax.vmap(lambda key: jax.random.randint(key, (), 0, len(stored)))(which)]
            t = (sample + jax.vmap(lambda key: jax.random.uniform(key, ()))(where)) / samples
            return path_gradient(predict, start, t, images, labels, score) / samples

        return sum_over(at, (np.arange(samples),), images)

    return pixel_explanation(pixels, reduce, Cost(0, samples))


def path_gradient(predict, start: Array, t: Array, images: Array, labels: Array, score: Score = logit) -> Array:
    """(x - x') d s / d x at x' + t (x - x'), (b, h, w, c); x' `start` (b, h, w, c), t (b,)."""
    difference = images - start
    return difference * input_gradient(predict, start + t[:, None, None, None] * difference, labels, score)


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


def _ruled(predict, rules):
    return with_rules(predict, **rules) if rules else predict


TABLE = table(gradient, input_x_gradient, integrated, expected_gradients)
