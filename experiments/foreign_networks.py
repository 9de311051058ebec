"""Do networks that other people published go through everything here, with the numbers that plain Flax gives?

    python experiments/foreign_networks.py FOLDER [--only NAME ...]

FOLDER holds the sources, each repository in a folder of its own (`SOURCES` names repository, commit and folder; `site`
holds Hugging Face's transformers 4.46, h5py and what they import). Of each network, on random weights and statistics,
two images of 64 pixels and 10 classes: the names of its layers; logits and input gradient against `module.apply` and
`jax.grad`, as it is, with `fast_convs`, and with the ordinary rule of every operation (`with_rules`); `grad_cam`
against the same formula by Flax's own interceptors; `with_pool(gap())` against the logits; the gradient of a training
step with `with_drop(dropout(0))`, and 20 steps of SGD, against the same in plain Flax. Differences are relative to the
largest value. What cannot be done says so in one line. Writes results/foreign_networks.json.
"""

import argparse
import collections
import dataclasses
import importlib
import importlib.machinery
import json
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from topgap_jax import drops, explain, models, pool
from topgap_jax.errors import UserError
from topgap_jax.rewrite import default_layer, fast_convs, layers, with_drop, with_pool, with_rules
from topgap_jax.rewrite.operations import OPERATIONS
from topgap_jax.run.provenance import provenance
from topgap_jax.types import Rule

RESULTS = Path(__file__).parent.parent / "results" / "foreign_networks.json"
SOURCES = {  # repository and commit -> folder in FOLDER that is put on Python's path
    "google/flax 18f8f311, examples/imagenet": "flax_examples",
    "jax-ml/bonsai 3628425": "bonsai",
    "google-research/big_vision 0127fb6": "big_vision",
    "n2cholas/jax-resnet 5b00735": "jax-resnet",
    "rwightman/efficientnet-jax 06d7ed6": "efficientnet-jax",
    "matthias-wright/flaxmodels 09bc772": "flaxmodels",
    "DarshanDeshpande/jax-models 0d59f47": "jax-models",
    "huggingface/transformers 4.46.3": "site",
}
UNUSED = {"big_vision": ("tensorflow", "tensorflow.io", "tensorflow.io.gfile"), "efficientnet-jax": ("flax.nn",)}
"""What repositories import and these networks do not use: TensorFlow, and a part of Flax that is gone."""
CLASSES, SIZE, BATCH, STEPS = 10, 64, 2, 20
ROUNDING = 1e-5


class Network(NamedTuple):
    """make() -> module; dense, the layer that `with_pool` takes; layer, for Grad-CAM where there is no default.

    eval, train: the arguments of a plain call; logits(what it returns).
    """

    folder: str
    make: Callable[[], Any]
    dense: str
    layer: str | None = None
    eval: dict[str, Any] = {"train": False}  # noqa: RUF012
    train: dict[str, Any] = {"train": True}  # noqa: RUF012
    logits: Callable[[Any], Any] = lambda out: out


