"""`coverage("stage3", "stage4")`: which of the channels of some layers ever answer (DeepXplore, arXiv 1705.06640)."""

import functools

import jax.numpy as jnp
import numpy as np

from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.models import bind
from topgap_jax.rewrite import feature_layer, read
from topgap_jax.types import Array, Cost, Curve, Evaluator, Measure

GRID = (0.0, 0.25, 0.5, 0.75)
NAMES = {"neuron_coverage": "neuron coverage by the split", "image_coverage": "neuron coverage by one image"}


def coverage(*layers: str, threshold: float = 0.25) -> Evaluator:
    """Share of neurons that pass a threshold: `neuron_coverage` over the split, `image_coverage` by one image, on
    average.

    A neuron is a channel of a layer (b, h, w, c) or a unit of one (b, c). Its value is its spatial mean after the layer
    is min-max scaled by its own lowest and highest entry in that image (a constant layer is 0); an image covers it if
    the value is > threshold, a split if some image does. The shares are of the neurons of all layers; curves over t =
    0, .25, .5, .75.

    The union grows with the number of images: compare on the same images only. One channel with an outlier lowers all
    others. More of it is no evidence of better features (Harel-Canada et al., FSE 2020). Rows are one byte per neuron
    and image.
    """
    if not layers:
        raise UserError(
            "coverage: name one or more layers, such as coverage('stage3', 'stage4'); `topgap layers` lists them"
        )
    for layer in layers:
        if not isinstance(layer, str):
            raise UserError(f"coverage: a layer is named by a text such as 'stage3', got {layer!r}")
    check_number("threshold", threshold, 0, 1)
    thresholds = sorted({*GRID, threshold})

    def rows(keys, model, variables, batch, prepared):
        predict, images = bind(model, variables), batch["image"]
        for layer in layers:
            feature_layer(predict, layer, images)
        nested = functools.reduce(read, layers, predict)(images)
        values = []
        for layer in reversed(layers):
            nested, value = nested
            if value.ndim not in (2, 4):
                raise UserError(f"coverage: layer '{layer}' has shape {value.shape}; (b, h, w, c) or (b, c) is needed")
            values.insert(0, neurons(value))
        levels = jnp.concatenate(values, 1)[..., None] > jnp.asarray(thresholds, jnp.float32)
        # How many of the ascending thresholds a neuron passes says which.
        return {"passed": levels.sum(-1).astype(jnp.uint8)}

    def summary(rows):
        passed, shares = rows["passed"], {}
        for level, t in enumerate(thresholds, 1):
            shares[t] = float((passed.max(0) >= level).mean()), float((passed >= level).mean(dtype=np.float64))
        measures, curves, n = {}, {}, len(passed)
        for place, (name, label) in enumerate(NAMES.items()):
            measures[name] = Measure(shares[threshold][place], n=n, label=label)
            curves[f"{name}_curve"] = Curve(list(GRID), [shares[t][place] for t in GRID], ("threshold", "share"), label)
        neurons = Measure(passed.shape[1], n=n, label="neurons", main=False)
        return measures | {"neurons": neurons} | curves

    return Evaluator(rows, summary, lambda predict, images: Cost(1, 0))


def neurons(value: Array) -> Array:
    """Spatial means (b, c) of a layer (b, h, w, c) or (b, c), min-max scaled over each example."""
    axes = tuple(range(1, value.ndim))
    value = value.astype(jnp.float32)
    low, high = value.min(axes, keepdims=True), value.max(axes, keepdims=True)
    scaled = jnp.where(high > low, (value - low) / jnp.where(high > low, high - low, 1), 0)
    return scaled.mean(axes[:-1]) if value.ndim == 4 else scaled


TABLE = table(coverage)
