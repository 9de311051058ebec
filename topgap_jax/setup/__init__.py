"""From a config to what the commands do: parts for `run.fit`, a model with weights, evaluation, pictures, layers."""

import importlib

ROOMS = {
    "assembly": ("Experiment", "experiment", "read"),
    "commands": (
        "Loaded", "evaluate", "from_config", "from_workdir", "layers", "parts", "restored", "stored",
    ),
    "peers": ("agree",),
    "pictures": ("Explained", "Page", "explain", "saved"),
    "checks": (),
    "config": (),
    "expressions": (),
    "tables": (),
    "verify": (),
    "weights": (),
}  # fmt: skip
__all__ = [name for names in ROOMS.values() for name in names]


def __getattr__(name: str):
    # Imported when it is named: `topgap help` needs the tables, and neither Orbax nor what reads data.
    if name in ROOMS:
        return importlib.import_module(f"topgap_jax.setup.{name}")
    for room, names in ROOMS.items():
        if name in names:
            return getattr(importlib.import_module(f"topgap_jax.setup.{room}"), name)
    raise AttributeError(f"module 'topgap_jax.setup' has no attribute '{name}'")


def __dir__():
    return sorted([*globals(), *ROOMS, *__all__])
