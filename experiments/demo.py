"""`make demo`: two classifiers on `shapes`, the same pyramid head once with GAP and once with Top-GAP, and what they look at.

Trains both (one seed), evaluates them on `test` and `test_shifted`, prints the comparison beside the stored one of several
seeds (results/shapes.json: one seed decides nothing), and writes runs/demo/report.html with the pictures in it. Run again, it
goes on where it was.
"""

import json
import sys
import time
from pathlib import Path

from topgap_jax import setup
from topgap_jax.report.compare import demo_table
from topgap_jax.report.page import report
from topgap_jax.report.sheets import sheet
from topgap_jax.run.cpu import configure_cpu
from topgap_jax.run.fit import fit

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "shapes.py"
STORED = HERE.parent / "results" / "shapes.json"
ARMS = {"gap": "gap()", "top_gap": "top_gap(fraction=.14)"}


def main() -> None:
    start, cpu = time.monotonic(), time.process_time()
    print(configure_cpu(), file=sys.stderr)
    runs = Path("runs/demo")
    rows = {}
    for arm, pool in ARMS.items():
        workdir = runs / arm
        experiment = setup.experiment(CONFIG, [("pool", pool)])
        fit(experiment.config, workdir, parts=setup.parts(experiment), file=CONFIG)
        loaded = setup.restored(experiment, workdir, "last")
        rows[arm] = setup.evaluate(loaded)
        for split in ("test", "test_shifted"):
            pictures = setup.explain(loaded, split=split, count=8)
            sheet(workdir / "sheets" / f"{pictures.title}.png", pictures.images, names=pictures.names, maps=pictures.maps,
                  boxes=pictures.boxes, regions=pictures.regions, title=pictures.heading)  # fmt: skip
    page = report([runs / arm for arm in ARMS], runs / "report.html", title="Top-GAP on shapes")
    stored = json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else None
    print(demo_table(rows, stored))
    print(f"\n{time.monotonic() - start:.0f} s, {time.process_time() - cpu:.0f} CPU seconds. Open {page}")


if __name__ == "__main__":
    main()
