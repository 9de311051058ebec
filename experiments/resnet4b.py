"""Does anything break what white-box attacks leave of a network that is robust? ResNet-4B at 2/255.

    TOPGAP_DATA=FOLDER python experiments/resnet4b.py [--images N]

`resnet4b_adv2` (arXiv 2103.06624, whose authors report 61.41 % under PGD) on CIFAR-10: APGD on cross-entropy on all
test images; on the first 2,000 AutoAttack's white-box attacks, then Square and APGD's images of two undefended
networks, each on what the ones before it leave. A stopped evaluation goes on in runs/resnet4b. Writes
results/resnet4b.json on a tree without changes; --images takes fewer, and writes nothing.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from topgap_jax import setup
from topgap_jax.measure import results
from topgap_jax.progress import write_text
from topgap_jax.run.cpu import configure_cpu
from topgap_jax.run.provenance import provenance

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "results" / "resnet4b.json"
BALL = "linf(2/255)"
SOURCES = ("resnet20_cifar10", "resnet44_cifar10")
TRANSFERS = ", ".join(f"transfer({BALL}, apgd({BALL}), 'FOLDER/{name}.safetensors')" for name in SOURCES)
EVALUATIONS = {f"robust(apgd({BALL}))": 10000, f"robust(autoattack({BALL}), {TRANSFERS})": 2000}
WHITE_BOX = 3  # attacks of AutoAttack before Square


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int)
    images = parser.parse_args().images
    if not os.environ.get("TOPGAP_DATA"):
        parser.error("set TOPGAP_DATA to the folder with tfds/ and weights/")
    about = provenance()
    whole = images is None and not (about["commit"] or "+").endswith("+")
    print(configure_cpu(), file=sys.stderr)
    folder_of_weights = Path(os.environ["TOPGAP_DATA"], "weights")
    init = str(folder_of_weights / "resnet4b_adv2_cifar10.safetensors")
    loaded = setup.from_config(ROOT / "configs" / "cifar10.py", [("init", init)])
    rows = []
    with tempfile.TemporaryDirectory() as empty:
        folder = ROOT / "runs" / "resnet4b" if whole else Path(empty)
        for text, n in EVALUATIONS.items():
            split = f"test[:{min(n, images or n)}]"
            evaluator = text.replace("FOLDER", str(folder_of_weights))
            (row,) = setup.evaluate(loaded, splits=split, evaluators=evaluator, save=folder / split)
            row = results.to_json(row._replace(measures=row.numbers))
            rows.append(json.loads(json.dumps(row).replace(f"{folder_of_weights}/", "")))  # of this machine
            print(split, rows[-1]["evaluator"], *cells(rows[-1]))
    if whole:
        write_text(RESULT, json.dumps({**about, "rows": rows}, indent=1) + "\n")


def cells(row):
    """Of a stored row: what stands clean and after each attack."""
    value = lambda name: row["measures"][name]["value"]
    names = sorted(name for name in row["measures"] if name.startswith("after_")) or ["robust_accuracy"]
    return [f"{100 * value(name):.2f} %" for name in ("clean_accuracy", *names)]


if __name__ == "__main__":
    main()
