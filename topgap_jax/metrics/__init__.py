"""Measures of maps: functions (keys, predict, maps, batch) -> {name: (b, ...)}, and the arithmetic under them."""

from topgap_jax.metrics import boxes, field
from topgap_jax.metrics.localisation import in_region, iou, iou_curve

__all__ = ["TABLE", "boxes", "field", "in_region", "iou", "iou_curve"]

TABLE = {"iou": iou, "iou_curve": iou_curve, "in_region": in_region}
