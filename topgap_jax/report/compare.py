"""Tables in the terminal: one run's results, several runs side by side, the demo beside the stored seeds."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from topgap_jax.report.read import (
    amount,
    audit_of,
    beside,
    comparison,
    differing,
    interval,
    is_robust,
    number,
    read_runs,
)

DEMO = (
    "accuracy", "worst_group_accuracy", "robust_accuracy", "foreground_sensitivity", "background_gap", "iou",
    "centre_iou", "full_iou", "max_box_accuracy", "rms_radius", "centre_corner_ratio", "top_lift",
)  # fmt: skip
ARM = "top_gap .14"  # the stored arm with the demo's pool


def compare(workdirs: Sequence[Path]) -> str:
    """The main measures of several runs side by side (* the best), with last minus first, and where the configs differ."""
    runs = read_runs(workdirs)
    names, several = [run.label for run in runs], len(runs) > 1
    rows, split = [], None
    for line in comparison([run.rows for run in runs]):
        if not line.main:
            continue
        if line.split != split:
            split = line.split
            rows.append([split])
        cells = [interval(cell) + (" *" if i == line.best else "  ") for i, cell in enumerate(line.cells)]
        rows.append([f"  {line.name}", line.evaluator, *cells, *[number(line.difference, sign=True)] * several])
    parts = []
    if rows:
        head = ["", "evaluator", *(f"{name}  " for name in names), *[f"{names[-1]} - {names[0]}"] * several]
        parts.append(aligned([head, *rows], right=range(2, len(head))))
        parts += ["* best; intervals, where given, are over images, not over seeds"] * several
    said: dict[str, list[str]] = {}
    for run in runs:
        parts += [
            f"{run.label}: no evaluation yet; topgap evaluate --workdir {shlex.quote(str(run.folder))} writes one"
        ] * (not run.rows)
        for row in filter(is_robust, run.rows):
            said.setdefault(note(run.rows, row), []).append(run.label)
    parts += [f"{', '.join(who)}: {words}" for words, who in said.items()]
    configs = differing([run.config for run in runs])
    changed = [[key, *(text or "-" for text in values)] for key, values, differs in configs if differs]
    if changed:
        parts.append("\n" + aligned([["config", *names], *changed]))
    return "\n".join(parts)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of one evaluation with their cost; every robust row has a line with its audit and what stands beside it."""
    head = ["split", "evaluator", "measure", "value", "examples", "forwards", "gradients", "seconds"]
    body = []
    for row in rows:
        cost = row.get("cost", {})
        costs = [amount(cost.get(key)) for key in ("forward_passes", "gradient_evaluations", "seconds")]
        about, costs = [row["split"], row["evaluator"]], [number(row.get("examples")), *costs]
        for line in comparison([[row]]):
            if line.main:
                body.append([*about, line.name, interval(line.cells[0]), *costs])
                about, costs = ["", ""], []
    parts = [aligned([head, *body], right=range(4, 8))]
    parts += [note(rows, row) for row in rows if is_robust(row)]
    return "\n".join(parts)


def demo_table(runs: Mapping[str, Sequence[Mapping[str, Any]]], stored: Mapping[str, Any] | None) -> str:
    """Two arms of one seed beside the stored several seeds (results/shapes.json; mean, paired difference, 95 % interval).

    runs {arm: rows of its evaluation}: the first is compared with the last.
    """
    names = list(runs)
    seeds = stored or {}
    head = [
        "",
        *names,
        "difference",
        "",
        *(f"{name}, all seeds" for name in ("gap", ARM)),
        "difference [95 %]",
        "verdict",
    ]
    head = head if stored else head[: len(names) + 2]
    rows, split = [], None
    for line in comparison(list(runs.values())):
        if line.name not in DEMO:
            continue
        if line.split != split:
            split = line.split
            rows.append([split])
        cells = [number(cell.value if cell else None) for cell in line.cells]
        row = [f"  {line.name}", *cells, number(line.difference, sign=True)]
        name = f"{line.evaluator.split('(')[0]}.{line.name}"
        known = seeds.get("comparison", {}).get(split, {}).get(name)
        if known:
            change = known[f"{ARM} - gap"]
            means = [number(known[arm]["mean"]) for arm in ("gap", ARM)]
            bounds = f"{number(change['mean'], sign=True)} [{number(change['low'], sign=True)}, {number(change['high'], sign=True)}]"
            row += ["|", *means, bounds, change["verdict"]]
        rows.append(row)
    count = len(seeds.get("runs", {}).get("gap", {}))
    notes = (
        [f"right of |: {count} seeds of the same comparison, paired by seed"]
        if stored
        else ["no stored seeds to compare with"]
    )
    notes += ["the left side is one seed, which decides nothing; robust numbers are not audited"]
    return "\n".join([aligned([head, *rows], right=range(1, 8)), *notes])


def note(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> str:
    """What a robust row lacks, in words: its audit, and of what belongs beside it that which was not measured."""
    missing = [name for name, found in beside(rows, row["split"]).items() if found is None]
    words = f"; not measured beside it: {', '.join(missing)}" if missing else ""
    return f"{row['evaluator']} on {row['split']}: {audit_of(row)}{words}"


def aligned(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Rows of cells as columns, the first row underlined; a row of one cell is a heading. What cannot be printed is `?`.

    >>> print(aligned([["name", "value"], ["a", "1"], ["bb", "10"]], right=[1]))
    name  value
    -----------
    a         1
    bb       10
    """
    rows = [["".join(c if c.isprintable() else "?" for c in str(cell)) for cell in row] for row in rows]
    columns = max(map(len, rows))
    widths = [max((len(row[i]) for row in rows if len(row) > max(i, 1)), default=0) for i in range(columns)]
    place = lambda i, cell: cell.rjust(widths[i]) if i in right else cell.ljust(widths[i])
    lines = ["  ".join(place(i, cell) for i, cell in enumerate(row)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
