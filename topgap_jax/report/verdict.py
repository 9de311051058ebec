"""`verdict`: what the numbers of one or several runs say, in a few sentences that claim no more than they do."""

from collections.abc import Sequence

from topgap_jax.report.lines import Line, all_fewer, comparison, has_interval, reason
from topgap_jax.report.read import Run, finite, in_training, kind, other_data
from topgap_jax.types import Measure

SPLITS = 3  # of which it says the accuracy


def verdict(runs: Sequence[Run]) -> list[str]:
    """Sentences: accuracy and what attacks leave of it, then where the networks look.

    It takes the numbers that stand for `accuracy()` (on splits that are no part of the training split), for what is
    robust, and for `localisation(..)` and `regions(..)`. Runs differ measurably where the 95 % intervals of two of them
    do not overlap. The intervals are over images: they do not say what another seed would have given.
    """
    names = [run.label for run in runs]
    trained = {row.split for run in runs for row in run.rows if in_training(row.split, run.config.get("train", ""))}
    lines = [line for line in comparison([run.rows for run in runs]) if line.headline and line.split not in trained]
    one_split = lambda lines: [line for line in lines if line.split == lines[0].split]
    of = lambda name: [line for line in lines if kind(line.evaluator) == name]
    changed = lambda line: any(row.network for row in line.rows if row)  # by the command line: no run's own number
    accuracies = [seen(line, names, line.evaluator if changed(line) else "") for line in of("accuracy")[:SPLITS]]
    robust = one_split([line for line in lines if line.audits])
    shared = [line.about.label for line in robust]  # a label that two attacks share does not tell them apart
    text = lambda line: line.evaluator if changed(line) or shared.count(line.about.label) > 1 else ""
    attacked = [f"{seen(line, names, text(line))}, {', '.join(line.audits)}" for line in robust]
    looks = [seen(line, names, line.evaluator) + baseline(line) for line in one_split(of("localisation"))[:1]]
    looks += [seen(line, names, line.evaluator) for line in one_split(of("regions"))[:1]]
    sentences = [sentence(parts, names) for parts in (accuracies + attacked, looks) if parts]
    if not sentences:
        sentences = [sentence([seen(line, names, line.evaluator)], names) for line in lines[:1]]
    if words := other_data(runs):
        sentences.append(f"{words[:1].upper()}{words[1:]}.")
    empty = [run.label for run in runs if not run.rows]
    if empty:
        sentences.append(f"{' and '.join(empty)} {'has' if len(empty) == 1 else 'have'} not been evaluated yet.")
    return sentences


def sentence(parts: Sequence[str], names: Sequence[str]) -> str:
    """The parts as one sentence; of a single run it begins with its name."""
    text = "; ".join(parts)
    return f"{names[0]}: {text}." if len(names) == 1 else f"{text[:1].upper()}{text[1:]}."


def seen(line: Line, names: Sequence[str], evaluator: str = "") -> str:
    """One measure in words: `accuracy on test is measurably higher for top_gap (0.920) than for gap (0.850)`."""
    about = f"{line.about.label} on {line.split}" + (f" by {evaluator}" if evaluator else "")
    values = {name: cell for name, cell in zip(names, line.cells) if cell is not None and finite(cell.value)}
    if len(names) == 1:
        return f"{about} is {value(line.cells[0]) + images(line, names)}"
    rest = [
        f"{name} {'not measured' if cell is None else 'undefined: ' + reason(cell)}"
        for name, cell in zip(names, line.cells)
        if name not in values
    ]
    numbers = [f"{name} {short(cell)}" for name, cell in values.items()]
    if len(values) < 2 or not all(map(has_interval, values.values())):
        return f"{about}: {', '.join(numbers + rest)}{images(line, names)}"
    above = max(values, key=lambda name: values[name].low)
    below = min(values, key=lambda name: values[name].high)
    if values[above].low <= values[below].high:
        words = ", ".join([*numbers, *rest, "intervals overlap"])
        return f"{about} does not differ measurably ({words}{images(line, names)})"
    others = [text for name, text in zip(values, numbers) if name not in (above, below)] + rest
    more = f" ({', '.join(others)})" if others else ""
    pair = f"for {above} ({short(values[above])}) than for {below} ({short(values[below])})"
    return f"{about} is measurably higher {pair}{more}{images(line, names)}"


def value(measure: Measure) -> str:
    """A single run's number with its interval."""
    if not finite(measure.value):
        return f"undefined ({reason(measure)})"
    bounds = f" [{measure.low:.3f}, {measure.high:.3f}]" if has_interval(measure) else ""
    return short(measure) + bounds


def short(measure: Measure) -> str:
    """Three digits after the point and the unit."""
    return f"{measure.value:.3f}" + (f" {measure.unit}" if measure.unit else "")


def images(line: Line, names: Sequence[str]) -> str:
    """`, over 104 of 1,000 images` where a measure is not over all of them."""
    counts = all_fewer(line, names)
    return f", over {counts}" if counts else ""


def baseline(line: Line) -> str:
    """Beside a measure with a better side, the first main one of its row without: what looking at nothing gives."""
    for numbers in [list(row.numbers.values()) for row in line.rows if row]:
        sides = [m for m in numbers if m.main and m.better is None and finite(m.value)]
        if numbers[0].better and sides:
            return f", {sides[0].label} {short(sides[0])}"
    return ""
