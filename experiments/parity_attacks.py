"""Do the attacks break as many images as those of auto-attack, torchattacks and foolbox? Same weights, same images.

    TOPGAP_DATA=FOLDER python experiments/parity_attacks.py --peer-python PYTHON [PART OF A NAME ...] [--images N]

PYTHON has torch, pyautoattack, torchattacks and foolbox (a process of its own). ResNet-20 on the first test images of
CIFAR-10, at radii where 10 to 70 % survive, which were looked for on other images (5,000 and after), and EfficientNet-
Lite0 on the first pictures of imagenet500. Ours may leave at most .5 points more at 1,000 images and one image more
below. Seconds are of whole attacks, compilation included, beside whatever else the machine does (`bench_attacks.py`
measures speed).
A row that is done stands in results/parity_attacks.json with its commit, if the tree has no changes, and is not made
again unless it is named; --images, --first and --radius write nothing.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from topgap_jax import data, setup
from topgap_jax.progress import write_text
from topgap_jax.run.cpu import configure_cpu
from topgap_jax.run.provenance import provenance

HERE = Path(__file__).parent
RESULT = HERE.parent / "results" / "parity_attacks.json"
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


class Row(NamedTuple):
    """One comparison: ours as a config writes it, and the peer's words; of the network that `NETWORKS` names."""

    attack: str
    ball: str
    eps: str
    images: int
    ours: str
    steps: int
    peers: tuple[str, ...]
    network: str = "resnet20"

    @property
    def name(self) -> str:
        return f"{self.ball} {self.attack}" + f" {self.network}" * (self.network != "resnet20")


