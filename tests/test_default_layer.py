"""Grad-CAM's default layer on networks of every kind: the last map that the logits depend on, or an error that says
what to give."""

import collections
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from topgap_jax import drops, evaluators, explain, models, pool
from topgap_jax.errors import UserError
from topgap_jax.rewrite import default_layer, layers, name, read, tap, with_drop, with_pool, with_rules
from topgap_jax.rules import guided

IMAGES = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3))
LABELS = jnp.array([0, 1])


class Net(nn.Module):
    """A compact module whose `__call__` is the function of a test."""

    f: Any

    @nn.compact
    def __call__(self, x):
        return self.f(x)


class Part(nn.Module):
    f: Any

    @nn.compact
    def __call__(self, x):
        return self.f(x)


def conv(features, name, size=3, stride=2, **options):
    return nn.Conv(features, (size, size), (stride, stride), name=name, **options)


def ended(x):
    return nn.Dense(5, name="logits")(x.mean((1, 2)))


def attention(x, heads=2, name=None):
    return x + nn.MultiHeadDotProductAttention(heads, name=name)(x, x)


def tokens(x, size=4):
    x = conv(8, "patches", size, size, padding="VALID")(x)
    return x.reshape(len(x), -1, 8)


def predict_of(f):
    model = models.linen(Net(f))
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    random = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape) * 0.3, x.dtype), shapes)
    return models.bind(model, variables)


def default(f):
    """The default layer of the network f; nothing is computed."""
    return _default(models.linen(Net(f)))


def _default(model, change=lambda predict: predict, images=IMAGES):
    found = []
    look = lambda variables, x: found.append(default_layer(change(models.bind(model, variables)), x))
    jax.eval_shape(look, jax.eval_shape(model.init, jax.random.key(0), images), images)
    return found[0]


def unused(x):
    early = conv(8, "early")(x)
    late = conv(8, "late")(nn.relu(early))
    conv(4, "auxiliary")(late)
    Part(lambda x: {"late": x[0], "stem": x[1]}, name="taps")((late, early))
    return ended(nn.relu(late))


def densely_connected(x):
    x = conv(4, "stem")(x)
    for i in range(2):
        x = jnp.concatenate([x, nn.relu(conv(4, f"grow{i}", stride=1)(nn.relu(x)))], -1)
    return ended(nn.relu(x))


def squeezed(x, spread=False):
    x = nn.relu(conv(8, "features")(x))
    gate = nn.sigmoid(conv(8, "excite", 1)(nn.relu(conv(2, "squeeze", 1)(x.mean((1, 2), keepdims=True)))))
    return ended(x * (name(jnp.broadcast_to(gate, x.shape), "gate") if spread else gate))


def u_net(x, resized_last=False):
    down = conv(4, "down")(x)
    lower = nn.relu(conv(8, "lower")(down))
    up = jax.image.resize(lower, (*down.shape[:3], 8), "bilinear")
    return ended(up if resized_last else conv(8, "up", stride=1)(jnp.concatenate([down, up], -1)))


def backbone(x):
    """Stages as a dict whose names are given at the end, in another order than that of the computation."""

    def stages(x):
        early = conv(4, "early")(x)
        return {"late": conv(8, "late")(early), "early": early}

    found = Part(stages, name="backbone")(x)
    return ended(found["late"]) + nn.Dense(5)(found["early"].mean((1, 2)))


def classes_first(x, layer, after=lambda x: x):
    return after(layer(nn.relu(conv(8, "features")(x))).mean((1, 2)))


def twice_named(x):
    maps = Part(lambda x: Part(lambda x: name(conv(5, "inner", 1, 1)(x) + 0.5, "maps"), name="middle")(x), name="outer")
    return pool.top_gap(k=3)(maps(conv(8, "features")(x)))


def jitted(x):
    return jax.jit(lambda x: ended(jax.jit(nn.relu)(conv(8, "features")(x))))(x)


def rematerialised(x):
    x = nn.remat(Part)(lambda x: conv(8, "inside")(x), name="part")(x)
    return ended(x * 2)


def convolution_behind_attention(x):
    x = conv(8, "features")(x)
    x = attention(x.reshape(len(x), -1, 8)).reshape(x.shape)
    return ended(nn.relu(conv(8, "last", stride=1)(x)))


