"""`evaluate`: every evaluator over a split, with what it cost, into `evaluation.json`."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from topgap_jax import __version__
from topgap_jax.errors import UserError, raised
from topgap_jax.evaluators.trust import verdict
from topgap_jax.measure import adversarial, results
from topgap_jax.measure.audit import audit_split
from topgap_jax.measure.criteria import headline
from topgap_jax.measure.log import Log
from topgap_jax.measure.queue import clean_logits, placed
from topgap_jax.measure.robust import attack_split, for_classes
from topgap_jax.measure.rows import measure_split
from topgap_jax.measure.splits import Split, check_model
from topgap_jax.measure.verdicts import fingerprint
from topgap_jax.models import bind
from topgap_jax.progress import say
from topgap_jax.rewrite.finite import first_not_finite
from topgap_jax.types import Audit, Check, Curve, Evaluator, Gallery, Measure, Model, Robustness, Variables


def evaluate(
    model: Model,
    variables: Variables,
    data: Split,
    evaluators: Mapping[str, Evaluator | Robustness | Audit],
    *,
    split: str,
    classes: int,
    training: Callable[[], Mapping[str, np.ndarray] | None] = lambda: None,
    overrides: Callable[[str], Mapping[str, str]] = lambda text: {},
    workdir: Path | None = None,
    save: Callable[[str], Path | None] = lambda text: None,
    examples: Callable[[str, Mapping[str, np.ndarray]], None] = lambda text, columns: None,
    weights: str = "",
    digest: str = "",
    source: str = "",
    seed: int = 0,
    mesh: Mesh | None = None,
    progress: bool | None = None,
) -> list[results.Row]:
    """One row per evaluator. evaluators: their texts -> what they are; overrides(text): what the command line changed
    that it depends on; training(): the training split's arrays, called if an evaluator asks for them.

    With a workdir each row is written as soon as it is there; a row of the same split, evaluator and overrides is
    replaced, rows of other `weights` (which `digest` stands for) or another `source` are moved aside. Examples draw
    from fold_in(key(seed), id). The seconds hold no compilation. With a workdir what was stopped goes on where it was.
    save(text): the .npz to write all images to that the attacks of an evaluator end with; a few are kept in the workdir
    for its report. examples(text, columns): is given what each example of the split contributes, {name: (n, ...)} by
    row: of attacks those of `measure.robust.Examples`, of an evaluator its rows.

    Raises UserError for a file that is no evaluation, before anything is measured, and if a weight or a logit is NaN or
    infinite, with the first layer that is: nothing that is measured of such a network means anything.
    """
    path = None if workdir is None else Path(workdir) / results.FILE
    if path is not None:
        results.read(path)
    check_model(model)
    for text, one in evaluators.items():
        if not isinstance(one, Evaluator | Robustness | Audit):
            raise UserError(f"'{text}': give an evaluator such as accuracy() or robust(pgd(linf(8/255))), got {one!r}")
    variables = evaluation_variables(variables)
    check_finite(variables, weights)
    variables = placed(variables, mesh)
    _check_logits(model, variables, data, mesh, weights)
    fitted = {text: for_classes(one, classes) for text, one in evaluators.items() if isinstance(one, Robustness)}
    for line in dict.fromkeys(line for _, lines in fitted.values() for line in lines):
        say(line)
    rows, weights_hash = [], functools.cache(lambda: fingerprint(variables))
    for text, evaluator in {**evaluators, **{text: one for text, (one, _) in fitted.items()}}.items():
        options = {"seed": seed, "mesh": mesh, "text": f"{split} {text}", "progress": progress}
        header = {"source": source, "split": split, "evaluator": text, "overrides": dict(overrides(text)), "seed": seed}
        header |= {} if isinstance(evaluator, Evaluator) else _sources(evaluator)
        about: dict[str, Any] = {"audit": None}
        logs: dict[str, Log | None] = {}

        def log_of(part="", folder=workdir, header=header, logs=logs, **more):
            if part not in logs:
                more |= header | {"batch": data.batch} | ({"part": part} if part else {})
                logs[part] = _log(folder, weights_hash, mesh, **more)
            return logs[part]

        if isinstance(evaluator, Robustness):
            file = save(text)
            keep = "all" if file else "few" if workdir else None
            folder = workdir or (file.parent if file else None)
            log = log_of(folder=folder, keep=keep)
            attacked = attack_split(model, variables, data, evaluator, log=log, keep=keep, **options)
            measures, cost, seconds = attacked[:3]
            examples(text, attacked.examples._asdict())
            norms = dict.fromkeys(attack.norm for attack in evaluator.runs)
            about = {"audit": results.NOT_AUDITED, "norms": tuple(filter(None, norms))}
        elif isinstance(evaluator, Audit):
            audited = audit_split(model, variables, data, evaluator, log=log_of, **options)
            measures, cost, seconds = audited.measures, audited.cost, audited.seconds
            words = f"audit at {evaluator.ball.name}: {headline(audited.checks)}"
            about = {"audit": words, "norms": (evaluator.ball.norm,), "checks": audited.checks}
        else:
            prepared = evaluator.prepare(training(), classes) if evaluator.prepare else {}
            whole = evaluator._replace(summary=_themselves)
            kept = {"prepared": prepared, "log": log_of()}
            values, cost, seconds = measure_split(model, variables, data, whole, **kept, **options)
            measures = _summary(evaluator, values, text)
            checks = tuple(measures.pop(name) for name, one in list(measures.items()) if isinstance(one, Check))
            if checks:
                about = {"audit": f"checks: {verdict(checks)}", "checks": checks}
            examples(text, values)
        rows.append(
            results.Row(
                split=split,
                evaluator=text,
                overrides=dict(overrides(text)),
                examples=data.examples,
                measures=measures,
                cost=_costs(cost, seconds, mesh),
                **about,
            )
        )
        leftovers = [*(audited.kept if isinstance(evaluator, Audit) else ()), *filter(None, logs.values())]
        if isinstance(evaluator, Robustness) and attacked.kept is not None:
            _store(attacked, evaluator, file, workdir, weights=weights, split=split, evaluator=rows[-1].text)
            leftovers.insert(0, attacked.kept)
        if path is not None and jax.process_index() == 0:
            results.write(path, rows[-1], weights, source, digest)
        for left in leftovers:
            left.remove()
    stored = [] if path is None else [row for row in results.read(path).rows if row.key not in {r.key for r in rows}]
    return results.with_audits([*rows, *stored])[: len(rows)]


def _summary(evaluator: Evaluator, rows: Mapping[str, np.ndarray], text: str) -> dict[str, Any]:
    """What an evaluator says of the whole split; a user's own may raise or return anything."""
    try:
        measures = dict(evaluator.summary(rows))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{text}: its summary of the split: {raised(error)}") from error
    for name, value in measures.items():
        if not isinstance(value, Measure | Curve | Gallery | Check):
            kind = type(value).__name__
            raise UserError(f"{text}: '{name}' of its summary must be a Measure or Curve, it is {kind}")
    return measures


