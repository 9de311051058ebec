"""Names of layers in files: every network by every naming, against the names of the packages themselves, and back."""

import functools
import hashlib
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct
from safetensors.numpy import save_file

from topgap_jax import models, pool, pretrained
from topgap_jax.build import build
from topgap_jax.errors import UserError
from topgap_jax.pretrained import fitting
from topgap_jax.pretrained.architectures import ARCHITECTURES, FOREIGN, foreign, recognise
from topgap_jax.pretrained.names import NAMINGS, torch_names
from topgap_jax.pretrained.names.layout import fits, ours, torch_shape

VALUES = {"classes": 1000, "pool": pool.gap(), "mean": (0.5,) * 3, "std": (0.25,) * 3}


def model_of(text):
    return build(text, models.TABLE, VALUES)


@functools.cache
def variables_of(text):
    """{path: shape} of the network of a config text, of which nothing is computed."""
    size = 32 if "4b" in text else 224 if "vit" in text or "vgg_head" in text else 64
    images = ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    leaves = jax.tree.flatten_with_path(jax.eval_shape(model_of(text).init, jax.random.key(0), images))[0]
    return {tuple(key.key for key in keys): leaf.shape for keys, leaf in leaves}


def files(row):
    """{naming: {path: name}} of the namings that call the row's first kernel as the row says."""
    variables = variables_of(row.model)
    named = {key: naming.names(variables) for key, naming in NAMINGS.items()}
    return {key: names for key, names in named.items() if names and set(row.first) & set(names.values())}


QUICK = (
    "resnet18(stem='imagenet')",
    "resnet18(stem='deep'",
    "resnet20(shortcut",
    "wrn",
    "vgg11(), map_head",
    "lite0",
    "b0",
)
QUICK = (*QUICK, "large", "convnext_tiny", "densenet", "vit", "resnet4b", "preact")


def marked(row):
    slow = () if any(part in row.model for part in QUICK) else (pytest.mark.slow,)
    return pytest.param(row, id=f"{row.model}-{row.first[0]}-{row.hub}", marks=slow)


@pytest.mark.parametrize("row", [marked(row) for row in ARCHITECTURES])
def test_a_file_is_recognised_and_all_of_it_is_asked_for(row):
    variables = variables_of(row.model)
    namings = files(row)
    assert namings
    for naming, names in namings.items():
        assert len(set(names.values())) == len(variables), naming
        shapes = {name: torch_shape(path, variables[path]) for path, name in names.items()}
        if "vgg_head" in row.model and (row.parameters > 120e6) != (naming == "timm vgg"):
            continue  # a row for each of the two
        described = recognise(shapes, row.hub)
        assert described is not None and (described.model, described.published) == (row.model, row.published), naming
        assert torch_names(variables, shapes) == names, naming


