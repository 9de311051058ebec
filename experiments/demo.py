"""`make demo`: two classifiers on `shapes`, the same pyramid head once with GAP and once with Top-GAP, and what they
look at.

Two arms of the study `shapes` (experiments/study.py), one seed: trains both, evaluates them, writes
runs/demo/report.html with the pictures in it, prints the comparison beside the stored seeds of the study (one seed
decides nothing), and says in two sentences what was seen. What needs many passes is measured on the first 500 images of
a split, where the study takes 1,000. Run again, it goes on where it was.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import study as driver
from _studies import CAM_ON_REGIONS, PGD, STUDIES

from topgap_jax import setup
from topgap_jax.measure.results import Row
from topgap_jax.report.compare import aligned
from topgap_jax.report.page import report
from topgap_jax.report.read import read_runs
from topgap_jax.report.sheets import draw
from topgap_jax.report.verdict import verdict
from topgap_jax.run.cpu import configure_cpu
from topgap_jax.run.fit import fit

RUNS = Path("runs/demo")
ARMS = ("gap", "top_gap .14")
WORKDIRS = {"gap": RUNS / "gap", "top_gap .14": RUNS / "top_gap"}
SPLITS = ("test", "test_shifted")
EVALUATORS = {  # of a split, and of its first images
    "": f"accuracy(), {CAM_ON_REGIONS}",
    "[:500]": f"{PGD}, regions(fill=mean), receptive_field()",
}


def main() -> None:
    start, cpu = time.monotonic(), driver.cpu_seconds()
    print(configure_cpu(), file=sys.stderr)
    rows, arrays = {}, {}
    for arm in ARMS:
        # The splits are drawn once: the seed is the same.
        chosen = driver.experiment(STUDIES["shapes"], STUDIES["shapes"].arms[arm], 0)._replace(arrays=arrays)
        workdir = WORKDIRS[arm]
        fit(chosen.config, workdir, parts=setup.parts(chosen), file=driver.ROOT / "configs" / "shapes.py")
        loaded = setup.restored(chosen, workdir, "last")
        rows[arm] = [
            row
            for images, texts in EVALUATORS.items()
            for row in setup.evaluate(loaded, splits=", ".join(f"{s}{images}" for s in SPLITS), evaluators=texts)
        ]
        for split in SPLITS:
            shown = setup.explain(loaded, split=split, count=8)
            list(draw(workdir / "sheets", shown, shown.pages))
    workdirs = list(WORKDIRS.values())
    page = report(workdirs, RUNS / "report.html", title="Top-GAP on shapes")
    print(beside_the_study(rows))
    print(f"\n{time.monotonic() - start:.0f} s, {driver.cpu_seconds() - cpu:.0f} CPU seconds. Open {page}\n")
    print("\n".join(verdict(read_runs(workdirs))))


def beside_the_study(rows: Mapping[str, Sequence[Row]]) -> str:
    """The demo's seed beside all seeds of the study, in the measures that the study shows.

    rows {arm: its rows}: the second arm is compared with the first.
    """
    study, stored = STUDIES["shapes"], driver.stored("shapes")
    control, method = ARMS
    values = {arm: driver.numbers(study, arm, rows[arm]) for arm in ARMS}
    lines = [["", *ARMS, "difference", "|", *(f"{arm}, all seeds" for arm in ARMS), "difference [95 %]", "verdict"]]
    for split in SPLITS:
        lines.append([split])
        for key, words in study.shown.items():
            each = [first(values[arm], split, key) for arm in ARMS]
            known = stored["comparison"].get(f"{split} | {key}")
            if None in each or known is None:
                continue
            change = known["differences"][f"{method} - {control}"]
            means = [f"{known['arms'][arm]['mean']:.3f}" for arm in ARMS]
            interval = driver.interval(change).strip("*")
            line = [f"  {words}", *(f"{x:.3f}" for x in each), f"{each[1] - each[0]:+.3f}", "|", *means, interval]
            lines.append([*line, change["verdict"]])
    seeds = len(stored["runs"][control])
    return (
        f"{aligned(lines, right=range(1, 8))}\nright of |: {seeds} seeds of the same comparison, paired by seed; left:"
        " one seed, which decides nothing, and PGD, object, background and ERF on 500 images of a split; robust"
        " numbers are not audited"
    )


def first(values: Mapping[str, float | None], split: str, key: str) -> float | None:
    """A measure of the demo on the split, or on its first images."""
    return next((values[name] for images in EVALUATORS if (name := f"{split}{images} | {key}") in values), None)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    main()
