"""Class activation maps beside pytorch-grad-cam's and captum's, before ReLU and scaling: ResNet-20, CIFAR-10 images.

    TOPGAP_DATA=... TOPGAP_PEER_PYTHON=python python experiments/parity_explain_cam.py [--images 4]

Largest difference over the range of the peer's map, median and worst over images. Named differences: the peer's
Grad-CAM++ has 1e-6 in its denominator and its Finer-CAM 1e-9, which a confident image's probabilities are below (each
compared both ways), its Eigen-CAM centres the features and leaves the sign to
LAPACK (centred and turned here), its Score-CAM aligns corners (half-pixel centres are put in there).
"""

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax import explain, models, setup
from topgap_jax.data import tfds
from topgap_jax.explain.cam import _first_component
from topgap_jax.rewrite import features_and_head
from topgap_jax.scores import logit
from topgap_jax.types import Cost, Explain

HERE = Path(__file__).parent


def eigen(layer, of_gradient):
    """Eigen-CAM as the peer computes it, of centred values."""

    def maps(keys, predict, images, labels):
        values, head = features_and_head(predict, layer, images)
        if of_gradient:
            values = values * jax.grad(lambda z: logit(head(z), labels).sum())(values)
        return _first_component(values - values.mean((1, 2), keepdims=True))

    return Explain(maps, lambda predict, images: Cost(0, 1), signed="its sign is LAPACK's")


def methods(layer):
    signed = {"relu": False}
    plus = explain.grad_cam_plus_plus(layer, **signed)
    finer = explain.finer_cam(layer, weights="softmax", strength=1, stop_weights=False, **signed)
    return {
        "captum grad_cam": explain.grad_cam(layer, **signed),
        "pgc grad_cam": explain.grad_cam(layer, **signed),
        "pgc grad_cam_plus_plus": plus,
        "pgc grad_cam_plus_plus as published": plus,
        "pgc xgrad_cam": explain.xgrad_cam(layer, **signed),
        "pgc hires_cam": explain.hires_cam(layer, **signed),
        "pgc elementwise_grad_cam": explain.elementwise_grad_cam(layer),
        "pgc layer_cam": explain.layer_cam(layer, **signed),
        "pgc eigen_cam": eigen(layer, False),
        "pgc eigen_grad_cam": eigen(layer, True),
        "pgc shapley_cam": explain.shapley_cam(layer, **signed),
        "pgc finer_cam": finer,
        "pgc finer_cam as published": finer,
        "pgc score_cam": explain.score_cam(layer, **signed),
        "pgc ablation_cam": explain.ablation_cam(layer, **signed),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--peer-python", default=os.environ.get("TOPGAP_PEER_PYTHON"), help="or TOPGAP_PEER_PYTHON")
    options = parser.parse_args()
    if not os.environ.get("TOPGAP_DATA") or not options.peer_python:
        parser.error("TOPGAP_DATA is the folder with tfds/ and weights/, --peer-python the Python that has the peers")
    weights = Path(os.environ["TOPGAP_DATA"], "weights/resnet20_cifar10.safetensors")
    records = tfds("cifar10")(f"test[:{options.images}]")
    rows = [records[i] for i in range(options.images)]
    images = np.stack([row["image"] for row in rows]).astype(np.float32) / 255
    labels = np.array([row["label"] for row in rows], np.int32)
    loaded = setup.from_config(HERE.parent / "configs/cifar10.py", [("init", str(weights))])
    predict = models.bind(loaded.experiment.model, loaded.variables)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, "images.npy"), images)
        np.save(Path(folder, "labels.npy"), labels)
        subprocess.run([options.peer_python, HERE / "_parity_explain_cam_peer.py", folder, weights], check=True)
        with np.load(Path(folder, "maps.npz")) as file:
            peers = dict(file)
    print(f"logits: {np.abs(peers['logits'] - predict(images)).max():.2g}")
    for layer in ("stage2", "stage3"):
        for name, method in methods(layer).items():
            maps = np.asarray(
                jax.jit(lambda images, m=method: m.maps(None, predict, images, jnp.asarray(labels)))(images)
            )
            peer = peers[f"{name} {layer}"]
            if "eigen" in name:
                maps = maps * np.sign((maps * peer).sum((1, 2), keepdims=True))
            differences = np.abs(maps - peer).max((1, 2)) / np.ptp(peer, (1, 2))
            print(f"{layer} {name:38} median {np.median(differences):.1e}  worst {differences.max():.1e}", flush=True)


if __name__ == "__main__":
    main()
