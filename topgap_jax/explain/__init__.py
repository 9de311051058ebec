"""Explanations: where the network looks, as functions (keys, predict, images, labels) -> maps (b, h', w')."""

from topgap_jax.build import merged
from topgap_jax.explain import attention, cam, field, gradient, relevance
from topgap_jax.explain.field import fields

TABLE = merged(attention.TABLE, cam.TABLE, field.TABLE, gradient.TABLE, relevance.TABLE)
globals().update(TABLE)  # the methods, also where a file has the name of one
