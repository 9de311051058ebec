"""`background_reliance(explain)`: how much of a map lies beside the object, by the object's size and place."""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import scipy  # scipy.stats is imported when it is first used

from topgap_jax.attacks import misclassified
from topgap_jax.build import table
from topgap_jax.grids import resized
from topgap_jax.metrics.localisation import object_masks
from topgap_jax.metrics.summaries import average, share
from topgap_jax.models import bind
from topgap_jax.types import Array, Cost, Evaluator, Explain, Measure

SIZES = (0, 0.05, 0.1, 0.25, 0.5, 1)
DISTANCES = (0, 0.2, 0.4, 1)
FEWEST = 20
NO_OBJECT = "no image has an object, a background and a map that is not 0"


def background_reliance(explain: Explain) -> Evaluator:
    """The map's excess outside the object, o / (1 - size): 1 for a map that is the same everywhere, 0 for one on the
    object.

    o is the share of sum |map| outside, size the object's share of the image, distance that of its centroid from the
    image's centre, 1 in a corner. Networks rely on the background where objects are small and far from the centre
    (arXiv 2505.03569, which has other formulas): means of the excess and the accuracy by size and by distance, of the
    excess by both, and Spearman's correlation with each. Of fewer than 20 images there is no mean. Needs regions or
    boxes; images without an object or a background, and maps that are 0, are left out.
    """
    Explain.single("background_reliance", explain)

    def rows(keys, model, variables, batch, prepared):
        predict, images, labels = bind(model, variables), batch["image"], batch["label"]
        inside, known = object_masks(batch)
        full = resized(jnp.abs(explain.maps(keys, predict, images, labels)), inside.shape[1:])
        right = ~misclassified(predict(images), labels)
        return {**excess(full, inside & known, known), "right": right}

    def summary(rows):
        defined = ~np.isnan(rows["excess"])
        values, size, distance, right = (rows[name][defined] for name in ("excess", "size", "distance", "right"))
        about = Measure(better="lower", label="map outside the object", unit="times chance")
        measures = {"excess": average(values, about, NO_OBJECT)}
        axes = {"size": (size, SIZES), "distance": (distance, DISTANCES)}
        for name, (of, _) in axes.items():
            measures[f"excess_by_{name}"] = _spearman(values, of, name)
        bins = {name: list(enumerate(pairwise(edges))) for name, (_, edges) in axes.items()}
        within = {(name, i): _within(of, *bins[name][i][1]) for name, (of, _) in axes.items() for i, _ in bins[name]}
        for name in axes:
            for i, (low, high) in bins[name]:
                words = f"{name} {low:g} to {high:g}"
                mask = within[name, i]
                measures[f"excess_{name}_{i}"] = _mean(values[mask], f"excess, {words}", "lower")
                accuracy = Measure(better="higher", label=f"accuracy, {words}", main=False)
                measures[f"accuracy_{name}_{i}"] = _enough(right[mask], accuracy, share)
        for i, (low, high) in bins["size"]:
            for j, (near, far) in bins["distance"]:
                mask = within["size", i] & within["distance", j]
                words = f"excess, size {low:g} to {high:g}, distance {near:g} to {far:g}"
                measures[f"excess_size_{i}_distance_{j}"] = _mean(values[mask], words, "lower")
        return measures

    return Evaluator(rows, summary, lambda predict, images: explain.cost(predict, images) + Cost(1, 0))


def excess(maps: Array, inside: Array, known: Array) -> dict[str, Array]:
    """excess, size and distance (b,) of maps (b, h, w) that are not negative; excess is NaN where it is undefined."""
    h, w = inside.shape[1:]
    area, whole = inside.sum((1, 2)), known.sum((1, 2))
    size = area / jnp.maximum(whole, 1)
    outside = (maps * (known & ~inside)).sum((1, 2)) / (maps * known).sum((1, 2))
    rows, columns = (2 * jnp.arange(n) + 1.0 - n for n in (h, w))  # from the centre, in half pixels
    place = [(inside * rows[:, None]).sum((1, 2)) / h, (inside * columns).sum((1, 2)) / w]
    distance = jnp.sqrt((place[0] ** 2 + place[1] ** 2) / 2) / jnp.maximum(area, 1)
    defined = (area > 0) & (area < whole) & jnp.isfinite(outside)
    return {"excess": jnp.where(defined, outside / (1 - size), jnp.nan), "size": size, "distance": distance}


def _within(values, low, high):
    """low < value <= high, the first bin with its lower end."""
    return (values > low if low else values >= 0) & (values <= high)


def _mean(values, words, better):
    return _enough(values, Measure(better=better, label=words, unit="times chance", main=False), average)


def _enough(values, about, summed):
    few = f"fewer than {FEWEST} images"
    return summed(values, about, few) if len(values) >= FEWEST else about._replace(n=len(values), reason=few)


def _spearman(values, of, name):
    about = Measure(n=len(values), label=f"Spearman's correlation with the {name}")
    if len(values) < FEWEST or np.ptp(values) == 0 or np.ptp(of) == 0:
        reason = f"fewer than {FEWEST} images" if len(values) < FEWEST else f"excess or {name} is the same everywhere"
        return about._replace(reason=reason)
    return about._replace(value=float(scipy.stats.spearmanr(values, of).statistic))


TABLE = table(background_reliance)