def attention_in_two_dimensions(x):
    """A block that takes and returns (b, h, w, c)."""
    f = lambda x: attention(x.reshape(len(x), -1, 8)).reshape(x.shape)
    return ended(Part(f, name="block")(conv(8, "features")(x)))


def attention_pooled(x):
    """One query that is learned: the positions are pooled, not mixed."""
    x = tokens(x)
    probe = jnp.broadcast_to(Part(lambda x: nn.Embed(1, 8)(jnp.zeros((1,), int)), name="probe")(x), (len(x), 1, 8))
    return nn.Dense(5)(nn.MultiHeadDotProductAttention(2)(probe, x)[:, 0])


def flattened(x):
    x = conv(8, "features")(x)
    return nn.Dense(5)(nn.relu(nn.Dense(7)(x.reshape(len(x), -1))))


def grouped(x):
    return ended(nn.relu(nn.GroupNorm(2, name="norm")(conv(8, "features")(x))))


def behind_a_loop(x):
    x = conv(8, "stem")(x)
    return ended(Part(lambda x: lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x), x), name="loop")(x))


def named_by_hand(x):
    x = attention(tokens(x))
    x = name(x.reshape(len(x), 4, 4, 8), "tokens").reshape(x.shape)
    return nn.Dense(5)(x.mean(1))


def windows(x):
    """Attention in windows, (b * windows, tokens, c), and a value with four axes that is no batch of maps."""
    x = conv(8, "features")(x)
    split = x.reshape(len(x), 2, 4, 2, 4, 8).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4, 8)
    x = attention(name(split, "windows").reshape(-1, 16, 8)).reshape(len(x), 2, 2, 4, 4, 8)
    return ended(conv(8, "merged", 2, 2)(x.transpose(0, 1, 3, 2, 4, 5).reshape(len(x), 8, 8, 8)))


