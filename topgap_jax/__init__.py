"""Image classifiers that look at the right pixels, and the tools that prove it, in JAX and Flax.

Rooms, from the ground up: `types`, `build`, `pool`, `scores`, `balls`, `mesh`, `rewrite`; `models`, `attacks`, `explain`, `metrics`;
`training`, `evaluators`; `data`, `run`, `report`. Everything that can be chosen is a small function that returns a value of
one of the types in `topgap_jax.types`.
"""

from topgap_jax import attacks, balls, explain, models, pool, rewrite, scores, types
from topgap_jax.build import build
from topgap_jax.errors import UserError

__version__ = "0.1.0"
__all__ = ["UserError", "attacks", "balls", "build", "explain", "models", "pool", "rewrite", "scores", "types"]
