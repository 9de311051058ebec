"""Weights in PyTorch naming and layout: written here by hand as PyTorch's authors name them, read by `pretrained`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct
from safetensors.numpy import save_file

from topgap_jax import models, pool, pretrained
from topgap_jax.build import build
from topgap_jax.errors import UserError

RGB = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


def norm(name, width):
    return {f"{name}.{leaf}": (width,) for leaf in ("weight", "bias", "running_mean", "running_var")}


def cifar_resnet(blocks, shortcut=False):
    """akamaster's names and shapes."""
    shapes = {"conv1.weight": (16, 3, 3, 3), **norm("bn1", 16), "linear.weight": (10, 64), "linear.bias": (10,)}
    before = 16
    for stage, width in enumerate((16, 32, 64), start=1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            shapes |= {f"{at}.conv1.weight": (width, before, 3, 3), f"{at}.conv2.weight": (width, width, 3, 3)}
            shapes |= norm(f"{at}.bn1", width) | norm(f"{at}.bn2", width)
            if shortcut and before != width:
                shapes |= {f"{at}.shortcut.0.weight": (width, before, 1, 1), **norm(f"{at}.shortcut.1", width)}
            before = width
    return shapes


def torchvision_resnet(blocks, bottleneck=False, stem=7):
    """torchvision's and timm's names and shapes."""
    shapes = {"conv1.weight": (64, 3, stem, stem), **norm("bn1", 64), "bn1.num_batches_tracked": ()}
    before = 64
    for stage, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512)), start=1):
        for block in range(count):
            at, out = f"layer{stage}.{block}", 4 * width if bottleneck else width
            kernels = [(width, before, 1, 1), (width, width, 3, 3), (out, width, 1, 1)]
            if not bottleneck:
                kernels = [(width, before, 3, 3), (width, width, 3, 3)]
            for i, kernel in enumerate(kernels, start=1):
                shapes |= {f"{at}.conv{i}.weight": kernel, **norm(f"{at}.bn{i}", kernel[0])}
            if before != out:
                shapes |= {f"{at}.downsample.0.weight": (out, before, 1, 1), **norm(f"{at}.downsample.1", out)}
            before = out
    return shapes | {"fc.weight": (1000, before), "fc.bias": (1000,)}


def torchvision_vgg(indices):
    """torchvision's names and shapes of VGG with batch norm, `features.N` of its convolutions given."""
    widths = {8: (64, 128, 256, 256, 512, 512, 512, 512), 13: (64,) * 2 + (128,) * 2 + (256,) * 3 + (512,) * 6}
    shapes, before = {}, 3
    for index, width in zip(indices, widths[len(indices)]):
        shapes |= {f"features.{index}.weight": (width, before, 3, 3), f"features.{index}.bias": (width,)}
        shapes |= norm(f"features.{index + 1}", width)
        before = width
    for index, (out, into) in {0: (4096, 512 * 49), 3: (4096, 4096), 6: (1000, 4096)}.items():
        shapes |= {f"classifier.{index}.weight": (out, into), f"classifier.{index}.bias": (out,)}
    return shapes


RESNET4B = {
    "conv1": (16, 3, 3, 3),
    "layer1.0.conv1": (32, 16, 3, 3),
    "layer1.0.conv2": (32, 32, 3, 3),
    "layer1.0.shortcut.0": (32, 16, 1, 1),
    "layer1.1.conv1": (32, 32, 3, 3),
    "layer1.1.conv2": (32, 32, 3, 3),
    "layer2.0.conv1": (32, 32, 3, 3),
    "layer2.0.conv2": (32, 32, 3, 3),
    "layer2.0.shortcut.0": (32, 32, 1, 1),
    "layer2.1.conv1": (32, 32, 3, 3),
    "layer2.1.conv2": (32, 32, 3, 3),
    "linear1": (100, 512),
    "linear2": (10, 100),
}
RESNET4B = {
    name: shape
    for layer, kernel in RESNET4B.items()
    for name, shape in ((f"{layer}.weight", kernel), (f"{layer}.bias", kernel[:1]))
}
VGG11 = torchvision_vgg((0, 4, 8, 11, 15, 18, 22, 25))
VGG16 = torchvision_vgg((0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40))


def random(shapes):
    generator = np.random.default_rng(0)
    normal = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: abs(tensor) if name.endswith("running_var") else tensor for name, tensor in normal.items()}


def small(head=None, **options):
    head = models.map_head(pool.gap()) if head is None else head
    return models.classifier(models.resnet20(**options), head, classes=10, **RGB)


