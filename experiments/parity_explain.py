"""Are our explanations and measures those of captum, pytorch-grad-cam, openerf, quantus, SciPy and scikit-image?

    TOPGAP_DATA=FOLDER python experiments/parity_explain.py --peer-python PYTHON [PART OF A NAME ...] [--images N]

Same weights, same images: ResNet-20 and 64 test images of CIFAR-10, EfficientNet-Lite0 and 16 pictures of imagenet500.
PYTHON has torch and the packages (`make bench-env`; a process of its own). What a method draws we draw, and hand it
over. A row is the largest difference over the range of the package's map, median and worst over the images; at most
1e-4. Where a rounding turns a ReLU, a single map is off by more: such images are computed once more in float64, where
the same limit holds. What a row says after its name is a difference of definition, which the script takes away.
Writes results/parity_explain.json where all is run, on a tree without changes. A row that is done is kept in runs/ with
its commit, so that the same command goes on where it was stopped. Relevance: parity_explain_relevance.py.
"""

import argparse
import contextlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax import data, explain, metrics, models, pool, rewrite, setup
from topgap_jax.build import build
from topgap_jax.explain.cam import _first_component
from topgap_jax.explain.gradient import quadrature as nodes_and_weights
from topgap_jax.explain.masks import _grids, _smooth_masks
from topgap_jax.grids import cell_numbers
from topgap_jax.keys import example_keys, fold_in, split
from topgap_jax.metrics.ranks import kendall_tau_b, pearson, spearman
from topgap_jax.metrics.structure import ssim
from topgap_jax.models import bind
from topgap_jax.progress import write_text
from topgap_jax.rules import deconvnet, guided_backprop
from topgap_jax.run.cpu import configure_cpu
from topgap_jax.run.provenance import provenance
from topgap_jax.scores import logit
from topgap_jax.types import Cost, Explain

HERE = Path(__file__).parent
LIMIT = 1e-4
SAMPLES = 8


class Network(NamedTuple):
    """config: of ours; split: of the pictures; images: how many; layer: (ours, the package's) for most maps; shallow:
    for Score-CAM and Ablation-CAM, which have a pass a channel; steps: of the quadrature; window, stride: of
    occlusion."""

    config: str
    weights: str
    split: str
    images: int
    layer: tuple[str, str]
    shallow: tuple[str, str]
    steps: int
    window: int
    stride: int


NETWORKS = {
    "resnet20": Network(
        "cifar10.py", "resnet20_cifar10", "test", 64, ("stage2", "layer2"), ("stage2", "layer2"), 50, 8, 4
    ),
    "efficientnet_lite0": Network(
        "imagenet.py", "efficientnet_lite0_imagenet", "test", 16, ("stage3", "blocks.4"), ("stage2", "blocks.2"),
        10, 56, 28,
    ),
}  # fmt: skip


class Row(NamedTuple):
    """One comparison. ours(keys, predict, images, labels) -> {name: array (n, ...)} or array; peer, words: what
    _parity_explain_peer.py is asked for; note: a difference of definition and what becomes of it; images: at most so
    many; given: maps that are measured, which `ours` gets too, {name: the package's name}, and whose measures have no
    range of their own."""

    package: str
    peer: str
    ours: Callable[..., Any]
    words: Mapping[str, Any] = {}
    note: str = ""
    images: int = 64
    given: Mapping[str, str] = {}


