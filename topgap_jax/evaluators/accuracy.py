"""`accuracy()`: how often, with what confidence, and for which groups the model is right."""

import jax
import jax.numpy as jnp

from topgap_jax.attacks import misclassified
from topgap_jax.build import table
from topgap_jax.metrics.summaries import average, by_group, calibration, share
from topgap_jax.models import bind
from topgap_jax.types import Cost, Evaluator, Measure

ACCURACY = Measure(better="higher", label="accuracy")


def accuracy() -> Evaluator:
    """Accuracy with Wilson's 95 % interval, NLL, calibration error (15 bins) and its curve.

    The calibration error is that of Guo et al. 2017, arXiv 1706.04599. Where the data have groups: accuracy and size of
    each group, and the worst group's accuracy.
    """

    def rows(keys, model, variables, batch, prepared):
        logits = bind(model, variables)(batch["image"]).astype(jnp.float32)
        log_probabilities = jax.nn.log_softmax(logits)
        out = {
            "correct": ~misclassified(logits, batch["label"]),
            "nll": -jnp.take_along_axis(log_probabilities, batch["label"][:, None], 1)[:, 0],
            "confidence": jnp.exp(log_probabilities.max(1)),
        }
        return out | ({"group": batch["group"]} if "group" in batch else {})

    def summary(rows):
        correct = rows["correct"]
        error, curve = calibration(rows["confidence"], correct)
        measures = {
            "accuracy": share(correct, ACCURACY),
            "nll": average(rows["nll"], Measure(better="lower", label="NLL", unit="nats")),
            "calibration_error": Measure(error, n=len(correct), better="lower", label="calibration error"),
        }
        return measures | by_group(correct, rows.get("group"), ACCURACY, "accuracy") | {"calibration": curve}

    return Evaluator(rows, summary, lambda predict, images: Cost(1, 0))


TABLE = table(accuracy)
