"""What explanations share: the gradient of a score with respect to the pixels, and how channels become one map."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from topgap_jax.errors import UserError
from topgap_jax.scores import logit
from topgap_jax.types import Array, Cost, Explain, Rules, Score

REDUCTIONS: dict[str, tuple[Callable[[Array], Array], str | None]] = {
    "max_abs": (lambda values: jnp.abs(values).max(-1), None),
    "sum": (lambda values: values.sum(-1), "lowers the class's logit"),
    "sum_abs": (lambda values: jnp.abs(values.sum(-1)), None),
    "abs_sum": (lambda values: jnp.abs(values).sum(-1), None),
    "sum_relu": (lambda values: jax.nn.relu(values.sum(-1)), None),
}
"""(b, h, w, c) -> (b, h, w), and what a negative value means; named in the order of the operations: "sum_abs" is
|sum|."""


def pixel_explanation(pixels: Callable, reduce: str, cost: Cost, rules: Rules | None = None) -> Explain:
    """The explanation whose maps are the reduced values (b, h, w, c) of `pixels`."""
    if reduce not in REDUCTIONS:
        raise UserError(f"reduce must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduce!r}")
    to_map, signed = REDUCTIONS[reduce]
    return Explain(
        maps=lambda *arguments: to_map(pixels(*arguments)),
        cost=lambda predict, images: cost,
        pixels=pixels,
        reduce=to_map,
        signed=signed,
        rules=tuple((rules or {}).items()),
    )


def input_gradient(f: Callable, images: Array, labels: Array, score: Score = logit) -> Array:
    """d s / d x, (b, h, w, c). The sum over the batch is of examples that do not see each other."""
    return jax.grad(lambda points: score(f(points), labels).sum())(images)


def rectified(maps: Array, relu: bool) -> Array:
    """The maps, without what is below 0 where `relu` asks so."""
    return jax.nn.relu(maps) if relu else maps
