"""How fast the core is beside PyTorch: forward, input gradient, PGD-20, adversarial and plain training step, on a CPU.

    python experiments/bench_core.py --peer-python bench-env/bin/python

ResNet-20 (ResNet-18 with the CIFAR stem in the last line), batch 128, 32x32, float32. Each path has a process of ours and
two of PyTorch (channels_last), asked in turn; PyTorch counts with the better of its two settings. Ratio = PyTorch's time
over ours: above 1 ours is faster. The peer's environment needs torch, numpy and safetensors.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import _bench_driver as driver
import numpy as np

PATHS = {  # title: what runs, on which network, and k of top_gap
    "forward": ("forward", "resnet20", None),
    "input gradient": ("input_gradient", "resnet20", None),
    "PGD-20": ("pgd", "resnet20", None),
    "PGD-10 adversarial step": ("adversarial", "resnet20", None),
    "training step, gap": ("train", "resnet20", None),
    "training step, top_gap(k=16)": ("train", "resnet20", 16),
    "ResNet-18 forward": ("forward", "resnet18", None),
}
PEERS = {
    "PyTorch, bound threads": {"OMP_NUM_THREADS": str(os.cpu_count()), "OMP_PROC_BIND": "true"},
    "PyTorch, one thread": {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
}
OURS = "topgap_jax"
COLUMNS = [
    "path",
    "PyTorch / ours, median [range]",
    "of minima",
    "of CPU time",
    "ours ms, median / min",
    "PyTorch ms, median / min",
    "compile s",
    "peak MB, ours / PyTorch",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=os.environ.get("TOPGAP_PEER_PYTHON"), help="or TOPGAP_PEER_PYTHON")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="length of one timed run (at least one call)")
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS), metavar="PATH")
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    if not options.peer_python:
        parser.error("name the Python that has torch: --peer-python or TOPGAP_PEER_PYTHON")
    machine, rows = driver.machine(), {}
    for title in options.paths:
        with tempfile.TemporaryDirectory() as folder:
            rows[title] = measure(title, options, Path(folder))
        print(title, rows[title]["ratio"], rows[title]["agreement"], flush=True)
    result = {"machine": machine, "load_average_after": driver.load_average(), "batch": options.batch, "paths": rows}
    if set(rows) == set(PATHS):
        driver.write("bench_core", result)
    print("\n" + driver.table(COLUMNS, [line(title, row) for title, row in rows.items()]))


def measure(title, options, folder):
    """One path: start its processes, compare what they compute, time them in turn."""
    path, network, k = PATHS[title]
    generator = np.random.default_rng(0)
    np.save(folder / "images.npy", generator.integers(0, 256, (options.batch, 32, 32, 3), np.uint8))
    np.save(folder / "labels.npy", generator.integers(0, 10, options.batch, np.int32))
    task = {
        "path": path,
        "network": network,
        "k": k,
        "images": str(folder / "images.npy"),
        "labels": str(folder / "labels.npy"),
        "weights": weights(network, folder),
    }
    processes = {  # the peers first: they write the weights if there are none
        name: driver.start("_bench_torch.py", options.peer_python, driver.KEEP_MEMORY | environment)
        for name, environment in PEERS.items()
    }
    processes[OURS] = driver.start("_bench_ours.py", environment=driver.NO_CACHE)
    answers = {name: driver.ask(process, "prepare", **task) for name, process in processes.items()}
    times = driver.interleave(processes, options.rounds, options.seconds)
    settings = {}
    for name, process in processes.items():
        told = {key: answers[name][key] for key in ("framework", "threads", "compile_seconds") if key in answers[name]}
        told |= {"environment": driver.KEEP_MEMORY | PEERS[name]} if name in PEERS else {}
        settings[name] = told | driver.figures(times[name]) | driver.ask(process, "memory")
    driver.stop(processes)
    peer = min(PEERS, key=lambda name: settings[name]["median_ms"])
    agreement = {
        key: disagreement(answers[OURS][key], answers[peer][key])
        for key in ("logits", "gradients", "loss")
        if key in answers[OURS]
    }
    return {
        "peer": peer,
        "ratio": driver.ratios(times[peer], times[OURS]),
        "agreement": agreement,
        "settings": settings,
    }


def weights(network, folder):
    """The file with the weights of both: the pretrained ResNet-20 where TOPGAP_DATA has it, else random ones."""
    pretrained = Path(os.environ.get("TOPGAP_DATA", folder)) / "weights" / "resnet20_cifar10.safetensors"
    return str(pretrained if network == "resnet20" and pretrained.exists() else folder / "weights.safetensors")


def disagreement(ours, peer):
    """Largest and median difference, relative to the largest entry."""
    ours, peer = np.asarray(ours), np.asarray(peer)
    difference = np.abs(ours - peer) / np.abs(peer).max()
    return {"largest": float(difference.max()), "median": float(statistics.median(difference.ravel()))}


def line(title, row):
    """A row of the printed table."""
    ratio, ours, peer = row["ratio"], row["settings"][OURS], row["settings"][row["peer"]]
    return [
        title,
        f"{ratio['median']:.2f} [{ratio['range'][0]:.2f}-{ratio['range'][1]:.2f}]",
        f"{ratio['of_minima']:.2f}",
        f"{ratio['cpu_median']:.2f}",
        f"{ours['median_ms']:.0f} / {ours['min_ms']:.0f}",
        f"{peer['median_ms']:.0f} / {peer['min_ms']:.0f}",
        f"{ours['compile_seconds']:.1f}",
        f"{ours['peak_mb']:.0f} / {peer['peak_mb']:.0f}",
    ]


if __name__ == "__main__":
    main()
