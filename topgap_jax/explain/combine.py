"""Explanations made of explanations: averaged over noise, over each other, one against another, of another target."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax.build import check_number, table
from topgap_jax.edges import check_logits, check_predict
from topgap_jax.errors import UserError
from topgap_jax.grids import same_size
from topgap_jax.keys import fold_in, normal, split
from topgap_jax.rewrite.speed import sum_over
from topgap_jax.scores import class_of_rank
from topgap_jax.types import Cost, Explain

AVERAGES = ("mean", "square", "variance")


def smooth(explain: Explain, *, samples: int = 32, sigma: float = 0.15, average: str = "mean") -> Explain:
    """Mean of an explanation over images with Gaussian noise (SmoothGrad, Smilkov et al. 2017, arXiv 1706.03825).

    sigma is in units of each image's own range, max - min; the noisy images are not clipped to [0, 1].
    `smooth(gradient())` and `smooth(integrated())` average the signed values of every channel and reduce them after
    that. average: "mean"; "square", the mean of the squares (SmoothGrad-Squared, Hooker et al. 2018, arXiv 1806.10758);
    "variance", their mean square distance from their mean, divided by n (VarGrad, Adebayo et al. 2018, arXiv
    1810.03307); the last two are averaged over channels. The samples run one after another. Noise comes from the
    example's own key.
    """
    Explain.single("smooth", explain)
    check_number("samples", samples, 1, whole=True)
    check_number("sigma", sigma, 0)
    if average not in AVERAGES:
        raise UserError(f"smooth: average must be one of {', '.join(map(repr, AVERAGES))}, got {average!r}")
    one = explain.pixels or explain.maps

    def values(keys, predict, images, labels):
        spread = sigma * jnp.ptp(images, (1, 2, 3), keepdims=True)
        # Differences from the clean image's values: a mean of squares less the square of a mean cancels.
        centre = one(keys, predict, images, labels) if average == "variance" else 0.0

        def at(sample):
            noise_keys, map_keys = split(fold_in(keys, sample))
            value = one(map_keys, predict, images + spread * normal(noise_keys, images), labels) - centre
            return {"mean": value, "square": value**2, "variance": (value, value**2)}[average]

        total = jax.tree.map(lambda x: x / samples, sum_over(at, (np.arange(samples),), images))
        return jnp.maximum(total[1] - total[0] ** 2, 0) if average == "variance" else total

    passes = samples + (average == "variance")
    cost = lambda predict, images: passes * explain.cost(predict, images)
    changed = {} if average == "mean" else {"signed": None}
    if explain.pixels is None:
        return dataclasses.replace(explain, maps=values, cost=cost, **changed)
    reduce = explain.reduce if average == "mean" else lambda values: values.mean(-1)
    maps = lambda *arguments: reduce(values(*arguments))
    return dataclasses.replace(explain, maps=maps, pixels=values, reduce=reduce, cost=cost, **changed)


def normalise(explain: Explain) -> Explain:
    """The explanation divided by its largest |value|, image by image: maps in [-1, 1]; a map of zeros stays one."""
    Explain.single("normalise", explain)

    def maps(keys, predict, images, labels):
        values = explain.maps(keys, predict, images, labels).astype(jnp.float32)
        largest = jnp.abs(values).max((1, 2), keepdims=True)
        return values / jnp.where(largest > 0, largest, 1)

    return dataclasses.replace(explain, maps=maps, pixels=None, reduce=None)


def ensemble(*explains: Explain) -> Explain:
    """Mean of several explanations, each divided by its largest |value| (`normalise`), at the size of the largest map.

    Maps of different methods have different units, so that a plain mean would be the one with the largest numbers.
    Smaller maps are enlarged bilinearly (half-pixel centres). (Rieger & Hansen 2019, arXiv 1903.00519.)
    """
    if len(explains) < 2:
        raise UserError("ensemble: give two or more explanations, such as ensemble(grad_cam(), integrated())")
    each = [normalise(Explain.single("ensemble", one)) for one in explains]

    def maps(keys, predict, images, labels):
        drawn = [None if keys is None else fold_in(keys, i) for i in range(len(each))]
        values = same_size([one.maps(part, predict, images, labels) for one, part in zip(each, drawn)])
        return sum(values) / len(values)

    signed = next((one.signed for one in each if one.signed), None)
    return _several(maps, each, signed)


def contrast(a: Explain, b: Explain) -> Explain:
    """The difference a - b of two explanations, at the size of the larger map: what the first sees and the second does
    not.

    `contrast(grad_cam(), targeted(grad_cam(), 'runner_up'))` shows what speaks for the label rather than for the class
    behind it. Maps of two methods have different units: give both as `normalise(...)`.
    """
    both = [Explain.single("contrast", one) for one in (a, b)]

    def maps(keys, predict, images, labels):
        # One key for both: where a method draws, the difference is not one of the draws.
        first, second = same_size([one.maps(keys, predict, images, labels) for one in both])
        return first - second

    return _several(maps, both, "more in the second explanation")


def targeted(explain: Explain, target: int | str | Callable) -> Explain:
    """The explanation of another target than the label.

    target: a class; "runner_up", the class with the largest logit but the label's; or a function of what the network
    returns to one number an example (b,): a box's score, a mask's sum, the similarity of an embedding. The explanation
    then sees a network with that number as its only logit.
    """
    if not isinstance(explain, Explain):
        raise UserError(f"targeted: give an explanation such as gradient(), got {explain!r}")
    if callable(target):
        of = lambda predict, images, labels: (_only(predict, target), jnp.zeros_like(labels))
        more = Cost()
    elif target == "runner_up":
        of = lambda predict, images, labels: (predict, _runner_up(predict(images), labels))
        more = Cost(1, 0)
    elif isinstance(target, int | np.integer) and not isinstance(target, bool) and target >= 0:
        of = lambda predict, images, labels: (_checked(predict, images, target), jnp.full_like(labels, target))
        more = Cost()
    else:
        raise UserError(f"targeted: target must be a class, 'runner_up' or a function of the outputs, got {target!r}")

    def through(method):
        if method is None:
            return None

        def values(keys, predict, images, labels):
            predict, labels = of(predict, images, labels)
            return method(keys, predict, images, labels)

        return values

    cost = lambda predict, images: more + explain.cost(_only(predict, target) if callable(target) else predict, images)
    return dataclasses.replace(explain, maps=through(explain.maps), pixels=through(explain.pixels), cost=cost)


def _only(predict, target):
    """The network whose only logit (b, 1) is `target` of its outputs."""

    def only(images, keys=None):
        value = target(predict(images, keys) if keys is not None else predict(images))
        if getattr(value, "shape", None) != images.shape[:1]:
            got = value.shape if hasattr(value, "shape") else f"a {type(value).__name__}"
            raise UserError(f"targeted: the target must be one number an example, shape {images.shape[:1]}, got {got}")
        return value[:, None]

    return only


def _runner_up(logits, labels):
    check_logits("targeted", logits)
    return class_of_rank(logits, labels, jnp.zeros_like(labels))


def _checked(predict, images, target):
    logits = check_predict("targeted", predict, images)
    check_logits("targeted", logits)
    if target >= logits.shape[-1]:
        raise UserError(f"targeted: class {target} is none of a network with {logits.shape[-1]} logits")
    return predict


def _several(maps, explains, signed) -> Explain:
    cost = lambda predict, images: sum((one.cost(predict, images) for one in explains), start=Cost())
    return Explain(maps, cost, signed=signed, rules=tuple(rule for one in explains for rule in one.rules))


TABLE = table(smooth, normalise, ensemble, contrast, targeted)
