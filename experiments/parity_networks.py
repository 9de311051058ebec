"""Do the networks of torchvision, timm, Hugging Face and RobustBench, saved as safetensors, give the same logits here?

    TOPGAP_PEER_PYTHON=.venv-bench/bin/python python experiments/parity_networks.py [PART OF A NAME ...]

Random weights and random batch statistics, two images of every size. `pretrained.describe` picks the architecture,
`pretrained.load` reads the file by name, as `topgap evaluate --weights` does. Largest difference of the logits, over
the largest logit; at most 1e-4. Where they differ, the layers with a kernel are compared one by one, and the first that
differs is printed. Hugging Face's and efficientnet_pytorch's files are timm's networks with the tensors renamed.
Writes results/parity_networks.json, unless parts of names are given.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from topgap_jax import models, pool, pretrained
from topgap_jax.build import build
from topgap_jax.pretrained.names import torch_names
from topgap_jax.run.provenance import provenance

HERE = Path(__file__).parent
SIZES, LARGE, FIXED = (96, 75), (224, 96), (224,)
NETWORKS = (  # publisher, its names, sizes of the images
    ("torchvision", ("resnet18", "resnet34", "resnet50", "densenet121"), SIZES),
    ("torchvision", ("vgg11_bn", "vgg16_bn"), LARGE),
    ("torchvision", ("efficientnet_b0", "mobilenet_v3_small", "mobilenet_v3_large"), SIZES),
    ("torchvision", ("convnext_tiny", "convnext_small", "convnext_base"), SIZES),
    ("torchvision-old", ("densenet121",), SIZES),
    ("timm", ("resnet18", "resnet34", "resnet50", "resnet18d", "resnet34d", "resnet50d", "densenet121"), SIZES),
    ("timm", ("vgg11_bn", "vgg16_bn"), LARGE),
    ("timm", ("efficientnet_b0", "tf_efficientnet_b0", "efficientnet_lite0"), SIZES),
    ("timm", tuple(f"tf_efficientnet_lite{number}" for number in range(5)), SIZES),
    ("timm", ("mobilenetv3_small_100", "tf_mobilenetv3_small_100"), SIZES),
    ("timm", ("mobilenetv3_large_100", "tf_mobilenetv3_large_100"), SIZES),
    ("timm", ("convnext_tiny", "convnext_small", "convnext_base"), SIZES),
    ("timm", ("vit_small_patch16_224", "deit_small_patch16_224"), FIXED),
    ("efficientnet_pytorch", ("tf_efficientnet_b0", *(f"tf_efficientnet_lite{number}" for number in range(5))), SIZES),
    ("huggingface", ("resnet18", "resnet34", "resnet50", "convnext_tiny", "convnext_small", "convnext_base"), SIZES),
    ("robustbench", ("trades", "deepmind"), (32,)),
)
TOLERANCE = 1e-4


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only networks whose publisher and name contain one of these")
    parser.add_argument("--peer-python", default=os.environ.get("TOPGAP_PEER_PYTHON"), help="or TOPGAP_PEER_PYTHON")
    options = parser.parse_args()
    if not options.peer_python:
        parser.error("name the Python that has torch, torchvision and timm: --peer-python or TOPGAP_PEER_PYTHON")
    differences = {}
    with tempfile.TemporaryDirectory() as folder:
        call = [options.peer_python, HERE / "_parity_networks_peer.py", folder]
        with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:
            versions = json.loads(peer.stdout.readline())
            for publisher, names, sizes in NETWORKS:
                for name in names:
                    key = f"{publisher} {name}"
                    if options.names and not any(part in key for part in options.names):
                        continue
                    print(publisher, name, *sizes, file=peer.stdin, flush=True)
                    if not peer.stdout.readline():
                        raise SystemExit(f"the peer ended at {key}")
                    differences |= rows(key, Path(folder), sizes)
            peer.stdin.close()
    worst = max(row["difference"] for row in differences.values())
    print(f"worst {worst:.2g}, allowed {TOLERANCE:g}")
    if not options.names:
        about = provenance()
        about["versions"] |= versions
        result = {**about, "tolerance": TOLERANCE, "worst": worst, "agree": worst <= TOLERANCE, "logits": differences}
        (HERE.parent / "results/parity_networks.json").write_text(json.dumps(result, indent=1) + "\n")
        print("written: results/parity_networks.json")
    return 0 if worst <= TOLERANCE else 1


def rows(key, folder, sizes):
    """{"timm resnet18 96x96": row, ...}, printed as they come."""
    found = {}
    for size in sizes:
        found[f"{key} {size}x{size}"] = row = compare(folder, size)
        print(f"{key:42} {size:4}  {row['difference']:.2g}  {row['model']}", flush=True)
        if row["difference"] > TOLERANCE:
            print(f"    first layer that differs: {first_difference(folder, size)}", flush=True)
    return found


def loaded(folder, images, mean, std):
    """The model that the file is for us, as text and built, and its variables."""
    described = pretrained.describe(folder / "network.safetensors")
    published = {"mean": tuple(map(float, mean)), "std": tuple(map(float, std))}
    for name, values in published.items():
        if described[name] is not None and not np.allclose(described[name], values, atol=0.005):
            raise SystemExit(f"{name} is {described[name]} for us, {values} for the publisher")
    model = build(described["model"], models.TABLE, {"classes": classes(folder), "pool": pool.gap(), **published})
    variables = pretrained.load(folder / "network.safetensors", model, image_shape=images.shape[1:])
    return described["model"], model, variables


def classes(folder):
    with np.load(next(folder.glob("*.npz"))) as file:
        return file["logits"].shape[-1]


def compare(folder, size):
    """Which model the file is for us, and how far our logits are from PyTorch's."""
    with np.load(folder / f"{size}.npz") as file:
        images, expected, mean, std = (file[name] for name in ("images", "logits", "mean", "std"))
    text, model, variables = loaded(folder, images, mean, std)
    logits = jax.jit(lambda variables, images: models.bind(model, variables)(images))(variables, images)
    scale = np.abs(expected).max()
    return {
        "model": text,
        "difference": float(np.abs(logits - expected).max() / scale),
        "largest_logit": float(scale),
        # what a network deaf to its input would miss
        "between_the_images": float(np.abs(expected[0] - expected[1]).max() / scale),
    }