def _from(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _hugging_face(family: str, **config):
    module = f"transformers.models.{family}"
    kind = {"resnet": "ResNet", "regnet": "RegNet"}[family]
    settings = _from(f"{module}.configuration_{family}", f"{kind}Config")(num_labels=CLASSES, **config)
    return _from(f"{module}.modeling_flax_{family}", f"Flax{kind}ForImageClassificationModule")(config=settings)


def _bonsai(folder: str, kind: str, config: Callable[[Any], Any]):
    module = f"bonsai.models.{folder}.modeling"
    settings = config(_from(module, "ModelConfig"))
    return nnx.jit(lambda: _from(module, kind)(settings, rngs=nnx.Rngs(0)))()


def _jeffnet(variant: str):
    return _from("jeffnet.linen", "create_model")(variant, num_classes=CLASSES, input_shape=(3, SIZE, SIZE))[0]


HF = {"eval": {"deterministic": True}, "train": {"deterministic": False}, "logits": lambda out: out.logits}
NETWORKS = {
    "Flax's ImageNet ResNet-18": Network(
        "flax_examples", lambda: _from("models", "ResNet18")(num_classes=CLASSES), "Dense_0"
    ),
    "bonsai ResNet (NNX)": Network(
        "bonsai",
        lambda: _bonsai("resnet", "ResNet", lambda kind: kind([1, 1, 1, 1], CLASSES)),
        "fc",
        eval={},
        train={},
    ),
    "bonsai ConvNeXt (NNX)": Network(
        "bonsai",
        lambda: _bonsai("convnext", "ConvNeXt", lambda kind: kind((1, 1, 2, 1), (32, 64, 128, 256), 0.0, CLASSES)),
        "head",
        eval={"train": False, "rngs": None},
        train={"train": True, "rngs": None},
    ),
    "bonsai DenseNet (NNX)": Network(
        "bonsai",
        lambda: _bonsai(
            "densenet121", "DenseNet", lambda kind: kind(CLASSES, dense_block_layers=[2, 2, 2, 2], growth_rate=16)
        ),
        "linear",
        eval={},
        train={},
    ),
    "bonsai EfficientNet-B0 (NNX)": Network(
        "bonsai",
        lambda: _bonsai(
            "efficientnet", "EfficientNet", lambda kind: dataclasses.replace(kind.b0(CLASSES), dropout_rate=0.0)
        ),
        "classifier",
        eval={"training": False},
        train={"training": True},
    ),
    "big_vision BiT": Network(
        "big_vision",
        lambda: _from("big_vision.models.bit", "Model")(num_classes=CLASSES, depth=(1, 1, 1, 1)),
        "head",
        logits=lambda out: out[0],
    ),
    "big_vision MLP-Mixer": Network(
        "big_vision",
        lambda: _from("big_vision.models.mlp_mixer", "Model")(
            num_classes=CLASSES, patch_size=(8, 8), num_blocks=2, hidden_dim=64, tokens_mlp_dim=64, channels_mlp_dim=64
        ),
        "head",
        layer="stem",
        logits=lambda out: out[0],
    ),
    "jax-resnet ResNet-18": Network(
        "jax-resnet", lambda: _from("jax_resnet.resnet", "ResNet18")(n_classes=CLASSES), "layers_11", eval={}, train={}
    ),
    "jeffnet MobileNetV2": Network(
        "efficientnet-jax",
        lambda: _jeffnet("pt_mobilenetv2_100"),
        "head/classifier",
        eval={"training": False},
        train={"training": True},
    ),
    "flaxmodels ResNet-18": Network(
        "flaxmodels",
        lambda: _from("flaxmodels.resnet.resnet", "ResNet18")(output="logits", pretrained=None, num_classes=CLASSES),
        "Dense_0",
    ),
    "jax-models PoolFormer-S12": Network(
        "jax-models",
        lambda: _from("jax_models.models.poolformer", "S12")(attach_head=True, num_classes=CLASSES),
        "Dense_0",
        eval={"deterministic": True},
        train={"deterministic": False},
    ),
    "Hugging Face ResNet": Network(
        "site",
        lambda: _hugging_face("resnet", depths=[1, 1, 1, 1], hidden_sizes=[32, 64, 128, 256], embedding_size=32),
        "classifier/1",
        **HF,
    ),
    "Hugging Face RegNet": Network(
        "site",
        lambda: _hugging_face(
            "regnet", depths=[1, 1, 1, 1], hidden_sizes=[32, 64, 128, 256], embedding_size=32, groups_width=16
        ),
        "classifier/1",
        **HF,
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    options = parser.parse_args()
    sys.path[:0] = [str(options.folder / folder) for folder in SOURCES.values()]
    stored = json.loads(RESULTS.read_text()) if options.only and RESULTS.exists() else {"networks": {}}
    about = {**provenance(), "command": "python experiments/foreign_networks.py FOLDER"}
    for name, network in NETWORKS.items():
        if not options.only or any(word in name for word in options.only):
            start = time.process_time()
            row = check(network)
            row["cpu_seconds"] = round(time.process_time() - start)
            stored["networks"][name] = row
            stored["networks"] = {key: stored["networks"][key] for key in NETWORKS if key in stored["networks"]}
            print(f"{name:30}", json.dumps(row), flush=True)
            RESULTS.write_text(json.dumps({**stored, **about, "sources": list(SOURCES)}, indent=1) + "\n")


def check(network: Network) -> dict[str, Any]:
    """What came out for one network: numbers where there are any, else the line that was said."""
    module = made(network)
    plain = PlainNNX(module, network) if isinstance(module, nnx.Module) else PlainLinen(module, network)
    model = models.nnx(module) if isinstance(module, nnx.Module) else models.linen(module)
    random = np.random.default_rng(0)
    images = jnp.asarray(random.uniform(size=(BATCH, SIZE, SIZE, 3)), jnp.float32)
    labels, keys = jnp.array([1, 2]), jax.random.split(jax.random.key(1), BATCH)
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), images), random)
    predict = lambda f: lambda variables, images: f(models.bind(model, variables))(images)
    row: dict[str, Any] = {"source": next(key for key, folder in SOURCES.items() if folder == network.folder)}

    def tried(key, call):
        try:
            row[key] = call()
        except UserError as error:
            row[key] = str(error)

    expected = jax.jit(value_and_gradient(plain.logits))(variables, images)
    against = lambda f: difference(jax.jit(value_and_gradient(f))(variables, images), expected)
    row["layers"] = len(layers(models.bind(model, variables), images))
    tried("apply", lambda: against(predict(lambda f: f)))
    tried("fast_convs", lambda: against(predict(fast_convs)))
    if isinstance(row["fast_convs"], float) and row["fast_convs"] > ROUNDING:
        # A ReLU within rounding of 0 switches a whole unit: float64 says which of the two is off.
        exact = in_float64(plain.logits, variables, images)
        row["float64"] = {
            "plain": difference(expected, exact),
            "fast_convs": difference(jax.jit(value_and_gradient(predict(fast_convs)))(variables, images), exact),
        }
    tried("with_rules", lambda: against(predict(lambda f: with_rules(f, **ordinary(collections.Counter())))))
    counts: collections.Counter[str] = collections.Counter()
    jax.eval_shape(predict(lambda f: with_rules(f, **ordinary(counts))), variables, images)
    row["operations"] = dict(counts)

    def cam():
        layer = network.layer or default_layer(models.bind(model, variables), images)
        row["layer"] = layer
        ours = jax.jit(lambda v, x, y: explain.grad_cam(layer)(keys, models.bind(model, v), x, y))
        theirs = jax.jit(lambda v, x, y: plain.grad_cam(v, x, y, layer))
        of_class = [(ours(variables, images, labels + i), theirs(variables, images, labels + i)) for i in range(5)]
        return difference(*zip(*of_class))  # of five classes, as the ReLU leaves nothing of some

    tried("default_layer", lambda: default_layer(models.bind(model, variables), images))
    tried("grad_cam", cam)

    def pooled(pooling):
        again = with_pool(model, dense=network.dense, pool=pooling)
        return jax.jit(lambda v, x: models.bind(again, v)(x))(variables, images)

    tried("with_pool", lambda: difference(pooled(pool.gap()), expected[0]))
    if not isinstance(row["with_pool"], str):
        row["top_gap"] = difference(pooled(pool.top_gap(k=1)), expected[0])

    def loss_of(model):
        def loss(params, stats, keys):
            now = {"params": params, "batch_stats": stats}
            out = model.apply(now, images, train=True, keys=keys, targets=jax.nn.one_hot(labels, CLASSES), step=0)
            return cross_entropy(out.logits, labels), (out.batch_stats, out.logs)

        return loss

    def plain_loss(params, stats, keys):
        logits, stats = plain.train(params, stats, images, keys[0])
        return cross_entropy(logits, labels), (stats, {})

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours, theirs = (trained(loss, variables, keys) for loss in (loss_of(model), plain_loss))
    row["warnings"] = [str(warning.message) for warning in caught if "did not move" in str(warning.message)]
    row["twenty_steps"] = difference(ours[:2], theirs[:2])
    row["moved"] = difference(theirs[0], variables["params"])  # how far training went

    def dropped():
        layer = row["layer"]
        gradient = lambda loss: jax.jit(jax.grad(loss, has_aux=True))(
            variables["params"], variables["batch_stats"], keys
        )
        still, _ = gradient(loss_of(with_drop(model, layer, drops.dropout(0.0))))
        _, (_, logs) = gradient(loss_of(with_drop(model, layer, drops.dropout(0.5))))
        row["drop_rate"] = float(logs["drop_rate"].mean())
        return difference(still, gradient(plain_loss)[0])

    if "layer" in row:
        tried("with_drop", dropped)
    return row


