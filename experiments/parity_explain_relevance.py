"""Is our relevance that of zennit? Same weights, same images, ResNet-20 without changes on our side.

    python experiments/parity_explain_relevance.py --peer-python PYTHON [--images 4]

PYTHON has torch and zennit. Of each composite: the largest difference, and the median over images of the largest, as
shares of the largest relevance of the image. zennit starts with 1 at the label, ours with the logit.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax import explain, models, rules, setup
from topgap_jax.data import tfds
from topgap_jax.rewrite.normalisation import normalisation
from topgap_jax.scores import logit

HERE = Path(__file__).parent
COMPOSITES = (
    "epsilon_plus", "epsilon_gamma_box", "epsilon_alpha2_beta1", "epsilon_plus_flat", "epsilon_alpha2_beta1_flat",
)  # fmt: skip
BACKWARD = ("deconvnet", "guided_backprop")


def relevance(peer_python: str, weights: Path, predict, images, labels) -> dict[str, dict[str, float]]:
    """{composite: {"largest", "median"}}: differences from zennit as shares of the image's largest relevance."""
    normalise, _ = normalisation(predict, images)
    first = lambda x: np.asarray(jnp.transpose(normalise(x), (0, 3, 1, 2)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arrays = {"images": first(images), "labels": np.asarray(labels)}
        for bound, full in (("low", jnp.zeros_like), ("high", jnp.ones_like)):
            arrays[bound] = first(full(images))[0, :, 0, 0]
        for word, array in arrays.items():
            np.save(folder / f"{word}.npy", array)
        subprocess.run(
            [peer_python, str(HERE / "_parity_explain_relevance_peer.py"), name, str(weights)], check=True, timeout=600
        )
        theirs = {row: np.load(folder / f"{row}.npy") for row in (*COMPOSITES, *BACKWARD, "logits")}
    logits = np.asarray(predict(images))
    np.testing.assert_allclose(logits, theirs["logits"], atol=1e-4 * np.abs(logits).max())
    start = np.asarray(logit(jnp.asarray(logits), labels))[:, None, None, None]
    std = 1 / (arrays["high"] - arrays["low"])
    differences = {}
    for row in (*COMPOSITES, *BACKWARD):
        if row in COMPOSITES:
            method, scale = explain.lrp(rules.VALUES[row]), start
        else:
            method, scale = explain.gradient(rules=rules.VALUES[row]), 1 / std[None, None, None]
        ours = jax.jit(lambda x, method=method: method.pixels(None, predict, x, labels))(images)
        difference, largest = np.abs(np.asarray(ours) / scale - theirs[row].transpose(0, 2, 3, 1)), np.abs(theirs[row])
        shares = difference.max((1, 2, 3)) / largest.max((1, 2, 3))
        differences[row] = {"largest": float(shares.max()), "median": float(np.median(shares))}
    return differences


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=os.environ.get("TOPGAP_PEER_PYTHON"), help="or TOPGAP_PEER_PYTHON")
    parser.add_argument("--images", type=int, default=4)
    options = parser.parse_args()
    if not os.environ.get("TOPGAP_DATA") or not options.peer_python:
        parser.error("TOPGAP_DATA is the folder with tfds/ and weights/, --peer-python the Python that has the peers")
    weights = Path(os.environ["TOPGAP_DATA"], "weights/resnet20_cifar10.safetensors")
    loaded = setup.from_config(HERE.parent / "configs/cifar10.py", [("init", str(weights))])
    records = tfds("cifar10")(f"test[:{options.images}]")
    read = [records[index] for index in range(options.images)]
    images = jnp.asarray(np.stack([record["image"] for record in read]), jnp.float32) / 255
    labels = jnp.asarray([record["label"] for record in read], jnp.int32)
    predict = models.bind(loaded.experiment.model, loaded.variables)
    rows = relevance(options.peer_python, weights, predict, images, labels)
    for name, row in rows.items():
        print(f"{name:28} largest {row['largest']:.1e}  median {row['median']:.1e}")
    return 0 if all(row["median"] < 1e-4 for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
