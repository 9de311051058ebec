"""From a config to what the commands do: parts for `run.fit`, a model with its weights, evaluation, pictures, layers."""

from topgap_jax.setup.assembly import Experiment, experiment, read
from topgap_jax.setup.commands import (
    Loaded,
    Pictures,
    evaluate,
    explain,
    from_weights,
    from_workdir,
    layers,
    parts,
    restored,
    stored,
)

__all__ = [
    "Experiment",
    "Loaded",
    "Pictures",
    "evaluate",
    "experiment",
    "explain",
    "from_weights",
    "from_workdir",
    "layers",
    "parts",
    "read",
    "restored",
    "stored",
]