def made(network: Network) -> Any:
    """The module; what its repository imports and does not need for it is empty meanwhile."""
    importlib.import_module("flax.training.checkpoints")  # which would take TensorFlow where it is
    empty = {name: types.ModuleType(name) for name in UNUSED.get(network.folder, ())}
    for name, each in empty.items():
        each.make_rng, each.__spec__ = None, importlib.machinery.ModuleSpec(name, None)
    sys.modules.update(empty)
    try:
        return network.make()
    finally:
        for name in empty:
            del sys.modules[name]


def value_and_gradient(f):
    """Logits, and the gradient of a sum of them in which each counts differently."""
    weights = jnp.arange(1.0, BATCH * CLASSES + 1).reshape(BATCH, CLASSES)
    return lambda v, x: (f(v, x), jax.grad(lambda x: (f(v, x) * weights).sum())(x))


def in_float64(f, variables, images):
    """`value_and_gradient` in float64."""
    with jax.enable_x64(True):
        double = lambda x: jnp.asarray(np.asarray(x, np.float64 if np.issubdtype(x.dtype, np.floating) else x.dtype))
        exact = jax.jit(value_and_gradient(f))(*jax.tree.map(double, (variables, images)))
        return jax.tree.map(np.asarray, exact)


def ordinary(counts):
    """The rule of every operation that is the operation and its own derivative, and counts how often it is used."""

    def rule(name):
        def forward(operation, *operands):
            counts[name] += 1
            return operation(*operands)

        return Rule(forward, lambda operation, gradient, *operands: jax.vjp(operation, *operands)[1](gradient))

    # A layer holds the convolution or product that is an operation by itself.
    return {name: rule(name) for name in OPERATIONS if not name.endswith("_layer")}


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def trained(loss, variables, keys):
    """Parameters, statistics and losses after 20 steps of gradient descent."""

    @jax.jit
    def step(params, stats, i):
        each = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        (value, (stats, _)), gradient = jax.value_and_grad(loss, has_aux=True)(params, stats, each)
        return jax.tree.map(lambda p, g: p - 1e-2 * g, params, gradient), stats, value

    params, stats, losses = variables["params"], variables["batch_stats"], []
    for i in range(STEPS):
        params, stats, value = step(params, stats, i)
        losses.append(float(value))
    return params, stats, losses


