"""Explanations: where the network looks, as functions (keys, predict, images, labels) -> maps (b, h', w')."""

from topgap_jax.explain.cam import cam, grad_cam

__all__ = ["TABLE", "cam", "grad_cam"]

TABLE = {"cam": cam, "grad_cam": grad_cam}
