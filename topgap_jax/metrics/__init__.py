"""Measures of maps: functions (keys, predict, maps, batch) -> {name: (b, ...)}, and the arithmetic under them."""

from topgap_jax.metrics import boxes, field, ranks
from topgap_jax.metrics.localisation import energy, in_region, iou, iou_curve
from topgap_jax.metrics.perturbation import deletion, insertion
from topgap_jax.metrics.spread import extent, gini

__all__ = [
    "TABLE",
    "boxes",
    "deletion",
    "energy",
    "extent",
    "field",
    "gini",
    "in_region",
    "insertion",
    "iou",
    "iou_curve",
    "ranks",
]

TABLE = {f.__name__: f for f in (iou, iou_curve, in_region, energy, gini, extent, deletion, insertion)}
