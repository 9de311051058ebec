"""What `topgap verify` prints: a table of measures as a file has them and as they are now, and its doubts in a line."""

from collections.abc import Sequence

from topgap_jax.measure.model_info import Comparison
from topgap_jax.report.compare import aligned


def table(compared: Sequence[Comparison]) -> str:
    """A line a measure: over all images, over those measured again as the file has it and as it is now, and how many
    of them differ."""
    percent = lambda share: f"{100 * share:.2f}"
    rows = [["", "stored", "images", "stored", "again", "images", "differ", ""]]
    for one in compared:
        rows.append(
            [
                f"{one.measure.replace('_', ' ')}, {one.evaluator}",
                percent(one.stored),
                str(one.n),
                percent(one.stored_checked),
                percent(one.again),
                str(one.checked),
                str(one.differ),
                "agrees" if one.agrees else f"does not agree (p = {one.p:.2g})",
            ]
        )
    return aligned(rows, right=range(1, 7))


def doubts(compared: Sequence[Comparison], faults: Sequence[str]) -> str:
    """Why a file is not confirmed, '' where it is."""
    against = [
        f"{one.measure.replace('_', ' ')} of {one.evaluator} is {100 * one.again:.2f} % on {one.checked} images, and "
        f"{100 * one.stored_checked:.2f} % on the same images in the file"
        for one in compared
        if not one.agrees
    ]
    return "; ".join([*faults, *against])
