"""Does Top-GAP make a network look at the object? Five seeds on `shapes`, GAP against Top-GAP, in every measure.

Each arm is the same network with the same seed, data and budget; only the pool differs. A difference is paired by seed and
given as mean with a 95 % t interval; whose interval holds 0 is "undecided". Writes results/shapes.json; a run that is there
already is not trained again, so the study can be stopped and continued. `--arms` and `--seeds` take a part of it.

    python experiments/shapes.py
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
from _study import cpu_seconds, paired

from topgap_jax import setup
from topgap_jax.progress import write_text
from topgap_jax.run.cpu import configure_cpu
from topgap_jax.run.fit import fit
from topgap_jax.run.provenance import provenance

CONFIG = Path(__file__).parent.parent / "configs" / "shapes.py"
RESULTS = Path(__file__).parent.parent / "results" / "shapes.json"
ARMS = {
    "gap": "gap()",
    "top_gap .05": "top_gap(fraction=.05)",
    "top_gap .14": "top_gap(fraction=.14)",
    "top_gap .3": "top_gap(fraction=.3)",
}
SEEDS = (0, 1, 2, 3, 4)
CHANCE = 1 / 6


def run(pool: str, seed: int, workdir: Path) -> dict:
    """Train (or continue, or reuse) one run, evaluate it, and return {split: {evaluator: {measure: value}}} and its cost."""
    overrides = [("pool", pool), ("seed", str(seed))]
    experiment = setup.experiment(CONFIG, overrides)
    before = cpu_seconds()
    fit(experiment.config, workdir, parts=setup.parts(experiment), file=CONFIG)
    trained = cpu_seconds()
    stored = workdir / "evaluation.json"
    rows = json.loads(stored.read_text())["rows"] if stored.exists() else []
    if len(rows) < 10:
        rows = setup.evaluate(setup.restored(experiment, workdir, "last"))
    numbers = {}
    for row in rows:
        numbers.setdefault(row["split"], {}).update(
            {f"{short(row['evaluator'])}.{k}": v for k, v in row["values"].items()}
        )
    return {"measures": numbers, "train_cpu_seconds": trained - before, "evaluate_cpu_seconds": cpu_seconds() - trained}


def short(evaluator: str) -> str:
    """`robust(pgd(...))` -> robust.

    >>> short("robust(pgd(linf(eps), steps=20))")
    'robust'
    """
    return evaluator.split("(")[0]


def compare(runs: dict) -> dict:
    """Per split and measure: mean and spread of each arm, and each arm minus gap, paired by seed."""
    table = {}
    seeds = [seed for seed in map(str, SEEDS) if all(seed in runs.get(arm, {}) for arm in ARMS)]
    if not seeds:
        return {}
    for split, measures in runs["gap"][seeds[0]]["measures"].items():
        for measure in measures:
            values = {arm: [runs[arm][seed]["measures"][split][measure] for seed in seeds] for arm in ARMS}
            if any(value is None for column in values.values() for value in column):
                continue
            row = {
                arm: {"mean": float(np.mean(v)), "std": float(np.std(v, ddof=1)), "values": v}
                for arm, v in values.items()
            }
            for arm in list(ARMS)[1:]:
                row[f"{arm} - gap"] = paired(values[arm], values["gap"])
            table.setdefault(split, {})[measure] = row
    return table


def requirement(runs: dict) -> list[dict]:
    """What the data set must be: in every seed GAP reaches 85 % on test, loses 20 points on test_shifted, stays 10 above chance."""
    rows = []
    for seed, stored in sorted(runs.get("gap", {}).items()):
        test, shifted = (stored["measures"][split]["accuracy.accuracy"] for split in ("test", "test_shifted"))
        holds = test >= 0.85 and test - shifted >= 0.2 and shifted >= CHANCE + 0.1
        rows.append({"seed": int(seed), "test": test, "test_shifted": shifted, "holds": bool(holds)})
    return rows


SHOWN = {
    "accuracy.accuracy": "accuracy",
    "accuracy.worst_group_accuracy": "worst-group accuracy",
    "accuracy.nll": "NLL",
    "accuracy.calibration_error": "calibration error",
    "robust.robust_accuracy": "PGD-20 accuracy, 2/255",
    "localisation.iou": "IoU of the class map",
    "localisation.best_iou": "IoU at its best tau",
    "localisation.in_region": "share of the map in the object",
    "regions.foreground_sensitivity": "foreground sensitivity",
    "regions.foreground_accuracy": "accuracy, object alone",
    "regions.background_accuracy": "accuracy, background alone",
    "regions.background_gap": "background gap",
    "receptive_field.rms_radius": "ERF radius, pixels",
    "receptive_field.centre_corner_ratio": "ERF centre / corner",
    "receptive_field.top_lift": "ERF lift of the top position",
}


def markdown(result: dict) -> str:
    """The comparison as a table for the README: mean of each arm, and each arm minus gap with its interval if it is decided."""
    arms = list(ARMS)
    lines = [
        "| split | measure | " + " | ".join(f"`{ARMS[arm]}`" for arm in arms) + " |",
        "|---|---|" + "---|" * len(arms),
    ]
    for split, measures in result["comparison"].items():
        for measure, name in SHOWN.items():
            row = measures[measure]
            cells = [f"{row[arms[0]]['mean']:.3f} ± {row[arms[0]]['std']:.3f}"]
            for arm in arms[1:]:
                change = row[f"{arm} - {arms[0]}"]
                bounds = f"{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
                cells.append(
                    f"{row[arm]['mean']:.3f}; " + (f"**{bounds}**" if change["verdict"] != "undecided" else bounds)
                )
            lines.append(f"| {split} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/study/shapes"))
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--table", action="store_true", help="print the stored results as a table for the README")
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown(json.loads(RESULTS.read_text())))
        return
    print(configure_cpu(), file=sys.stderr)
    for seed in arguments.seeds:
        for arm in arguments.arms:
            done = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
            if str(seed) in done.get(arm, {}):
                continue
            stored = run(ARMS[arm], seed, arguments.runs / f"{arm.replace(' ', '_')}_seed{seed}")
            # Read again: another process may have written its own runs meanwhile.
            done = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
            done.setdefault(arm, {})[str(seed)] = stored
            result = {**provenance(), "config": "configs/shapes.py", "arms": ARMS, "requirement": requirement(done)}
            RESULTS.parent.mkdir(exist_ok=True)
            write_text(RESULTS, json.dumps({**result, "comparison": compare(done), "runs": done}, indent=1) + "\n")
            print(f"{arm}, seed {seed}: {stored['measures']['test']['accuracy.accuracy']:.3f} on test, "
                  f"{stored['measures']['test_shifted']['accuracy.accuracy']:.3f} on test_shifted")  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    main()