def rows(network: Network, shape, arrays) -> dict[str, Row]:
    """arrays: the handed ones, {name: array}."""
    (ours, theirs), (shallow, their_shallow) = network.layer, network.shallow
    segments = cell_numbers("", 7, shape[:2])
    layer, small = {"layer": theirs}, {"layer": their_shallow}
    steps = network.steps
    plain = {"relu": False}
    of = lambda method: {"method": method, **layer}
    finer = explain.finer_cam(ours, weights="softmax", strength=1, stop_weights=False, **plain)
    table = {
        "saliency": Row("captum", "saliency", channels(explain.gradient(), jnp.abs)),
        "input x gradient": Row("captum", "input_x_gradient", channels(explain.input_x_gradient())),
        "integrated gradients": Row(
            "captum", "integrated", channels(explain.integrated(steps=steps)),
            quadrature("gausslegendre", steps),
        ),
        "integrated gradients, right": Row(
            "captum", "integrated", channels(explain.integrated(steps=10, rule="riemann_right")),
            quadrature("riemann_right", 10),
        ),
        "integrated gradients, trapezoid": Row(
            "captum", "integrated",
            channels(explain.integrated(steps=10, rule="riemann_trapezoid"), lambda x: x * 9 / 10),
            quadrature("riemann_trapezoid", 10), "its weights sum to (n - 1) / n",
        ),
        "guided backprop": Row("captum", "guided_backprop", channels(explain.gradient(rules=guided_backprop))),
        "deconvolution": Row("captum", "deconvnet", channels(explain.gradient(rules=deconvnet))),
        "SmoothGrad": Row(
            "captum", "smoothgrad", channels(explain.smooth(explain.gradient(), samples=SAMPLES)),
            {"average": "smoothgrad"}, "noise handed over",
        ),
        "SmoothGrad, squares": Row(
            "captum", "smoothgrad", channels(explain.smooth(explain.gradient(), samples=SAMPLES, average="square")),
            {"average": "smoothgrad_sq"}, "noise handed over",
        ),
        "expected gradients": Row(
            "captum", "expected_gradients",
            channels(explain.expected_gradients(arrays["references"], samples=SAMPLES)), {}, "draws handed over", 16,
        ),
        "occlusion": Row(
            "captum", "occlusion", maps(explain.occlusion(window=network.window, stride=network.stride)),
            {"window": network.window, "stride": network.stride},
        ),
        "feature ablation": Row("captum", "feature_ablation", maps(explain.feature_ablation(segments))),
        "LIME": Row(
            "captum", "lime_segments",
            maps(explain.lime(segments, samples=100, baseline="mean")), {"penalty": 1.0, "width": 0.25},
            "samples handed over", 8,
        ),
        "RISE": Row(
            "eclique/RISE", "rise", maps(explain.rise(masks=100)), {"p": 0.5}, "masks handed over", 8,
        ),
        "Grad-CAM of captum": Row("captum", "layer_grad_cam", maps(explain.grad_cam(ours, **plain)), layer),
        "Grad-CAM": Row("pytorch-grad-cam", "cam", maps(explain.grad_cam(ours, **plain)), of("grad_cam")),
        "Grad-CAM++": Row(
            "pytorch-grad-cam", "cam", maps(explain.grad_cam_plus_plus(ours, **plain)), of("grad_cam_plus_plus"),
            "1e-6 in its denominator left out",
        ),
        "XGrad-CAM": Row("pytorch-grad-cam", "cam", maps(explain.xgrad_cam(ours, **plain)), of("xgrad_cam")),
        "HiRes-CAM": Row("pytorch-grad-cam", "cam", maps(explain.hires_cam(ours, **plain)), of("hires_cam")),
        "element-wise Grad-CAM": Row(
            "pytorch-grad-cam", "cam", maps(explain.elementwise_grad_cam(ours)), of("elementwise_grad_cam")
        ),
        "Layer-CAM": Row("pytorch-grad-cam", "cam", maps(explain.layer_cam(ours, **plain)), of("layer_cam")),
        "Eigen-CAM": Row(
            "pytorch-grad-cam", "cam", maps(centred_eigen(ours, False)), of("eigen_cam"),
            "features centred as there; its sign is LAPACK's",
        ),
        "Eigen-Grad-CAM": Row(
            "pytorch-grad-cam", "cam", maps(centred_eigen(ours, True)), of("eigen_grad_cam"),
            "centred as there; its sign is LAPACK's",
        ),
        "Shapley-CAM": Row("pytorch-grad-cam", "cam", maps(explain.shapley_cam(ours, **plain)), of("shapley_cam")),
        "Finer-CAM": Row(
            "pytorch-grad-cam", "cam", maps(finer), of("finer_cam"), "1e-9 in its denominator left out"
        ),
        "Score-CAM": Row(
            "pytorch-grad-cam", "cam", maps(explain.score_cam(shallow, **plain)), {"method": "score_cam", **small},
            "half-pixel centres instead of aligned corners", 8,
        ),
        "Ablation-CAM": Row(
            "pytorch-grad-cam", "cam", maps(explain.ablation_cam(shallow, **plain)),
            {"method": "ablation_cam", **small}, "", 8,
        ),
        "receptive field": Row(
            "openerf", "field", maps(explain.field(ours, channel="sum")), layer,
            "sums over channels and of |.| over colours, of each image; there the positive part of means",
        ),
        "measures of maps": Row(
            "scipy, scikit-image, quantus", "of_maps", of_maps, given={"a": "a", "b": "b", "inside": "inside"}
        ),
        "measures of the network": Row(
            "quantus, pytorch-grad-cam", "of_network", of_network, {"steps": 32},
            "quantus: a curve without its start; pytorch-grad-cam: the drop over the probability, in percent", 16,
            {"full": "a"},
        ),
    }  # fmt: skip
    if network.config == "imagenet.py":
        # 128 pictures at once, and a channel set to its least value less 1e7 where features are signed.
        del table["expected gradients"], table["Ablation-CAM"]
    return table


