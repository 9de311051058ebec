"""Image classifiers that look at the right pixels, and the tools that prove it, in JAX and Flax.

Rooms, from the ground up: `types`, `edges`, `build`; `engine`, `norms`, `order`, `keys`, `mesh`, `pool`, `scores`,
`balls`, `penalties`, `rewrite`, `targets`; `metrics`, `drops`, `rules`, `explain`, `attacks`, `models`; `evaluators`,
`training`; `progress`, `data`, `pretrained`, `measure`, `run`, `setup`; `report`. Everything that can be chosen is a
small function that returns a value of one of the types in `topgap_jax.types`.

>>> import topgap_jax as tg
>>> tg.pool.top_gap(k=4), tg.attacks.pgd, tg.explain.grad_cam  # doctest: +ELLIPSIS
(<function ...>, <function pgd ...>, <function grad_cam ...>)
"""

import importlib

from topgap_jax.errors import UserError

__version__ = "0.1.0"

ROOMS = (
    "types", "edges", "build",
    "engine", "norms", "order", "keys", "mesh", "pool", "scores", "balls", "penalties", "rewrite", "grids", "baselines",
    "targets",
    "metrics", "drops", "rules", "explain", "attacks", "models", "evaluators", "training",
    "stored", "progress", "data", "pretrained", "measure", "run", "setup", "report",
)  # fmt: skip
__all__ = ["UserError", *ROOMS]


def __getattr__(name: str):
    # Rooms are imported when they are named: `data` and `report` take a second that a notebook on attacks need not
    # wait.
    if name in ROOMS:
        return importlib.import_module(f"topgap_jax.{name}")
    raise AttributeError(f"module 'topgap_jax' has no attribute '{name}'")


def __dir__():
    return sorted([*globals(), *ROOMS])
