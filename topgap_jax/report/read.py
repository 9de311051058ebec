"""Run folders as the report and the tables see them: what is there, and nothing invented for what is not."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from topgap_jax.build import names as names_of
from topgap_jax.errors import UserError
from topgap_jax.progress import read_metrics

HEADLINES = (
    "accuracy", "generalisation_gap", "worst_group_accuracy", "robust_accuracy", "foreground_sensitivity", "background_gap",
    "foreground_accuracy", "background_accuracy", "iou", "best_iou", "max_box_accuracy", "centre_iou", "full_iou",
    "centre_box_accuracy", "full_box_accuracy", "in_region", "lift", "energy", "energy_lift", "gini", "effective_area",
    "deletion", "insertion", "topk_intersection", "kendall_tau_b", "chance", "neuron_coverage", "image_coverage", "rms_radius",
    "centre_corner_ratio", "top_lift", "nll", "calibration_error",
)  # fmt: skip
"""The measures a comparison starts with, in this order: worst group and regions stand around the robust number."""

BESIDE = (
    "worst_group_accuracy",
    "foreground_sensitivity",
    "background_gap",
    "foreground_accuracy",
    "background_accuracy",
)
"""What stands beside every robust number: adversarial training can buy the one with the other."""

HIGHER = {
    "accuracy", "worst_group_accuracy", "robust_accuracy", "clean_accuracy", "foreground_sensitivity",
    "foreground_accuracy", "iou", "best_iou", "max_box_accuracy", "in_region", "lift", "share_inside", "top_share_inside",
    "top_lift", "energy", "energy_lift", "insertion", "topk_intersection", "kendall_tau_b",
}  # fmt: skip
LOWER = {"nll", "calibration_error", "background_gap", "deletion"}


class Measure(NamedTuple):
    """One number of an evaluation; low and high bound its interval where one is given."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None


class Run(NamedTuple):
    """A run folder. config and versions are flat {dotted key: text}; metrics the lines of metrics.jsonl; rows those of
    evaluation.json; weights and data say what was evaluated."""

    label: str
    folder: Path
    config: dict[str, str]
    file: str | None
    versions: dict[str, str]
    metrics: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    weights: str
    data: str
    sheets: list[Path]


def read_runs(folders: Sequence[Path | str]) -> list[Run]:
    """Every folder once, in order, with labels that tell them apart; a folder that is no run is a UserError."""
    unique = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    if not unique:
        raise UserError("no run folder given; name one or more that `topgap train --workdir` wrote")
    return told_apart([read_run(folder, label) for folder, label in zip(unique, labels(unique))])


def read_run(folder: Path, label: str) -> Run:
    """What lies in one run folder; only config.json must be there."""
    path = folder / "config.json"
    if not path.is_file():
        why = "it has no config.json" if folder.is_dir() else "there is no such folder"
        raise UserError(f"'{folder}' is not a run: {why}; name a folder that `topgap train --workdir` wrote")
    stored, evaluation = read_json(path, "config"), read_json(folder / "evaluation.json", "rows")
    return Run(
        label=label,
        folder=folder,
        config=flat(stored["config"]),
        file=stored.get("file"),
        versions=flat(read_json(folder / "versions.json")),
        metrics=[row for row in read_metrics(folder) if isinstance(row, dict) and "step" in row],
        rows=with_gaps(evaluation.get("rows", []), str(stored["config"].get("train", ""))),
        weights=str(evaluation.get("weights", "")),
        data=str(evaluation.get("data", "")),
        sheets=sorted(folder.glob("sheets/*.png")),
    )


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs; a row whose evaluator names a number that their configs differ in says it, `robust(pgd(linf(eps))) with eps=8/255`.

    Rows of different runs are one line of a table only where they measure the same thing.
    """
    names = [key for key, _, differs in differing([run.config for run in runs]) if differs and key.isidentifier()]

    def named(run: Run, row: dict[str, Any]) -> dict[str, Any]:
        text = str(row.get("evaluator", ""))
        head, found, tail = text.rpartition(") with ")
        call, note = (f"{head})", tail) if found else (text, "")
        told = [
            f"{name}={fraction(run.config[name])}" for name in names if name in run.config and name in names_of(call)
        ]
        said = {words.partition("=")[0] for words in note.split(", ")}
        told = [words for words in told if words.partition("=")[0] not in said]
        return row | {"evaluator": f"{call} with {', '.join([note] * bool(note) + told)}"} if told else row

    return [run._replace(rows=[named(run, row) for row in run.rows]) for run in runs]


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


def read_json(path: Path, needs: str | None = None) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no file; it must have the key `needs`."""
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read as JSON: {' '.join(str(error).split())}") from None
    if not isinstance(stored, dict) or (needs and needs not in stored):
        raise UserError(f"'{path}' is not what a run writes: it should be an object" + f" with '{needs}'" * bool(needs))
    return stored


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
    return [(key, found, len(set(found)) > 1) for key, found in values.items()]


