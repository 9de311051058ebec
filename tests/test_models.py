"""Backbones, heads and the classifier: shapes, numbers of parameters, and arithmetic against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct

from topgap_jax import models, rewrite
from topgap_jax.errors import UserError
from topgap_jax.models import heads
from topgap_jax.models.layers import convolution
from topgap_jax.models.preact import PreActBlock
from topgap_jax.models.resnet import BasicBlock, Bottleneck, ResNet
from topgap_jax.pool import gap, gmp, top_gap

KEY = jax.random.key(0)
RGB = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


def tiny(**options):
    """A backbone of two stages that compiles in a moment."""
    return ResNet((4, 6), (1, 1), (4, 3, 1, False), **options)


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def numpy_conv(x, kernel, stride=1):
    """x (h, w, c), kernel (k, k, c, d), zero padding of k // 2 on every side."""
    k = kernel.shape[0]
    padded = np.pad(x, ((k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    rows = range(0, padded.shape[0] - k + 1, stride)
    columns = range(0, padded.shape[1] - k + 1, stride)
    return np.array([[np.tensordot(padded[i : i + k, j : j + k], kernel, 3) for j in columns] for i in rows])


def numpy_norm(x, variables, name):
    """Batch norm in eval mode."""
    p, running = variables["params"][name], variables["batch_stats"][name]
    return (x - running["mean"]) / np.sqrt(running["var"] + 1e-5) * p["scale"] + p["bias"]


def relu(x):
    return np.maximum(x, 0)


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
        # VGG's pooling drops an odd row, a strided convolution keeps it.
        height, width = (n // stride if factory.startswith("vgg") else -(-n // stride) for n in size)
        assert features[name].shape == (2, height, width, channel), name
    assert parameters(models.classifier(backbone, models.map_head(gap()), classes=10, **RGB), 64) == count


@pytest.mark.parametrize(
    "backbone, head, classes, count",
    [
        ("resnet18", models.map_head(gap()), 1000, 11_689_512),  # torchvision's counts
        ("resnet34", models.map_head(gap()), 1000, 21_797_672),
        ("resnet50", models.map_head(gap()), 1000, 25_557_032),
        ("efficientnet_lite0", models.conv_head(gap()), 1000, 4_652_008),  # timm's
        ("efficientnet_lite1", models.conv_head(gap()), 1000, 5_416_680),
        ("efficientnet_lite2", models.conv_head(gap()), 1000, 6_092_072),
        ("efficientnet_lite3", models.conv_head(gap()), 1000, 8_197_096),
        ("efficientnet_lite4", models.conv_head(gap()), 1000, 13_006_568),
        ("efficientnet_b0", models.conv_head(gap(), activation="silu", eps=1e-5), 1000, 5_288_548),
        ("vgg11", models.vgg_head(), 1000, 132_868_840),
        ("vgg16", models.vgg_head(), 1000, 138_365_992),
    ],
)
def test_parameters_are_those_of_torchvision(backbone, head, classes, count):
    assert parameters(models.classifier(models.TABLE[backbone](), head, classes=classes, **RGB), 64) == count


def test_parameters_of_resnet4b():
    assert parameters(models.resnet4b(**RGB), 32) == 123_734


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
def test_preact_block(features, stride):
    x = random(1, 5, 6, 4)
    block = PreActBlock(features, stride, jnp.float32)
    variables = filled(block.init, x)
    kernel = kernels(variables)
    active = relu(numpy_norm(x[0], variables, "norm1"))
    y = relu(numpy_norm(numpy_conv(active, kernel["conv1"], stride), variables, "norm2"))
    skip = x[0] if stride == 1 else active[::2, ::2] @ kernel["project"][0, 0]
    expected = skip + numpy_conv(y, kernel["conv2"])
    np.testing.assert_allclose(jax.jit(block.apply)(variables, x)[0], expected, atol=1e-4)


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
    "stem must be 'cifar' or 'imagenet', got 'none'": lambda: models.resnet50(stem="none"),
    "blocks must be a whole number of at least 1, got 0": lambda: models.small_resnet(blocks=0),
    "VGG halves its images five times and needs at least 32x32 pixels, got 8x8": lambda: forward(models.vgg11()),
    "classifier needs a backbone and a head, e.g. classifier(resnet20(), map_head(gap()), ...)": lambda: forward(
        models.map_head(gap()), tiny()
    ),
    "classes must be a whole number of at least 2, got 1": lambda: models.resnet4b(1, **RGB),
    "dtype must be 'float32' or 'bfloat16', got 'float16'": lambda: models.classifier(
        tiny(), models.map_head(gap()), classes=3, **RGB, dtype="float16"
    ),
    "mean and std need one number per channel each, every std above 0; got mean=(0.0,), std=(0.0,)": lambda: (
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