def _themselves(rows):
    """The rows of a split as their own summary; of a name, so that an evaluator with it is one and compiles once."""
    return rows


def _store(attacked, robustness, file, workdir, **about):
    """The images that attacks ended with: all to `file`, a few to the run's folder for its report."""
    kept, examples, attacks = attacked.kept, attacked.examples, [attack.name for attack in robustness.runs]
    if file is not None and jax.process_index() == 0:
        adversarial.save(file, kept.ids, kept.images, examples, attacks, **about)
    if workdir is not None and len(kept.few) and jax.process_index() == 0:
        path = Path(workdir) / adversarial.FOLDER / adversarial.file_name(about["split"], about["evaluator"])
        images = kept.images[np.searchsorted(kept.ids, kept.few)]
        adversarial.save(path, kept.few, images, examples, attacks, clean=kept.clean, **about)


def evaluation_variables(variables: Variables) -> Variables:
    """What is evaluated: the averaged parameters ("ema") where training kept them, else the parameters themselves."""
    kept = variables.get("ema") or variables
    if "params" not in kept:
        raise UserError(f"variables must hold 'params', as Model.init returns them, got {', '.join(kept) or 'none'}")
    return {"params": kept["params"], "batch_stats": kept.get("batch_stats", {})}


def _local(leaf):
    if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)  # what a module of somebody else may keep among its state
    return np.asarray(leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf)


def check_finite(variables: Variables, weights: str = "") -> None:
    """Raise a UserError that names the first array of the variables with a value that is NaN or infinite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        values = _local(leaf)
        if jax.numpy.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
            count = values.size - np.isfinite(values).sum()
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"{weights or 'the model'}: {count} of {values.size} values of {name} are not finite; "
                "evaluate an earlier checkpoint"
            )


def _check_logits(model, variables, data, mesh, weights):
    """The first batch must have finite logits; where it has not, the error names the first layer that has not."""
    ids, batch = next(iter(data.batches(None)))
    logits = jax.device_get(clean_logits(model, mesh)(variables, batch["image"]))[: len(ids)]
    wrong = int((~np.isfinite(logits).all(1)).sum())
    if wrong:
        layer = first_not_finite(bind(model, variables), batch["image"])
        raise UserError(
            f"{weights or 'the model'}: the logits of {wrong} of the first {len(ids)} images are not finite, from layer"
            f" '{layer}' on; its weights or its normalisation overflow: evaluate an earlier checkpoint"
        )


def _sources(evaluator: Robustness | Audit) -> dict[str, Any]:
    """What a log says of the networks that attacks transfer from."""
    given = [evaluator.twin] if isinstance(evaluator, Audit) else [attack.source for attack in evaluator.runs]
    networks = [network for network in given if network is not None]
    return {"sources": {source.name: fingerprint(source.variables) for source in networks}} if networks else {}


def _log(folder, weights_hash, mesh, **header):
    """Where an evaluator notes what it has. Processes of a larger run do not: they need not see the same disk.

    At another width per device floating point may decide otherwise, so that the header says it too.
    """
    if folder is None or jax.process_count() > 1:
        return None
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.ravel())
    header |= {"weights": weights_hash(), "devices": [device.device_kind for device in devices]}
    header |= {"version": __version__, "jax": jax.__version__}
    header |= {"threefry_partitionable": bool(jax.config.jax_threefry_partitionable)}
    name = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:12]
    return Log(Path(folder) / f"unfinished-{name}.jsonl", header)


def _costs(cost, seconds, mesh):
    kind = (jax.devices() if mesh is None else mesh.devices.ravel())[0].device_kind
    return {
        "forward_passes": float(cost.forwards),
        "gradient_evaluations": float(cost.gradients),
        "seconds": round(seconds, 3),
        "device": kind if mesh is None or mesh.size == 1 else f"{mesh.size} x {kind}",
    }