@pytest.fixture(scope="module")
def cifar():
    return random(cifar_resnet(3))


def test_every_tensor_arrives_in_our_layout(tmp_path, cifar):
    save_file(cifar, tmp_path / "w.safetensors")
    variables = pretrained.load(tmp_path / "w.safetensors", small())
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == sum(tensor.size for tensor in cifar.values())
    params, stats = variables["params"]["backbone"], variables["batch_stats"]["backbone"]
    block = params["stage2"]["block0"]
    for ours, theirs in (
        (params["stem"]["conv"]["kernel"], cifar["conv1.weight"].transpose(2, 3, 1, 0)),
        (params["stem"]["norm"]["scale"], cifar["bn1.weight"]),
        (stats["stem"]["norm"]["mean"], cifar["bn1.running_mean"]),
        (stats["stage3"]["block2"]["norm2"]["var"], cifar["layer3.2.bn2.running_var"]),
        (block["conv1"]["kernel"], cifar["layer2.0.conv1.weight"].transpose(2, 3, 1, 0)),
        (block["norm1"]["bias"], cifar["layer2.0.bn1.bias"]),
        (variables["params"]["head"]["dense"]["kernel"], cifar["linear.weight"].T),
        (variables["params"]["head"]["dense"]["bias"], cifar["linear.bias"]),
    ):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == jnp.float32


def test_npz_prefix_half_precision_and_counters_make_no_difference(tmp_path, cifar):
    half = {name: tensor.astype(np.float16) for name, tensor in cifar.items()}
    save_file(half, tmp_path / "w.safetensors")
    counters = {"module.bn1.num_batches_tracked": np.array(7)}
    np.savez(tmp_path / "w.npz", **{f"module.{name}": tensor for name, tensor in half.items()}, **counters)
    one, other = (pretrained.load(tmp_path / name, small()) for name in ("w.safetensors", "w.npz"))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert pretrained.describe(tmp_path / "w.npz")["model"] == pretrained.describe(tmp_path / "w.safetensors")["model"]


def test_bfloat16_tensors_are_read(tmp_path):
    save_file(
        {name: tensor.astype(jnp.bfloat16) for name, tensor in random(RESNET4B).items()}, tmp_path / "w.safetensors"
    )
    variables = pretrained.load(tmp_path / "w.safetensors", models.resnet4b(**RGB))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    expected = random(RESNET4B)["linear1.weight"].T
    np.testing.assert_allclose(variables["params"]["linear1"]["kernel"], expected, rtol=0.01)


MODELS = {  # config text: tensors of the file, the data's classes
    "classifier(resnet20(), map_head(pool), classes=classes, mean=mean, std=std)": (cifar_resnet(3), 10),
    "classifier(resnet32(), map_head(pool), classes=classes, mean=mean, std=std)": (cifar_resnet(5), 10),
    "classifier(resnet44(), map_head(pool), classes=classes, mean=mean, std=std)": (cifar_resnet(7), 10),
    "classifier(resnet56(), map_head(pool), classes=classes, mean=mean, std=std)": (cifar_resnet(9), 10),
    "classifier(resnet20(shortcut='project'), map_head(pool), classes=classes, mean=mean, std=std)": (
        cifar_resnet(3, shortcut=True),
        10,
    ),
    "classifier(resnet18(stem='imagenet'), map_head(pool), classes=classes, mean=mean, std=std)": (
        torchvision_resnet((2, 2, 2, 2)),
        1000,
    ),
    "classifier(resnet18(stem='cifar'), map_head(pool), classes=classes, mean=mean, std=std)": (
        torchvision_resnet((2, 2, 2, 2), stem=3),
        1000,
    ),
    "classifier(resnet34(stem='imagenet'), map_head(pool), classes=classes, mean=mean, std=std)": (
        torchvision_resnet((3, 4, 6, 3)),
        1000,
    ),
    "classifier(resnet50(stem='imagenet'), map_head(pool), classes=classes, mean=mean, std=std)": (
        torchvision_resnet((3, 4, 6, 3), bottleneck=True),
        1000,
    ),
    "classifier(vgg11(), vgg_head(), classes=classes, mean=mean, std=std)": (VGG11, 1000),
    "classifier(vgg16(), vgg_head(), classes=classes, mean=mean, std=std)": (VGG16, 1000),
    "resnet4b(classes=classes, mean=mean, std=std)": (RESNET4B, 10),
}


