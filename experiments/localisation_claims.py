"""Is Top-GAP's class map nearer to the object than what other methods make of the same network? On fine-tuned networks.

    TOPGAP_DATA=FOLDER python experiments/localisation_claims.py [STUDY ...]

arXiv 2409.04819 shows the class map that its head gives, and claims better localisation. Here: `pets3` (298 test
pictures, masks) and `tiny_imagenet20` (the first 300 validation pictures, boxes), the arms gap and Top-GAP of
study.py, seed 0 (trained where runs/ has them not), eight methods, each on the same pictures of a network, maps of the
true class.
MaxBoxAcc and V2, best IoU, PxAP (needs masks), thresholds chosen on these very pictures, for every method and in every
resample alike; the centre box and the full image beside them. A difference is paired: 95 % interval of 2,000 bootstrap
resamples of the pictures. A method that is done is kept in runs/ with its commit, so that the same command goes on
where it was stopped. Writes the networks of which all methods are done into results/localisation_claims.json, on a tree
without changes; what stands there of others stays, each method with its commit.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import study

from topgap_jax.evaluators.localisation import LEAST
from topgap_jax.measure.evaluate import evaluate
from topgap_jax.metrics.boxes import LEVELS, TAUS
from topgap_jax.metrics.localisation import average_precision
from topgap_jax.progress import write_text
from topgap_jax.run.cpu import configure_cpu
from topgap_jax.run.provenance import provenance
from topgap_jax.setup import expressions
from topgap_jax.setup.assembly import context, open_split, sample

ROOT = Path(__file__).parent.parent
RUNS, RESULT = ROOT / "runs", ROOT / "results" / "localisation_claims.json"
NETWORKS = {  # split, arms, batch
    "pets3": ("test", ("gap", "top_gap .28"), 30),
    "tiny_imagenet20": ("validation[:300]", ("gap", "top_gap .25"), 50),
}
NATIVE = "cam()"
METHODS = (
    NATIVE,
    "grad_cam('stage4')",
    "grad_cam_plus_plus('stage4')",
    "layer_cam('stage4')",
    "recipro_cam('stage4')",
    "smooth(gradient())",
    "integrated(rules=guided)",
    "lrp(epsilon_plus)",
)
MEASURES = ("max_box_accuracy", "max_box_accuracy_v2", "best_iou", "pxap")
BASELINES = ("centre", "full")
RESAMPLES = 2_000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", default=list(NETWORKS), help=", ".join(NETWORKS))
    options = parser.parse_args()
    if not os.environ.get("TOPGAP_DATA"):
        parser.error("TOPGAP_DATA is the folder with tfds/ and weights/")
    print(configure_cpu(), file=sys.stderr)
    about = provenance()
    stored = json.loads(RESULT.read_text())["networks"] if RESULT.exists() else {}
    networks = {}
    clean = not (about["commit"] or "+").endswith("+")
    for name in options.studies:
        split, arms, batch = NETWORKS[name]
        for arm in arms:
            folder = kept(name, arm)
            folder.mkdir(parents=True, exist_ok=True)
            study.train(name, arm, 0, RUNS)
            loaded = study.load(name, arm, 0, RUNS)
            for number, method in enumerate(METHODS):
                if not (folder / f"{number}.json").exists():
                    measure(loaded, method, split, batch, folder / str(number), about["commit"])
    for name, (split, arms, _) in NETWORKS.items():
        for arm in arms:
            folder = kept(name, arm)
            if all((folder / f"{number}.json").exists() for number in range(len(METHODS))):
                networks[f"{name}, {arm}"] = {"split": split, **summarised(folder)}
                print(f"\n{name}, {arm}, {split}\n{table(networks[f'{name}, {arm}'])}")
    if clean and networks:
        text = json.dumps({**about, "resamples": RESAMPLES, "networks": {**stored, **networks}}, indent=1)
        write_text(RESULT, text + "\n")
    else:
        print("not written: that is for whole networks, on a tree without changes", file=sys.stderr)


def kept(name, arm):
    """The folder of what was measured of a network."""
    return RUNS / "localisation_claims" / f"{name}_{arm}".replace(" ", "_")


def measure(loaded, method, split, batch, path, commit):
    """Write what each picture says of a method's maps, and how it was made."""
    experiment, columns, start = loaded.experiment, {}, time.process_time()
    text = f"localisation({method})"
    built = expressions.choices(
        experiment.config, "evaluators", experiment.methods, text, "METHODS", **context(experiment)
    )
    evaluate(
        experiment.model, loaded.variables, open_split(experiment, split, batch, None), built, split=split,
        classes=len(experiment.classes), training=lambda: sample(experiment), weights=loaded.weights,
        source=experiment.config.source, examples=lambda _, values: columns.update(values),
        seed=experiment.config.seed,
    )  # fmt: skip
    np.savez_compressed(path.with_suffix(".npz"), **columns)
    cpu_seconds = round(time.process_time() - start, 1)
    write_text(path.with_suffix(".json"), json.dumps({"method": method, "cpu_seconds": cpu_seconds, "commit": commit}))


