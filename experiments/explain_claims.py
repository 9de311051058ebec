"""Does integrated gradients with guided non-linearity find what matters better than its rivals? On real networks.

    TOPGAP_DATA=FOLDER python experiments/explain_claims.py [NETWORK ...]

Kwon et al. (ICPR 2020) claim a lower deletion score than other methods on five ImageNet networks. Here: EfficientNet-
Lite0 on 100 pictures of imagenet500; ResNet-20, 32 and 44, and a VGG-11 that is trained here on 20,000 images (arm
`vgg11` of configs/guided.py, in runs/), on 1,000 test images of CIFAR-10; maps of the predicted class, deletion (mean
colour and blur, 32 steps, lower is better) and insertion into the blur (higher is better). Every method sees the same
images, so that a difference is paired: 95 % interval of 10,000 bootstrap resamples of the images. Areas of different
networks are not compared (arXiv 2408.08137). A method that is done is kept in runs/ with its commit, so that the same
command goes on where it was stopped. Writes results/explain_claims.json with the networks of which all methods are
done, on a tree without changes.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from topgap_jax import setup
from topgap_jax.measure.evaluate import evaluate
from topgap_jax.progress import write_text
from topgap_jax.run.cpu import configure_cpu
from topgap_jax.run.fit import fit
from topgap_jax.run.provenance import provenance
from topgap_jax.setup import config as configs
from topgap_jax.setup import expressions
from topgap_jax.setup.assembly import context, open_split

HERE = Path(__file__).parent
NETWORKS = {
    "EfficientNet-Lite0": ("imagenet.py", "efficientnet_lite0_imagenet", "test[:100]", 20),
    "ResNet-20": ("cifar10.py", "resnet20_cifar10", "test[:1000]", 100),
    "ResNet-32": ("cifar10.py", "resnet32_cifar10", "test[:1000]", 100),
    "ResNet-44": ("cifar10.py", "resnet44_cifar10", "test[:1000]", 100),
    "VGG-11": ("guided.py", "vgg11", "test[:1000]", 100),  # an arm, which is trained
}
OURS = "integrated(rules=guided)"
METHODS = {
    OURS: "guided non-linearity",
    "integrated()": "integrated gradients",
    "smooth(gradient())": "SmoothGrad",
    "grad_cam()": "Grad-CAM",
    "lrp(epsilon_plus)": "LRP",
}
METRICS = "deletion(steps=32), deletion(steps=32, substrate='blur'), insertion(steps=32)"
MEASURES = {"deletion": "deletion, mean colour", "deletion_2": "deletion, blur", "insertion": "insertion into blur"}
RESAMPLES = 10_000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help=", ".join(NETWORKS))
    parser.add_argument("--images", type=int, help="only the first N images of each: nothing is written")
    options = parser.parse_args()
    if not os.environ.get("TOPGAP_DATA"):
        parser.error("TOPGAP_DATA is the folder with tfds/ and weights/")
    print(configure_cpu(), file=sys.stderr)
    about = provenance()
    whole = options.images is None and not (about["commit"] or "+").endswith("+")
    kept = HERE.parent / "runs" / "explain_claims.json"
    rows = json.loads(kept.read_text()) if whole and kept.exists() else {}
    for network in options.networks:
        split, batch = NETWORKS[network][2:]
        split = split if options.images is None else f"test[:{options.images}]"
        loaded = load(network)
        done = rows.setdefault(network, {})
        for method in METHODS:
            if method not in done:
                start = time.process_time()
                done[method] = columns(loaded, method, split, batch)
                done[method] |= {"cpu_seconds": round(time.process_time() - start, 1), "commit": about["commit"]}
                if whole:
                    kept.parent.mkdir(exist_ok=True)
                    write_text(kept, json.dumps(rows))
        print(f"\n{network}, {split}")
        summary = summarised(done)
        for method, measured in summary.items():
            numbers = "  ".join(f"{label} {words(measured[name])}" for name, label in MEASURES.items())
            print(f"{METHODS[method]:22}{numbers}  {done[method]['cpu_seconds']:.0f} CPU s")
    complete = {network: summarised(done) for network, done in rows.items() if set(done) == set(METHODS)}
    if whole and complete:
        images = {name: NETWORKS[name][2] for name in complete}
        text = json.dumps({**about, "images": images, "networks": complete}, indent=1)
        write_text(HERE.parent / "results/explain_claims.json", text + "\n")
    else:
        print("not written: that is for whole networks, on a tree without changes", file=sys.stderr)


def load(network):
    """The network with its published weights, or trained."""
    config, weights, *_ = NETWORKS[network]
    config, runs = HERE.parent / "configs" / config, HERE.parent / "runs"
    if weights not in configs.load(config).arms:
        file = Path(os.environ["TOPGAP_DATA"], "weights", f"{weights}.safetensors")
        return setup.from_config(config, [("init", str(file))])
    experiment = setup.experiment(config, [], weights)
    fit(experiment.config, runs / weights, parts=setup.parts(experiment), file=config)
    return setup.restored(experiment, runs / weights, "last")


def columns(loaded, method, split, batch):
    """{measure: its value of every image} of a method's maps."""
    chosen, kept = loaded.experiment, {}
    text = f"measures({method}, {METRICS}, labels='predicted')"
    built = expressions.choices(chosen.config, "evaluators", chosen.methods, text, "METHODS", **context(chosen))
    data = open_split(chosen, split, batch, None)
    rows = evaluate(
        chosen.model, loaded.variables, data, built, split=split, classes=len(chosen.classes), weights=loaded.weights,
        source=chosen.config.source, examples=lambda _, values: kept.update(values), seed=chosen.config.seed,
    )  # fmt: skip
    cost = {key: rows[0].cost[key] for key in ("forward_passes", "gradient_evaluations")}
    return {name: np.asarray(kept[name], float).tolist() for name in MEASURES} | cost


def summarised(done):
    """{method: {measure: mean with its interval, and the difference from ours}} of the columns of one network."""
    draws = np.random.default_rng(0).integers(0, len(done[OURS]["deletion"]), (RESAMPLES, len(done[OURS]["deletion"])))

    def interval(values):
        means = values[draws].mean(1)
        return [float(values.mean()), *map(float, np.quantile(means, (0.025, 0.975)))]

    out = {}
    for method, column in done.items():
        values = {name: np.asarray(column[name]) for name in MEASURES}
        out[method] = {name: {"mean": interval(each)} for name, each in values.items()}
        if method != OURS:
            for name, each in values.items():
                out[method][name]["ours_minus_this"] = interval(np.asarray(done[OURS][name]) - each)
        out[method] |= {key: column[key] for key in ("forward_passes", "gradient_evaluations", "cpu_seconds", "commit")}
    return out


def words(measured):
    mean, low, high = measured["mean"]
    text = f"{mean:.3f} [{low:.3f}, {high:.3f}]"
    if "ours_minus_this" in measured:
        mean, low, high = measured["ours_minus_this"]
        text += f" ({mean:+.3f} [{low:+.3f}, {high:+.3f}])"
    return text


if __name__ == "__main__":
    main()
