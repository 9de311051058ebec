"""`accuracy()`: how often, with what confidence, and for which groups the model is right."""

import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax.attacks import misclassified
from topgap_jax.build import table
from topgap_jax.metrics.calibration import calibration, wilson
from topgap_jax.models import bind
from topgap_jax.types import Cost, Evaluator


def accuracy() -> Evaluator:
    """Accuracy with Wilson's 95 % interval, NLL, calibration error (15 bins) and its curve.

    Where the data have groups: accuracy and size of each group, and the worst group's accuracy.
    """

    def rows(keys, model, variables, batch):
        logits = bind(model, variables)(batch["image"]).astype(jnp.float32)
        log_probabilities = jax.nn.log_softmax(logits)
        out = {
            "correct": ~misclassified(logits, batch["label"]),
            "nll": -jnp.take_along_axis(log_probabilities, batch["label"][:, None], 1)[:, 0],
            "confidence": jnp.exp(log_probabilities.max(1)),
        }
        return out | ({"group": batch["group"]} if "group" in batch else {})

    def summary(rows):
        correct, n = rows["correct"], len(rows["correct"])
        low, high = wilson(correct.sum(), n)
        error, curve = calibration(rows["confidence"], correct)
        values = {"accuracy": float(correct.mean()), "accuracy_low": low, "accuracy_high": high}
        values |= {"nll": float(rows["nll"].mean(dtype=np.float64)), "calibration_error": error}
        if "group" in rows:
            groups = np.unique(rows["group"])
            shares = [float(correct[rows["group"] == group].mean()) for group in groups]
            values["worst_group_accuracy"] = min(shares)
            values |= {f"group_{group}_accuracy": share for group, share in zip(groups, shares)}
            values |= {f"group_{group}_examples": int((rows["group"] == group).sum()) for group in groups}
        return values | {"calibration": curve}

    return Evaluator(rows, summary, Cost(1, 0))


TABLE = table(accuracy)