@pytest.mark.parametrize("text", MODELS)
def test_names_and_shapes_of_every_architecture(text, monkeypatch):
    """The file is described as this model, and this model asks for exactly the file's tensors (none of them is
    made)."""
    shapes, classes = MODELS[text]
    described = pretrained.Description({k: v for k, v in shapes.items() if not k.endswith("tracked")}, {})
    for module in (pretrained, pretrained.networks):
        monkeypatch.setattr(module, "read", lambda path: described)
    monkeypatch.setattr(
        pretrained, "tensors", lambda path: {k: np.broadcast_to(np.float32(0), v) for k, v in shapes.items()}
    )
    monkeypatch.setattr(pretrained.fitting, "ours", lambda path, shape, tensor: 0)
    told = pretrained.describe("w.safetensors")
    assert told["model"] == text
    imagenet = "imagenet" in text or "vgg" in text
    assert told["mean"] == ((0.485, 0.456, 0.406) if imagenet else None)
    assert told["std"] == ((0.229, 0.224, 0.225) if imagenet else None)
    model = build(text, models.TABLE, {"classes": classes, "pool": pool.gap(), **RGB})
    pretrained.load("w.safetensors", model)


def test_vgg_and_pre_activation_names_of_cifar_authors():
    """Those of kuangliu's nets, which end in `classifier` and `linear`, and of Rice et al.'s, whose last norm is
    `bn`."""

    def names(model, known=()):
        variables = jax.eval_shape(model.init, jax.random.key(0), ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
        leaves = jax.tree.flatten_with_path(variables)[0]
        return pretrained.torch_names({tuple(k.key for k in keys): x.shape for keys, x in leaves}, known).values()

    head = models.map_head(pool.gap())
    vgg = names(models.classifier(models.vgg11(), head, classes=10, **RGB), {"classifier.weight"})
    assert set(vgg) == {name for name in VGG11 if name.startswith("features")} | {
        "classifier.weight",
        "classifier.bias",
    }
    known = {"linear.weight", "layer2.0.shortcut.0.weight"}
    preact = names(models.classifier(models.preact_resnet18(), head, classes=10, **RGB), known)
    assert {"bn.running_mean", "linear.bias", "layer2.0.shortcut.0.weight", "layer4.1.bn1.weight"} < set(preact)
    assert len(set(preact)) == len(preact)


def test_metadata_tell_the_normalisation(tmp_path, cifar):
    save_file(cifar, tmp_path / "w.safetensors", {"mean": "0.4914, 0.4822,0.4465", "std": "0.2471,0.2435,0.2616"})
    told = pretrained.describe(tmp_path / "w.safetensors")
    assert told["mean"] == (0.4914, 0.4822, 0.4465) and told["std"] == (0.2471, 0.2435, 0.2616)


def test_unknown_tensors_are_described_as_nothing(tmp_path):
    save_file({"conv1.weight": np.zeros((8, 3, 3, 3), np.float32)}, tmp_path / "w.safetensors")
    assert pretrained.describe(tmp_path / "w.safetensors") == {"mean": None, "std": None, "model": None}


def error(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_unexpected_and_mis_shaped_tensors_are_listed(tmp_path, cifar):
    path = tmp_path / "w.safetensors"
    wrong = dict(cifar)
    del wrong["layer1.0.conv1.weight"]
    wrong["layer4.0.conv1.weight"] = np.zeros(3, np.float32)
    wrong["linear.weight"] = np.zeros((100, 64), np.float32)
    save_file(wrong, path)
    assert (
        error(pretrained.load, path, small())
        == f"{path} does not fit the model: missing: layer1.0.conv1.weight; unexpected: layer4.0.conv1.weight; "
        "mis-shaped: linear.weight (100, 64) instead of (10, 64)"
    )


def test_a_long_list_is_cut(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"scale": np.zeros(3, np.float32)}, path)
    text = error(pretrained.load, path, small())
    # 19 convolutions, 19 norms of 4 tensors each and the dense layer's 2 are 97; 4 are spelled out.
    assert f"{path} does not fit the model: missing: " in text
    assert " and 93 more; unexpected: scale" in text


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("the file was unpickled",))


def test_objects_in_npz_are_not_unpickled(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, **{"conv1.weight": np.array([Trap()], dtype=object)})
    text = error(pretrained.describe, path)
    assert text.startswith(f"{path} is not a readable .npz file of plain arrays: Object arrays cannot be loaded")


