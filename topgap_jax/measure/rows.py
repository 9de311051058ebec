"""`measure_split`: the rows of one evaluator over a split, with what they cost."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from topgap_jax.keys import example_keys, root
from topgap_jax.measure.costs import cost_of
from topgap_jax.measure.log import Log, packed, unpacked
from topgap_jax.measure.splits import Split
from topgap_jax.mesh import replicated
from topgap_jax.mesh import split as divided
from topgap_jax.progress import bar
from topgap_jax.rewrite import fused
from topgap_jax.types import Batch, Cost, Curve, Evaluator, Measure, Model, Variables


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
    log: Log | None = None,
) -> tuple[dict[str, Measure | Curve], Cost, float]:
    """(summary, cost per image, seconds) of one evaluator. Called again with the same evaluator and model, it compiles
    nothing.

    prepared: what `evaluator.prepare` made of the training split, {} where that is nothing. What a `log` holds is not
    measured again.
    """
    rows, key, prepared = _rows(evaluator, model, mesh), root(seed), prepared or {}

    def compute(batch, count):
        # Padding stands behind the examples and ends here: no summary ever sees it.
        values = jax.device_get(rows(key, variables, batch, prepared))
        part = {name: value[:count] for name, value in values.items()}
        return part if evaluator.host is None else evaluator.host(part)

    compile = lambda batch: rows.lower(key, variables, batch, prepared).compile()
    whole, images, seconds = by_batches(data, compile, compute, log, text, progress)
    return dict(evaluator.summary(whole)), cost_of(evaluator.cost, model, variables, images), seconds


def by_batches(
    data: Split,
    compile: Callable[[Batch], Any],
    compute: Callable[[Batch, int], Mapping[str, np.ndarray]],
    log: Log | None,
    text: str,
    progress: bool | None,
) -> tuple[dict[str, np.ndarray], jax.ShapeDtypeStruct, float]:
    """({name: (n, ...)} by row of the split, the shape of a batch's images, seconds without compilation).

    compute(batch, m) -> {name: (m, ...)} of the first m examples of a batch, which go to the log as soon as they are
    there; batches that it holds already are not computed. compile(batch): called before the first that is.
    """
    log = None if log is None or log.path is None else log
    kept = [entry for entry in log.entries if "rows" in entry] if log else []
    parts, ids = [unpacked(entry["rows"]) for entry in kept], [entry["ids"] for entry in kept]
    seconds, done, images, start = sum(entry["seconds"] for entry in kept), sum(map(len, ids)), None, 0.0
    left = np.setdiff1d(np.arange(data.examples), np.concatenate(ids)).astype(np.int32) if ids else None
    with bar(data.examples, text, enabled=progress, done=done) as shown:
        for some, batch in data.batches(left):
            if images is None:
                images = jax.ShapeDtypeStruct(batch["image"].shape, batch["image"].dtype)
                compile(batch)
                start = time.perf_counter()
            parts.append(compute(batch, len(some)))
            ids.append(some)
            now = time.perf_counter()
            if log:
                log.append({"rows": packed(parts[-1]), "ids": some.tolist(), "seconds": now - start})
            seconds, start = seconds + now - start, now
            shown.update(len(some))
    if images is None:
        batch = next(iter(data.batches(np.arange(1, dtype=np.int32))))[1]
        images = jax.ShapeDtypeStruct(batch["image"].shape, batch["image"].dtype)
    order = np.argsort(np.concatenate(ids), kind="stable")
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {name: values[order] for name, values in whole.items()}, images, seconds


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