def channels(method: Explain, change=lambda values: values):
    return lambda *arguments: change(method.pixels(*arguments))


def maps(method: Explain):
    return lambda *arguments: method.maps(*arguments)


def quadrature(rule, steps):
    """What captum is asked for; in float64 it takes our nodes, which are rounded to float32."""
    return {"rule": rule, "steps": steps, "nodes": nodes_and_weights(rule, steps)[0].tolist()}


def centred_eigen(layer, of_gradient):
    """Eigen-CAM as the package computes it, of centred values."""

    def computed(keys, predict, images, labels):
        values, head = rewrite.features_and_head(predict, layer, images)
        if of_gradient:
            values = values * jax.grad(lambda z: logit(head(z), labels).sum())(values)
        return _first_component(values - values.mean((1, 2), keepdims=True))

    return Explain(computed, lambda predict, images: Cost(0, 1), signed="its sign is LAPACK's")


def of_maps(keys, predict, images, labels, a, b, inside):
    batch = {"image": jnp.repeat(a[..., None], 3, -1), "label": labels, "region": inside.astype(jnp.uint8)}
    of = lambda metric: metric(keys, predict, a, batch)
    return {
        "spearman": spearman(a, b),
        "kendall_tau_b": kendall_tau_b(a, b),
        "pearson": pearson(a, b),
        "ssim": ssim(a, b),
        "gini": of(metrics.gini())["gini"],
        "entropy": jnp.log(of(metrics.extent())["effective_share"] * a[0].size),
        "energy": of(metrics.energy())["energy"],
        "pointing": of(metrics.pointing())["pointing"],
    }


def of_network(keys, predict, images, labels, full):
    batch = {"image": images, "label": labels}
    curve = metrics.deletion(steps=32, substrate=0.0)(keys, predict, full, batch)["deletion_curve"]
    drop = metrics.average_drop()(keys, predict, full, batch)["average_drop"]
    return {"deletion": curve[:, 1:], "average_drop": jnp.maximum(drop, 0)}


