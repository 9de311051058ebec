"""`adcc(explain)` and `arcc(explain)`: three measures of a map in one number, by their harmonic mean."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp

from topgap_jax.build import table
from topgap_jax.grids import scaled
from topgap_jax.metrics import average_drop, road
from topgap_jax.metrics.ranks import is_constant, pearson
from topgap_jax.metrics.summaries import average
from topgap_jax.models import bind
from topgap_jax.types import Array, Evaluator, Explain, Measure, Metric

SHARES = (0.2, 0.4, 0.6, 0.8)
TERMS = {
    "coherency": Measure(better="higher", label="coherency", main=False),
    "complexity": Measure(better="lower", label="complexity, the mean of the mask", main=False),
}


def adcc(explain: Explain) -> Evaluator:
    """Harmonic mean of coherency, 1 - complexity and 1 - average drop, per image (Poppi et al. 2021, arXiv 2104.10252).

    m is the scaled map: coherency (Pearson's r of m and the map of x m + 1) / 2, complexity mean m, average drop max(0,
    p - o) / p of the label's probability, o that of x m. Where a term is 0, so is ADCC; the coherency of a constant map
    is 0. Maps are of the label, masked pixels black.
    """
    about = {"average_drop": Measure(better="lower", label="average drop", unit="%", main=False)}
    return _combined("adcc", "ADCC", explain, average_drop(), about, lambda rows: 1 - rows["average_drop"] / 100)


def arcc(explain: Explain) -> Evaluator:
    """Harmonic mean of coherency, 1 - complexity (both as in `adcc`) and 2 ROAD cut to [0, 1], per image (arXiv
    2605.14641).

    ROAD is `road` at 20, 40, 60 and 80 % of the pixels, of probabilities: of logits it would be cut at 1.
    """
    metric = road(shares=SHARES)
    about = {name: metric.measures[name]._replace(main=False) for name in ("road", "road_unsolved")}
    return _combined("arcc", "ARCC", explain, metric, about, lambda rows: jnp.clip(2 * rows["road"], 0, 1))


def harmonic_mean(*terms: Array) -> Array:
    """Of terms (b,) that are not negative; 0 where one is 0.

    >>> round(float(harmonic_mean(jnp.array([0.8]), jnp.array([0.7]), jnp.array([0.9]))[0]), 6)
    0.791623
    """
    positive = jnp.stack(terms) > 0
    inverse = (1 / jnp.where(positive, jnp.stack(terms), 1)).sum(0)
    return jnp.where(positive.all(0), len(terms) / inverse, 0)


def coherency(mask: Array, again: Array) -> Array:
    """(r + 1) / 2 of maps (b, h, w), r Pearson's correlation; 0 where one is constant."""
    r = pearson(mask, again)
    return jnp.where(is_constant(mask) | is_constant(again), 0, (r + 1) / 2)


def _combined(
    name: str,
    words: str,
    explain: Explain,
    metric: Metric,
    about: dict[str, Measure],
    third: Callable[[Mapping[str, Array]], Array],
) -> Evaluator:
    Explain.single(name, explain)
    about = {name: Measure(better="higher", label=words)} | TERMS | about

    def rows(keys, model, variables, batch, prepared):
        predict, images, labels = bind(model, variables), batch["image"], batch["label"]
        maps = explain.maps(keys, predict, images, labels)
        mask = scaled(maps, images.shape[1:3])
        again = explain.maps(keys, predict, images * mask[..., None], labels)
        terms = {"coherency": coherency(mask, scaled(again, images.shape[1:3])), "complexity": mask.mean((1, 2))}
        terms |= {key: row for key, row in metric.rows(keys, predict, maps, batch).items() if key in about}
        terms |= {name: harmonic_mean(terms["coherency"], 1 - terms["complexity"], third(terms))}
        finite = jnp.isfinite(maps).all((1, 2)) & jnp.isfinite(again).all((1, 2))
        return {key: jnp.where(finite, row, jnp.nan) for key, row in terms.items()}

    def summary(rows):
        return {key: average(rows[key], one, "no map is finite") for key, one in about.items()}

    def cost(predict, images):
        return 2 * explain.cost(predict, images) + metric.cost(predict, images)

    return Evaluator(rows, summary, cost)


TABLE = table(adcc, arcc)
