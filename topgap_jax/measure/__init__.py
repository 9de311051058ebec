"""A model over a split: evaluators, attacks with their verdicts, and what they cost."""

from topgap_jax.measure import evaluate, robust, splits, verdicts

__all__ = ["evaluate", "robust", "splits", "verdicts"]
