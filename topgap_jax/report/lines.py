"""The measures of several evaluations side by side, and numbers as people read them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from topgap_jax.measure.results import Row
from topgap_jax.report.read import finite
from topgap_jax.types import Measure


class Line(NamedTuple):
    """One line of a comparison of runs.

    about          the measure without a value: label, unit, better, main
    cells, rows    each run's measure and the row it stands in, None where absent
    headline       whether it stands for its evaluator
    best           index of the best run, None: no side is better, all are equal, or runs are not to be compared by it
    difference     last run minus first, None where runs are not to be compared by it (`about.across`)
    """

    split: str
    evaluator: str
    about: Measure
    cells: list[Measure | None]
    rows: list[Row | None]
    headline: bool
    best: int | None
    difference: float | None

    @property
    def label(self) -> str:
        """The measure in words, with its unit."""
        return f"{self.about.label} ({self.about.unit})" if self.about.unit else self.about.label

    @property
    def audits(self) -> list[str]:
        """The audits of a robust number in words; none of another measure, nor of the audit's own."""
        audits = [row.audit for row in self.rows if row and row.audit is not None and not row.checks]
        return list(dict.fromkeys(audits)) if self.headline else []


def comparison(tables: Sequence[Sequence[Row]]) -> list[Line]:
    """All measures of several evaluations, split by split, in the order of their rows."""
    indexed = [{row.key: row for row in table} for table in tables]
    keys = list(dict.fromkeys(key for table in indexed for key in table))
    splits = list(dict.fromkeys(split for split, *_ in keys))
    lines = []
    for key in sorted(keys, key=lambda key: splits.index(key[0])):
        rows = [table.get(key) for table in indexed]
        names = list(dict.fromkeys(name for row in rows if row for name in row.numbers))
        for name in names:
            cells = [row.numbers.get(name) if row else None for row in rows]
            about = describing(name, [cell for cell in cells if cell])
            values = [cell.value if cell else None for cell in cells]
            several = len(values) > 1 and finite(values[0]) and finite(values[-1]) and about.across
            lines.append(
                Line(
                    split=key[0],
                    evaluator=next(row for row in rows if row).text,
                    about=about,
                    cells=cells,
                    rows=rows,
                    headline=name == names[0],
                    best=best(about.better if about.across else None, values),
                    difference=values[-1] - values[0] if several else None,
                )
            )
    return lines


def describing(name: str, measures: Sequence[Measure]) -> Measure:
    """What a name stands for, in the words of the measure that says most: those of version 0.1.0 say little."""
    bare = name.replace("_", " ")
    about = min(measures, key=lambda measure: (measure.better is None, measure.main, measure.label == bare))
    return Measure(
        better=about.better,
        label=str(about.label or name),
        unit=str(about.unit),
        main=about.main,
        across=all(measure.across for measure in measures),
    )


def best(better: str | None, values: Sequence[float | None]) -> int | None:
    """Index of the best of several values; None for a measure without a better side, or if all are equal.

    >>> best("higher", [0.8, None, 0.9]), best("lower", [0.8, 0.9]), best(None, [8, 9]), best("higher", [0.5, 0.5])
    (2, 0, None, None)
    """
    numbers = {index: value for index, value in enumerate(values) if finite(value)}
    if better not in ("higher", "lower") or len(set(numbers.values())) < 2:
        return None
    return (max if better == "higher" else min)(numbers, key=numbers.get)


def number(value: Any, *, sign: bool = False) -> str:
    """A number for people: four digits after the point below 10, fewer above.

    >>> number(0.91234), number(-12.3456, sign=True), number(10000), number(12345.6), number(0.0000123)
    ('0.9123', '-12.35', '10,000', '12,346', '1.23e-05')
    """
    plus = "+" if sign else ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or not finite(value):
        return f"{value:{plus},}"
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3:
        return f"{value:{plus}.2e}"
    return f"{value:{plus},.{4 if size < 10 else 2 if size < 1000 else 0}f}"


def amount(value: Any) -> str:
    """A cost for people: as few digits as it needs, at most four; "" for none.

    >>> amount(1.0), amount(20.25), amount(81.66), amount(123456.7), amount(None)
    ('1', '20.25', '81.66', '123,457', '')
    """
    return (f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}") if finite(value) else ""


def has_interval(measure: Measure) -> bool:
    """Are both ends of its 95 % interval known?"""
    return finite(measure.low) and finite(measure.high)


def interval(measure: Measure) -> str:
    """`0.9123 [0.9065, 0.9177]`, the number alone where no interval is known, `undefined` where no image defines it."""
    if not finite(measure.value):
        return "undefined"
    bounds = f" [{number(measure.low)}, {number(measure.high)}]" if has_interval(measure) else ""
    return number(measure.value) + bounds


def fewer(measure: Measure | None, row: Row | None) -> str:
    """`104 of 1,000 images` where a measure is over fewer images than its evaluation, else "".

    >>> row = Row("test", "accuracy()", {}, 1000, {}, {}, None)
    >>> fewer(Measure(0.5, n=104), row), fewer(Measure(0.5, n=1000), row)
    ('104 of 1,000 images', '')
    """
    if measure is None or row is None or not finite(measure.value) or not measure.n or measure.n >= row.examples:
        return ""
    return f"{measure.n:,} of {row.examples:,} images"


def all_fewer(line: Line, names: Sequence[str]) -> str:
    """The same of all runs: `104 of 1,000 images` where they agree, else `104 of 1,000 images for gap`."""
    texts = {n: fewer(cell, row) for n, cell, row in zip(names, line.cells, line.rows) if cell and finite(cell.value)}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return ", ".join(f"{text} for {name}" for name, text in texts.items() if text)


def reason(measure: Measure) -> str:
    """Why a measure has no value."""
    return str(measure.reason or "its value is no finite number")
