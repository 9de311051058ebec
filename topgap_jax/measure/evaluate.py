"""`evaluate`: every evaluator over a split, with what it cost, into `evaluation.json`."""

import functools
import hashlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from topgap_jax.errors import UserError
from topgap_jax.keys import example_keys
from topgap_jax.measure.robust import attack_split
from topgap_jax.measure.splits import Split
from topgap_jax.measure.verdicts import Log, fingerprint
from topgap_jax.mesh import replicated
from topgap_jax.mesh import split as divided
from topgap_jax.progress import bar, write_text
from topgap_jax.rewrite import fused
from topgap_jax.types import Cost, Evaluator, Model, Robustness, Variables

FILE = "evaluation.json"


def evaluate(
    model: Model,
    variables: Variables,
    data: Split,
    evaluators: Mapping[str, Evaluator | Robustness],
    *,
    split: str,
    workdir: Path | None = None,
    weights: str = "",
    source: str = "",
    seed: int = 0,
    mesh: Mesh | None = None,
    progress: bool | None = None,
) -> list[dict[str, Any]]:
    """One row per evaluator: {"split", "evaluator", "examples", "complete", "values", "curves", "cost", "audit"}.

    evaluators: their texts -> what they are. With a workdir each row is written as soon as it is there; a row of the same
    split and evaluator is replaced, rows of other `weights` or another `source` are dropped. Examples draw from
    fold_in(key(seed), id). The seconds hold no compilation. An attack that was stopped goes on where it was.

    Raises UserError if a weight is NaN or infinite: nothing that is measured of such a network means anything.
    """
    variables = evaluation_variables(variables)
    _check_finite(variables, weights)
    if mesh is not None:
        variables = jax.device_put(variables, replicated(mesh))
    rows = []
    for text, evaluator in evaluators.items():
        options = {"seed": seed, "mesh": mesh, "text": f"{split} {text}", "progress": progress}
        if isinstance(evaluator, Robustness):
            options["log"] = _log(workdir, variables, source=source, split=split, evaluator=text, seed=seed)
            values, cost, seconds = attack_split(model, variables, data, evaluator, **options)
        else:
            values, cost, seconds = measure_split(model, variables, data, evaluator, **options)
        rows.append(_row(split, text, data.examples, values, cost, seconds, mesh))
        if workdir is not None and jax.process_index() == 0:
            _write(Path(workdir), rows[-1], weights, source)
    return rows


def measure_split(
    model: Model,
    variables: Variables,
    data: Split,
    evaluator: Evaluator,
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
    text: str = "",
    progress: bool | None = None,
) -> tuple[dict[str, Any], Cost, float]:
    """(summary, cost per image, seconds) of one evaluator. Called again with the same evaluator and model, it compiles nothing."""
    rows, key = _rows(evaluator, model, mesh), jax.random.key(seed)
    parts, start = [], 0.0
    with bar(data.examples, text, enabled=progress) as shown:
        for ids, batch in data.batches(None):
            if not parts:
                rows.lower(key, variables, batch).compile()
                start = time.perf_counter()
            # Padding stands behind the examples and ends here: no summary ever sees it.
            part = {name: value[: len(ids)] for name, value in jax.device_get(rows(key, variables, batch)).items()}
            parts.append(part if evaluator.host is None else evaluator.host(part))
            shown.update(len(ids))
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return dict(evaluator.summary(whole)), evaluator.cost, time.perf_counter() - start


def evaluation_variables(variables: Variables) -> Variables:
    """What is evaluated: the averaged parameters ("ema") where training kept them, else the parameters themselves."""
    chosen = variables.get("ema") or variables
    return {"params": chosen["params"], "batch_stats": chosen.get("batch_stats", {})}


def _check_finite(variables, weights):
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        values = np.asarray(leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf)
        if jax.numpy.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
            count = values.size - np.isfinite(values).sum()
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"{weights or 'the model'}: {count} of {values.size} values of {name} are not finite; evaluate an earlier checkpoint"
            )


@functools.lru_cache(maxsize=32)
def _rows(evaluator, model, mesh):
    """The jitted rows of an evaluator; kept, so that an evaluation after every epoch compiles once."""

    @fused
    def rows(key, variables, batch):
        return evaluator.rows(example_keys(key, batch["id"]), model, variables, batch)

    if mesh is None:
        return jax.jit(rows)
    # The rows are few numbers; replicated, every process can read them.
    return jax.jit(rows, in_shardings=(None, replicated(mesh), divided(mesh)), out_shardings=replicated(mesh))


def _log(workdir, variables, **header):
    """Where an attack notes its verdicts. Processes of a larger run do not: they need not see the same disk."""
    if workdir is None or jax.process_count() > 1:
        return None
    header |= {"weights": fingerprint(variables)}
    name = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:12]
    return Log(Path(workdir) / f"attack-{name}.jsonl", header)


def _row(split, text, examples, summary, cost, seconds, mesh):
    curves = {name: value for name, value in summary.items() if isinstance(value, Mapping)}
    values = {name: _plain(value) for name, value in summary.items() if name not in curves}
    kind = (jax.devices() if mesh is None else mesh.devices.ravel())[0].device_kind
    costs = {"forward_passes": float(cost.forwards), "gradient_evaluations": float(cost.gradients)}
    costs |= {
        "seconds": round(seconds, 3),
        "device": kind if mesh is None or mesh.size == 1 else f"{mesh.size} x {kind}",
    }
    row = {"split": split, "evaluator": text, "examples": examples, "complete": True}
    return row | {"values": values, "curves": {k: _curve(v) for k, v in curves.items()}, "cost": costs, "audit": None}


def _curve(curve):
    return {axis: [_plain(value) for value in curve[axis]] for axis in ("x", "y")}


def _plain(value):
    """A number that JSON has: NaN and infinity are null."""
    number = value.item() if hasattr(value, "item") else value
    return None if isinstance(number, float) and not math.isfinite(number) else number


def _write(workdir, row, weights, source):
    path = workdir / FILE
    known = {"weights": weights, "data": source}
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        rows = before["rows"] if all(before.get(name) == value for name, value in known.items()) else []
        kept = [r for r in rows if (r["split"], r["evaluator"]) != (row["split"], row["evaluator"])]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not an evaluation of this program; move it away") from None
    workdir.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"rows": [*kept, row], **known}, indent=1) + "\n")