# sha256 of the lines "name elements" of what the package itself saves, in the order of the alphabet; torchvision 0.28,
# timm 1.0.31, RobustBench 1.1.1.
SAVED = {
    ("torchvision resnet", "resnet50(stem='imagenet'), map_head(pool)"): "418a1a88f9479c81",
    ("torchvision vgg", "vgg16(), vgg_head()"): "3cbb2ae4624aad77",
    ("torchvision efficientnet", "efficientnet_b0(), conv_head(pool)"): "1a86b2a2b6787ae9",
    ("torchvision mobilenet", "mobilenet_v3_small(), mobilenet_head(width=576, hidden=1024)"): "3cfce8f871fef36d",
    ("torchvision mobilenet", "mobilenet_v3_large(), mobilenet_head()"): "8d320dad1dcebec6",
    ("torchvision convnext", "convnext_tiny(), convnext_head()"): "fe93c932ff7cb76f",
    ("torchvision convnext", "convnext_base(), convnext_head()"): "90d93a5c451f689d",
    ("torchvision densenet", "densenet121(), map_head(pool)"): "6ae7c11f144bc6f0",
    ("timm resnet-d", "resnet18(stem='deep', shortcut='average'), map_head(pool)"): "243804de774d84a4",
    ("timm resnet-d", "resnet50(stem='deep', shortcut='average'), map_head(pool)"): "fbf4f4520ed4b659",
    ("timm vgg", "vgg11(), vgg_head()"): "27a2483fad6608f5",
    ("timm efficientnet", "efficientnet_b0(), conv_head(pool)"): "e18ea8c5d99448bf",
    ("timm efficientnet", "efficientnet_lite0(), conv_head(pool)"): "d40260be3b6b229d",
    ("timm efficientnet", "efficientnet_lite4(), conv_head(pool)"): "7b43410c679d7650",
    ("timm mobilenet", "mobilenet_v3_small(), mobilenet_head(width=576, hidden=1024)"): "aae05c003bef5ab1",
    ("timm mobilenet", "mobilenet_v3_large(), mobilenet_head()"): "cd69971b6dd5a718",
    ("timm convnext", "convnext_tiny(), convnext_head()"): "4e07cbdddce24652",
    ("timm convnext", "convnext_small(), convnext_head()"): "4755c85d7cb4192b",
    ("timm vit", "vit_s16"): "df1e604686afee55",
}
SIBLINGS = ("resnet50(", "vgg16", "small", "base", "lite4")


@pytest.mark.parametrize(
    "naming, network",
    [pytest.param(*key, marks=pytest.mark.slow if any(s in key[1] for s in SIBLINGS) else ()) for key in SAVED],
)
def test_names_are_those_that_the_package_saves(naming, network):
    text = f"classifier({network}, classes=classes, mean=mean, std=std)"
    text = "vit_s16(classes=classes, mean=mean, std=std)" if network == "vit_s16" else text
    variables = variables_of(text)
    names = NAMINGS[naming].names(variables)
    lines = sorted(f"{name} {math.prod(variables[path])}" for path, name in names.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == SAVED[naming, network]


def test_a_file_of_timm_becomes_our_variables_and_they_a_file(tmp_path):
    """MobileNetV3: dense layers that timm has as convolutions, among others."""
    text = "classifier(mobilenet_v3_small(), mobilenet_head(width=576, hidden=1024), classes=10, mean=mean, std=std)"
    names = NAMINGS["timm mobilenet"].names(variables_of(text))
    generator, tensors, expected = np.random.default_rng(0), {}, {}
    for path, shape in variables_of(text).items():
        expected[path] = values = np.abs(generator.normal(size=shape)).astype(np.float32)
        if path[-1] == "kernel":
            values = values.transpose(3, 2, 0, 1) if values.ndim == 4 else values.T
            if "hidden" in path or "squeeze_excite" in path:
                values = values[..., None, None]
        tensors[names[path]] = np.ascontiguousarray(values)
    unused = {"sub_block1.layer.0.bn1.weight": np.ones(3, np.float32)}  # TRADES's, which nothing uses
    save_file(tensors | unused, tmp_path / "w.safetensors")
    loaded = pretrained.load(tmp_path / "w.safetensors", model_of(text), image_shape=(64, 64, 3))
    for keys, leaf in jax.tree.flatten_with_path(loaded)[0]:
        np.testing.assert_array_equal(leaf, expected[tuple(key.key for key in keys)], str(keys))
    saved = pretrained.to_torch(loaded, "timm mobilenet")
    assert set(saved) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(saved[name], tensor, name)  # shapes too


def test_namings_that_a_network_does_not_have():
    variables = {"params": {"backbone": {"stem": {"patch": {"kernel": np.ones((1, 1, 3, 4))}}}}}
    for naming, text in (
        ("timm mobilnet", "there is no naming 'timm mobilnet'; did you mean 'timm mobilenet'? choose from torchvision"),
        ("torchvision resnet", "the layer 'stem/patch' has no name by 'torchvision resnet'"),
    ):
        with pytest.raises(UserError) as caught:
            pretrained.to_torch(variables, naming)
        assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    "leaf, shape, file",
    [
        ("kernel", (3, 3, 4, 6), (6, 4, 3, 3)),
        ("kernel", (3, 3, 1, 6), (6, 1, 3, 3)),
        ("kernel", (4, 6), (6, 4)),
        ("kernel", (4, 6), (6, 4, 1, 1)),
        ("kernel", (12, 6), (6, 3, 2, 2)),
        ("layer_scale", (6,), (6, 1, 1)),
        ("bias", (6,), (6,)),
        ("positions", (1, 5, 6), (1, 5, 6)),
    ],
)
def test_layouts(leaf, shape, file):
    assert fits(("params", leaf), shape, file)
    tensor = np.arange(math.prod(file), dtype=np.float32).reshape(file)
    value = ours(("params", leaf), shape, tensor)
    assert value.shape == shape
    flat = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T if leaf == "kernel" else value
    np.testing.assert_array_equal(flat.ravel(), tensor.ravel())