def handed(network, predict, images, labels, keys):
    """{name: array}: what the package is given besides the images, all drawn as our methods draw."""
    shape, n = images.shape[1:], len(images)
    samples = [fold_in(keys, m) for m in range(SAMPLES)]
    normal = lambda keys: jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
    spread = 0.15 * np.ptp(images.astype(np.float64), (1, 2, 3), keepdims=True)
    noise = np.stack([spread * np.asarray(normal(split(each)[0])) for each in samples], 1)
    references = images[: n // 2][::-1].copy()
    which, where = [], []
    for m, each in enumerate(samples):
        first, second = split(each)
        which.append(jax.vmap(lambda key: jax.random.randint(key, (), 0, len(references)))(first))
        where.append((m + jax.vmap(lambda key: jax.random.uniform(key, ()))(second)) / SAMPLES)
    few = keys[:8]
    drawn = jax.jit(lambda i: jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (49,)))(fold_in(few, i)) | (i == 0))
    mask = jax.jit(lambda i: _smooth_masks(*_grids(fold_in(few, i), 7, 0.5, shape[:2]), shape[:2]))
    # Maps to measure: of the layer's size enlarged, and of the pixels; in [0, 1] and without equal values.
    size = (32, 32)
    scaled = metrics.localisation.scaled
    first = jax.jit(lambda x, y: explain.hires_cam(network.layer[0], relu=False).maps(keys, predict, x, y))
    second = jax.jit(lambda x, y: explain.gradient(reduce="abs_sum").maps(keys, predict, x, y))
    a, b = first(images, labels), second(images, labels)
    inside = np.zeros((n, *size), np.float32)
    inside[:, 8:24, 4:20] = 1
    return {
        "segments": cell_numbers("", 7, shape[:2]),
        "noise": noise,
        "references": references,
        "which": np.stack(which, 1),
        "where": np.stack(where, 1),
        "shown": np.stack([np.asarray(drawn(i), np.float32) for i in range(100)], 1),
        "masks": np.stack([np.asarray(mask(i)) for i in range(100)], 1),
        "a": np.asarray(scaled(a, size)),
        "b": np.asarray(scaled(b, size)),
        "inside": inside,
        "full": np.asarray(scaled(b, shape[:2])),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only rows whose name contains one of these, such as 'resnet20 RISE'")
    parser.add_argument("--peer-python", default=os.environ.get("TOPGAP_PEER_PYTHON"), help="or TOPGAP_PEER_PYTHON")
    parser.add_argument("--images", type=int, help="at most this many images a row")
    options = parser.parse_args()
    if not os.environ.get("TOPGAP_DATA") or not options.peer_python:
        parser.error("TOPGAP_DATA is the folder with tfds/ and weights/, --peer-python the Python that has the peers")
    print(configure_cpu(), file=sys.stderr)
    about = provenance()
    whole = not options.images and not (about["commit"] or "+").endswith("+")
    kept = HERE.parent / "runs" / "parity_explain.json"
    results = json.loads(kept.read_text()) if whole and kept.exists() else {}
    count = 0
    with peer(options.peer_python) as process:
        about["versions"] |= json.loads(process.stdout.readline())
        for name, network in NETWORKS.items():
            with tempfile.TemporaryDirectory() as folder:
                count += compared(
                    name, network, Path(folder), process, options, results, kept if whole else None, about["commit"]
                )
        process.stdin.close()
    if not whole or len(results) < count:
        print("not written: that is for all rows and images, on a tree without changes", file=sys.stderr)
    else:
        text = json.dumps({**about, "limit": LIMIT, "agree": agree(results), "rows": results}, indent=1)
        write_text(HERE.parent / "results/parity_explain.json", text + "\n")
    return 0 if agree(results) else 1


def agree(results):
    return all(row["agree"] for row in results.values())


def compared(name, network, folder, process, options, results, kept, commit) -> int:
    """Every row of a network that is asked for and not in `results`, into it; the number of rows there are."""
    weights = Path(os.environ["TOPGAP_DATA"], f"weights/{network.weights}.safetensors")
    loaded = setup.from_config(HERE.parent / "configs" / network.config, [("init", str(weights))])
    images, labels = pictures(loaded, network.split, network.images)
    keys = example_keys(jax.random.key(0), jnp.arange(len(images)))
    arrays = handed(network, bind(loaded.experiment.model, loaded.variables), images, labels, keys)
    for key, array in {"images": images, "labels": labels, **arrays}.items():
        np.save(folder / f"{key}.npy", array)
    every = rows(network, images.shape[1:], arrays)
    for row_name, row in every.items():
        full = f"{name} {row_name}"
        if full in results or (options.names and not any(part in full for part in options.names)):
            continue
        n = min(len(images), row.images, options.images or row.images)
        request = {"network": name, "weights": str(weights), "folder": str(folder), "peer": row.peer}
        request["words"] = row.words
        given = {key: arrays[key] for key in row.given}
        for key, theirs in row.given.items():
            np.save(folder / f"{theirs}.npy", given[key])
        start = time.perf_counter()
        ours = computed(loaded, row, keys, images, labels, given, list(range(n)), double=False)
        result = {"package": row.package, "images": n, "note": row.note, "commit": commit}
        result["seconds"] = time.perf_counter() - start
        theirs, result["package_seconds"] = asked(process, request, list(range(n)), double=False)
        differences = difference(ours, theirs, row)
        result |= {
            "median": float(np.median(differences)),
            "worst": float(differences.max()),
            "logits": float(np.abs(ours["logits"] - theirs["logits"]).max() / np.abs(theirs["logits"]).max()),
            "measures": {key: float(difference({key: ours[key]}, {key: theirs[key]}, row).max()) for key in theirs}
            if row.given
            else {},
        }
        loose = np.flatnonzero(~(differences <= LIMIT)).tolist()
        if loose and not row.given:
            ours64 = computed(loaded, row, keys, images, labels, given, loose, double=True)
            theirs64 = asked(process, request, loose, double=True)[0]
            again = difference(ours64, theirs64, row)
            from64 = lambda side: float(difference({k: v[loose] for k, v in side.items()}, theirs64, row).max())
            result["loose"] = {
                "images": len(loose),
                "worst_in_float64": float(again.max()),
                "ours_from_float64": from64(ours),
                "package_from_float64": from64(theirs),
            }
        result["agree"] = bool(not loose or (not row.given and again.max() <= LIMIT))
        results[full] = result
        if kept:
            kept.parent.mkdir(exist_ok=True)
            write_text(kept, json.dumps(results, indent=1))
        print(line(full, result), flush=True)
    return len(every)


def line(name, row):
    said = f"median {row['median']:.1e} worst {row['worst']:.1e}"
    if "loose" in row:
        said += f", {row['loose']['images']} above the limit, {row['loose']['worst_in_float64']:.1e} in float64"
        said += " (float32: ours {ours_from_float64:.1e}, theirs {package_from_float64:.1e})".format(**row["loose"])
    times = f"{row['seconds']:.0f} s, {row['package_seconds']:.0f} s"
    return f"{name:48} {said} ({times}){'' if row['agree'] else '  DIFFERS'}"


def pictures(loaded, split, count):
    """images (n, h, w, 3) in [0, 1], labels (n,), evenly spaced."""
    config = loaded.experiment.config
    source = loaded.experiment.source(split)
    ids = np.linspace(0, len(source) - 1, count).round().astype(int)
    read = [data.decode(source, int(i), config.image_size, config.resize) for i in ids]
    images = np.stack([record["image"] for record in read]).astype(np.float32) / 255
    return images, np.array([record["label"] for record in read], np.int32)


def computed(loaded, row, keys, images, labels, given, indices, double):
    """{name: array (n, ...)} and the logits; in float64 where it is asked for (sums, scores and the last layer stay
    float32)."""
    with float64() if double else contextlib.nullcontext():
        dtype = jnp.float64 if double else jnp.float32
        variables = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype), loaded.variables)

        model = float64_model(loaded.experiment) if double else loaded.experiment.model

        def call(variables, keys, images, labels, given):
            predict = bind(model, variables)
            return row.ours(keys, predict, images, labels, *given), predict(images)

        program = jax.jit(call if double else rewrite.fused(call))
        index = np.asarray(indices)
        maps = [jnp.asarray(array[index]) for array in given.values()]
        points = jnp.asarray(images[index], dtype)
        values, logits = program(variables, keys[index], points, jnp.asarray(labels[index]), maps)
        values = values if isinstance(values, dict) else {"maps": values}
        return {key: np.asarray(value) for key, value in {**values, "logits": logits}.items()}


