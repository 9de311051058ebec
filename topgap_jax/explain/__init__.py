"""Explanations: where the network looks, as functions (keys, predict, images, labels) -> maps (b, h', w')."""

from topgap_jax.build import merged
from topgap_jax.explain import ablation, cam, field, gradient, layers
from topgap_jax.explain.field import fields

TABLE = merged(ablation.TABLE, cam.TABLE, field.TABLE, gradient.TABLE, layers.TABLE)
globals().update(TABLE)  # the methods, also where a file has the name of one
