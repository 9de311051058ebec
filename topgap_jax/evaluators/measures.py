"""`measures(explain, gini(), deletion(), ...)`: any measures of any explanation's maps, averaged over a split."""

import jax.numpy as jnp
import numpy as np

from topgap_jax.build import table
from topgap_jax.errors import UserError
from topgap_jax.metrics.calibration import mean_interval
from topgap_jax.models import bind
from topgap_jax.types import Cost, Evaluator, Explain, Metric


def measures(explain: Explain, *metrics: Metric, labels: str = "true") -> Evaluator:
    """Means, with a 95 % interval over images, of the metrics of the maps for the "true" or the "predicted" class.

    For the "predicted" class the metrics see the prediction as the label: deletion and insertion then follow its probability.
    Where a measure is not defined (NaN: the map has no positive value) the image is left out of its mean; `undefined` is how
    many images miss one or more measures. A measure of several numbers becomes a curve over their place.
    """
    if not callable(explain):
        raise UserError(f"measures: give an explanation such as cam(), got {explain!r}")
    if not metrics or not all(map(callable, metrics)):
        raise UserError("measures: give one or more metrics after the explanation, such as measures(cam(), gini())")
    if labels not in ("true", "predicted"):
        raise UserError(f"measures: labels must be 'true' or 'predicted', got {labels!r}")

    def rows(keys, model, variables, batch):
        predict, images = bind(model, variables), batch["image"]
        if labels == "predicted":
            batch = {**batch, "label": jnp.argmax(predict(images), -1).astype(jnp.int32)}
        maps, out = explain(keys, predict, images, batch["label"]), {}
        for metric in metrics:
            out |= metric(keys, predict, maps, batch)
        return out

    def summary(rows):
        values, curves, undefined = {}, {}, np.zeros(len(next(iter(rows.values()))), bool)
        for name, found in rows.items():
            undefined |= np.isnan(found.reshape(len(found), -1)).any(1)
            if found.ndim == 1:
                defined = found[~np.isnan(found)]
                mean, low, high = mean_interval(defined) if len(defined) else (np.nan,) * 3
                values |= {name: mean, f"{name}_low": low, f"{name}_high": high}
            else:
                flat = found.reshape(len(found), -1)
                count = (~np.isnan(flat)).sum(0)
                means = np.nansum(flat, 0, dtype=np.float64) / np.where(count, count, np.nan)
                curves[name] = {"x": list(range(flat.shape[1])), "y": means.tolist()}
        return values | {"undefined": int(undefined.sum())} | curves

    costs = [getattr(explain, "cost", Cost(1, 0)), *(getattr(metric, "cost", Cost(0, 0)) for metric in metrics)]
    more = 1 if labels == "predicted" else 0
    total = Cost(sum(cost.forwards for cost in costs) + more, sum(cost.gradients for cost in costs))
    return Evaluator(rows, summary, total)


TABLE = table(measures)
