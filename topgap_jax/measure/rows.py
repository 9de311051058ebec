"""`measure_split`: the rows of one evaluator over a split, with what they cost."""

import functools
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from topgap_jax.keys import example_keys
from topgap_jax.measure.costs import cost_of
from topgap_jax.measure.splits import Split
from topgap_jax.mesh import replicated
from topgap_jax.mesh import split as divided
from topgap_jax.progress import bar
from topgap_jax.rewrite import fused
from topgap_jax.types import Cost, Curve, Evaluator, Measure, Model, Variables


def measure_split(
    model: Model,
    variables: Variables,
    data: Split,
    evaluator: Evaluator,
    *,
    prepared: Any = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    text: str = "",
    progress: bool | None = None,
) -> tuple[dict[str, Measure | Curve], Cost, float]:
    """(summary, cost per image, seconds) of one evaluator. Called again with the same evaluator and model, it compiles
    nothing.

    prepared: what `evaluator.prepare` made of the training split, {} where that is nothing.
    """
    rows, key, prepared = _rows(evaluator, model, mesh), jax.random.key(seed), prepared or {}
    parts, start, cost = [], 0.0, Cost()
    with bar(data.examples, text, enabled=progress) as shown:
        for ids, batch in data.batches(None):
            if not parts:
                cost = cost_of(evaluator.cost, model, variables, batch["image"])
                rows.lower(key, variables, batch, prepared).compile()
                start = time.perf_counter()
            # Padding stands behind the examples and ends here: no summary ever sees it.
            values = jax.device_get(rows(key, variables, batch, prepared))
            part = {name: value[: len(ids)] for name, value in values.items()}
            parts.append(part if evaluator.host is None else evaluator.host(part))
            shown.update(len(ids))
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return dict(evaluator.summary(whole)), cost, time.perf_counter() - start


@functools.lru_cache(maxsize=32)
def _rows(evaluator, model, mesh):
    """The jitted rows of an evaluator; kept, so that an evaluation after every epoch compiles once."""

    @fused
    def rows(key, variables, batch, prepared):
        return evaluator.rows(example_keys(key, batch["id"]), model, variables, batch, prepared)

    if mesh is None:
        return jax.jit(rows)
    # The rows are few numbers; replicated, every process can read them.
    whole = replicated(mesh)
    return jax.jit(rows, in_shardings=(None, whole, divided(mesh), whole), out_shardings=whole)
