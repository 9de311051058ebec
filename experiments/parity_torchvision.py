"""Do torchvision's networks, saved as safetensors, give the same logits here?

    TOPGAP_PEER_PYTHON=bench-env/bin/python python experiments/parity_torchvision.py

ResNet-18/34/50 and VGG-11/16 with batch norm, random weights and random batch statistics, 1000 classes, two images of
each of two sizes. `pretrained.describe` picks the architecture, `pretrained.load` reads the file, as `topgap evaluate
--weights` does. Largest difference of the logits, relative to the largest logit; at most 1e-4. Writes
results/parity_torchvision.json.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import jax
import numpy as np

from topgap_jax import models, pool, pretrained
from topgap_jax.build import build
from topgap_jax.run.provenance import provenance

HERE = Path(__file__).parent
MODELS = {
    "resnet18": (96, 75),
    "resnet34": (96, 75),
    "resnet50": (96, 75),
    "vgg11_bn": (224, 96),
    "vgg16_bn": (224, 96),
}
TOLERANCE = 1e-4


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=os.environ.get("TOPGAP_PEER_PYTHON"), help="or TOPGAP_PEER_PYTHON")
    options = parser.parse_args()
    if not options.peer_python:
        parser.error("name the Python that has torch and torchvision: --peer-python or TOPGAP_PEER_PYTHON")
    differences = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, sizes in MODELS.items():
            wanted = ":".join(map(str, (name, *sizes)))
            call = [options.peer_python, HERE / "_parity_torchvision_peer.py", folder, wanted]
            torch, torchvision = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
            path = Path(folder) / f"{name}.safetensors"
            for size in sizes:
                differences[f"{name} {size}x{size}"] = row = compare(path, size)
                print(f"{name:10} {size:4}  {row['difference']:.2g}  {row['model']}", flush=True)
            path.unlink()
    about = provenance()
    about["versions"] |= {"torch": torch, "torchvision": torchvision}
    worst = max(row["difference"] for row in differences.values())
    result = {**about, "tolerance": TOLERANCE, "worst": worst, "agree": worst <= TOLERANCE, "logits": differences}
    (HERE.parent / "results").mkdir(exist_ok=True)
    (HERE.parent / "results/parity_torchvision.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"worst {worst:.2g}, allowed {TOLERANCE:g}; written: results/parity_torchvision.json")
    return 0 if worst <= TOLERANCE else 1


def compare(path, size):
    """Which model the file is for us, and how far our logits are from PyTorch's."""
    with np.load(path.parent / f"{path.stem}_{size}.npz") as file:
        images, expected = file["images"], file["logits"]
    described = pretrained.describe(path)
    values = {"classes": 1000, "mean": described["mean"], "std": described["std"], "pool": pool.gap()}
    model = build(described["model"], models.TABLE, values)
    variables = pretrained.load(path, model, image_shape=images.shape[1:])
    logits = jax.jit(lambda variables, images: models.bind(model, variables)(images))(variables, images)
    scale = np.abs(expected).max()
    return {
        "model": described["model"],
        "difference": float(np.abs(logits - expected).max() / scale),
        "largest_logit": float(scale),
        "between_the_images": float(
            np.abs(expected[0] - expected[1]).max() / scale
        ),  # what a network deaf to its input would miss
    }


if __name__ == "__main__":
    raise SystemExit(main())
