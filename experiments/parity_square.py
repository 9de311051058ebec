"""Is our Square as strong a search as auto-attack's? Both draw at random, so one run of each decides nothing.

    TOPGAP_DATA=FOLDER python experiments/parity_square.py --peer-python PYTHON [--seeds 5] [--images N] [--queries N]

Five seeds of each on the same 200 test images of CIFAR-10 (5,000 and after), ResNet-20, 500 candidates, in every
norm. A search is judged by the margin of its best image, z_y less the largest other logit, 0 where that is
misclassified: the mean over all images. The package draws one window and one sign for all images of a batch at a step,
so its images are not independent and the seeds are the sample: Welch's 95 % interval of the difference of the means
(ours - the package's, above 0 ours is weaker). Writes results/parity_square.json, on a tree without changes.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from parity_attacks import NORMS, network, number, peer, written
from scipy import stats

from topgap_jax import setup
from topgap_jax.attacks import square
from topgap_jax.balls import l1, l2, linf
from topgap_jax.evaluators.robust import robust
from topgap_jax.measure.robust import attack_split
from topgap_jax.measure.splits import resident_split
from topgap_jax.progress import write_text
from topgap_jax.run.cpu import configure_cpu
from topgap_jax.run.provenance import provenance

RESULT = Path(__file__).parent.parent / "results" / "parity_square.json"
BALLS = {"linf": (linf, ".75/255"), "l2": (l2, ".1"), "l1": (l1, "1.5")}  # the radii of parity_attacks.py
FIRST, IMAGES, QUERIES, SEEDS = 5000, 200, 500, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=os.environ.get("TOPGAP_PEER_PYTHON"), help="or TOPGAP_PEER_PYTHON")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--queries", type=int, default=QUERIES)
    options = parser.parse_args()
    if not os.environ.get("TOPGAP_DATA") or not options.peer_python:
        parser.error("TOPGAP_DATA is the folder with tfds/ and weights/, --peer-python the Python that has the peers")
    print(configure_cpu(), file=sys.stderr)
    about = provenance()
    whole = (options.seeds, options.images, options.queries) == (SEEDS, IMAGES, QUERIES)
    loaded, weights, _ = network("resnet20")
    split = f"test[{FIRST}:{FIRST + options.images}]"
    data = resident_split(setup.read(loaded.experiment, split), classes=10, batch=options.images)
    rows = {}
    with tempfile.TemporaryDirectory() as folder, peer(options.peer_python) as process:
        files = written(Path(folder), "resnet20", loaded, split)
        for norm, (ball, eps) in BALLS.items():
            attack = square(ball(number(eps)), queries=options.queries)
            ours, theirs = [], []
            for seed in range(options.seeds):
                ours.append(searched(loaded, data, attack, seed))
                words = {**files, "network": "resnet20", "weights": weights, "package": "auto-attack", "seed": seed}
                words |= {"attack": "square", "norm": NORMS[norm], "eps": number(eps), "steps": options.queries}
                print(json.dumps(words | {"batch": options.images}), file=process.stdin, flush=True)
                answer = json.loads(process.stdout.readline() or "null")
                if answer is None:
                    raise SystemExit(f"the peer ended at {norm}")
                theirs.append(np.array(answer["margins"]))
            rows[norm] = row(eps, np.array(ours), np.array(theirs))
            print("|", " | ".join(cells(norm, rows[norm])), "|", flush=True)
    if whole and not (about["commit"] or "+").endswith("+"):
        about |= {"split": split, "queries": QUERIES, "seeds": SEEDS}
        RESULT.parent.mkdir(exist_ok=True)
        write_text(RESULT, json.dumps({**about, "rows": rows}, indent=1) + "\n")


def searched(loaded, data, attack, seed):
    """z_y less the largest other logit (n,) of the best images of a search; what is misclassified has at most 0."""
    examples = attack_split(
        loaded.experiment.model, loaded.variables, data, robust(attack), seed=seed, progress=False
    ).examples
    return -examples.margin


def row(eps, ours, theirs):
    """Of margins (seeds, n): images left and mean margin by seed, and the difference of the means."""
    of = lambda margins: np.maximum(margins, 0).mean(1)
    apart = stats.ttest_ind(of(ours), of(theirs), equal_var=False).confidence_interval(0.95)
    about = lambda margins: {"left": (margins > 0).sum(1).tolist(), "margins": of(margins).tolist()}
    difference = {"mean": of(ours).mean() - of(theirs).mean(), "low": apart.low, "high": apart.high}
    return {"eps": eps, "n": ours.shape[1], "ours": about(ours), "package": about(theirs), "difference": difference}


def cells(norm, row):
    """A row of the table: images left by seed and mean margin, of ours and of the package; the margins' difference."""
    of = lambda side: f"{', '.join(map(str, sorted(side['left'])))}; {np.mean(side['margins']):.4f}"
    return [
        norm,
        row["eps"],
        of(row["ours"]),
        of(row["package"]),
        "{mean:+.4f} [{low:+.4f}, {high:+.4f}]".format(**row["difference"]),
    ]


if __name__ == "__main__":
    main()