@pytest.mark.parametrize(
    "leaf, shape, file",
    [
        ("kernel", (3, 3, 4, 6), (6, 4, 3)),
        ("kernel", (3, 3, 4, 6), (4, 6, 3, 3)),
        ("kernel", (1, 1, 4, 6), (6, 4)),
        ("kernel", (4, 6), (4, 6)),
        ("kernel", (4, 6), (6, 5, 1, 1)),
        ("bias", (6,), (5,)),
        ("positions", (1, 5, 6), (1, 6, 5)),
    ],
)
def test_layouts_that_do_not_fit(leaf, shape, file):
    assert not fits(("params", leaf), shape, file)


OTHERS = {
    "a ResNeXt": {"layer1.0.conv2.weight": (128, 4, 3, 3), "conv1.weight": (64, 3, 7, 7)},
    "a wide ResNet": {"layer1.0.conv2.weight": (128, 128, 3, 3), "conv1.weight": (64, 3, 7, 7)},
    "a residual network with squeeze-and-excite": {"layer1.0.se.fc1.weight": (4, 64, 1, 1)},
    "a RegNet": {"trunk_output.block1.block1-0.f.a.0.weight": (24, 32, 1, 1)},
    "a BiT or ResNetV2": {"resnet/root_block/standardized_conv2d/kernel": (7, 7, 3, 64)},
    "a Swin transformer": {"layers.0.blocks.0.attn.relative_position_bias_table": (169, 3)},
    "a ConvNeXt V2": {"stages.0.blocks.0.mlp.grn.weight": (384,), "stages.0.blocks.0.gamma": (96,)},
    "an EfficientNetV2": {"features.1.0.block.0.0.weight": (24, 24, 3, 3)},
    "a MobileNetV2": {"features.1.conv.0.0.weight": (32, 1, 3, 3)},
    "a ShuffleNet": {"stage2.0.branch1.0.weight": (24, 1, 3, 3)},
    "a SqueezeNet": {"features.3.squeeze.weight": (16, 64, 1, 1)},
    "a GoogLeNet": {"inception3a.branch1.conv.weight": (64, 192, 1, 1)},
    "an Inception network": {"Mixed_5b.branch1x1.conv.weight": (64, 192, 1, 1)},
    "an AlexNet": {"features.0.weight": (64, 3, 11, 11)},
    "a transformer": {"blocks.0.attn.qkv.weight": (2304, 768), "patch_embed.proj.weight": (768, 3, 16, 16)},
    "a ConvNeXt of another kind": {"stages.0.blocks.0.gamma": (192,)},
    "an EfficientNet or MobileNet of another kind": {"conv_stem.weight": (32, 3, 3, 3)},
    "a DenseNet of another size": {"features.denseblock1.denselayer1.norm1.weight": (64,)},
    "a wide ResNet of another size": {"block1.layer.0.conv1.weight": (192, 16, 3, 3)},
    "a VGG of another kind": {"features.2.weight": (64, 64, 3, 3)},
    "a residual network of another kind": {"layer1.0.conv1.weight": (64, 64, 1, 1)},
}


