"""How fast the core is beside PyTorch: forward, input gradient, PGD-20, adversarial and plain training step, on a CPU.

    python experiments/bench_core.py --peer-python bench-env/bin/python

ResNet-20 (ResNet-18 with the CIFAR stem in the last line), batch 128, 32x32, float32. Each path has four processes of
ours (the engine with oneDNN on one and on two devices, the engine without oneDNN, plain JAX) and two of PyTorch
(channels_last), asked in turn; PyTorch counts with the better of its two settings. With --compile a third one uses
torch.compile, beside and not counted. Ratio = PyTorch's time over ours: above 1 ours is faster. The peer's environment
needs torch, numpy and safetensors.
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
COMPILED = "torch.compile"
OURS = {  # name: environment, and whether the engine is used
    "oneDNN": ({}, True),
    "oneDNN, 2 devices": ({"BENCH_DEVICES": "2"}, True),
    "XLA": ({"TOPGAP_ONEDNN": "off"}, True),
    "plain JAX": ({}, False),
}
TARGETS = {  # PyTorch's time over ours at least: with oneDNN, with XLA alone
    "forward": (1.3, 0.75),
    "input gradient": (1.4, 0.95),
    "PGD-20": (1.4, 0.9),
    "PGD-10 adversarial step": (1.3, 0.75),
    "training step, gap": (1.1, 0.55),
    "training step, top_gap(k=16)": (1.05, None),
    "ResNet-18 forward": (1.05, 0.85),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=os.environ.get("TOPGAP_PEER_PYTHON"), help="or TOPGAP_PEER_PYTHON")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="length of one timed run (at least one call)")
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS), metavar="PATH")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--ours", nargs="+", choices=OURS, default=list(OURS), metavar="SETTING")
    parser.add_argument("--compile", action="store_true", help="torch.compile beside, where it compiles in a minute")
    parser.add_argument("--name", default="bench_core", help="of the file in results/")
    options = parser.parse_args()
    if not options.peer_python:
        parser.error("name the Python that has torch: --peer-python or TOPGAP_PEER_PYTHON")
    machine, rows = driver.machine(), {}
    for title in options.paths:
        with tempfile.TemporaryDirectory() as folder:
            rows[title] = measure(title, options, Path(folder))
        print("|", " | ".join(line(title, rows[title], options)), "|", flush=True)
    result = {"machine": machine, "load_average_after": driver.load_average(), "batch": options.batch, "paths": rows}
    if set(rows) == set(PATHS) and set(options.ours) == set(OURS):
        driver.write(options.name, result)
    print("\n" + driver.table(columns(options), [line(title, row, options) for title, row in rows.items()]))


def measure(title, options, folder):
    """One path: start its processes, compare what they compute, time them in turn."""
    task = make_task(*PATHS[title], folder, options.batch)
    processes = {  # the peers first: they write the weights if there are none
        name: driver.start("_bench_torch.py", options.peer_python, driver.KEEP_MEMORY | environment)
        for name, environment in PEERS.items()
    }
    if options.compile:
        compiled = driver.KEEP_MEMORY | PEERS["PyTorch, bound threads"] | {"BENCH_COMPILE": "1"}
        processes[COMPILED] = driver.start("_bench_torch.py", options.peer_python, compiled)
    for name in options.ours:
        processes[name] = driver.start("_bench_ours.py", environment=driver.NO_CACHE | OURS[name][0])
    answers = {
        name: driver.ask(process, "prepare", **task, **({"engine": OURS[name][1]} if name in OURS else {}))
        for name, process in processes.items()
    }
    times = driver.interleave(processes, options.rounds, options.seconds)
    settings = {}
    for name, process in processes.items():
        told = {key: answers[name][key] for key in ("framework", "threads", "compile_seconds") if key in answers[name]}
        told |= {"environment": driver.KEEP_MEMORY | PEERS[name]} if name in PEERS else {}
        settings[name] = told | driver.figures(times[name]) | driver.ask(process, "memory")
    driver.stop(processes)
    peer = min(PEERS, key=lambda name: settings[name]["median_ms"])
    agreement = {
        name: {
            key: disagreement(answers[name][key], answers[peer][key])
            for key in ("logits", "gradients", "loss")
            if key in answers[name]
        }
        for name in options.ours
    }
    return {
        "peer": peer,
        "targets": dict(zip(("oneDNN", "XLA"), TARGETS[title])),
        "ratio": {name: driver.ratios(times[peer], times[name]) for name in processes if name not in PEERS},
        "agreement": agreement,
        "settings": settings,
    }


def make_task(path, network, k, folder, batch=128):
    """What every process of a path is asked to prepare, on images and labels that are drawn into the folder."""
    generator = np.random.default_rng(0)
    np.save(folder / "images.npy", generator.integers(0, 256, (batch, 32, 32, 3), np.uint8))
    np.save(folder / "labels.npy", generator.integers(0, 10, batch, np.int32))
    files = {name: str(folder / f"{name}.npy") for name in ("images", "labels")}
    return {"path": path, "network": network, "k": k, "weights": weights(network, folder), **files}


def weights(network, folder):
    """The file with the weights of both: the pretrained ResNet-20 where TOPGAP_DATA has it, else random ones."""
    pretrained = Path(os.environ.get("TOPGAP_DATA", folder)) / "weights" / "resnet20_cifar10.safetensors"
    return str(pretrained if network == "resnet20" and pretrained.exists() else folder / "weights.safetensors")


def disagreement(ours, peer):
    """Largest and median difference, relative to the largest entry."""
    ours, peer = np.asarray(ours), np.asarray(peer)
    difference = np.abs(ours - peer) / np.abs(peer).max()
    return {"largest": float(difference.max()), "median": float(statistics.median(difference.ravel()))}


def columns(options):
    """The head of the printed table."""
    names = [*options.ours, *([COMPILED] if options.compile else [])]
    return ["path", *names, "ms, PyTorch / first", "compile s, first", "peak MB, PyTorch / first"]


def line(title, row, options):
    """A row of the printed table: PyTorch's time over ours, median [range], of minima; of CPU time."""
    cells = [title]
    for name in [*options.ours, *([COMPILED] if options.compile else [])]:
        ratio = row["ratio"][name]
        low, high = ratio["range"]
        cells.append(
            f"{ratio['median']:.2f} [{low:.2f}-{high:.2f}], {ratio['of_minima']:.2f}; {ratio['cpu_median']:.2f}"
        )
    ours, peer = row["settings"][options.ours[0]], row["settings"][row["peer"]]
    return [
        *cells,
        f"{peer['median_ms']:.0f} / {ours['median_ms']:.0f}",
        f"{ours['compile_seconds']:.1f}",
        f"{peer['peak_mb']:.0f} / {ours['peak_mb']:.0f}",
    ]


if __name__ == "__main__":
    main()
