"""Run folders as the report and the tables see them: what is there, and nothing invented for what is not."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from topgap_jax.build import names as names_of
from topgap_jax.errors import UserError
from topgap_jax.measure import adversarial, results
from topgap_jax.measure.results import Row
from topgap_jax.progress import METRICS, read_metrics, rows_in, say
from topgap_jax.report import index
from topgap_jax.run import manifest
from topgap_jax.run.workdir import VERSIONS, read_config, read_versions
from topgap_jax.stored import files_inside, read_object
from topgap_jax.types import Measure

BESIDE = ("accuracy", "regions")
"""The evaluators that stand beside every robust number: adversarial training can buy the one with the other."""


class Run(NamedTuple):
    """A run folder. config and versions are flat {dotted key: text}; metrics the lines of metrics.jsonl; rows those of
    evaluation.json; weights and data say what was evaluated, stale what is to be said where those weights are no longer
    the folder's; adversarial, by the row's number, files of images that its attacks ended with; faults: which files
    are gone or damaged, in words.
    """

    label: str
    folder: Path
    config: dict[str, str]
    file: str | None
    versions: dict[str, str]
    metrics: list[dict[str, Any]]
    rows: list[Row]
    weights: str
    data: str
    sheets: list[Path]
    classes: tuple[str, ...] = ()
    adversarial: Mapping[int, Path] = {}
    stale: str = ""
    faults: tuple[str, ...] = ()


def read_runs(folders: Sequence[Path | str]) -> list[Run]:
    """Every folder once, in order, with labels that tell them apart; a folder that is no run is a UserError."""
    unique = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    if not unique:
        raise UserError("no run folder given; name one or more that `topgap train --workdir` wrote")
    return with_overrides([read_run(folder, label) for folder, label in zip(unique, labels(unique))])


def read_run(folder: Path, label: str) -> Run:
    """What lies in one run folder; only config.json must be there."""
    path = folder / "config.json"
    if not path.is_file():
        why = "it has no config.json" if folder.is_dir() else "there is no such folder"
        raise UserError(f"'{folder}' is not a run: {why}; name a folder that `topgap train --workdir` wrote")
    stored, evaluation = read_config(path), results.read(folder / results.FILE)
    rows = with_gaps(evaluation.rows, str(stored["config"].get("train", "")))
    sheets = files_inside(folder, f"{index.FOLDER}/*.png")
    images = {path.name: path for path in files_inside(folder, f"{adversarial.FOLDER}/*.npz")}
    names = [adversarial.file_name(row.split, row.text) for row in rows]
    return Run(
        label=label,
        folder=folder,
        config=flat(stored["config"]),
        file=stored.get("file"),
        versions=flat(_versions(folder / VERSIONS)),
        metrics=_metrics(folder),
        rows=rows,
        weights=evaluation.weights,
        stale=_stale(folder, evaluation),
        data=evaluation.data,
        sheets=sheets,
        classes=tuple(map(str, (stored.get("data") or {}).get("classes", ()))),
        adversarial={i: images[name] for i, name in enumerate(names) if name in images},
        faults=(*index.faults(folder / index.FOLDER), *_without_images(zip(names, rows), images)),
    )


def _without_images(rows: Iterable[tuple[str, Row]], images: Mapping[str, Path]) -> Iterator[str]:
    """Files of adversarial images that are gone: an attack leaves some wherever there were images to attack."""
    for name, row in rows:
        if name not in images and "attacked" in row.measures and row.measures["attacked"].value:
            yield f"{adversarial.FOLDER}/{name} is gone: topgap evaluate --again makes the images of {row.text} again"


def _metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics, and a line where the newest checkpoint knows of more: a save comes after its rows."""
    rows = read_metrics(folder)
    steps = [int(path.name) for path in folder.glob("checkpoints/last/*") if path.name.isdecimal()]
    if not steps:
        return rows
    try:
        meta = folder / "checkpoints" / "last" / str(max(steps)) / "meta" / "metadata"
        expected = read_object(meta, "the meta of a checkpoint", {"rows?": int}).get("rows", 0)
    except UserError:  # damaged, or just being written or removed: who reads the checkpoint says so
        return rows
    there = rows_in(folder) - sum(row["step"] > max(steps) for row in rows)
    if there < expected:
        say(f"{folder / METRICS} has {there} of the {expected} rows that were written up to step {max(steps)}")
    return rows


def _stale(folder: Path, evaluation: results.Evaluation) -> str:
    """What to say where the weights that were evaluated are no longer those of the folder."""
    now = manifest.digests(folder)
    if not evaluation.digest or not now or now.get(evaluation.weights) == evaluation.digest:
        return ""
    newest = next((name for name in now if name.split(",")[0] == evaluation.weights.split(",")[0]), next(iter(now)))
    return f"no longer the weights in the folder, which now has {newest}: evaluate again"


def with_overrides(runs: Sequence[Run]) -> list[Run]:
    """The runs; a number in which their configs differ becomes an override of every row whose evaluator depends on it.

    Rows of different runs are one line of a table only where they measure the same thing: `robust(pgd(linf(eps)))` of
    eps 2/255 and of 8/255 do not.
    """
    differ = [key for key, _, differs in differing([run.config for run in runs]) if differs and key.isidentifier()]

    def full(run: Run, row: Row) -> Row:
        keys = mentioned(row.evaluator, run.config)
        return row._replace(overrides={key: fraction(run.config[key]) for key in differ if key in keys} | row.overrides)

    return [run._replace(rows=[full(run, row) for row in run.rows]) for run in runs]