def test_networks_that_are_not_among_ours():
    assert set(OTHERS) == {kind for kind, *_ in FOREIGN}
    for kind, shapes in OTHERS.items():
        assert recognise(shapes) is None and foreign(shapes) == kind
    assert foreign({"weight": (3, 3)}) is None


def test_what_a_hub_calls_it_decides_where_shapes_do_not(tmp_path):
    row = next(row for row in ARCHITECTURES if row.hub == "tf_" and "b0" in row.model)
    variables = variables_of(row.model)
    names = NAMINGS["timm efficientnet"].names(variables)
    shapes = {name: torch_shape(path, variables[path]) for path, name in names.items()}
    assert "padding='same', eps=0.001" in recognise(shapes, "tf_efficientnet_b0").model
    save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, tmp_path / "w.safetensors")
    assert pretrained.describe(tmp_path / "w.safetensors")["alike"] == row.model
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "tf_efficientnet_b0"}))
    told = pretrained.describe(tmp_path / "w.safetensors")
    assert told["model"] == row.model and "alike" not in told
    assert "efficientnet_b0()" in recognise(shapes, "efficientnet_b0").model


def test_an_error_says_which_network_the_file_is(tmp_path):
    model = model_of("classifier(resnet20(), map_head(pool), classes=classes, mean=mean, std=std)")

    def error(shapes):
        save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, tmp_path / "w.safetensors")
        with pytest.raises(UserError) as caught:
            pretrained.load(tmp_path / "w.safetensors", model)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    others = error(OTHERS["a ResNeXt"])
    # Before the names: the command line shows the first 500 characters of an error.
    assert "does not fit the model; this is a ResNeXt, which is not among resnet18, resnet34, resnet50, " in others
    assert others.index("vit_s16: missing: ") < 500
    text = (
        "classifier(mobilenet_v3_small(), mobilenet_head(width=576, hidden=1024), classes=classes, mean=mean, std=std)"
    )
    names = NAMINGS["torchvision mobilenet"].names(variables_of(text))
    ours = error({name: torch_shape(path, variables_of(text)[path]) for path, name in names.items()})
    assert f"does not fit the model; the file is {text}: missing: " in ours
    assert error({"scale": (3,)}).endswith("unexpected: scale")


def test_heads_of_others_than_the_published(tmp_path):
    """What people put in the place of a ResNet's `fc`: dropout and a dense layer are read, two dense layers are told
    to be a head."""
    text = "classifier(resnet18(), map_head(pool), classes=classes, mean=mean, std=std)"
    variables = variables_of(text)
    names = NAMINGS["torchvision resnet"].names(variables)
    shapes = {name: torch_shape(path, variables[path]) for path, name in names.items()}
    dropped = {re.sub(r"^fc\.", "fc.1.", name): shape for name, shape in shapes.items()}
    assert recognise(dropped) == recognise(shapes)
    assert torch_names(variables, dropped)[("params", "head", "dense", "kernel")] == "fc.1.weight"
    deep = {re.sub(r"^fc\.", "fc.3.", name): shape for name, shape in shapes.items()} | {"fc.0.weight": (64, 512)}
    with pytest.raises(UserError, match=r"does not fit the model; its head is another; head=None leaves .*: missing: "):
        fitting._fit("w.pth", deep, variables, "file")
    # A transformer's positions are of one image size.
    text = fitting._hint({"pos_embed": (1, 197, 384)}, None, [], {("params", "positions"): ""})
    assert "images of 224 x 224 pixels" in text


def test_the_head_of_any_naming_can_be_left_out():
    """What `head=None` drops of a file: the head's tensors, whatever they are called, and nothing of the blocks."""
    for naming in NAMINGS.values():
        for layer, templates in naming.table.items():
            for template in (templates,) if isinstance(templates, str) else templates:
                name = re.sub(r"\{\w+\}", "2", template) + ".weight"
                if layer.split("/")[0] in ("head", "block"):
                    assert fitting._of_a_head(name, None) == layer.startswith("head"), name