def measures(row: Mapping[str, Any]) -> list[Measure]:
    """The numbers of an evaluation's row; `name_low` and `name_high` are the interval of `name` (or of `name_accuracy`)."""
    values, bounds, used = row.get("values", {}), {}, set()
    for stem in [name.removesuffix("_low") for name in values if name.endswith("_low")]:
        owner = stem if stem in values else f"{stem}_accuracy"
        if owner in values and f"{stem}_high" in values:
            bounds[owner] = (values[f"{stem}_low"], values[f"{stem}_high"])
            used |= {f"{stem}_low", f"{stem}_high"}
    return [Measure(name, value, *bounds.get(name, (None, None))) for name, value in values.items() if name not in used]


def headline(row: Mapping[str, Any]) -> Measure:
    """The number that stands for a row: robust accuracy where there is one, else its first."""
    found = {measure.name: measure for measure in measures(row)}
    return found.get("robust_accuracy") or next(iter(found.values()), Measure("", None))


def is_robust(row: Mapping[str, Any]) -> bool:
    """Is this row a claim about robustness, which needs an audit?"""
    return str(row.get("evaluator", "")).split("(")[0].strip() in ("robust", "curve")


def audit_of(row: Mapping[str, Any]) -> str:
    """The audit of a robust row in words."""
    audit = row.get("audit")
    return "not audited" if not audit else audit if isinstance(audit, str) else json.dumps(audit, ensure_ascii=False)


def beside(rows: Iterable[Mapping[str, Any]], split: str) -> dict[str, Measure | None]:
    """What belongs beside a robust number, from the other rows of the same split; None where it was not measured."""
    others = [row for row in rows if row.get("split") == split and not is_robust(row)]
    found = {measure.name: measure for row in others for measure in measures(row)}
    return {name: found.get(name) for name in BESIDE}


def with_gaps(rows: Sequence[Mapping[str, Any]], train: str) -> list[Mapping[str, Any]]:
    """The rows, where every `accuracy()` of other images than the training split's has `generalisation_gap`: the accuracy on
    a part of the training split, such as "train[:1000]", minus its own. Without a row of such a part nothing is added.
    """
    accuracies = [row for row in rows if str(row.get("evaluator")).startswith("accuracy(") and row.get("values")]
    seen = next((row["values"].get("accuracy") for row in accuracies if _overlap(row["split"], train) == "part"), None)
    others = [row for row in accuracies if _overlap(row["split"], train) == "apart"]
    others = [row for row in others if finite(seen) and finite(row["values"].get("accuracy"))]
    gap = lambda row: {"generalisation_gap": seen - row["values"]["accuracy"]}
    return [{**row, "values": {**row["values"], **gap(row)}} if row in others else row for row in rows]