def first_difference(folder, size):
    """The first layer with a kernel whose output is not PyTorch's, with its difference over its largest value."""
    with np.load(folder / f"{size}.npz") as file:
        arrays = dict(file)
    _, model, variables = loaded(folder, arrays["images"], arrays["mean"], arrays["std"])
    paths = {tuple(k.key for k in keys): leaf.shape for keys, leaf in jax.tree.flatten_with_path(variables)[0]}
    names = torch_names(paths, pretrained.read(folder / "network.safetensors").shapes)
    layers = {path[1:-1]: name for path, name in names.items() if path[-1] == "kernel"}

    names_in_order = []

    def outputs(variables, images):
        values = []

        def record(function, args, kwargs, context):
            value = function(*args, **kwargs)
            if context.module.path in layers:
                names_in_order.append(layers[context.module.path])
                values.append(value)
            return value

        with nn.intercept_methods(record):
            models.bind(model, variables)(images)
        return values

    values = jax.jit(outputs)(variables, arrays["images"])
    for name, value in zip(names_in_order, values):
        expected = arrays[f"layer {name}"].reshape(value.shape)
        difference = float(np.abs(value - expected).max() / np.abs(expected).max())
        if difference > TOLERANCE:
            return f"{name} ({difference:.2g})"
    return "none: it is what follows the last kernel"


if __name__ == "__main__":
    raise SystemExit(main())
