"""How fast ImageNet networks are beside PyTorch: forward, input gradient and training step, on a CPU.

    python experiments/bench_networks.py --peer-python bench-env/bin/python

Batch 8 at 224x224, float32, random weights that timm's network of the peer has drawn. Each row has two processes of
ours (the engine with oneDNN, the engine without) and one of PyTorch (channels_last, bound threads), asked in
turn. Ratio = PyTorch's time over ours: above 1 ours is faster. The peer's environment needs torch, timm, numpy and
safetensors.
"""

import argparse
import os
import tempfile
from pathlib import Path

import _bench_driver as driver
import numpy as np
from bench_core import OURS, PEERS, disagreement

NETWORKS = {  # ours: timm's name
    "EfficientNet-Lite0": "tf_efficientnet_lite0",
    "MobileNetV3-Large": "mobilenetv3_large_100",
    "ConvNeXt-T": "convnext_tiny",
    "DenseNet-121": "densenet121",
    "ResNet-50": "resnet50",
}
PATHS = ("forward", "input_gradient", "train")
TRAINED = ("EfficientNet-Lite0", "ResNet-50")
SETTINGS = ("oneDNN", "XLA")
PEER = "PyTorch, bound threads"
TARGETS = {  # PyTorch's time over ours at least, with oneDNN: of forward and of input gradient
    "EfficientNet-Lite0": (1.2, 1.2),
    "MobileNetV3-Large": (1.2, 1.2),
    "ConvNeXt-T": (1.0, 1.1),
    "DenseNet-121": (1.0, 1.1),
    "ResNet-50": (1.0, 1.1),
}
TRAINING, WITHOUT = 1.0, 0.6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=os.environ.get("TOPGAP_PEER_PYTHON"), help="or TOPGAP_PEER_PYTHON")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="length of one timed run (at least one call)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS), metavar="PATH")
    parser.add_argument("--ours", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    if not options.peer_python:
        parser.error("name the Python that has torch and timm: --peer-python or TOPGAP_PEER_PYTHON")
    machine, rows = driver.machine(), []
    for network in options.networks:
        for path in [path for path in options.paths if path != "train" or network in TRAINED]:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(network, path, options, Path(folder)))
            print("|", " | ".join(line(rows[-1])), "|", flush=True)
    whole = (options.networks, options.paths, options.ours) == (list(NETWORKS), list(PATHS), list(SETTINGS))
    if whole:
        about = {"machine": machine, "load_average_after": driver.load_average()}
        driver.write("bench_networks", about | {"batch": options.batch, "size": options.size, "rows": rows})
    print("\n" + table(rows))


def table(rows):
    """PyTorch's time over ours, of whole rows as they are stored."""
    head = ["network", "path", *rows[0]["ratio"], "ms, PyTorch / first", "compile s, first", "peak MB, PyTorch / first"]
    return driver.table(head, [line(row) for row in rows])


def measure(network, path, options, folder):
    """One row: start its processes, compare what they compute, time them in turn."""
    generator, shape = np.random.default_rng(0), (options.batch, options.size, options.size, 3)
    np.save(folder / "images.npy", generator.integers(0, 256, shape, np.uint8))
    np.save(folder / "labels.npy", generator.integers(0, 1000, options.batch, np.int32))
    files = {name: str(folder / f"{name}.npy") for name in ("images", "labels")}
    files["weights"] = str(folder / "weights.safetensors")
    task = {"path": path, "network": NETWORKS[network], "k": None, **files}
    environments = {PEER: driver.KEEP_MEMORY | PEERS[PEER]}
    environments |= {name: driver.NO_CACHE | OURS[name][0] for name in options.ours}
    processes, answers = {}, {}
    for name, environment in environments.items():  # the peer first: it writes the weights
        if name == PEER:
            processes[name] = driver.start("_bench_torch.py", options.peer_python, environment)
            answers[name] = driver.ask(processes[name], "prepare", **task)
        else:
            processes[name] = driver.start("_bench_ours.py", environment=environment)
            own = {"engine": OURS[name][1], "classes": 1000}
            answers[name] = driver.ask(processes[name], "prepare", **task, **own)
    times = driver.interleave(processes, options.rounds, options.seconds)
    settings = {}
    for name, process in processes.items():
        told = {key: answers[name][key] for key in ("framework", "threads", "compile_seconds") if key in answers[name]}
        settings[name] = told | driver.figures(times[name]) | driver.ask(process, "memory")
    driver.stop(processes)
    keys = [key for key in ("logits", "gradients", "loss") if key in answers[PEER]]
    return {
        "network": network,
        "path": path,
        "targets": {"oneDNN": TRAINING if path == "train" else TARGETS[network][PATHS.index(path)], "XLA": WITHOUT},
        "ratio": {name: driver.ratios(times[PEER], times[name]) for name in options.ours},
        "agreement": {
            name: {key: disagreement(answers[name][key], answers[PEER][key]) for key in keys} for name in options.ours
        },
        "settings": settings,
    }


def line(row):
    """A row of the printed table: PyTorch's time over ours, median [range]; of CPU time."""
    cells = [row["network"], row["path"]]
    for ratio in row["ratio"].values():
        low, high = ratio["range"]
        cells.append(f"{ratio['median']:.2f} [{low:.2f}-{high:.2f}]; {ratio['cpu_median']:.2f}")
    ours, peer = row["settings"][next(iter(row["ratio"]))], row["settings"][PEER]
    return [
        *cells,
        f"{peer['median_ms']:.0f} / {ours['median_ms']:.0f}",
        f"{ours['compile_seconds']:.1f}",
        f"{peer['peak_mb']:.0f} / {ours['peak_mb']:.0f}",
    ]


if __name__ == "__main__":
    main()
