"""Explanations: where the network looks, as functions (keys, predict, images, labels) -> maps (b, h', w')."""

from topgap_jax.explain.cam import cam, grad_cam
from topgap_jax.explain.field import field, fields
from topgap_jax.explain.gradient import gradient, integrated, smooth

__all__ = ["TABLE", "cam", "field", "fields", "grad_cam", "gradient", "integrated", "smooth"]

TABLE = {
    "cam": cam,
    "field": field,
    "grad_cam": grad_cam,
    "gradient": gradient,
    "integrated": integrated,
    "smooth": smooth,
}
