"""Is our Square as strong a search as auto-attack's? Both draw at random, so one run of each decides nothing.

    TOPGAP_DATA=FOLDER python experiments/parity_square.py --peer-python PYTHON [NORM ...] [--seeds 5] [--images N]

Five seeds of each on the same 200 test images of CIFAR-10 (5,000 and after), ResNet-20, 500 candidates, in every
norm. A search is judged by the margin of its best image, z_y less the largest other logit, 0 where that is
misclassified: the mean over all images. The package draws one window and one sign for all images of a batch at a step,
so its images are not independent and the seeds are the sample: Welch's 95 % interval of the difference of the means
(ours - the package's, above 0 ours is weaker). A norm that is done stands in results/parity_square.json, if the tree
has no changes, and is not made again unless it is named; --images and --seeds write nothing.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from parity_attacks import NORMS, network, number, peer, written
from scipy import stats

from topgap_jax import setup
from topgap_jax.attacks import attack, square
from topgap_jax.attacks.state import BROKEN
from topgap_jax.balls import l1, l2, linf
from topgap_jax.keys import example_keys
from topgap_jax.models import bind
from topgap_jax.progress import write_text
from topgap_jax.run.cpu import configure_cpu
from topgap_jax.run.provenance import provenance

RESULT = Path(__file__).parent.parent / "results" / "parity_square.json"
BALLS = {"linf": (linf, ".75/255"), "l2": (l2, ".1"), "l1": (l1, "1.5")}  # the radii of parity_attacks.py
FIRST, IMAGES, QUERIES, SEEDS = 5000, 200, 500, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("norms", nargs="*", help=f"of {', '.join(BALLS)}; those that are not stored if none is given")
    parser.add_argument("--peer-python", default=os.environ.get("TOPGAP_PEER_PYTHON"), help="or TOPGAP_PEER_PYTHON")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--images", type=int, default=IMAGES)
    options = parser.parse_args()
    if not os.environ.get("TOPGAP_DATA") or not options.peer_python:
        parser.error("TOPGAP_DATA is the folder with tfds/ and weights/, --peer-python the Python that has the peers")
    print(configure_cpu(), file=sys.stderr)
    about = provenance()
    whole = (options.seeds, options.images) == (SEEDS, IMAGES) and not (about["commit"] or "+").endswith("+")
    rows = json.loads(RESULT.read_text())["rows"] if whole and RESULT.is_file() else {}
    loaded, weights, _ = network("resnet20")
    split = f"test[{FIRST}:{FIRST + options.images}]"
    arrays = setup.read(loaded.experiment, split)
    with tempfile.TemporaryDirectory() as folder, peer(options.peer_python) as process:
        files = written(Path(folder), "resnet20", loaded, split)
        for norm in options.norms or [norm for norm in BALLS if norm not in rows]:
            ball, eps = BALLS[norm]
            search, ours, theirs = searching(loaded, arrays, ball(number(eps))), [], []
            for seed in range(options.seeds):
                ours.append(search(seed))
                words = {**files, "network": "resnet20", "weights": weights, "package": "auto-attack", "seed": seed}
                words |= {"attack": "square", "norm": NORMS[norm], "eps": number(eps), "steps": QUERIES}
                print(json.dumps(words | {"batch": options.images}), file=process.stdin, flush=True)
                answer = json.loads(process.stdout.readline() or "null")
                if answer is None:
                    raise SystemExit(f"the peer ended at {norm}")
                theirs.append(np.array(answer["margins"]))
            rows[norm] = {"commit": about["commit"], **row(eps, np.array(ours), np.array(theirs))}
            print("|", " | ".join(cells(norm, rows[norm])), "|", flush=True)
            if whole:
                made = {**about, "split": split, "queries": QUERIES, "seeds": SEEDS}
                made["rows"] = {norm: rows[norm] for norm in BALLS if norm in rows}
                write_text(RESULT, json.dumps(made, indent=1) + "\n")


def searching(loaded, arrays, ball):
    """seed -> z_y less the largest other logit (n,) of the best image that a search has met, 0 if misclassified.

    The package scores its start and as many candidates as its queries; ours only judges what the last step makes.
    """
    images, labels = arrays["image"].astype(np.float32) / 255, arrays["label"].astype(np.int32)
    search = square(ball, queries=QUERIES + 1)

    @jax.jit
    def run(variables, key, images, labels):
        keys = example_keys(key, np.arange(len(labels), dtype=np.int32))
        state = attack(search, keys, bind(loaded.experiment.model, variables), images, labels)
        return jax.numpy.where(state.status == BROKEN, 0.0, -state.score)

    return lambda seed: np.asarray(run(loaded.variables, jax.random.key(seed), images, labels))


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
