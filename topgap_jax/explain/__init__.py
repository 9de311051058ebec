"""Explanations: where the network looks, as functions (keys, predict, images, labels) -> maps (b, h', w')."""

from topgap_jax.build import merged
from topgap_jax.explain import (
    ablation,
    attention,
    cam,
    combine,
    field,
    gradient,
    layers,
    masks,
    perturbation,
    relevance,
    rivals,
    surrogate,
    taylor,
)
from topgap_jax.explain.field import fields, theoretical_fields

TABLE = merged(
    cam.TABLE,
    layers.TABLE,
    ablation.TABLE,
    gradient.TABLE,
    taylor.TABLE,
    relevance.TABLE,
    attention.TABLE,
    perturbation.TABLE,
    masks.TABLE,
    surrogate.TABLE,
    combine.TABLE,
    field.TABLE,
    rivals.TABLE,
)
globals().update(TABLE)  # the methods, also where a file has the name of one
