"""What is left of the class under the map as a soft mask: `average_drop`."""

import jax.numpy as jnp

from topgap_jax.build import table
from topgap_jax.grids import scaled
from topgap_jax.scores import probability
from topgap_jax.types import Array, Cost, Measure, Metric


def average_drop() -> Metric:
    """Change of the label's probability p to o when the image is multiplied by the scaled map m in [0, 1], in percent.

    average_drop 100 max(0, p - o) / p, average_increase 100 [o > p] (Chattopadhay et al. 2018, arXiv 1710.11063),
    average_gain 100 max(0, o - p) / (1 - p) (Zhang et al. 2023, arXiv 2301.07002); (b,) each, {"mask_mean": (b,)} the
    mean of m. What is masked becomes black, as in the papers. A map that is 1 everywhere has no drop: no number here
    says anything without the mask's mean beside it, and a method that searches for such a mask optimises the measure.
    """

    def rows(keys, predict, maps, batch):
        images, labels = batch["image"], batch["label"]
        mask = scaled(maps, images.shape[1:3])
        before, after = probability(predict(images), labels), probability(predict(images * mask[..., None]), labels)
        return {**changes(before, after), "mask_mean": mask.mean((1, 2))}

    about = {
        "average_drop": Measure(better="lower", label="average drop", unit="%"),
        "average_increase": Measure(better="higher", label="average increase", unit="%", main=False),
        "average_gain": Measure(better="higher", label="average gain", unit="%"),
        "mask_mean": Measure(label="mean of the mask"),
    }
    return Metric(rows, about, lambda predict, images: Cost(2, 0))


def changes(before: Array, after: Array) -> dict[str, Array]:
    """Drop, increase and gain (b,) in percent of the probabilities p and o, (b,) each.

    >>> [f"{float(row[0]):.1f}" for row in changes(jnp.array([0.8]), jnp.array([0.6])).values()]
    ['25.0', '0.0', '0.0']
    """
    more = after > before
    return {
        "average_drop": 100 * jnp.where(more, 0, (before - after) / jnp.where(before > 0, before, 1)),
        "average_increase": 100 * more.astype(jnp.float32),
        "average_gain": 100 * jnp.where(more, (after - before) / jnp.where(more, 1 - before, 1), 0),
    }


TABLE = table(average_drop)
