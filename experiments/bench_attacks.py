"""How fast attacks are beside auto-attack, torchattacks and a loop in PyTorch, on a CPU: whole attacks of a split.

    TOPGAP_DATA=FOLDER python experiments/bench_attacks.py --peer-python bench-env/bin/python [--rounds 7]

ResNet-20 with its published weights, test images of CIFAR-10, in turn with the peer's process, which gets 250 at a time
(auto-attack's own default), ours config.batch. Seconds are those
of `topgap evaluate`, which hold no compilation; the peer's hold its clean forward passes, as ours do. Ratio = the
package's time over ours: above 1 ours is faster. `gradients` is the share of the gradient evaluations that the attack
would take if it never stopped early. PGD at a radius at which nothing breaks attacks every image to the end, as the
packages always do. `images` is ours alone: seconds and peak memory by the number of images. A row that is done stands
in results/bench_attacks.json with its commit, if the tree has no changes and 7 rounds were made, and is not made again
unless it is named.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import _bench_driver as driver
from parity_attacks import network, number, peer, written

from topgap_jax import setup
from topgap_jax.run.cpu import configure_cpu

HERE = Path(__file__).parent
RESULT = HERE.parent / "results" / "bench_attacks.json"
UNBREAKABLE = ".001/255"
HALF, THIRD = ".53/255", ".75/255"  # under APGD; of test images 5,000 to 5,999 .531 stand at .5/255, .479 at .55/255


class Row(NamedTuple):
    """ours: as a config writes it; package, attack, steps: of the peer; target: its time over ours at least; full:
    gradient evaluations an image of an attack that never stops, 0 where that is not asked."""

    ours: str
    eps: str
    images: int
    package: str
    attack: str
    steps: int
    target: float
    full: int = 0


ROWS = {
    "APGD-CE 100, none survives": Row("apgd(linf({}))", "8/255", 1000, "auto-attack", "apgd-ce", 100, 12, 101),
    "APGD-CE 100, half survive": Row("apgd(linf({}))", HALF, 500, "auto-attack", "apgd-ce", 100, 1 / 0.55),
    "AutoAttack, half survive": Row("autoattack(linf({}))", HALF, 100, "auto-attack", "autoattack", 0, 1 / 0.75),
    "APGD-CE 100, a third survives": Row("apgd(linf({}))", THIRD, 500, "auto-attack", "apgd-ce", 100, 1 / 0.55),
    "AutoAttack, a third survives": Row("autoattack(linf({}))", THIRD, 100, "auto-attack", "autoattack", 0, 1 / 0.75),
    "PGD-20, torchattacks": Row("pgd(linf({}), steps=20)", UNBREAKABLE, 1000, "torchattacks", "pgd", 20, 1.6),
    "PGD-20, a loop in PyTorch": Row("pgd(linf({}), steps=20)", UNBREAKABLE, 1000, "loop", "pgd", 20, 1.45),
}
IMAGES = (1000, 2000, 4000, 10000)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only rows whose name contains one of these")
    parser.add_argument("--peer-python", default=os.environ.get("TOPGAP_PEER_PYTHON"), help="or TOPGAP_PEER_PYTHON")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, help="at most this many images a row")
    options = parser.parse_args()
    if not os.environ.get("TOPGAP_DATA") or not options.peer_python:
        parser.error("TOPGAP_DATA is the folder with tfds/ and weights/, --peer-python the Python that has the peers")
    configure_cpu()
    machine = driver.machine()
    whole = options.rounds >= 7 and not options.images and not machine["commit"].endswith("+")
    stored = json.loads(RESULT.read_text())["rows"] if whole and RESULT.is_file() else {}
    named = lambda name: any(word in name for word in options.names)
    rows = {name: row for name, row in stored.items() if not named(name)}
    parts = {name: lambda row=row: beside(row, options) for name, row in ROWS.items()}
    parts |= {f"{n} images": lambda n=n: alone(min(n, options.images or n), options) for n in IMAGES}
    for name, part in parts.items():
        if name not in rows and (not options.names or named(name)):
            rows[name] = {"commit": machine["commit"], "load_average": driver.load_average(), **part()}
            print("|", " | ".join([f"{name:28}", *cells(rows[name])]), "|", flush=True)
            if whole:
                made = {"command": "python experiments/bench_attacks.py", "machine": machine}
                driver.write("bench_attacks", {**made, "rows": {n: rows[n] for n in parts if n in rows}})
    if not whole:
        print("not written: that is for 7 rounds or more of a row's own images, on a tree without changes")


def beside(row, options):
    """One attack of ours and one of a package, in turn."""
    n = min(row.images, options.images or row.images)
    loaded, weights, batch = network("resnet20")
    evaluator, split = f"robust({row.ours.format(row.eps)})", f"test[:{n}]"
    measured = lambda: setup.evaluate(loaded, splits=split, evaluators=evaluator)[0]
    with tempfile.TemporaryDirectory() as folder, peer(options.peer_python) as process:
        words = {**written(Path(folder), "resnet20", loaded, split), "network": "resnet20", "weights": weights}
        words |= {"package": row.package, "attack": row.attack, "batch": batch, "norm": "Linf"}
        words |= {"eps": number(row.eps), "steps": row.steps}
        seconds, theirs = [], []
        for _ in range(options.rounds):
            ours = measured()
            seconds.append(ours.cost["seconds"])
            print(json.dumps(words), file=process.stdin, flush=True)
            answer = json.loads(process.stdout.readline() or "null")
            if answer is None:
                raise SystemExit(f"the peer ended at {row.package} {row.attack}")
            theirs.append(answer["seconds"])
    ratios = [their / our for their, our in zip(theirs, seconds)]
    gradients = ours.cost["gradient_evaluations"]
    return {
        "evaluator": evaluator,
        "images": n,
        "package": row.package,
        "target": row.target,
        "ratio": {"median": statistics.median(ratios), "range": [min(ratios), max(ratios)]},
        "seconds": seconds,
        "package_seconds": theirs,
        "robust": ours.measures["robust_accuracy"].value,
        "package_robust": sum(answer["robust"]) / n,
        "gradient_evaluations": gradients,
        **({"gradients": gradients / row.full} if row.full else {}),
    }


ALONE = """
import sys
sys.path.insert(0, sys.argv[1])
from _bench_worker import peak_megabytes
from parity_attacks import network
from topgap_jax import setup
from topgap_jax.run.cpu import configure_cpu
configure_cpu()
loaded = network("resnet20")[0]
row = setup.evaluate(loaded, splits=sys.argv[2], evaluators="robust(pgd(linf(.75/255), steps=20))")[0]
print(row.cost["seconds"], peak_megabytes())
"""


def alone(n, options):
    """Seconds and peak memory of PGD-20 on n images in a process of its own."""
    command = [sys.executable, "-c", ALONE, str(HERE), f"test[:{n}]"]
    rounds = [
        [float(word) for word in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]
        for _ in range(options.rounds)
    ]
    seconds, peaks = zip(*rounds)
    return {
        "images": n, "seconds": list(seconds), "median_seconds": statistics.median(seconds),
        "peak_mb": statistics.median(peaks),
    }  # fmt: skip


def cells(row):
    """A row of the printed table: ratio, what it should be, seconds, robust accuracy (both: the package's / ours), and
    the share of the gradients."""
    if "ratio" not in row:
        return [f"{row['median_seconds']:.1f} s", f"peak {row['peak_mb']:.0f} MB"]
    median = statistics.median
    return [
        "{:.2f} [{:.2f}-{:.2f}]".format(row["ratio"]["median"], *row["ratio"]["range"]),
        f"{row['target']:.2f}",
        f"{median(row['package_seconds']):.1f} / {median(row['seconds']):.1f}",
        f"{row['package_robust']:.3f} / {row['robust']:.3f}",
        f"{row['gradients']:.3f}" if "gradients" in row else "",
    ]


if __name__ == "__main__":
    main()
