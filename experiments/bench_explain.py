"""How fast explanations are beside captum, pytorch-grad-cam and openerf's loop, on a CPU, and in how much memory.

    TOPGAP_DATA=FOLDER python experiments/bench_explain.py --peer-python bench-env/bin/python

ResNet-20 at batch 128 of CIFAR-10's test images and EfficientNet-Lite0 at batch 8 of imagenet500, their published
weights. Each row has a process of ours (one compiled program, compile time apart) and one of the package (its tensors
channels_last, bound threads), asked in turn. Ratio = the package's time over ours: above 1 ours is faster. Memory is
the peak above that after the imports, compilation and first call included. "family" is the eight class activation maps
that share one pass: beside the package's eight calls, and beside eight calls of ours. A row that is done is kept in
runs/ with its commit, so that the same command goes on where it was stopped; results/bench_explain.json is written
where every row is there, on a tree without changes. Figures of a busy machine say little: `load_average` stands with
each row. --ideas times what might make those faster that miss their target, beside what is done, and writes
results/bench_explain_ideas.json.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import _bench_driver as driver
import numpy as np
from bench_core import PEERS
from parity_explain import pictures

from topgap_jax import setup
from topgap_jax.progress import write_text

HERE = Path(__file__).parent
OURS = "oneDNN"
NETWORKS = {
    "resnet20": {
        "config": "cifar10.py", "weights": "resnet20_cifar10", "batch": 128, "layers": (None, "layer3"),
        "shallow": ("stage3", "layer3"), "window": 8, "stride": 4, "together": 1,
    },
    "efficientnet_lite0": {
        "config": "imagenet.py", "weights": "efficientnet_lite0_imagenet", "batch": 8, "layers": (None, "bn2"),
        "shallow": ("stage2", "blocks.2"), "window": 56, "stride": 28, "together": 4,
    },
}  # fmt: skip
STEPS = 50
TARGETS = {  # the package's time over ours at least
    "saliency": 1.3,
    "input_x_gradient": 1.3,
    "integrated": 1.3,
    "guided_backprop": 1.15,
    "occlusion": 1.3,
    "grad_cam": 3,
    "score_cam": 1.5,
    "family": None,
    "field": 3,
}
FAMILY = 5  # eight calls of ours over the family
AS_IT_IS = "as it is"
IDEAS_FOR = (
    ("resnet20", "saliency"), ("resnet20", "occlusion"), ("resnet20", "score_cam"), ("efficientnet_lite0", "field")
)  # fmt: skip
IDEAS = {  # the environment of our process: what might use both cores better
    AS_IT_IS: {},
    "two devices, a thread each": {"BENCH_DEVICES": "2", "OMP_NUM_THREADS": "1"},
    "two halves of the batch": {"BENCH_SLICES": "2"},
    "four quarters of the batch": {"BENCH_SLICES": "4"},
    "two halves, a thread each": {"BENCH_SLICES": "2", "OMP_NUM_THREADS": "1"},
    "threads bound to cores": {"OMP_PROC_BIND": "true"},
    "threads that spin for a while": {"GOMP_SPINCOUNT": "10000"},  # for ever would take a core from the other processes
    "two batches of masks together": {"BENCH_TOGETHER": "2"},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=os.environ.get("TOPGAP_PEER_PYTHON"), help="or TOPGAP_PEER_PYTHON")
    parser.add_argument("--peer", choices=PEERS, default="PyTorch, bound threads", help="one thread on a busy machine")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="length of one timed run (at least one call)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--paths", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="PATH")
    parser.add_argument("--ideas", action="store_true", help="ours alone, in other ways")
    options = parser.parse_args()
    if options.ideas and os.environ.get("TOPGAP_DATA"):
        return ideas(options)
    if not os.environ.get("TOPGAP_DATA") or not options.peer_python:
        parser.error("TOPGAP_DATA is the folder with tfds/ and weights/, --peer-python the Python that has the peers")
    machine = driver.machine()
    whole = options.rounds >= 7 and options.peer == parser.get_default("peer") and not machine["commit"].endswith("+")
    kept = HERE.parent / "runs" / "bench_explain.json"
    rows = json.loads(kept.read_text()) if whole and kept.exists() else {}
    for name in options.networks:
        with tempfile.TemporaryDirectory() as folder:
            files = written(NETWORKS[name], Path(folder))
            for path in options.paths:
                key = f"{name} {path}"
                if key not in rows:
                    rows[key] = {"commit": machine["commit"], **measure(name, path, options, files)}
                    if whole:
                        kept.parent.mkdir(exist_ok=True)
                        write_text(kept, json.dumps(rows, indent=1))
                print("|", " | ".join(line(key, rows[key])), "|", flush=True)
    if whole and len(rows) == len(NETWORKS) * len(TARGETS):
        driver.write("bench_explain", {"machine": machine, "steps": STEPS, "rows": rows})
    else:
        print("not written: that is for every row with 7 rounds or more, on a tree without changes")


def ideas(options):
    """Time what misses its target as it is and in each of `IDEAS`; what is not among --paths stays in the file."""
    file = HERE.parent / "results" / "bench_explain_ideas.json"
    parts = json.loads(file.read_text())["parts"] if file.exists() else {}
    machine = driver.machine()
    for name, path in IDEAS_FOR:
        if path not in options.paths:
            continue
        network, before, processes = NETWORKS[name], driver.load_average(), {}
        both = {"steps": STEPS, "window": network["window"], "stride": network["stride"], "layer": network["layers"][0]}
        with tempfile.TemporaryDirectory() as folder:
            words = written(network, Path(folder)) | both | {"shallow": network["shallow"][0]}
            for idea, environment in IDEAS.items():
                processes[idea] = driver.start("_bench_explain_ours.py", environment=driver.NO_CACHE | environment)
                config = str(HERE.parent / "configs" / network["config"])
                driver.ask(processes[idea], "prepare", path=path, config=config, **words)
        times = driver.interleave(processes, options.rounds, options.seconds)
        driver.stop(processes)
        rows = {
            key: driver.figures(each) | {"ratio": driver.ratios(times[AS_IT_IS], each)} for key, each in times.items()
        }
        about = {"commit": machine["commit"], "load_average": [before, driver.load_average()]}
        parts[f"{name} {path}"] = about | {"rows": rows}
        for key, row in rows.items():
            print("|", " | ".join([f"{name} {path}", *idea_cells(key, row)]), "|", flush=True)
        if options.rounds >= 7 and not machine["commit"].endswith("+"):
            driver.write("bench_explain_ideas", {"machine": machine, "parts": parts})


def written(network, folder):
    """The files with the images, uint8, and labels that both sides read."""
    weights = Path(os.environ["TOPGAP_DATA"], f"weights/{network['weights']}.safetensors")
    loaded = setup.from_config(HERE.parent / "configs" / network["config"], [("init", str(weights))])
    images, labels = pictures(loaded, "test", network["batch"])
    np.save(folder / "images.npy", np.round(255 * images).astype(np.uint8))
    np.save(folder / "labels.npy", labels)
    return {name: str(folder / f"{name}.npy") for name in ("images", "labels")} | {"weights": str(weights)}


def measure(name, path, options, files):
    """One row: start its processes, compare what they compute, time them in turn."""
    network, before = NETWORKS[name], driver.load_average()
    both = {**files, "steps": STEPS, "window": network["window"], "stride": network["stride"]}
    sides = [{"layer": layer, "shallow": at} for layer, at in zip(network["layers"], network["shallow"])]
    config = str(HERE.parent / "configs" / network["config"])
    processes = {
        options.peer: driver.start(
            "_bench_explain_torch.py", options.peer_python, driver.KEEP_MEMORY | PEERS[options.peer]
        )
    }
    words = {"path": path, "network_name": name, "together": network["together"], **both, **sides[1]}
    answers = {options.peer: driver.ask(processes[options.peer], "prepare", **words)}
    for setting, what in {OURS: path, **({"eight calls": "eight calls"} if path == "family" else {})}.items():
        processes[setting] = driver.start("_bench_explain_ours.py", environment=driver.NO_CACHE)
        answers[setting] = driver.ask(processes[setting], "prepare", path=what, config=config, **both, **sides[0])
    times = driver.interleave(processes, options.rounds, options.seconds)
    settings = {}
    for setting, process in processes.items():
        keys = ("framework", "threads", "compile_seconds", "first_seconds", "planned_mb")
        said = {key: answers[setting][key] for key in keys if key in answers[setting]}
        peak = driver.ask(process, "memory")["peak_mb"]
        settings[setting] = said | driver.figures(times[setting])
        settings[setting] |= {"peak_mb": peak, "above_import_mb": peak - answers[setting]["import_mb"]}
    driver.stop(processes)
    sums, expected = (np.asarray(answers[setting]["maps"]) for setting in (OURS, options.peer))
    row = {
        "load_average": [before, driver.load_average()],
        "peer": options.peer,
        "target": TARGETS[path],
        "ratio": driver.ratios(times[options.peer], times[OURS]),
        "agreement": float(np.median(np.abs(sums - expected) / np.abs(expected).max())),
        "settings": settings,
    }
    if path == "family":
        row |= {"calls_target": FAMILY, "calls_ratio": driver.ratios(times["eight calls"], times[OURS])}
    return row


def idea_cells(name, row):
    """A row of the table of ideas."""
    return [f"{name:28}", said(row["ratio"]), f"{row['median_ms']:.0f} ms", f"{row['cpu_ms']:.0f} ms"]


def said(ratio):
    """Median [range]; that of CPU time."""
    return "{:.2f} [{:.2f}-{:.2f}]; {:.2f}".format(ratio["median"], *ratio["range"], ratio["cpu_median"])


def line(key, row):
    """A row of the printed table: the package's time over ours, median [range]; of CPU time; what it should be."""
    ours, peer = row["settings"][OURS], row["settings"][row["peer"]]
    return [
        f"{key:36}",
        said(row["ratio"]) + (f" (at least {row['target']})" if row["target"] else ""),
        f"eight calls {said(row['calls_ratio'])} (at least {row['calls_target']})" if "calls_ratio" in row else "",
        f"{peer['median_ms']:.0f} / {ours['median_ms']:.0f} ms",
        f"compile {ours['compile_seconds']:.1f} s",
        f"above import {peer['above_import_mb']:.0f} / {ours['above_import_mb']:.0f} MB",
        f"agreement {row['agreement']:.1e}",
    ]


if __name__ == "__main__":
    main()