def drawn(shapes, random):
    """Variables of these shapes, such that activations neither vanish nor explode, and nothing is 0."""

    def draw(path, leaf):
        name = str(getattr(path[-1], "key", path[-1]))
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        if len(leaf.shape) > 1:
            scale = np.sqrt(1.5 / max(np.prod(leaf.shape[:-1]), 1))
            return jnp.asarray(random.normal(size=leaf.shape) * scale, leaf.dtype)
        positive = any(word in name for word in ("scale", "var", "gamma"))
        return jnp.asarray(random.uniform(0.5, 1.5, leaf.shape) if positive else random.normal(size=leaf.shape) / 10)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def difference(found, expected) -> float:
    """Largest difference of two trees, over the largest value of the second."""
    leaves = lambda tree: [np.asarray(x, np.float64) for x in jax.tree.leaves(tree) if jnp.size(x)]
    pairs = list(zip(leaves(found), leaves(expected), strict=True))
    largest = max(np.abs(b).max() for _, b in pairs)
    return float(f"{max(np.abs(a - b).max() for a, b in pairs) / largest:.2g}")


class PlainLinen:
    """The network by Flax alone."""

    def __init__(self, module, network):
        self.module, self.network = module, network

    def call(self, variables, images):
        return self.network.logits(self.module.apply(dict(variables), images, **self.network.eval))

    logits = call

    def train(self, params, stats, images, key):
        rngs = {"dropout": key, "params": jax.random.fold_in(key, 1)}
        apply = lambda: self.module.apply(
            {"params": params, "batch_stats": stats}, images, rngs=rngs, mutable=["batch_stats"], **self.network.train
        )
        # What asks for a named axis gets one.
        out, updates = jax.vmap(apply, axis_name="batch", axis_size=1, out_axes=None)()
        return self.network.logits(out), updates.get("batch_stats", stats)

    def grad_cam(self, variables, images, labels, layer):
        def at(change):
            def intercept(next_fun, args, kwargs, context):
                out = next_fun(*args, **kwargs)
                named = context.method_name == "__call__" and "/".join(context.module.path) == layer
                return change(out) if named else out

            with nn.intercept_methods(intercept):
                return self.call(variables, images)

        return reference_cam(at, labels)