NETWORKS = {
    "what the logits do not depend on": (unused, "late"),
    "dense connections": (densely_connected, "grow1"),
    "gates": (squeezed, "features"),
    "gates over all positions": (lambda x: squeezed(x, spread=True), "features"),
    "branches": (u_net, "up"),
    "a resized map": (lambda x: u_net(x, resized_last=True), "lower"),
    "a dict": (backbone, "backbone/late"),
    "1x1 convolution, mean": (lambda x: classes_first(x, conv(5, "head", 1, 1)), "features"),
    "dense layer, mean": (lambda x: classes_first(x, nn.Dense(5)), "features"),
    "class maps, log softmax": (lambda x: classes_first(x, conv(5, "head", 1, 1), nn.log_softmax), "features"),
    "class maps, ReLU": (lambda x: classes_first(x, lambda x: nn.relu(conv(5, "head", 1, 1)(x))), "features"),
    "class maps, named on the way": (twice_named, "features"),
    "jit": (jitted, "features"),
    "remat": (rematerialised, "part"),
    "attention, then a convolution": (convolution_behind_attention, "last"),
    "attention in a block": (attention_in_two_dimensions, "block"),
    "attention as pooling": (attention_pooled, "patches"),
    "flattened": (flattened, "features"),
    "group norm": (grouped, "norm"),
    "behind a loop": (behind_a_loop, "loop"),
    "tokens with a name": (named_by_hand, "tokens"),
    "windows": (windows, "merged"),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_default_layer(network):
    f, expected = NETWORKS[network]
    assert default(f) == expected


def vit(x, heads=2, class_token=False):
    x = tokens(x)
    x = jnp.concatenate([jnp.zeros_like(x[:, :1]), x], 1) if class_token else x
    x = attention(x, heads)
    return nn.Dense(5)(x[:, 0] if class_token else x.mean(1))


def mixer(x):
    x = tokens(x)
    return nn.Dense(5)((x + nn.Dense(16)(x.swapaxes(1, 2)).swapaxes(1, 2)).mean(1))


def looped(x, body=lambda m, x: nn.relu(m(x)), layer=lambda: nn.Conv(8, (3, 3)), start=lambda x: conv(8, "stem")(x)):
    loop = nn.scan(
        lambda m, x, _: (body(m, x), None), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
    )
    x, _ = loop(layer(), start(x), None)
    return nn.Dense(5)(x.reshape(len(x), -1, 8).mean(1))


def vit_in_a_loop(x):
    return looped(x, lambda m, x: x + m(x, x), lambda: nn.MultiHeadDotProductAttention(2), tokens)


def shared(x):
    x, layer = conv(8, "stem")(x), conv(8, "shared", stride=1)
    return ended(layer(nn.relu(layer(x))))


def channels_first(x):
    kernel = Part(lambda x: nn.Embed(8, 27)(jnp.arange(8)), name="kernel")(x).reshape(8, 3, 3, 3)
    x = nn.relu(lax.conv(x.transpose(0, 3, 1, 2), kernel, (1, 1), "SAME"))
    return nn.Dense(5)(name(x, "features").mean((2, 3)))


HINT = "topgap_jax.rewrite.name(value, 'features')"
MIXED = "tokens are mixed after 'patches', the last named (b, h, w, c) value: give a later layer (b, n, c) as"
ERRORS = {
    "ViT": (vit, MIXED),
    "ViT with one head": (lambda x: vit(x, heads=1), MIXED),
    "ViT with a class token": (lambda x: vit(x, class_token=True), MIXED),
    "ViT in a loop": (vit_in_a_loop, MIXED),
    "MLP-Mixer": (mixer, MIXED),
    "a loop": (
        looped,
        (
            "the last named (b, h, w, c) value, 'Conv_0', stands in a loop or another function that cannot be entered: "
            f"give a layer outside it, such as layer='stem', or name what comes out of the loop, {HINT}"
        ),
    ),
    "only a loop": (
        lambda x: looped(x, layer=lambda: nn.Conv(3, (3, 3)), start=lambda x: x),
        "give a layer outside it, or",
    ),
    "a shared layer": (shared, "is named 'shared', which is met 2 times: give it a name of its own"),
    "nothing": (
        lambda x: nn.Dense(5)(x.mean((1, 2))),
        f"no named (b, h, w, c) value in this function: name one with {HINT}",
    ),
    "only class maps": (
        lambda x: conv(5, "head")(x).mean((1, 2)),
        f"no named (b, h, w, c) value before the class maps: name one with {HINT}",
    ),
    "channels first": (
        channels_first,
        (
            "the last named value before the pooling, 'features' (2, 8, 16, 16), has the axes (b, c, h, w): name its"
            " transpose, topgap_jax.rewrite.name(value.transpose(0, 2, 3, 1), 'features')"
        ),
    ),
}


@pytest.mark.parametrize("network", ERRORS)
def test_errors_say_what_to_give(network):
    f, text = ERRORS[network]
    with pytest.raises(UserError) as raised:
        default(f)
    assert text in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("taker", ["grad_cam", "field", "receptive_field", "coverage", "with_drop", "cam"])
def test_a_layer_with_channels_first_is_refused_by_its_name(taker):
    """By whoever takes it for features (b, h, w, c); `read` and `tap` take any value, and a transpose is one."""
    label = "maps" if taker == "cam" else "features"

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.normal(), (5, 3, 3, 3))
            maps = name(lax.conv(x.transpose(0, 3, 1, 2), kernel, (1, 1), "SAME"), label)
            return name(maps.transpose(0, 2, 3, 1), "last").mean((1, 2))

    model = models.linen(Net())
    variables = model.init(jax.random.key(0), IMAGES)
    predict, keys = models.bind(model, variables), jax.random.split(jax.random.key(0), 2)
    batch = {"image": IMAGES, "label": LABELS}
    take = {
        "grad_cam": lambda layer: explain.grad_cam(layer)(keys, predict, IMAGES, LABELS),
        "cam": lambda layer: explain.cam()(keys, predict, IMAGES, LABELS),
        "field": lambda layer: explain.field(layer)(keys, predict, IMAGES, LABELS),
        "receptive_field": lambda layer: evaluators.receptive_field(layer).rows(keys, model, variables, batch, {}),
        "coverage": lambda layer: evaluators.coverage(layer).rows(keys, model, variables, batch, {}),
        "with_drop": lambda layer: with_drop(model, layer, drops.dropout(0.5)).apply(
            variables, IMAGES, train=True, keys=keys, targets=jnp.eye(5)[:2], step=0
        ),
    }[taker]
    with pytest.raises(UserError) as raised:
        take(label)
    assert f"layer '{label}' (2, 5, 16, 16) has the axes (b, c, h, w): name its transpose" in str(raised.value)
    if taker != "cam":
        jax.eval_shape(lambda: take("last"))
    assert read(predict, label)(IMAGES)[1].shape == (2, 5, 16, 16)


