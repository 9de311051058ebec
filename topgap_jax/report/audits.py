"""The checks of an audit, and those of `trust`, as a person reads them: in the terminal, and for the page."""

import textwrap
from collections.abc import Sequence
from typing import Any

from topgap_jax.measure.criteria import CHECKS, FAIL, REMINDER, WARN
from topgap_jax.measure.results import Row
from topgap_jax.report.read import Run
from topgap_jax.types import Check

COLUMNS = 120
INDENT = 46  # of a check's sentence, behind its name and status


def checks_table(row: Row) -> str:
    """Every check of an audit with its evidence, those that failed first; plain ASCII."""
    lines = [*textwrap.wrap(f"{row.text} on {row.split}: {headline(row)}", COLUMNS), "-" * COLUMNS]
    for check in ordered(row.checks):
        name = f"{check.id:4} {check.status:8} {name_of(check)}"
        sentence = textwrap.wrap(check.sentence, COLUMNS - INDENT) or [""]
        lines.append(f"{name:{INDENT}}{sentence[0]}".rstrip())
        lines += [" " * INDENT + words for words in sentence[1:]]
    return "\n".join([*lines, *textwrap.wrap(reminder(row.checks), COLUMNS)])


def name_of(check: Check) -> str:
    """What a check of an audit or of `trust` looks at, in words."""
    if check.id in CHECKS:
        return CHECKS[check.id]
    # Here, because evaluators bring Flax, for which a table of runs need not wait.
    from topgap_jax.evaluators.trust import CHECKS as OF_TRUST

    return OF_TRUST.get(check.id, "")


def headline(row: Row) -> str:
    """The verdict of the audit in `row`, without the ball that its evaluator names."""
    return (row.audit or "").partition(": ")[2] or row.audit or ""


def ordered(checks: Sequence[Check]) -> list[Check]:
    """What failed, then what warns, then the rest, each in the order of the checks."""
    order = ("fail", "warn", "pass", "skipped")
    return sorted(checks, key=lambda check: order.index(check.status) if check.status in order else len(order))


def reminder(checks: Sequence[Check]) -> str:
    """What to do about a network on whose way a gradient is cut; "" of another."""
    return REMINDER if any(check.id == "A17" and check.status in (WARN, FAIL) for check in checks) else ""


def checked(runs: Sequence[Run], *, attacks: bool) -> list[dict[str, Any]]:
    """Every row of the runs that has checks, for the page: audits, whose attacks have a norm, or those of `trust`."""
    return [
        {
            "run": i,
            "row": row,
            "headline": headline(row),
            "checks": [(check, name_of(check)) for check in ordered(row.checks)],
            "reminder": reminder(row.checks),
            "norms": [measure for name, measure in row.numbers.items() if name.startswith("stands_")],
        }
        for i, run in enumerate(runs)
        for row in run.rows
        if row.checks and bool(row.norms) == attacks
    ]