BOTH, ONE = ("auto-attack", "torchattacks"), ("auto-attack",)
ROWS = (
    Row("pgd", "linf", ".75/255", 1000, "pgd({})", 20, ("torchattacks", "foolbox")),
    Row("apgd-ce", "linf", ".75/255", 1000, "apgd({})", 100, BOTH),
    Row("apgd-dlr", "linf", ".75/255", 1000, "apgd({}, score=dlr)", 100, BOTH),
    Row("apgd-t", "linf", ".75/255", 200, "apgd_t({})", 100, ONE),
    Row("fab-t", "linf", ".75/255", 200, "fab_t({})", 100, ONE),
    Row("square", "linf", ".75/255", 200, "square({})", 5000, ONE),
    Row("autoattack", "linf", ".75/255", 300, "autoattack({})", 0, ONE),
    Row("pgd", "l2", ".1", 100, "pgd({})", 20, ("torchattacks", "foolbox")),
    Row("apgd-ce", "l2", ".1", 100, "apgd({})", 100, BOTH),
    Row("apgd-dlr", "l2", ".1", 100, "apgd({}, score=dlr)", 100, BOTH),
    Row("apgd-t", "l2", ".1", 100, "apgd_t({})", 100, ONE),
    Row("fab-t", "l2", ".1", 100, "fab_t({})", 100, ONE),
    Row("square", "l2", ".1", 100, "square({})", 5000, ONE),
    Row("apgd-ce", "l1", "1.5", 100, "apgd({}, larger_radii=True)", 100, ONE),
    Row("apgd-t", "l1", "1.5", 100, "apgd_t({}, targets=5, larger_radii=True)", 100, ONE),
    Row("fab-t", "l1", "1.5", 100, "fab_t({})", 100, ONE),
    Row("square", "l1", "1.5", 100, "square({})", 5000, ONE),
    Row("pgd", "linf", ".5/255", 50, "pgd({})", 20, ("torchattacks", "foolbox"), "efficientnet_lite0"),
    Row("apgd-ce", "linf", ".5/255", 50, "apgd({})", 100, BOTH, "efficientnet_lite0"),
)
NETWORKS = {  # config, weights, images that a package gets at a time
    "resnet20": ("cifar10.py", "resnet20_cifar10", 250),
    "efficientnet_lite0": ("imagenet.py", "efficientnet_lite0_imagenet", 25),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only rows whose name contains one of these, such as 'linf apgd'")
    parser.add_argument("--peer-python", default=os.environ.get("TOPGAP_PEER_PYTHON"), help="or TOPGAP_PEER_PYTHON")
    parser.add_argument("--images", type=int, help="at most this many images a row")
    parser.add_argument("--first", type=int, default=0, help="the first image; 5000 to look for a radius")
    parser.add_argument("--radius", help="another radius than a row's, such as .75/255")
    options = parser.parse_args()
    if not os.environ.get("TOPGAP_DATA") or not options.peer_python:
        parser.error("TOPGAP_DATA is the folder with tfds/ and weights/, --peer-python the Python that has the peers")
    print(configure_cpu(), file=sys.stderr)
    rows = [row for row in ROWS if not options.names or any(part in row.name for part in options.names)]
    about = {**provenance(), "command": "experiments/parity_attacks.py"}
    whole = not (options.images or options.first or options.radius or (about["commit"] or "+").endswith("+"))
    stored = json.loads(RESULT.read_text())["rows"] if whole and RESULT.is_file() else {}
    results = {name: row for name, row in stored.items() if not options.names or name not in [row.name for row in rows]}
    with tempfile.TemporaryDirectory() as folder, peer(options.peer_python) as process:
        for row in rows:
            if row.name in results:
                continue
            n = min(row.images, options.images or row.images)
            row = row._replace(eps=options.radius or row.eps)
            loaded, weights, batch = network(row.network)
            files = written(Path(folder), row.network, loaded, f"test[{options.first}:{options.first + n}]")
            result = {
                "commit": about["commit"],
                "eps": row.eps,
                "n": n,
                "ours": ours(loaded, row, options.first, n),
            }
            for package in row.peers:
                words = {**files, "network": row.network, "weights": weights, "package": package}
                words |= {
                    "attack": row.attack,
                    "batch": batch,
                    "norm": NORMS[row.ball],
                    "eps": number(row.eps),
                    "steps": row.steps,
                }
                print(json.dumps(words), file=process.stdin, flush=True)
                answer = json.loads(process.stdout.readline() or "null")
                if answer is None:
                    raise SystemExit(f"the peer ended at {package} {row.attack}")
                about["versions"]["torch"] = answer["torch"]
                result[package] = {"robust": int(sum(answer["robust"])), "seconds": round(answer["seconds"], 1)}
            allowed = 5 * n // 1000 if n >= 1000 else 1
            result["agree"] = result["ours"]["robust"] <= min(result[p]["robust"] for p in row.peers) + allowed
            results[row.name] = result
            if whole:
                store(about, row.name, result)
            print("|", " | ".join(cells(row.name, result)), "|", flush=True)
    if not whole:
        print("not written: that is for a row's own images and radius, on a tree without changes", file=sys.stderr)
    return 0 if all(row["agree"] for row in results.values()) else 1


def store(about, name, row):
    """Put a row into the result. The file is read again: another process may have written its own meanwhile."""
    rows = {**(json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else {}), name: row}
    rows = {row.name: rows[row.name] for row in ROWS if row.name in rows}
    agree = all(row["agree"] for row in rows.values())
    write_text(RESULT, json.dumps({**about, "agree": agree, "rows": rows}, indent=1) + "\n")


def cells(name, row):
    """A row of the printed table: images left by ours and by each package."""
    packages = ", ".join(f"{who} {row[who]['robust']}" for who in row if isinstance(row[who], dict) and who != "ours")
    ours = str(row["ours"]["robust"])
    return [f"{name:32}", row["eps"], str(row["n"]), ours, packages, "" if row["agree"] else "WEAKER"]


@functools.cache
def network(name):
    """(the network with its weights, their file, images that a package gets at a time)."""
    config, weights, batch = NETWORKS[name]
    file = str(Path(os.environ["TOPGAP_DATA"], f"weights/{weights}.safetensors"))
    return setup.from_config(HERE.parent / "configs" / config, [("init", file)]), file, batch


def ours(loaded, row, first, n):
    """Images left by our attack, as `topgap evaluate` measures them."""
    start = time.perf_counter()
    text = f"robust({row.ours.format(f'{row.ball}({row.eps})')})"
    (measured,) = setup.evaluate(loaded, splits=f"test[{first}:{first + n}]", evaluators=text)
    robust = measured.measures["robust_accuracy"].value
    return {"evaluator": text, "robust": round(robust * n), "seconds": round(time.perf_counter() - start, 1)}


def written(folder, name, loaded, split):
    """The files with the images (n, h, w, 3) and labels (n,) for the peer."""
    files = {kind: str(folder / f"{name} {split} {kind}.npy") for kind in ("images", "labels")}
    if not Path(files["images"]).exists():
        source, config = loaded.experiment.source(split), loaded.experiment.config
        rows = [data.decode(source, index, config.image_size, config.resize) for index in range(len(source))]
        np.save(files["images"], np.stack([row["image"] for row in rows]).astype(np.float32) / 255)
        np.save(files["labels"], np.array([row["label"] for row in rows]))
    return files


def number(text):
    top, _, bottom = text.partition("/")
    return float(top) / float(bottom or 1)


def peer(python):
    return subprocess.Popen(
        [python, HERE / "_parity_attacks_peer.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


if __name__ == "__main__":
    raise SystemExit(main())