@pytest.mark.parametrize("change", ["jit", "fast", "with_rules", "tap"])
def test_default_layer_of_what_is_made_of_a_network(change):
    """The engine's convolutions, functions with rules of their own, and names in `jit` are followed like the rest."""
    make = {
        "jit": jax.jit,
        "fast": lambda f: f,
        "with_rules": lambda f: with_rules(f, **guided),
        "tap": lambda f: tap(f, "excite", lambda x: x + 1),
    }[change]
    model = models.linen(Net(squeezed))
    assert _default(models.fast(model) if change == "fast" else model, make) == "features"


def test_class_maps_of_heads_and_of_with_pool():
    """Grad-CAM of class maps would be CAM again."""
    for head in ("map_head", "pyramid_head"):
        made = getattr(models, head)(pool.gap())
        model = models.classifier(models.small_resnet(), made, classes=5, mean=[0.5] * 3, std=[0.2] * 3)
        features = {"map_head": "backbone/stage4", "pyramid_head": "head/smooth"}[head]
        assert _default(model, images=jnp.zeros((2, 32, 32, 3))) == features
    pooled = with_pool(models.linen(Net(flat_end)), dense="logits", pool=pool.gap())
    assert _default(pooled) == "features"


def flat_end(x):
    return ended(nn.relu(conv(5, "features")(x)))


def test_grad_cam_takes_it():
    """Grad-CAM of a network with class maps is not relu(cam()), and `read` without a layer reads the same."""
    predict = predict_of(lambda x: pool.gap()(name(conv(5, "head", 1, 1)(nn.relu(conv(8, "features")(x))), "maps")))
    run = jax.jit(
        lambda images: (
            explain.grad_cam()(None, predict, images, LABELS),
            explain.grad_cam("features")(None, predict, images, LABELS),
            explain.cam()(None, predict, images, LABELS),
            read(predict)(images)[1],
            read(predict, "features")(images)[1],
        )
    )
    ours, expected, cam, value, features = run(IMAGES)
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(value, features)
    assert np.abs(ours - np.maximum(cam, 0)).max() > 0.01


def test_nnx():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.more = nnx.List([nnx.Conv(8, 8, (3, 3), rngs=rngs) for _ in range(2)])
            self.head = nnx.Linear(8, 5, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.conv(x))
            for layer in self.more:
                x = x + nnx.relu(layer(x))
            return self.head(x.mean((1, 2)))

    model = models.nnx(nnx.jit(lambda: Block(nnx.Rngs(0)))())
    predict = models.bind(model, model.init(jax.random.key(0), IMAGES))
    assert default_layer(predict, IMAGES) == "more/1"


class Outputs(collections.OrderedDict):
    """A dict with attributes, as Hugging Face's are, which cannot be made of pairs."""

    def __init__(self, *, features=None):
        super().__init__(features=features)
        self.features = features

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)


class Frozen(dict):
    def __setitem__(self, key, value):
        raise TypeError("frozen")


@dataclasses.dataclass
class Record:
    features: Any


@pytest.mark.parametrize("kind", ["defaultdict", "attributes", "frozen", "dataclass"])
def test_outputs_of_any_kind(kind):
    """A submodule may return what it likes: where it can, the values in it have names, and the container is the
    same."""

    def returned(x):
        x = conv(8, "features")(x)
        return {
            "defaultdict": lambda: collections.defaultdict(list, {"features": x}),
            "attributes": lambda: Outputs(features=x),
            "frozen": lambda: Frozen(features=x),
            "dataclass": lambda: Record(x),
        }[kind]()

    def f(x):
        out = Part(returned, name="part")(x)
        assert type(out).__name__ == {"attributes": "Outputs", "dataclass": "Record"}.get(
            kind, kind.replace("f", "F", kind == "frozen")
        )
        if kind == "defaultdict":
            assert out["missing"] == []
        return ended(out.features if kind in ("attributes", "dataclass") else out["features"])

    predict = predict_of(f)
    names = [x.name for x in layers(predict, IMAGES)]
    labelled = ["part['features']"] if kind in ("defaultdict", "attributes") else []
    assert names == ["part/features", *labelled, "logits"]
    assert default_layer(predict, IMAGES) == "part/features"
