"""Tables in the terminal: one run's results, several runs side by side."""

import shlex
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from unicodedata import combining, east_asian_width

from topgap_jax.measure.results import Row
from topgap_jax.report.audits import checks_table, headline
from topgap_jax.report.lines import Line, all_fewer, amount, comparison, fewer, interval, number, reason
from topgap_jax.report.read import beside, differing, finite, other_data, read_runs
from topgap_jax.types import Measure

COLUMNS = 120
LABEL = 45  # of a measure's words; what an attack is in full is said by its evaluator


def compare(workdirs: Sequence[Path | str]) -> str:
    """The main measures of several runs side by side (* the best), with last minus first, and where the configs differ.

    Plain ASCII, except for what the runs themselves name otherwise.
    """
    runs = read_runs(workdirs)
    names, several = [run.label for run in runs], len(runs) > 1
    lines = [line for line in comparison([run.rows for run in runs]) if line.about.main]
    brief = len(runs) > 2  # their intervals would not fit in a line
    columns = [
        cells([line.cells[i] for line in lines], best=[line.best == i for line in lines], brief=brief)
        for i in range(len(runs))
    ]
    rows = []
    for (line, heading), *values in zip(headed(lines), *columns):
        change = ["" if line.difference is None else number(line.difference, sign=True)] * several
        rows += [*heading, [label(line, all_fewer(line, names)), *values, *change]]
    parts = []
    if rows:
        head = ["", *(f"{name}  " for name in names), *["difference"] * several]
        parts.append(aligned([head, *rows], right=range(1, len(head))))
        about = "intervals are on the page of topgap report" if brief else "intervals are over images, not over seeds"
        parts += [printable(f"* best; difference: {names[-1]} - {names[0]}; {about}")] * several
    parts += [printable(text) for text in [other_data(runs)] if text]
    parts += apart(lines) * several + undefined(lines, names)
    parts += [printable(f"{run.label}: evaluated is {run.weights}, {run.stale}") for run in runs if run.stale]
    notes: dict[str, list[str]] = {}
    for run in runs:
        command = f"topgap evaluate --workdir {shlex.quote(str(run.folder))}"
        parts += [printable(f"{run.label}: no evaluation yet; {command} writes one")] * (not run.rows)
        for row in run.rows:
            if row.audit is not None and not row.checks:
                notes.setdefault(note(run.rows, row), []).append(run.label)
    parts += [f"{printable(', '.join(labels))}: {words}" for words, labels in notes.items()]
    parts += [printable(f"{run.label}: {summed(row)}") for run in runs for row in run.rows if row.checks]
    changed = [(key, texts) for key, texts, differs in differing([run.config for run in runs]) if differs]
    return "\n".join([*parts, *(["", configs(changed, names)] if changed else [])])


def table(rows: Sequence[Row]) -> str:
    """The main measures of one evaluation with their cost an image; every robust number has a line with its audit, and
    one with the clean accuracy and what each attack of several left."""
    head = ["", "value", "images", "forwards", "gradients", "seconds"]
    body, lines = [], [line for line in comparison([rows]) if line.about.main]
    for (line, heading), value in zip(headed(lines), cells([line.cells[0] for line in lines])):
        [measure], [row] = line.cells, line.rows
        images = fewer(measure, row).removesuffix(" images")
        costs = [amount(row.cost.get(key)) for key in ("forward_passes", "gradient_evaluations", "seconds")]
        body += heading
        first = [images or number(row.examples), *costs]
        body.append([label(line), value, *(first if heading else [images])])
    robust = [row for row in rows if row.audit is not None and not row.checks]
    notes = [line for row in robust for line in (note(rows, row), left(row)) if line]
    audits = [f"\n{printable_lines(checks_table(row))}" for row in rows if row.checks]
    return "\n".join([aligned([head, *body], right=range(1, len(head))), *undefined(lines), *notes, *audits])


def headed(lines: Iterable[Line]) -> Iterable[tuple[Line, list[list[str]]]]:
    """(line, the heading before it): an evaluator's text stands once, above its measures."""
    before = None
    for line in lines:
        key = line.split, line.evaluator
        yield line, [] if key == before else [[f"{line.split}: {line.evaluator}"]]
        before = key


def label(line: Line, images: str = "") -> str:
    """The measure's words, indented, and over how many images it is, if not over all."""
    more = f", {images}" if images else ""
    return "  " + textwrap.shorten(line.label, max(LABEL - len(more), 20), placeholder="...") + more


def cells(measures: Sequence[Measure | None], *, best: Sequence[bool] = (), brief: bool = False) -> list[str]:
    """A column of measures, `-` where a run has none, * at the best; intervals stand below intervals."""
    parts = [("-" if measure is None else interval(measure)).partition(" ") for measure in measures]
    longest = max((len(bounds) for _, _, bounds in parts), default=0)
    texts = [value if brief or not longest else f"{value} {bounds:{longest}}" for value, _, bounds in parts]
    return [text + (" *" if mark else "  ") for text, mark in zip(texts, best)] if best else texts


