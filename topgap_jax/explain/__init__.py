"""Explanations: where the network looks, as functions (keys, predict, images, labels) -> maps (b, h', w')."""

from topgap_jax.explain.cam import cam, grad_cam
from topgap_jax.explain.field import field, fields

__all__ = ["TABLE", "cam", "field", "fields", "grad_cam"]

TABLE = {"cam": cam, "field": field, "grad_cam": grad_cam}