def other_data(runs: Sequence[Run]) -> str:
    """What to say where numbers of different data stand in one line, "" where none do."""
    by_key: dict[Any, dict[str, list[str]]] = {}
    for run in runs:
        for row in run.rows:
            source = row.overrides.get("source", run.config.get("source", ""))
            by_key.setdefault(row.key, {}).setdefault(source, []).append(run.label)
    sources = next((each for each in by_key.values() if len(each) > 1), {})
    listed = ", ".join(f"{source} of {' and '.join(labels)}" for source, labels in sources.items())
    return f"the data differ ({listed}): a difference between these runs is one of the data too" if sources else ""


def mentioned(text: str, config: Mapping[str, str]) -> set[str]:
    """The keys of a flat config that the value of `text` depends on, those behind other keys included.

    >>> sorted(mentioned("robust(attack)", {"attack": "pgd(linf(eps))", "eps": ".1", "seed": "0"}))
    ['attack', 'eps']
    """
    keys, texts = set(), [text]
    while texts:
        text = texts.pop()
        new = (set(names_of(text)) & set(config)) - keys
        keys |= new
        texts += [config[key] for key in new]
    return keys


def fraction(text: str) -> str:
    """A number of a config as people write it: 8/255 where it is one.

    >>> fraction("0.03137254901960784"), fraction("0.1"), fraction("20")
    ('8/255', '0.1', '20')
    """
    try:
        value = float(text) * 255
    except ValueError:
        return text
    return f"{value:.0f}/255" if len(text) > 8 and abs(value - round(value)) < 1e-9 else text


def _versions(path: Path) -> dict[str, Any]:
    """What a run was made with at its last start; {} if it does not say."""
    return {key: each for key, each in read_versions(path).items() if key != "earlier"} if path.is_file() else {}


def labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart.

    >>> labels([Path("/runs/a/gap"), Path("/runs/b/gap"), Path("/runs/top")])
    ['a/gap', 'b/gap', 'top']
    """
    end = lambda folder, n: "/".join(folder.parts[-n:])
    unique = lambda folder, n: sum(end(other, n) == end(folder, n) for other in folders) == 1
    return [next(end(f, n) for n in range(1, len(f.parts) + 1) if unique(f, n) or n == len(f.parts)) for f in folders]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} -> {"a.b": "1"}; text stays as it is, everything else is JSON."""
    out = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return out


def differing(tables: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str | None], bool]]:
    """(key, value of each, do they differ?) of flat tables, in the order of appearance."""
    keys = dict.fromkeys(key for table in tables for key in table)
    values = {key: [table.get(key) for table in tables] for key in keys}
    return [(key, each, len(set(each)) > 1) for key, each in values.items()]


def kind(evaluator: str) -> str:
    """The name of the function an evaluator's text calls.

    >>> kind("robust(pgd(linf(eps)))")
    'robust'
    """
    return evaluator.partition("(")[0].strip()


def beside(rows: Iterable[Row], robust: Row) -> tuple[dict[str, Measure], list[str]]:
    """({name: Measure}, evaluators not run): what belongs beside a robust number, the main measures of `accuracy()` and
    `regions()` of the same network on the same split."""
    measures, missing = {}, []
    same = lambda row: row.split == robust.split and row.network == robust.network
    for name in BESIDE:
        row = next((row for row in rows if kind(row.evaluator) == name and same(row)), None)
        missing += [] if row else [f"{name}()"]
        measures |= {key: measure for key, measure in row.numbers.items() if measure.main} if row else {}
    return measures, missing


def with_gaps(rows: Sequence[Row], train: str) -> list[Row]:
    """The rows, where `accuracy()` of images outside the training split has `generalisation_gap`: the accuracy on a
    part of the training split, such as "train[:1000]", minus its own. Without a row of such a part nothing is added.
    """
    accuracy = lambda row: row.measures["accuracy"].value if "accuracy" in row.measures else None
    rows = list(rows)
    for place, row in enumerate(rows):
        if kind(row.evaluator) != "accuracy" or not finite(accuracy(row)) or _overlap(row.split, train) != "apart":
            continue
        same = [each for each in rows if kind(each.evaluator) == "accuracy" and each.network == row.network]
        trained = next((accuracy(each) for each in same if _overlap(each.split, train) == "part"), None)
        if finite(trained):
            gap = Measure(trained - accuracy(row), n=row.measures["accuracy"].n, label="generalisation gap")
            first = {"accuracy": row.measures["accuracy"], "generalisation_gap": gap}
            rows[place] = row._replace(measures={**first, **row.measures, **first})
    return rows


def in_training(split: str, train: str) -> bool:
    """Is this split a part of the training split, as far as the texts tell?"""
    return _overlap(split, train) == "part"


def _overlap(split: str, train: str) -> str:
    """Whether a split is a "part" of the training split, "apart" from it, or neither as far as the texts tell.

    >>> [_overlap(split, "train[:900]") for split in ("train[:100]", "test", "train[900:]", "train", "train[-5%:]")]
    ['part', 'apart', 'apart', '', '']
    """
    if split == train or split.split("[")[0] != train.split("[")[0]:
        return "part" if split == train else "apart"
    ranges = [re.fullmatch(r"[^\[]+(?:\[(\d*):(\d*)\])?", text) for text in (split, train)]
    if not all(ranges):
        return ""
    (low, high), (first, last) = ((int(m[1] or 0), int(m[2]) if m[2] else math.inf) for m in ranges)
    return "apart" if high <= first or last <= low else "part" if first <= low and high <= last else ""


def finite(value: Any) -> bool:
    """Is this a number one can subtract?"""
    return isinstance(value, (int, float)) and math.isfinite(value)
