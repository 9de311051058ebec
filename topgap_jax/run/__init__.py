"""A run on the disk: the training loop, checkpoints, the folder, where it came from, the CPU's settings."""

import importlib

ROOMS = ("checkpoint", "cpu", "fit", "manifest", "plan", "provenance", "workdir")


def __getattr__(name: str):
    # Imported when it is named: what reads a run's folder needs neither Orbax nor Optax.
    if name in ROOMS:
        return importlib.import_module(f"topgap_jax.run.{name}")
    raise AttributeError(f"module 'topgap_jax.run' has no attribute '{name}'")


def __dir__():
    return sorted([*globals(), *ROOMS])
