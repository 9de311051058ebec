"""Explanations: where the network looks, as functions (keys, predict, images, labels) -> maps (b, h', w')."""

from topgap_jax.build import merged
from topgap_jax.explain import cam, field, gradient, masks, perturbation, surrogate
from topgap_jax.explain.field import fields, theoretical_fields

TABLE = merged(cam.TABLE, field.TABLE, gradient.TABLE, masks.TABLE, perturbation.TABLE, surrogate.TABLE)
globals().update(TABLE)  # the methods, also where a file has the name of one