def summarised(folder):
    """{"methods": {method: {measure: mean with its interval, and the native map minus it}}, "baselines": ...}."""
    columns, about = [], []
    for number, method in enumerate(METHODS):
        about.append(json.loads((folder / f"{number}.json").read_text()))
        assert about[-1].pop("method") == method, f"{folder} is of other methods"
        with np.load(folder / f"{number}.npz") as arrays:
            columns.append({key: arrays[key] for key in arrays})
    n = len(columns[0]["finite"])
    draws = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    weights = np.stack([np.bincount(draw, minlength=n) for draw in draws]).astype(np.float32)
    weights = np.concatenate([np.ones((1, n), np.float32), weights])  # the pictures themselves first
    values = [measures(each, weights) for each in columns]
    methods = {}
    for method, each, said in zip(METHODS, values, about):
        methods[method] = {name: {"mean": interval(value)} for name, value in each.items()} | said
        if method != NATIVE:
            for name, value in each.items():
                methods[method][name]["native_minus_this"] = interval(values[0][name] - value)
    return {"pictures": n, "methods": methods, "baselines": baselines(columns[0])}


def measures(columns, weights):
    """{measure: (1 + resamples,)}: of the pictures counted as each row of weights says."""
    finite = columns["finite"][:, None]
    best = lambda right: (weights @ (right & finite).astype(np.float32)).max(1) / (weights @ finite)[:, 0]
    levels = (TAUS * LEVELS).astype(int)
    at = lambda name, least: best((columns[name] >= least)[:, levels])
    out = {
        "max_box_accuracy": at("box_iou", 0.5),
        "max_box_accuracy_v2": np.mean([at("best_box_iou", least) for least in LEAST], axis=0),
        "best_iou": (weights @ np.nan_to_num(columns["ious"])).max(1) / (weights @ finite)[:, 0],
    }
    if "true_pixels" in columns:
        true, false = (weights @ columns[f"{side}_pixels"].astype(np.float32) for side in ("true", "false"))
        out["pxap"] = np.array([average_precision(*pair) for pair in zip(true, false)])
    return out


def baselines(columns):
    """{box: {measure: value}} of what looks at nothing."""
    out = {}
    for box in BASELINES:
        ious = columns[f"{box}_box_iou"]
        out[box] = {
            "max_box_accuracy": float((ious >= 0.5).mean()),
            "max_box_accuracy_v2": float(np.mean([(ious >= least).mean() for least in LEAST])),
            "best_iou": float(columns[f"{box}_iou"].mean()),
        }
    if "true_pixels" in columns:
        true, false = (columns[f"{side}_pixels"].sum(0, dtype=np.int64) for side in ("true", "false"))
        inner = columns["centre_pixels"].sum(0, dtype=np.int64)
        pairs = [np.array([total.sum() - part, part]) for total, part in zip((true, false), inner)]
        out["centre"]["pxap"] = average_precision(*pairs)
        out["full"]["pxap"] = float(true.sum() / (true.sum() + false.sum()))
    return out


def interval(values):
    return [float(values[0]), *map(float, np.quantile(values[1:], (0.025, 0.975)))]


def table(network):
    """The printed lines of one network."""
    said = lambda three, sign="": "{:{s}.3f} [{:{s}.3f}, {:{s}.3f}]".format(*three, s=sign)
    lines = []
    for method, each in network["methods"].items():
        cells = []
        for name in MEASURES:
            if name in each:
                against = each[name].get("native_minus_this")
                cells.append(f"{name} {said(each[name]['mean'])}" + (f" ({said(against, '+')})" if against else ""))
        lines.append(f"{method:30}" + "  ".join(cells) + f"  {each['cpu_seconds']:.0f} CPU s")
    return "\n".join([*lines, *(f"{box} box: {each}" for box, each in network["baselines"].items())])


if __name__ == "__main__":
    main()
