"""`measures(explain, gini(), deletion(), ...)`: any measures of any explanation's maps, averaged over a split."""

import jax.numpy as jnp

from topgap_jax.build import table
from topgap_jax.errors import UserError
from topgap_jax.metrics.summaries import average, average_curve
from topgap_jax.models import bind
from topgap_jax.types import Cost, Evaluator, Explain, Measure, Metric


def measures(explain: Explain, *metrics: Metric, labels: str = "true") -> Evaluator:
    """Means, with a 95 % interval over images, of the metrics of the maps for the "true" or the "predicted" class.

    For the "predicted" class the metrics see the prediction as the label: deletion and insertion then follow its
    probability. Where a measure is not defined (NaN: the map has no positive value) the image is left out of its mean,
    whose `n` says over how many it is. Two metrics that measure something of one name keep both: `deletion`,
    `deletion_2`.
    """
    Explain.single("measures", explain)
    if not metrics or not all(isinstance(metric, Metric) for metric in metrics):
        raise UserError("measures: give one or more metrics after the explanation, such as measures(cam(), gini())")
    if labels not in ("true", "predicted"):
        raise UserError(f"measures: labels must be 'true' or 'predicted', got {labels!r}")
    names, about = [], {}  # of each metric {its name of a row: the name here}
    for metric in metrics:
        names.append({name: _unused(name, about) for name in metric.measures})
        about |= {names[-1][name]: one for name, one in metric.measures.items()}

    def rows(keys, model, variables, batch, prepared):
        predict, images = bind(model, variables), batch["image"]
        if labels == "predicted":
            batch = {**batch, "label": jnp.argmax(predict(images), -1).astype(jnp.int32)}
        maps, out = explain.maps(keys, predict, images, batch["label"]), {}
        for metric, renamed in zip(metrics, names):
            out |= {renamed[name]: row for name, row in metric(keys, predict, maps, batch).items()}
        return out

    def summary(rows):
        summed = lambda name: average if isinstance(about[name], Measure) else average_curve
        return {name: summed(name)(rows[name], about[name]) for name in about}

    def cost(predict, images):
        total = explain.cost(predict, images) + Cost(1 if labels == "predicted" else 0, 0)
        return sum((metric.cost(predict, images) for metric in metrics), start=total)

    return Evaluator(rows, summary, cost)


def _unused(name, taken):
    number = 2
    full = name
    while full in taken:
        full, number = f"{name}_{number}", number + 1
    return full


TABLE = table(measures)