def test_other_files(tmp_path):
    assert (
        error(pretrained.describe, "w.onnx")
        == "w.onnx: weights are read from .safetensors, .npz, .pth, .pt, .bin, .th, .tar, .ckpt files, not from '.onnx'"
    )
    assert error(pretrained.describe, "none.safetensors") == "there is no weights file 'none.safetensors'"
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    assert error(pretrained.describe, broken).startswith(f"{broken} is not a readable safetensors file: ")
    zipped = tmp_path / "broken.npz"
    zipped.write_bytes(b"PK nothing")
    assert error(pretrained.load, zipped, small()).startswith(f"{zipped} is not a readable .npz file of plain arrays: ")


def test_metadata_that_are_no_numbers(tmp_path, cifar):
    path = tmp_path / "w.safetensors"
    save_file(cifar, path, {"mean": "about a half"})
    assert (
        error(pretrained.describe, path)
        == f"{path}: the metadata say mean='about a half'; expected numbers like '0.485,0.456,0.406'"
    )


def test_a_head_that_pytorch_has_no_names_for(tmp_path, cifar):
    path = tmp_path / "w.safetensors"
    save_file(cifar, path)
    assert (
        error(pretrained.load, path, small(models.pyramid_head(pool.gap(), width=4)))
        == "the layer 'head/lateral_stage1' of this model has no name in PyTorch's files: weights are read into"
        " backbones with the head that they were published with, e.g. map_head(pool) or conv_head(pool);"
        " head=None leaves the file's head out"
    )


LOGITS = {  # of CIFAR-10's test image 0, measured in PyTorch
    "resnet20_cifar10": (-5.3097, -0.4958, 0.8773, 23.7305, -4.1050, 4.4637, -0.2343, -5.4179, -3.7118, -9.8822),
    "resnet32_cifar10": (-0.3690, 1.3433, -1.0559, 18.4410, -6.1009, 0.6111, -1.8881, -2.4627, -3.8274, -4.6605),
    "resnet44_cifar10": (-6.8512, -1.0791, 0.7169, 29.5060, -7.3731, 3.7368, 4.2831, -5.0542, -8.3445, -9.7938),
    "resnet4b_adv2_cifar10": (-1.0657, -2.0077, 0.4390, 3.9829, -1.0166, 2.9082, 0.8422, -0.4090, -1.5756, -2.0801),
}


@pytest.mark.parametrize("name", LOGITS)
def test_published_weights_give_pytorchs_logits(topgap_data, name):
    import tensorflow_datasets as tfds

    record = tfds.data_source("cifar10", data_dir=str(topgap_data / "tfds"), split="test")[0]
    images = np.float32(record["image"][None]) / 255
    path = topgap_data / "weights" / f"{name}.safetensors"
    told = pretrained.describe(path)
    values = {"classes": 10, "pool": pool.gap(), "mean": told["mean"], "std": told["std"]}
    model = build(told["model"], models.TABLE, values)
    logits = jax.jit(model.apply)(pretrained.load(path, model), images).logits
    np.testing.assert_allclose(logits[0], LOGITS[name], atol=1e-3)


@pytest.mark.slow
def test_efficientnet_lite0_gives_its_published_logits(topgap_data):
    """The first picture of imagenet500, a tench, in the centre crop of 224 pixels; measured in PyTorch."""
    import tensorflow_datasets as tfds

    source = tfds.data_source("imagenet500", data_dir=str(topgap_data / "tfds"))
    picture = next(iter(source.values()))[0]["image"]
    top, left = ((n - 224) // 2 for n in picture.shape[:2])
    images = np.float32(picture[None, top : top + 224, left : left + 224]) / 255
    path = topgap_data / "weights" / "efficientnet_lite0_imagenet.safetensors"
    described = pretrained.describe(path)
    np.testing.assert_allclose((described["mean"], described["std"]), ([127 / 255] * 3, [128 / 255] * 3), atol=1e-7)
    values = {"classes": 1000, "pool": pool.gap(), "mean": described["mean"], "std": described["std"]}
    model = build(described["model"], models.TABLE, values)
    logits = jax.jit(model.apply)(pretrained.load(path, model, image_shape=(224, 224, 3)), images).logits[0]
    np.testing.assert_allclose(
        logits[:8], (10.3121, 5.4997, 1.2099, 1.2734, 1.0688, 1.3066, 0.0411, -1.0858), atol=1e-3
    )
    assert np.argsort(-logits)[:5].tolist() == [0, 1, 389, 391, 395]
