"""A model over a split: evaluators, attacks with their verdicts, and what they cost."""

import importlib

FILES = ("costs", "evaluate", "results", "robust", "splits", "verdicts")
__all__ = [*FILES]


def __getattr__(name: str):
    # Imported when named: a table of stored results (`topgap compare`) need not wait for Flax.
    if name in FILES:
        return importlib.import_module(f"topgap_jax.measure.{name}")
    raise AttributeError(f"module 'topgap_jax.measure' has no attribute '{name}'")
