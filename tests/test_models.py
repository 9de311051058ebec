"""Backbones, heads and the classifier: shapes, numbers of parameters, and arithmetic against plain NumPy."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct

from topgap_jax import models, rewrite
from topgap_jax.errors import UserError
from topgap_jax.models import convnext, densenet, heads, vit
from topgap_jax.models.inverted_residual import Block, InvertedResidual, InvertedResiduals, Variant
from topgap_jax.models.layers import convolution, stochastic_depth
from topgap_jax.models.preact import PreActBlock
from topgap_jax.models.resnet import BasicBlock, Bottleneck, ResNet, Stem
from topgap_jax.pool import gap, gmp, top_gap

KEY = jax.random.key(0)
RGB = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


def tiny(**options):
    """A backbone of two stages that compiles in a moment."""
    return ResNet((4, 6), (1, 1), (4, 3, 1, False), **options)


class Dropping(nn.Module):
    """Stochastic depth as a module."""

    rate: float

    @nn.compact
    def __call__(self, x, train):
        return stochastic_depth(x, self.rate, train)


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def numpy_conv(x, kernel, stride=1, pad=None):
    """x (h, w, c), kernel (k, k, c, d), or (k, k, 1, c) for a depthwise one; zero padding of k // 2 on every side, or of
    `pad`: (top, bottom), (left, right)."""
    k = kernel.shape[0]
    padded = np.pad(x, (*(pad or [(k // 2, k // 2)] * 2), (0, 0)))
    rows = range(0, padded.shape[0] - k + 1, stride)
    columns = range(0, padded.shape[1] - k + 1, stride)
    if kernel.shape[2] != x.shape[2]:
        kernel = np.eye(x.shape[2], dtype=np.float32) * kernel
    return np.array([[np.tensordot(padded[i : i + k, j : j + k], kernel, 3) for j in columns] for i in rows])


def numpy_norm(x, variables, name, eps=1e-5):
    """Batch norm in eval mode."""
    p, running = variables["params"][name], variables["batch_stats"][name]
    return (x - running["mean"]) / np.sqrt(running["var"] + eps) * p["scale"] + p["bias"]


def numpy_layer_norm(x, p):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def numpy_dense(x, p):
    return x @ p["kernel"] + p["bias"]


def relu(x):
    return np.maximum(x, 0)


def relu6(x):
    return np.clip(x, 0, 6)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def hard_swish(x):
    return x * relu6(x + 3) / 6


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def filled(init, *args):
    """Random variables of the right shapes, the variances positive, without compiling `init`."""
    generator = np.random.default_rng(1)

    def fill(path, leaf):
        values = generator.normal(size=leaf.shape).astype(np.float32) * (0.5 if len(leaf.shape) > 1 else 1)
        return 0.5 + np.abs(values) if path[-1].key == "var" else values

    return jax.tree.map_with_path(fill, jax.eval_shape(init, KEY, *args))


def parameters(model, size):
    variables = jax.eval_shape(model.init, KEY, ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


BACKBONES = {  # factory: channels of the stages, their strides, parameters with 10 class maps
    "resnet20": ([16, 16, 32, 64], [1, 1, 2, 4], 269_722),
    "resnet32": ([16, 16, 32, 64], [1, 1, 2, 4], 464_154),
    "resnet44": ([16, 16, 32, 64], [1, 1, 2, 4], 658_586),
    "resnet56": ([16, 16, 32, 64], [1, 1, 2, 4], 853_018),
    "resnet18": ([64, 64, 128, 256, 512], [4, 4, 8, 16, 32], 11_181_642),
    "resnet34": ([64, 64, 128, 256, 512], [4, 4, 8, 16, 32], 21_289_802),
    "resnet50": ([64, 256, 512, 1024, 2048], [4, 4, 8, 16, 32], 23_528_522),
    "preact_resnet18": ([64, 64, 128, 256, 512], [1, 1, 2, 4, 8], 11_172_170),
    "wrn28_10": ([16, 160, 320, 640], [1, 1, 2, 4], 36_479_194),
    "vgg11": ([64, 128, 256, 512, 512], [2, 4, 8, 16, 32], 9_231_114),
    "vgg16": ([64, 128, 256, 512, 512], [2, 4, 8, 16, 32], 14_728_266),
    "efficientnet_lite0": ([16, 24, 40, 112, 320], [2, 4, 8, 16, 32], 2_962_058),
    "efficientnet_b0": ([16, 24, 40, 112, 320], [2, 4, 8, 16, 32], 3_598_598),
    "mobilenet_v3_large": ([16, 24, 40, 112, 160], [2, 4, 8, 16, 32], 2_818_042),
    "mobilenet_v3_small": ([16, 16, 24, 48, 96], [2, 4, 8, 16, 32], 871_530),
    "convnext_tiny": ([96, 96, 192, 384, 768], [4, 4, 8, 16, 32], 27_826_282),
    "densenet121": ([64, 256, 512, 1024, 1024], [4, 4, 8, 16, 32], 6_964_106),
    "small_resnet": ([16, 8, 16, 32, 64], [2, 2, 4, 8, 16], 79_722),
}


DEEPER = ("resnet32", "resnet44", "resnet56", "resnet34")  # than another of their family


@pytest.mark.parametrize("size", [(75, 48), pytest.param((64, 64), marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "factory", [pytest.param(name, marks=pytest.mark.slow) if name in DEEPER else name for name in BACKBONES]
)
def test_backbone_stages_and_parameters(factory, size):
    channels, strides, count = BACKBONES[factory]
    backbone = models.TABLE[factory]()
    names = ["stem", "stage1", "stage2", "stage3", "stage4"][: len(channels)]
    images = ShapeDtypeStruct((2, *size, 3), jnp.float32)
    features, variables = jax.eval_shape(lambda x: backbone.init_with_output(KEY, x), images)
    assert set(variables["params"]) == set(names) == set(features)
    for name, channel, stride in zip(names, channels, strides):
        # VGG's pooling, ConvNeXt's patches and DenseNet's transitions drop an odd row, a strided convolution keeps it.
        down = factory.startswith(("vgg", "convnext")) or (factory == "densenet121" and stride > 4)
        height, width = (n // stride if down else -(-n // stride) for n in size)
        assert features[name].shape == (2, height, width, channel), name
    assert parameters(models.classifier(backbone, models.map_head(gap()), classes=10, **RGB), 64) == count


@pytest.mark.parametrize(
    "backbone, head, classes, count",
    [
        ("resnet18", models.map_head(gap()), 1000, 11_689_512),  # torchvision's counts
        ("resnet34", models.map_head(gap()), 1000, 21_797_672),
        ("resnet50", models.map_head(gap()), 1000, 25_557_032),
        ("mobilenet_v3_large", models.mobilenet_head(), 1000, 5_483_032),
        ("mobilenet_v3_small", models.mobilenet_head(width=576, hidden=1024), 1000, 2_542_856),
        ("convnext_tiny", models.convnext_head(), 1000, 28_589_128),
        pytest.param("convnext_small", models.convnext_head(), 1000, 50_223_688, marks=pytest.mark.slow),
        ("convnext_base", models.convnext_head(), 1000, 88_591_464),
        ("densenet121", models.map_head(gap()), 1000, 7_978_856),
        ("efficientnet_b0", models.conv_head(gap(), activation="silu", eps=1e-5), 1000, 5_288_548),
        ("efficientnet_lite0", models.conv_head(gap()), 1000, 4_652_008),  # timm's
        pytest.param("efficientnet_lite1", models.conv_head(gap()), 1000, 5_416_680, marks=pytest.mark.slow),
        pytest.param("efficientnet_lite2", models.conv_head(gap()), 1000, 6_092_072, marks=pytest.mark.slow),
        pytest.param("efficientnet_lite3", models.conv_head(gap()), 1000, 8_197_096, marks=pytest.mark.slow),
        ("efficientnet_lite4", models.conv_head(gap()), 1000, 13_006_568),
        ("vgg11", models.vgg_head(), 1000, 132_868_840),
        ("vgg16", models.vgg_head(), 1000, 138_365_992),
    ],
)
def test_parameters_are_those_of_torchvision(backbone, head, classes, count):
    assert parameters(models.classifier(models.TABLE[backbone](), head, classes=classes, **RGB), 64) == count


def test_parameters_of_whole_classifiers():
    assert parameters(models.resnet4b(**RGB), 32) == 123_734
    assert parameters(models.vit_s16(1000, **RGB), 224) == 22_050_664
    assert parameters(models.vit_s16(1000, **RGB, registers=4), 224) == 22_050_664 + (4 - 1) * 384


def test_cifar_stem_and_project_shortcut():
    images = ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    backbone = models.resnet18(stem="cifar")
    features, _ = jax.eval_shape(lambda x: backbone.init_with_output(KEY, x), images)
    assert features["stem"].shape == (1, 32, 32, 64) and features["stage4"].shape == (1, 4, 4, 512)
    project = models.classifier(models.resnet20(shortcut="project"), models.map_head(gap()), classes=10, **RGB)
    extra = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert parameters(project, 32) == 269_722 + extra


@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (1, 2), (5, 2), (7, 2)])
def test_convolution_pads_every_side(size, kernel, stride):
    x = random(1, size, size, 2)
    layer = convolution(3, kernel, stride, dtype=jnp.float32, name="conv")
    variables = filled(layer.init, x)
    expected = numpy_conv(x[0], variables["params"]["kernel"], stride)
    np.testing.assert_allclose(layer.apply(variables, x)[0], expected, atol=1e-5)


def kernels(variables):
    return {name: p["kernel"] for name, p in variables["params"].items() if "kernel" in p}


@pytest.mark.parametrize("shortcut", ["pad", "project"])
def test_basic_block(shortcut):
    x = relu(random(1, 5, 6, 4))
    block = BasicBlock(8, 2, shortcut, jnp.float32)
    variables = filled(block.init, x)
    kernel = kernels(variables)
    y = relu(numpy_norm(numpy_conv(x[0], kernel["conv1"], 2), variables, "norm1"))
    y = numpy_norm(numpy_conv(y, kernel["conv2"]), variables, "norm2")
    if shortcut == "pad":
        assert "project" not in kernel
        skip = np.pad(x[0, ::2, ::2], ((0, 0), (0, 0), (2, 2)))
    else:
        skip = numpy_norm(x[0, ::2, ::2] @ kernel["project"][0, 0], variables, "project_norm")
    np.testing.assert_allclose(jax.jit(block.apply)(variables, x)[0], relu(y + skip), atol=1e-4)


def test_bottleneck_has_its_stride_in_the_3x3_convolution():
    x = relu(random(1, 5, 6, 4))
    block = Bottleneck(2, 2, "project", jnp.float32)
    variables = filled(block.init, x)
    kernel = kernels(variables)
    y = relu(numpy_norm(numpy_conv(x[0], kernel["conv1"]), variables, "norm1"))
    y = relu(numpy_norm(numpy_conv(y, kernel["conv2"], 2), variables, "norm2"))
    y = numpy_norm(numpy_conv(y, kernel["conv3"]), variables, "norm3")
    skip = numpy_norm(x[0, ::2, ::2] @ kernel["project"][0, 0], variables, "project_norm")
    np.testing.assert_allclose(jax.jit(block.apply)(variables, x)[0], relu(y + skip), atol=1e-4)


@pytest.mark.parametrize("features, stride", [(4, 1), (6, 2)])
@pytest.mark.parametrize("activation, padding", [("relu", "symmetric"), ("silu", "same")])
def test_preact_block(features, stride, activation, padding):
    x = random(1, 6, 6, 4)
    block = PreActBlock(features, stride, jnp.float32, activation, padding)
    variables = filled(block.init, x)
    kernel = kernels(variables)
    active = (lambda x: x * sigmoid(x)) if activation == "silu" else relu
    pad = [(0, 1), (0, 1)] if padding == "same" and stride == 2 else None
    activate, active = active, active(numpy_norm(x[0], variables, "norm1"))
    y = activate(numpy_norm(numpy_conv(active, kernel["conv1"], stride, pad), variables, "norm2"))
    skip = x[0] if stride == 1 else active[::2, ::2] @ kernel["project"][0, 0]
    expected = skip + numpy_conv(y, kernel["conv2"])
    np.testing.assert_allclose(jax.jit(block.apply)(variables, x)[0], expected, atol=1e-4)


def test_resnet_d_has_a_deep_stem_and_a_mean_in_its_shortcut():
    x = random(1, 9, 10, 3)
    stem = Stem(8, 3, 2, False, True, jnp.float32)
    variables = filled(stem.init, x)
    y, kernel = x[0], kernels(variables)
    for i, (name, stride) in enumerate((("conv1", 2), ("conv2", 1), ("conv", 1)), start=1):
        y = relu(numpy_norm(numpy_conv(y, kernel[name], stride), variables, f"norm{i}".removesuffix("3")))
    np.testing.assert_allclose(jax.jit(stem.apply)(variables, x)[0], y, atol=1e-4)

    x = relu(random(1, 5, 6, 4))  # an odd last row is a window of its own
    block = BasicBlock(8, 2, "average", jnp.float32)
    variables = filled(block.init, x)
    kernel = kernels(variables)
    y = relu(numpy_norm(numpy_conv(x[0], kernel["conv1"], 2), variables, "norm1"))
    y = numpy_norm(numpy_conv(y, kernel["conv2"]), variables, "norm2")
    means = np.array([[x[0, i : i + 2, j : j + 2].mean((0, 1)) for j in (0, 2, 4)] for i in (0, 2, 4)])
    skip = numpy_norm(means @ kernel["project"][0, 0], variables, "project_norm")
    np.testing.assert_allclose(jax.jit(block.apply)(variables, x)[0], relu(y + skip), atol=1e-4)


@pytest.mark.parametrize("padding, stride", [("symmetric", 1), ("symmetric", 2), ("same", 2)])
def test_inverted_residual(padding, stride):
    x = random(1, 6, 8, 4)
    block = Block(5, stride, 6, 4, 2, "hard_swish")
    layer = InvertedResidual(block, Variant(padding, 1e-3, "relu", nn.hard_sigmoid), 0.5, jnp.float32)
    variables = filled(layer.init, x)
    kernel, excite = kernels(variables), variables["params"]["squeeze_excite"]
    y = hard_swish(numpy_norm(numpy_conv(x[0], kernel["expand"]), variables, "expand_norm", 1e-3))
    pad = [(1, 2), (1, 2)] if padding == "same" else None
    y = hard_swish(numpy_norm(numpy_conv(y, kernel["depthwise"], stride, pad), variables, "depthwise_norm", 1e-3))
    gate = numpy_dense(relu(numpy_dense(y.mean((0, 1)), excite["reduce"])), excite["expand"])
    y = numpy_norm(numpy_conv(y * relu6(gate + 3) / 6, kernel["project"]), variables, "project_norm", 1e-3)
    expected = x[0] + y if stride == 1 else y
    np.testing.assert_allclose(jax.jit(layer.apply)(variables, x)[0], expected, atol=1e-4)


def test_a_block_that_does_not_expand_has_no_expansion():
    layer = InvertedResidual(Block(3, 1, 4, 6, 0, "relu6"), Variant("same", 1e-3), 0.0, jnp.float32)
    shapes = jax.eval_shape(layer.init, KEY, random(1, 6, 6, 4))["params"]
    assert set(shapes) == {"depthwise", "depthwise_norm", "project", "project_norm"}


def test_convnext_block():
    x = random(1, 5, 6, 4)
    block = convnext.Block(0.5, jnp.float32)
    variables = filled(block.init, x)
    p = variables["params"]
    y = numpy_layer_norm(numpy_conv(x[0], p["depthwise"]["kernel"]) + p["depthwise"]["bias"], p["norm"])
    expected = x[0] + p["layer_scale"] * numpy_dense(gelu(numpy_dense(y, p["dense1"])), p["dense2"])
    np.testing.assert_allclose(jax.jit(block.apply)(variables, x)[0], expected, atol=1e-4)


def test_convnext_stage_drops_what_fills_no_patch():
    x = random(1, 5, 7, 4)
    stage = convnext.Stage(6, (), jnp.float32)
    variables = filled(stage.init, x)
    p = variables["params"]
    y = numpy_layer_norm(x[0], p["downsample_norm"])
    expected = numpy_conv(y, p["downsample"]["kernel"], 2, [(0, 0), (0, 0)]) + p["downsample"]["bias"]
    np.testing.assert_allclose(stage.apply(variables, x)[0], expected, atol=1e-4)


def test_densenet_stage():
    x = random(1, 5, 6, 4)
    stage = densenet.Stage(1, True, True, jnp.float32)
    variables = filled(stage.init, x)
    layer = {name: values["block0"] for name, values in variables.items()}
    kernel = kernels(layer)
    y = numpy_conv(relu(numpy_norm(x[0], variables, "transition_norm")), kernels(variables)["transition"])
    y = np.array([[y[i : i + 2, j : j + 2].mean((0, 1)) for j in (0, 2, 4)] for i in (0, 2)])
    new = numpy_conv(relu(numpy_norm(y, layer, "norm1")), kernel["conv1"])
    new = numpy_conv(relu(numpy_norm(new, layer, "norm2")), kernel["conv2"])
    expected = relu(numpy_norm(np.concatenate([y, new], -1), variables, "norm"))
    np.testing.assert_allclose(jax.jit(stage.apply)(variables, x)[0], expected, atol=1e-3)


def test_attention():
    x = random(1, 5, 12)
    layer = vit.Attention()
    variables = filled(layer.init, x)
    p = variables["params"]
    q, k, v = numpy_dense(x[0], p["qkv"]).reshape(5, 3, 6, 2).transpose(1, 2, 0, 3)  # (heads, tokens, 2) each
    weights = np.exp(q @ k.transpose(0, 2, 1) / math.sqrt(2))
    values = (weights / weights.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(5, 12)
    np.testing.assert_allclose(layer.apply(variables, x)[0], numpy_dense(values, p["project"]), atol=1e-4)


@pytest.mark.parametrize("registers", [0, 4])
def test_tokens_of_vit(registers):
    images = ShapeDtypeStruct((2, 32, 48, 3), jnp.float32)
    model = models.vit_s16(5, **RGB, registers=registers)
    variables = jax.eval_shape(model.init, KEY, images)
    assert variables["params"]["positions"].shape == (1, 6 if registers else 7, 384)
    read = lambda layer: lambda v, x: rewrite.read(models.bind(model, v), layer)(x)
    logits, tokens = jax.eval_shape(read("block11/norm1"), variables, images)
    assert tokens.shape == (2, 1 + registers + 6, 384) and logits.shape == (2, 5)
    assert jax.eval_shape(read("tokens"), variables, images)[1].shape == (2, 2, 3, 384)


def test_small_resnet_with_its_pyramid_takes_10_million_multiplications():
    model = models.classifier(models.small_resnet(), models.pyramid_head(gap(), width=32), classes=6, **RGB)
    images = ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(model.init, KEY, images)
    count = 0
    for equation in jax.make_jaxpr(lambda v, x: model.apply(v, x).logits)(variables, images).eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            count += equation.outvars[0].aval.size * np.prod(equation.invars[1].aval.shape[:-1])
    assert round(count / 1e6, 1) == 10.4


def test_map_head_with_gap_is_a_dense_layer_on_the_mean():
    features = {"stem": random(2, 5, 5, 3), "stage1": random(2, 3, 4, 5)}
    head = models.map_head(gap()).clone(classes=7)
    variables = filled(head.init, features)
    dense = variables["params"]["dense"]
    expected = features["stage1"].mean((1, 2)) @ dense["kernel"] + dense["bias"]
    np.testing.assert_allclose(head.apply(variables, features), expected, atol=1e-6)


def test_conv_head_with_gap_is_the_published_tail():
    features = {"stage4": random(2, 3, 4, 5)}
    head = models.conv_head(gap(), width=6, activation="silu", eps=1e-3, dropout=0.5).clone(classes=7)
    variables = filled(head.init, features)
    x = numpy_norm(features["stage4"] @ kernels(variables)["conv"][0, 0], variables, "norm", 1e-3)
    pooled = (x * sigmoid(x)).mean((1, 2))
    np.testing.assert_allclose(
        head.apply(variables, features), numpy_dense(pooled, variables["params"]["dense"]), atol=1e-5
    )
    maps = models.conv_head(identity, width=6).clone(classes=7)
    assert jax.eval_shape(maps.apply, variables, features).shape == (2, 3, 4, 7)


def test_conv_head_drops_whole_channels_in_training():
    features = {"stage4": random(200, 2, 2, 3)}
    head = models.conv_head(identity, width=1, dropout=0.5).clone(classes=2)
    variables = filled(head.init, features)
    bias = variables["params"]["dense"]["bias"]
    train = lambda key: head.apply(variables, features, True, rngs={"dropout": key}, mutable=["batch_stats"])[0]
    drop = jax.jit(train)
    dropped = np.all(drop(KEY) == bias, (1, 2, 3))
    assert 70 < dropped.sum() < 130  # of 200, by half; a channel that ReLU6 made zero counts as well
    assert not np.array_equal(dropped, np.all(drop(jax.random.key(1)) == bias, (1, 2, 3)))


def test_mobilenet_head():
    features = {"stage4": random(2, 3, 4, 5)}
    head = models.mobilenet_head(width=6, hidden=8).clone(classes=7)
    variables = filled(head.init, features)
    x = hard_swish(numpy_norm(features["stage4"] @ kernels(variables)["conv"][0, 0], variables, "norm", 1e-3))
    x = hard_swish(numpy_dense(x.mean((1, 2)), variables["params"]["hidden"]))
    expected = numpy_dense(x, variables["params"]["dense"])
    np.testing.assert_allclose(head.apply(variables, features), expected, rtol=1e-4, atol=1e-4)


def test_convnext_head():
    features = {"stage4": random(2, 3, 4, 5)}
    head = models.convnext_head().clone(classes=7)
    variables = filled(head.init, features)
    p = variables["params"]
    expected = numpy_dense(numpy_layer_norm(features["stage4"].mean((1, 2)), p["norm"]), p["dense"])
    np.testing.assert_allclose(head.apply(variables, features), expected, rtol=1e-4, atol=1e-4)


def test_stochastic_depth_drops_rows_in_training_only():
    x = np.ones((400, 2, 3), np.float32)
    dropped = Dropping(0.25).apply({}, x, True, rngs={"dropout": KEY})
    rows = dropped.reshape(400, -1)
    assert np.all(rows == rows[:, :1]) and set(np.unique(rows)) == {0, np.float32(1 / 0.75)}
    assert 0.18 < (rows[:, 0] == 0).mean() < 0.32
    np.testing.assert_array_equal(Dropping(0.25).apply({}, x, False), x)


def test_class_maps_start_he_normal_without_bias():
    head = models.map_head(gap()).clone(classes=1000)
    dense = jax.jit(head.init)(KEY, {"stage1": jnp.zeros((1, 1, 1, 50))})["params"]["dense"]
    np.testing.assert_allclose(np.std(dense["kernel"]), np.sqrt(2 / 50), rtol=0.02)
    assert not np.any(dense["bias"])


def identity(maps, step=None):
    return maps


def test_additive_pyramid_test_case_14_5():
    # topgap.md 14.5: all-ones 3x3 kernels, no bias, one channel; everything is positive, so ReLU is the identity.
    features = {"stage1": jnp.arange(8.0).reshape(1, 2, 4, 1), "stage2": jnp.array([1.0, 2.0]).reshape(1, 1, 2, 1)}
    head = models.pyramid_head(identity, width=1, levels=2).clone(classes=1)
    shapes = jax.eval_shape(head.init, KEY, features)
    variables = jax.tree.map(lambda x: np.full(x.shape, x.ndim > 1, np.float32), shapes)
    maps = jax.jit(head.apply)(variables, features)
    np.testing.assert_allclose(maps[0, :, :, 0], [[68, 122, 138, 96]] * 2)


@pytest.mark.parametrize("merge", ["add", "concat"])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_pyramid_is_the_formula(merge, levels):
    sizes = {"stem": (6, 5, 2), "stage1": (6, 5, 2), "stage2": (3, 5, 3), "stage3": (2, 2, 4)}
    features = {name: random(1, *shape) for name, shape in sizes.items()}
    head = models.pyramid_head(identity, width=3, merge=merge, levels=levels).clone(classes=2)
    variables = filled(head.init, features)
    weights = variables["params"]

    def conv3(x, name):
        return numpy_conv(x, weights[name]["kernel"]) + weights[name]["bias"]

    def up(x, like):
        rows = np.floor((np.arange(like.shape[0]) + 0.5) * x.shape[0] / like.shape[0]).astype(int)
        columns = np.floor((np.arange(like.shape[1]) + 0.5) * x.shape[1] / like.shape[1]).astype(int)
        return x[rows][:, columns]

    x = conv3(features["stage3"][0], "lateral_stage3")
    if merge == "concat":
        x = relu(x)
    for level in ("stage2", "stage1")[: levels - 1]:
        lateral = conv3(features[level][0], f"lateral_{level}")
        if merge == "add":
            x = lateral + up(x, lateral)
        else:
            x = relu(conv3(np.concatenate([lateral, up(x, lateral)], -1), f"merge_{level}"))
    if merge == "add":
        x = relu(conv3(x, "smooth"))
    expected = x @ weights["dense"]["kernel"] + weights["dense"]["bias"]
    np.testing.assert_allclose(jax.jit(head.apply)(variables, features)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "merge, classes, count", [("add", 10, 2_657_802), ("add", 1000, 2_912_232), ("concat", 10, 4_427_530)]
)
def test_pyramid_parameters(merge, classes, count):
    sizes = {"stage2": (28, 28, 128), "stage3": (14, 14, 256), "stage4": (7, 7, 512)}
    features = {name: ShapeDtypeStruct((1, *shape), jnp.float32) for name, shape in sizes.items()}
    head = models.pyramid_head(gap(), merge=merge).clone(classes=classes)
    assert sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(head.init, KEY, features))) == count


def test_pyramid_finest_level_and_batch_norm():
    features = {"stem": random(2, 8, 8, 2), "stage1": random(2, 4, 4, 2), "stage2": random(2, 2, 2, 2)}

    def layers(**options):
        head = models.pyramid_head(identity, width=3, **options).clone(classes=2)
        return jax.eval_shape(head.init, KEY, features)

    assert set(layers(levels=2)["params"]) == {"lateral_stage1", "lateral_stage2", "smooth", "dense"}
    assert set(layers(levels=2, finest="stem")["params"]) == {"lateral_stem", "lateral_stage1", "smooth", "dense"}
    assert set(layers(levels=2, norm="batch")["batch_stats"]) == {"norm"}
    assert set(layers(levels=2, norm="batch", merge="concat")["batch_stats"]) == {"norm_stage1", "norm_stage2"}


def test_stages_do_not_depend_on_the_order_of_the_dict():
    assert heads.ordered({"stage2": 0, "stem": 0, "stage1": 0}) == ["stem", "stage1", "stage2"]


def test_upsample_to_a_size_that_is_no_multiple():
    x = random(1, 7, 4, 2)
    rows = np.floor((np.arange(13) + 0.5) * 7 / 13).astype(int)
    np.testing.assert_array_equal(heads.upsample(x, 13, 8), x[:, rows][:, :, np.arange(8) // 2])
    np.testing.assert_array_equal(heads.upsample(x, 14, 8), x[:, np.arange(14) // 2][:, :, np.arange(8) // 2])


@pytest.mark.parametrize("size", [(3, 4), (7, 7), (14, 9)])
def test_adaptive_mean(size):
    x = random(1, *size, 2)
    bins = lambda n: [slice(int(np.floor(i * n / 7)), int(np.ceil((i + 1) * n / 7))) for i in range(7)]
    expected = [[x[0, r, c].mean((0, 1)) for c in bins(size[1])] for r in bins(size[0])]
    np.testing.assert_allclose(heads.adaptive_mean(x, 7)[0], expected, atol=1e-6)


def test_vgg_head_flattens_like_pytorch_and_drops_in_training_only():
    features = {"stage4": random(2, 7, 7, 3)}
    head = models.vgg_head(width=8, dropout=0.5).clone(classes=4)
    variables = filled(head.init, features)
    dense = variables["params"]
    x = features["stage4"].transpose(0, 3, 1, 2).reshape(2, -1)
    for name in ("dense1", "dense2"):
        x = relu(x @ dense[name]["kernel"] + dense[name]["bias"])
    expected = x @ dense["dense3"]["kernel"] + dense["dense3"]["bias"]
    np.testing.assert_allclose(head.apply(variables, features), expected, rtol=1e-4, atol=1e-4)
    dropped = lambda seed: head.apply(variables, features, True, rngs={"dropout": jax.random.key(seed)})
    assert not np.allclose(dropped(0), dropped(1))


def test_classifier_normalises_inside():
    images = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)
    plain = models.classifier(tiny(), models.map_head(gmp()), classes=3, mean=(0, 0, 0), std=(1, 1, 1))
    normalising = models.classifier(tiny(), models.map_head(gmp()), classes=3, **RGB)
    variables = filled(plain.init, images)
    normalised = (images - np.array(RGB["mean"])) / np.array(RGB["std"])
    logits = [jax.jit(model.apply)(variables, x).logits for model, x in ((plain, normalised), (normalising, images))]
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-4, atol=1e-4)


FAMILIES = {
    "inverted_residual": InvertedResiduals(
        (4, "relu6"),
        (Block(3, 1, 4, 4, 0, "relu6"), Block(3, 2, 8, 6, 2, "hard_swish"), Block(5, 1, 6, 6, 2, "silu")),
        Variant("same", 1e-3),
        0.9,
    ),
    "convnext": convnext.ConvNeXt((2, 1), (4, 6), 0.9),
    "densenet": densenet.DenseNet((1, 1), 4),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_network_of_the_family(family):
    """Strides, images that are independent of one another, statistics that move, and blocks that are dropped in training
    with keys and only then."""
    images = np.random.default_rng(0).random((4, 32, 36, 3), np.float32)
    model = models.classifier(FAMILIES[family], models.map_head(gap()), classes=3, **RGB)
    variables = filled(model.init, images)
    layers = {layer.name: layer.shape for layer in rewrite.layers(models.bind(model, variables), images)}
    size = (16, 18) if family == "inverted_residual" else (8, 9)
    assert layers["backbone/stem"][1:3] == size
    last = {"inverted_residual": (8, 9, 6), "convnext": (4, 4, 6), "densenet": (4, 4, 50)}[family]
    assert layers["backbone/stage1" if family == "inverted_residual" else "backbone/stage2"][1:] == last

    @jax.jit
    def run(variables, images, keys):
        train = [model.apply(variables, images, train=True, keys=each) for each in (None, keys)]
        return model.apply(variables, images).logits, train

    logits, (plain, dropped) = run(variables, images, jax.random.split(KEY, 4))
    assert np.isfinite(logits).all() and np.ptp(logits, 0).min() > 1e-3
    others = run(variables, images[::-1], jax.random.split(KEY, 4))[0][::-1]
    np.testing.assert_allclose(logits, others, rtol=1e-4, atol=1e-4)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), plain.batch_stats, variables["batch_stats"])
    assert all(jax.tree.leaves(moved))
    assert np.array_equal(plain.logits, dropped.logits) == (family == "densenet")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_in_bfloat16_with_float32_parameters(family):
    half = FAMILIES[family].clone(dtype=jnp.bfloat16)
    images = ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    features, variables = jax.eval_shape(lambda x: half.init_with_output(KEY, x), images)
    assert {leaf.dtype for leaf in features.values()} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_images_do_not_depend_on_their_neighbours_in_eval_mode():
    images = np.random.default_rng(0).random((3, 9, 8, 3), np.float32)
    model = models.classifier(tiny(), models.map_head(top_gap(k=3)), classes=3, **RGB)
    variables = filled(model.init, images)
    predict = jax.jit(models.bind(model, variables))
    np.testing.assert_allclose(predict(images)[1:2], predict(images[1:2]), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_eagerly_the_logits_are_the_same():
    images = np.random.default_rng(0).random((3, 9, 8, 3), np.float32)
    model = models.classifier(tiny(), models.map_head(top_gap(k=3)), classes=3, **RGB)
    predict = models.bind(model, filled(model.init, images))
    np.testing.assert_allclose(jax.jit(predict)(images), predict(images), rtol=1e-4, atol=1e-4)


def test_training_moves_the_batch_statistics_by_a_tenth():
    images = np.random.default_rng(0).random((4, 6, 6, 3), np.float32)
    model = models.classifier(tiny(), models.map_head(gap()), classes=3, mean=(0, 0, 0), std=(1, 1, 1))
    variables = filled(model.init, images)
    after = jax.jit(lambda v, x: model.apply(v, x, train=True))(variables, images).batch_stats["backbone"]["stem"][
        "norm"
    ]
    before = variables["batch_stats"]["backbone"]["stem"]["norm"]
    kernel = variables["params"]["backbone"]["stem"]["conv"]["kernel"]
    values = np.stack([numpy_conv(image, kernel) for image in images])
    np.testing.assert_allclose(after["mean"], 0.9 * before["mean"] + 0.1 * values.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(after["var"], 0.9 * before["var"] + 0.1 * values.var((0, 1, 2)), atol=1e-4)
    assert model.apply(variables, images).batch_stats is variables["batch_stats"]


def test_the_pool_follows_the_step():
    images = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)
    schedule = lambda step: jnp.where(step < 10, 16.0, 1.0)
    model, mean, maximum = (
        models.classifier(tiny(), models.map_head(pool), classes=3, **RGB)
        for pool in (top_gap(k=schedule), gap(), gmp())
    )
    variables = filled(model.init, images)
    logits = lambda model, step: jax.jit(model.apply)(variables, images, step=step).logits
    np.testing.assert_allclose(logits(model, 0), logits(mean, None), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits(model, None), logits(maximum, None), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "backbone, head",
    [
        (tiny(shortcut="pad"), models.map_head(gap())),
        (tiny(), models.pyramid_head(gap(), width=4, levels=2, norm="batch")),
    ],
    ids=["map_head", "pyramid_head"],
)
def test_bfloat16_is_the_trunk_only(backbone, head):
    images = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)
    half = models.classifier(backbone, head, classes=3, **RGB, dtype="bfloat16")
    full = models.classifier(backbone, head, classes=3, **RGB)
    shapes = jax.eval_shape(half.init, KEY, images)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))
    variables = filled(full.init, images)
    predict = models.bind(half, variables)
    for layer, dtype in (("stage1", jnp.bfloat16), ("stage2", jnp.bfloat16), ("maps", jnp.float32)):
        assert jax.eval_shape(rewrite.read(predict, layer), images)[1].dtype == dtype, layer
    logits, expected = jax.jit(predict)(images), jax.jit(models.bind(full, variables))(images)
    assert logits.dtype == jnp.float32 and not np.array_equal(logits, expected)
    np.testing.assert_allclose(logits, expected, atol=0.05 * np.abs(expected).max())
    statistics = jax.eval_shape(lambda: half.apply(variables, images, train=True)).batch_stats
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(statistics))


def test_layers_have_the_names_of_their_paths():
    model = models.classifier(tiny(), models.pyramid_head(gap(), width=4, levels=2), classes=3, **RGB)
    images = jnp.zeros((1, 8, 8, 3))
    variables = filled(model.init, images)
    found = {x.name: x.shape for x in rewrite.layers(models.bind(model, variables), images)}
    assert found["backbone/stage2"] == found["backbone/stage2/block0/conv1"] == (1, 4, 4, 6)
    assert found["head/lateral_stage1"] == (1, 8, 8, 4)
    assert found["maps"] == (1, 8, 8, 3)


def forward(backbone, head=models.map_head(gap()), size=8, channels=3):  # noqa: B008
    model = models.classifier(backbone, head, classes=3, **RGB)
    jax.eval_shape(model.init, KEY, ShapeDtypeStruct((1, size, size, channels), jnp.float32))


ERRORS = {
    "shortcut must be 'pad' or 'project', got 'zero'": lambda: models.resnet20(shortcut="zero"),
    "stem must be 'imagenet', 'cifar' or 'deep', got 'none'": lambda: models.resnet50(stem="none"),
    "blocks must be a whole number of at least 1, got 0": lambda: models.small_resnet(blocks=0),
    "VGG halves its images five times and needs at least 32x32 pixels, got 8x8": lambda: forward(models.vgg11()),
    "ConvNeXt halves its images five times and needs at least 32x32 pixels, got 8x8": lambda: forward(
        models.convnext_tiny()
    ),
    "DenseNet halves its images five times and needs at least 32x32 pixels, got 8x8": lambda: forward(
        models.densenet121()
    ),
    "vit_s16 takes images whose sides are multiples of 16, got 24x8": lambda: models.vit_s16(**RGB).init(
        KEY, jnp.zeros((1, 24, 8, 3))
    ),
    "padding must be 'symmetric' or 'same', got 'valid'": lambda: models.efficientnet_lite0(padding="valid"),
    "stochastic_depth must be a number in [0, 0.99], got 1": lambda: models.convnext_tiny(stochastic_depth=1),
    "shortcut must be 'project' or 'average', got 'pad'": lambda: models.resnet18(shortcut="pad"),
    "activation must be one of relu, relu6, silu, hard_swish, gelu, got 'mish'": lambda: models.conv_head(
        gap(), activation="mish"
    ),
    "conv_head needs a pool such as gap() or top_gap(k=4), got None": lambda: models.conv_head(None),
    "classifier needs a backbone and a head, e.g. classifier(resnet20(), map_head(gap()), ...)": lambda: forward(
        models.map_head(gap()), tiny()
    ),
    "classes must be a whole number of at least 2, got 1": lambda: models.resnet4b(1, **RGB),
    "dtype must be 'float32' or 'bfloat16', got 'float16'": lambda: models.classifier(
        tiny(), models.map_head(gap()), classes=3, **RGB, dtype="float16"
    ),
    "mean and std need one finite number per channel each, every std above 0; got mean=(0.0,), std=(0.0,)": lambda: (
        models.resnet4b(mean=(0,), std=(0,))
    ),
    "the images have 1 channels, mean and std have 3; they must agree": lambda: forward(tiny(), channels=1),
    "resnet4b is for 32x32 images, got 8x8": lambda: models.resnet4b(**RGB).init(KEY, jnp.zeros((1, 8, 8, 3))),
    "map_head needs a pool such as gap() or top_gap(k=4), got 4": lambda: models.map_head(4),
    "pyramid_head needs a pool such as gap() or top_gap(k=4), got None": lambda: models.pyramid_head(None),
    "merge must be 'add' or 'concat', got 'max'": lambda: models.pyramid_head(gap(), merge="max"),
    "norm must be None or 'batch', got 'group'": lambda: models.pyramid_head(gap(), norm="group"),
    "levels must be a whole number of at least 1, got 0": lambda: models.pyramid_head(gap(), levels=0),
    "dropout must be a number in [0, 1], got 2": lambda: models.vgg_head(dropout=2),
    "pyramid_head: 4 levels are too many; the backbone has stem, stage1, stage2": lambda: forward(
        tiny(), models.pyramid_head(gap(), levels=4)
    ),
    "pyramid_head: 2 levels from 'stage2' on are too many; the backbone has stem, stage1, stage2": lambda: forward(
        tiny(), models.pyramid_head(gap(), levels=2, finest="stage2")
    ),
    "pyramid_head: there is no stage 'stage9' for finest; the backbone has stem, stage1, stage2": lambda: forward(
        tiny(), models.pyramid_head(gap(), finest="stage9")
    ),
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors(text):
    with pytest.raises(UserError) as error:
        ERRORS[text]()
    assert str(error.value) == text