def float64_model(experiment):
    """The experiment's network that computes in float64, which no config can ask for."""
    config = experiment.config
    module = sys.modules["topgap_jax.models.classifier"]  # the module, not the function of that name
    in_float64 = lambda part: part.clone(dtype=jnp.float64) if hasattr(part, "dtype") else part

    def classifier(backbone, head, *, classes, mean, std):
        return models.linen(module.Classifier(in_float64(backbone), in_float64(head.clone(classes=classes)), mean, std))

    values = {"classes": len(experiment.classes), "pool": pool.gap(), "mean": config.mean, "std": config.std}
    return build(config.model, {**models.TABLE, "classifier": classifier}, values)


@contextlib.contextmanager
def float64():
    """JAX in float64, the normalisation of images too, with the random numbers of float32."""
    classifier = sys.modules["topgap_jax.models.classifier"]  # the module, not the function of that name
    normalise = classifier.normalise
    draws = {"normal": jnp.float32, "uniform": jnp.float32, "randint": jnp.int32}
    before = {name: getattr(jax.random, name) for name in (*draws, "bernoulli")}
    try:
        for name, dtype in draws.items():
            setattr(jax.random, name, of_type(before[name], dtype))
        jax.random.bernoulli = lambda key, p, shape: before["bernoulli"](key, jnp.float32(p), shape)
        classifier.normalise = lambda images, mean, std: (images - np.float64(mean)) / np.float64(std)
        with jax.enable_x64(True):
            yield
    finally:
        classifier.normalise = normalise
        for name, function in before.items():
            setattr(jax.random, name, function)


