"""`completeness(explain)`: does a signed map add up to what it explains?"""

import jax.numpy as jnp

from topgap_jax.build import table
from topgap_jax.errors import UserError
from topgap_jax.metrics.substrates import Substrate, checked, substrate_images
from topgap_jax.metrics.summaries import average
from topgap_jax.models import bind
from topgap_jax.scores import logit
from topgap_jax.types import Cost, Evaluator, Explain, Measure, Score


def completeness(explain: Explain, *, baseline: Substrate = "mean", score: Score = logit) -> Evaluator:
    """|sum of the map - (s(x) - s(x'))| / |s(x) - s(x')|, the mean over images; 0 is exact.

    Of methods that promise it: path methods from the same baseline x' (Sundararajan et al. 2017, arXiv 1703.01365),
    such as integrated(reduce='sum'). `baseline`: "mean", as `integrated` begins, "blur", a colour, or a picture. Maps
    without a sign cannot add up to a difference: UserError. Images whose score is the baseline's have none.
    """
    Explain.single("completeness", explain)
    if explain.signed is None:
        raise UserError(
            "completeness: the map has no sign, so that it cannot add up to a difference of scores; give one that has, "
            "such as integrated(reduce='sum')"
        )
    baseline, words = checked("completeness", baseline)

    def rows(keys, model, variables, batch, prepared):
        predict, images, labels = bind(model, variables), batch["image"], batch["label"]
        total = explain.maps(keys, predict, images, labels).astype(jnp.float32).sum((1, 2))
        other = substrate_images("completeness", baseline, predict, images)
        due = score(predict(images), labels) - score(predict(other), labels)
        defined = jnp.isfinite(total) & (due != 0)
        return {"completeness_error": jnp.where(defined, jnp.abs(total - due) / jnp.abs(due), jnp.nan)}

    def summary(rows):
        about = Measure(better="lower", label=f"completeness error from the {words}")
        reason = "no map is finite, or no score differs from the baseline's"
        return {"completeness_error": average(rows["completeness_error"], about, reason)}

    return Evaluator(rows, summary, lambda predict, images: explain.cost(predict, images) + Cost(2, 0))


TABLE = table(completeness)