def _overlap(split: str, train: str) -> str:
    """Whether a split is a "part" of the training split, "apart" from it, or neither as far as the texts tell.

    >>> [_overlap(split, "train[:900]") for split in ("train[:100]", "test", "train[900:]", "train", "train[-5%:]")]
    ['part', 'apart', 'apart', '', '']
    """
    if split == train or split.split("[")[0] != train.split("[")[0]:
        return "part" if split == train else "apart"
    found = [re.fullmatch(r"[^\[]+(?:\[(\d*):(\d*)\])?", text) for text in (split, train)]
    if not all(found):
        return ""
    (low, high), (first, last) = ((int(m[1] or 0), int(m[2]) if m[2] else math.inf) for m in found)
    return "apart" if high <= first or last <= low else "part" if first <= low and high <= last else ""


class Line(NamedTuple):
    """One line of a comparison: the measures of the runs, the index of the best (None: no best), last minus first."""

    split: str
    evaluator: str
    name: str
    cells: list[Measure | None]
    best: int | None
    difference: float | None
    robust: bool
    main: bool


def comparison(tables: Sequence[Sequence[Mapping[str, Any]]]) -> list[Line]:
    """All measures of several evaluations, split by split, the headlines first."""
    rows = [{(str(row.get("split")), str(row.get("evaluator"))): row for row in table} for table in tables]
    keys = list(dict.fromkeys(key for table in rows for key in table))
    splits = list(dict.fromkeys(split for split, _ in keys))
    lines = []
    for key in keys:
        present = [table.get(key) for table in rows]
        found = [{m.name: m for m in measures(row)} if row else {} for row in present]
        first = next(headline(row).name for row in present if row)
        robust = any(is_robust(row) for row in present if row)
        for name in dict.fromkeys(name for table in found for name in table):
            cells = [table.get(name) for table in found]
            values = [cell.value if cell else None for cell in cells]
            ends = values[0], values[-1]
            difference = ends[1] - ends[0] if len(values) > 1 and all(map(finite, ends)) else None
            lines.append(
                Line(*key, name, cells, best(name, values), difference, robust, name in HEADLINES or name == first)
            )
    rank = {name: place for place, name in enumerate(HEADLINES)}
    return sorted(lines, key=lambda line: (splits.index(line.split), not line.main, rank.get(line.name, len(rank))))


def best(name: str, values: Sequence[float | None]) -> int | None:
    """Index of the best of several values; None for a measure without a better side, or if all are equal.

    >>> best("accuracy", [0.8, None, 0.9]), best("nll", [0.8, 0.9]), best("rms_radius", [8, 9]), best("iou", [0.5, 0.5])
    (2, 0, None, None)
    """
    known = {index: value for index, value in enumerate(values) if finite(value)}
    if name not in HIGHER | LOWER or len(set(known.values())) < 2:
        return None
    return (max if name in HIGHER else min)(known, key=known.get)


def finite(value: Any) -> bool:
    """Is this a number one can subtract?"""
    return isinstance(value, (int, float)) and math.isfinite(value)


def number(value: Any, *, sign: bool = False) -> str:
    """A number for people: four digits after the point below 10, fewer above; `–` for none.

    >>> number(0.91234), number(-12.3456, sign=True), number(10000), number(12345.6), number(0.0000123), number(None)
    ('0.9123', '-12.35', '10,000', '12,346', '1.23e-05', '–')
    """
    plus = "+" if sign else ""
    if value is None or isinstance(value, str):
        return value or "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:{plus},}"
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3:
        return f"{value:{plus}.2e}"
    return f"{value:{plus},.{4 if size < 10 else 2 if size < 1000 else 0}f}"


def amount(value: Any) -> str:
    """A cost for people: as few digits as it needs, at most four.

    >>> amount(1.0), amount(20.25), amount(81.66), amount(123456.7), amount(None)
    ('1', '20.25', '81.66', '123,457', '–')
    """
    return (f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}") if finite(value) else "–"


def interval(measure: Measure | None) -> str:
    """`0.9123 [0.9065, 0.9177]`, or the number alone where no interval is given."""
    if measure is None:
        return "–"
    bounds = f" [{number(measure.low)}, {number(measure.high)}]" if finite(measure.low) and finite(measure.high) else ""
    return number(measure.value) + bounds