def of_type(draw, dtype):
    """The function of `jax.random` with this dtype, whatever it is asked for."""
    signature = inspect.signature(draw)

    def typed(*arguments, **options):
        bound = signature.bind(*arguments, **options)
        bound.arguments["dtype"] = dtype
        return draw(*bound.args, **bound.kwargs)

    return typed


def asked(process, request, indices, double):
    print(json.dumps({**request, "indices": indices, "double": double}), file=process.stdin, flush=True)
    answer = process.stdout.readline()
    if not answer:
        raise SystemExit(f"the peer ended at {request['network']} {request['peer']}")
    with np.load(Path(request["folder"], "theirs.npz")) as file:
        return dict(file), round(json.loads(answer)["seconds"], 1)


def difference(ours, theirs, row):
    """Largest difference over the range of the package's values, image by image (n,)."""
    worst = []
    for name in [key for key in theirs if key != "logits" or len(theirs) == 1]:
        a, b = np.asarray(ours[name], np.float64), np.asarray(theirs[name], np.float64)
        if a.shape != b.shape:
            raise SystemExit(f"{name}: ours is {a.shape}, the package's {b.shape}")
        a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
        if "LAPACK" in row.note:
            a = a * np.where((a * b).sum(1, keepdims=True) < 0, -1, 1)
        worst.append(np.abs(a - b).max(1) / (np.abs(b).max() if row.given else np.ptp(b, 1)))
    return np.max(worst, 0)


def peer(python):
    return subprocess.Popen(
        [python, "-W", "ignore", HERE / "_parity_explain_peer.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