def apart(lines: Iterable[Line]) -> list[str]:
    """Which measures say nothing of one network against another, in a line; none where no two runs have one."""
    shared = [line for line in lines if not line.about.across and sum(cell is not None for cell in line.cells) > 1]
    labels = dict.fromkeys(line.about.label for line in shared)
    why = "areas of different networks differ in scale (arXiv 2408.08137); compare methods within a run"
    return [printable(f"not compared between runs: {', '.join(labels)}: {why}")] * bool(labels)


def undefined(lines: Iterable[Line], names: Sequence[str] = ()) -> list[str]:
    """Why measures have no value, each reason once."""
    reasons: dict[str, dict[str, None]] = {}
    for line in lines:
        empty = [i for i, measure in enumerate(line.cells) if measure and not finite(measure.value)]
        for i in empty:
            who = f" of {names[i]}" if len(empty) < len(line.cells) else ""
            reasons.setdefault(reason(line.cells[i]), {})[f"{line.about.label}{who}"] = None
    return [printable(f"undefined: {', '.join(labels)}: {words}") for words, labels in reasons.items()]


def note(rows: Sequence[Row], row: Row) -> str:
    """What a robust number lacks, in words: its audit, and of what belongs beside it that which was not measured."""
    _, missing = beside(rows, row)
    words = f"; not measured beside it: {', '.join(missing)}" if missing else ""
    return printable(f"{row.text} on {row.split}: {row.audit}{words}")


def left(row: Row) -> str:
    """How a robust number came about: the clean accuracy, what each attack left, and how many verdicts are not certain,
    where there are some."""
    shares = ["clean_accuracy", *(name for name in row.numbers if name.startswith("after_"))]
    counts = [name for name in ("fragile", "unconfirmed", "not_finite") if name in row.numbers]
    measures = [row.numbers[name] for name in shares if name in row.numbers]
    measures += [row.numbers[name] for name in counts if row.numbers[name].value]
    words = printable("; ".join(f"{measure.label} {number(measure.value)}" for measure in measures))
    return textwrap.fill(words, COLUMNS, initial_indent="  ", subsequent_indent="  ")


def summed(row: Row) -> str:
    """An audit in a line: its verdict, and which checks failed or warn."""
    of = lambda status: [check.id for check in row.checks if check.status == status]
    words = {"fail": "failed", "warn": "warn"}
    parts = [f"{word}: {', '.join(of(status))}" for status, word in words.items() if of(status)]
    return "; ".join([f"{row.text} on {row.split}: {headline(row)}", *parts])


def configs(changed: Sequence[tuple[str, Sequence[str | None]]], names: Sequence[str]) -> str:
    """The values of the config in which runs differ: as a table, or below each other where that would be too wide."""
    text = aligned([["config", *names], *([key, *(value or "-" for value in values)] for key, values in changed)])
    if max(map(width, text.splitlines())) <= COLUMNS:
        return text
    widest = max(map(width, names))
    lines = []
    for key, values in changed:
        lines += [
            printable(key),
            *(printable(f"  {padded(name, widest)}  {value or '-'}") for name, value in zip(names, values)),
        ]
    return "\n".join(lines)


def printable(text: str) -> str:
    """The text with `?` for every character that cannot be printed."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))


def printable_lines(text: str) -> str:
    """The text line by line as `printable` has it."""
    return "\n".join(map(printable, text.split("\n")))


def width(text: str) -> int:
    """Columns of a terminal that a text takes: Chinese letters two, accents that are letters of their own none.

    >>> width("gap"), width("\u732b"), width("u\u0308")
    (3, 2, 1)
    """
    return sum(not combining(letter) and 1 + (east_asian_width(letter) in "WF") for letter in text)


def padded(text: str, columns: int, right: bool = False) -> str:
    """The text with spaces behind it, or before it, to so many columns."""
    spaces = " " * (columns - width(text))
    return spaces + text if right else text + spaces


def aligned(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Rows of cells as columns, the first underlined; a row of one cell is a heading. What cannot be printed is `?`.

    >>> print(aligned([["name", "value"], ["a", "1"], ["bb", "10"]], right=[1]))
    name  value
    -----------
    a         1
    bb       10
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    columns = max(map(len, rows))
    widths = [max((width(row[i]) for row in rows if len(row) > max(i, 1)), default=0) for i in range(columns)]
    place = lambda i, cell: padded(cell, widths[i], i in right)
    lines = ["  ".join(place(i, cell) for i, cell in enumerate(row)).rstrip() for row in rows]
    wide = max(width(line) for line, row in zip(lines, rows) if len(row) > 1 or columns == 1)
    return "\n".join([lines[0], "-" * wide, *lines[1:]])