class PlainNNX:
    """The same of an NNX network."""

    def __init__(self, module, network):
        self.network = network
        self.graph, self.params, self.random, self.rest = nnx.split(module, nnx.Param, nnx.RngState, ...)

    def merged(self, params, stats, train):
        filled = []
        for state, values in ((self.params, params), (self.rest, stats)):
            state = jax.tree.map(lambda x: x, state)
            nnx.replace_by_pure_dict(state, values)
            filled.append(state)
        module = nnx.merge(self.graph, filled[0], jax.tree.map(lambda x: x, self.random), filled[1])
        module.train() if train else module.eval()
        return module

    def logits(self, variables, images):
        return self.merged(variables["params"], variables["batch_stats"], False)(images, **self.network.eval)

    def train(self, params, stats, images, key):
        module = self.merged(params, stats, True)
        if any(jax.tree.leaves(self.random)):
            raise UserError("the plain reference has no keys for an NNX module that draws")
        logits = module(images, **self.network.train)
        return logits, nnx.to_pure_dict(nnx.split(module, nnx.Param, nnx.RngState, ...)[3])

    def grad_cam(self, variables, images, labels, layer):
        def at(change):
            module = self.merged(variables["params"], variables["batch_stats"], False)
            (part,) = [child for path, child in nnx.iter_modules(module) if "/".join(map(str, path)) == layer]
            kind = type(part)
            call = lambda self, *args, **kwargs: change(kind.__call__(self, *args, **kwargs))
            object.__setattr__(part, "__class__", type(kind.__name__, (kind,), {"__call__": call}))
            return module(images, **self.network.eval)

        return reference_cam(at, labels)


def reference_cam(at, labels):
    """Grad-CAM of at(change), the logits with the layer's output passed through `change`."""
    seen = []
    at(lambda features: (seen.append(features), features)[1])
    (features,) = seen
    shifted = lambda delta: jnp.take_along_axis(at(lambda features: features + delta), labels[:, None], 1).sum()
    weights = jax.grad(shifted)(jnp.zeros_like(features)).mean((1, 2))
    return jax.nn.relu(jnp.einsum("bhwc,bc->bhw", features, weights))


if __name__ == "__main__":
    main()
