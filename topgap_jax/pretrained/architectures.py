"""The networks that a file of weights can be, as data: recognised by what its first kernel is called and by the number
of its parameters."""

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from topgap_jax.pretrained.names import unused

Shape = tuple[int, ...]
Normalisation = Mapping[str, tuple[float, ...]]

IMAGENET: Normalisation = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF: Normalisation = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
BYTES: Normalisation = {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}
NONE: Normalisation = {}

# What the number of classes, the size of images or the batches decide is not counted: the last dense layer, by all
# namings, positions, running statistics.
UNCOUNTED = re.compile(
    r"(fc|fc\.\d|_fc|linear|linear2|logits|head|head\.fc|classifier|classifier\.[1236])\.(weight|bias)"
    r"|.*\.running_(mean|var)|pos_embed"
)


class Architecture(NamedTuple):
    """A network in one naming or several.

    model: its config text; parameters: their number, without the last dense layer; first: what a file may call its
    first kernel; published: mean and std of the weights that go by these names, where there is one choice; hub: how
    the architecture begins in a hub's config.json, where names and shapes do not tell it from the next row's.
    """

    model: str
    parameters: int
    first: tuple[str, ...]
    published: Normalisation = NONE
    hub: str = ""


def recognise(shapes: Mapping[str, Shape], hub: str = "") -> Architecture | None:
    """The architecture of a file with tensors of these shapes, None where it is not among ours. hub: what a hub's
    config.json calls it."""
    return next((row for row in alike(shapes) if hub.startswith(row.hub)), None)


def alike(shapes: Mapping[str, Shape]) -> list[Architecture]:
    """All architectures with tensors of these names and shapes: of some there are two publications, which a hub's name
    tells apart."""
    counted = (name for name in shapes if not (UNCOUNTED.fullmatch(name) or unused(name)))
    parameters = sum(math.prod(shapes[name]) for name in counted)
    of_file = lambda row: row.parameters == parameters and any(name in shapes for name in row.first)
    return [row for row in ARCHITECTURES if of_file(row)]


def foreign(shapes: Mapping[str, Shape]) -> str | None:
    """What kind of network, not among ours, has tensors of these shapes ("a ResNeXt"), None where that is unknown."""
    for kind, pattern, test in FOREIGN:
        for name, shape in shapes.items():
            if re.fullmatch(pattern, name) and (test is None or (len(shape) == 4 and test(*shape))):
                return kind
    return None


def unlike(shapes: Mapping[str, Shape]) -> str | None:
    """What to say of a file that does not fit a model: which network it is, or that it is one which is not among ours;
    None where that is unknown."""
    if row := recognise(shapes):
        return f"the file is {row.model}"
    if kind := foreign(shapes):
        networks = dict.fromkeys(re.search(r"(?:classifier\()?(\w+)", row.model)[1] for row in ARCHITECTURES)
        return f"this is {kind}, which is not among {', '.join(networks)}"
    return None


def _text(backbone: str, head: str = "map_head(pool)") -> str:
    return f"classifier({backbone}, {head}, classes=classes, mean=mean, std=std)"


# What files call the first kernel.
RESNET = ("conv1.weight", "embedder.embedder.convolution.weight", "resnet.embedder.embedder.convolution.weight")
RESNET_D, TRADES, DEEPMIND, VGG = ("conv1.0.weight",), ("conv1.weight",), ("init_conv.weight",), ("features.0.weight",)
EFFICIENTNET_PYTORCH, TIMM, TORCHVISION = ("_conv_stem.weight",), ("conv_stem.weight",), ("features.0.0.weight",)
CONVNEXT = (
    "features.0.0.weight",
    "stem.0.weight",
    "embeddings.patch_embeddings.weight",
    "convnext.embeddings.patch_embeddings.weight",
)
DENSENET, VIT = ("features.conv0.weight",), ("patch_embed.proj.weight",)

# Options in which publications of the same network differ.
PYTORCH, TENSORFLOW = "padding='symmetric', eps=1e-05", "padding='same', eps=0.001"
SILU = "conv_head(pool, activation='silu', eps={})"
SMALL = "mobilenet_head(width=576, hidden=1024{})"

ARCHITECTURES = (
    Architecture(_text("resnet18(stem='imagenet')"), 11_176_512, RESNET, IMAGENET),
    Architecture(_text("resnet34(stem='imagenet')"), 21_284_672, RESNET, IMAGENET),
    Architecture(_text("resnet50(stem='imagenet')"), 23_508_032, RESNET, IMAGENET),
    Architecture(_text("resnet18(stem='cifar')"), 11_168_832, RESNET),
    Architecture(_text("resnet34(stem='cifar')"), 21_276_992, RESNET),
    Architecture(_text("resnet50(stem='cifar')"), 23_500_352, RESNET),
    Architecture(_text("resnet18(stem='deep', shortcut='average')"), 11_195_744, RESNET_D, IMAGENET),
    Architecture(_text("resnet34(stem='deep', shortcut='average')"), 21_303_904, RESNET_D, IMAGENET),
    Architecture(_text("resnet50(stem='deep', shortcut='average')"), 23_527_264, RESNET_D, IMAGENET),
    Architecture(_text("resnet20()"), 269_072, RESNET),
    Architecture(_text("resnet32()"), 463_504, RESNET),
    Architecture(_text("resnet44()"), 657_936, RESNET),
    Architecture(_text("resnet56()"), 852_368, RESNET),
    Architecture(_text("resnet20(shortcut='project')"), 271_824, RESNET),
    Architecture(_text("resnet32(shortcut='project')"), 466_256, RESNET),
    Architecture(_text("resnet44(shortcut='project')"), 660_688, RESNET),
    Architecture(_text("resnet56(shortcut='project')"), 855_120, RESNET),
    Architecture("resnet4b(classes=classes, mean=mean, std=std)", 122_724, RESNET),
    Architecture(_text("preact_resnet18()"), 11_167_040, RESNET),
    Architecture(_text("wrn28_10()"), 36_472_784, TRADES),
    Architecture(_text("wrn28_10(activation='silu', padding='same')"), 36_472_784, DEEPMIND),
    # torchvision's second dense layer has a name that MobileNetV3's last one has, and is not counted; timm's is
    Architecture(_text("vgg11()", "vgg_head()"), 111_990_528, VGG, IMAGENET),
    Architecture(_text("vgg11()", "vgg_head()"), 128_771_840, VGG, IMAGENET),
    Architecture(_text("vgg16()", "vgg_head()"), 117_487_680, VGG, IMAGENET),
    Architecture(_text("vgg16()", "vgg_head()"), 134_268_992, VGG, IMAGENET),
    Architecture(_text("vgg11()"), 9_225_984, VGG),
    Architecture(_text("vgg16()"), 14_723_136, VGG),
    Architecture(_text("efficientnet_lite0()", "conv_head(pool)"), 3_371_008, EFFICIENTNET_PYTORCH, BYTES),
    Architecture(_text("efficientnet_lite1()", "conv_head(pool)"), 4_135_680, EFFICIENTNET_PYTORCH, BYTES),
    Architecture(_text("efficientnet_lite2()", "conv_head(pool)"), 4_811_072, EFFICIENTNET_PYTORCH, BYTES),
    Architecture(_text("efficientnet_lite3()", "conv_head(pool)"), 6_916_096, EFFICIENTNET_PYTORCH, BYTES),
    Architecture(_text("efficientnet_lite4()", "conv_head(pool)"), 11_725_568, EFFICIENTNET_PYTORCH, BYTES),
    Architecture(_text("efficientnet_lite0()", "conv_head(pool)"), 3_371_008, TIMM, HALF, "tf_"),
    Architecture(_text(f"efficientnet_lite0({PYTORCH})", "conv_head(pool, eps=1e-05)"), 3_371_008, TIMM, IMAGENET),
    Architecture(_text("efficientnet_lite1()", "conv_head(pool)"), 4_135_680, TIMM, HALF),
    Architecture(_text("efficientnet_lite2()", "conv_head(pool)"), 4_811_072, TIMM, HALF),
    Architecture(_text("efficientnet_lite3()", "conv_head(pool)"), 6_916_096, TIMM, HALF),
    Architecture(_text("efficientnet_lite4()", "conv_head(pool)"), 11_725_568, TIMM, HALF),
    Architecture(_text(f"efficientnet_b0({TENSORFLOW})", SILU.format(1e-3)), 4_007_548, EFFICIENTNET_PYTORCH, IMAGENET),
    Architecture(_text(f"efficientnet_b0({TENSORFLOW})", SILU.format(1e-3)), 4_007_548, TIMM, IMAGENET, "tf_"),
    Architecture(_text("efficientnet_b0()", SILU.format(1e-5)), 4_007_548, (*TIMM, *TORCHVISION), IMAGENET),
    Architecture(_text("mobilenet_v3_large()", "mobilenet_head()"), 4_202_032, TORCHVISION, IMAGENET),
    Architecture(_text(f"mobilenet_v3_large({TENSORFLOW})", "mobilenet_head()"), 4_202_032, TIMM, HALF, "tf_"),
    Architecture(_text(f"mobilenet_v3_large({PYTORCH})", "mobilenet_head(eps=1e-05)"), 4_202_032, TIMM, IMAGENET),
    Architecture(_text("mobilenet_v3_small()", SMALL.format("")), 1_517_856, TORCHVISION, IMAGENET),
    Architecture(_text(f"mobilenet_v3_small({TENSORFLOW})", SMALL.format("")), 1_517_856, TIMM, HALF, "tf_"),
    Architecture(_text(f"mobilenet_v3_small({PYTORCH})", SMALL.format(", eps=1e-05")), 1_517_856, TIMM, IMAGENET),
    Architecture(_text("convnext_tiny()", "convnext_head()"), 27_820_128, CONVNEXT, IMAGENET),
    Architecture(_text("convnext_small()", "convnext_head()"), 49_454_688, CONVNEXT, IMAGENET),
    Architecture(_text("convnext_base()", "convnext_head()"), 87_566_464, CONVNEXT, IMAGENET),
    Architecture(_text("densenet121()"), 6_953_856, DENSENET, IMAGENET),
    Architecture("vit_s16(classes=classes, mean=mean, std=std)", 21_590_016, VIT, IMAGENET, "deit_"),
    Architecture("vit_s16(classes=classes, mean=mean, std=std)", 21_590_016, VIT, HALF, "vit_"),
    Architecture("vit_s16(classes=classes, mean=mean, std=std)", 21_590_016, VIT),
)


# Networks that are not among ours, by the name of one of their tensors and, where there is a test, by its shape as a
# kernel (out, in, height, width); the first that fits counts. Our networks with other numbers of layers come last.
FOREIGN: tuple[tuple[str, str, Callable[..., bool] | None], ...] = (
    ("a ResNeXt", r"layer1\.0\.conv2\.weight", lambda out, into, h, w: into < out),
    ("a wide ResNet", r"layer1\.0\.conv2\.weight", lambda out, into, h, w: out > 64),
    ("a residual network with squeeze-and-excite", r"layer1\.0\.se\..+", None),
    ("a RegNet", r"(trunk_output\.block1|s1\.b1)\..+", None),
    ("a BiT or ResNetV2", r"(resnet/)?root_block/standardized_conv2d/kernel|stages\.0\.blocks\.0\.norm3\.weight", None),
    ("a Swin transformer", r"(layers|features)\.\d\.(blocks\.)?\d\.attn\.relative_position_bias_table", None),
    ("a ConvNeXt V2", r".*\.grn\..+", None),
    (
        "an EfficientNetV2",
        r"blocks\.0\.0\.conv\.weight|features\.1\.0\.block\.0\.0\.weight",
        lambda out, into, h, w: into > 1 and h == w == 3,
    ),
    ("a MobileNetV2", r"features\.1\.conv\.0\.0\.weight", None),
    ("a ShuffleNet", r"stage2\.0\.branch1\.0\.weight", None),
    ("a SqueezeNet", r"features\.\d+\.squeeze\.weight", None),
    ("a GoogLeNet", r"inception3a\..+", None),
    ("an Inception network", r"Mixed_5b\..+", None),
    ("an AlexNet", r"features\.0\.weight", lambda out, into, h, w: h == 11),
    (
        "a transformer",
        r".*relative_position_bias_table|.*(attn\.qkv|self_attention\.in_proj_|attention\.attention\.query)\.?weight",
        None,
    ),
    ("a ConvNeXt of another kind", r".*(layer_scale|layer_scale_parameter|stages\.0\.blocks\.0\.gamma)", None),
    ("an EfficientNet or MobileNet of another kind", r"_?conv_stem\.weight|features\.1\.(0\.)?block\..+", None),
    ("a DenseNet of another size", r"features\.denseblock1\..+", None),
    ("a wide ResNet of another size", r"block1\.layer\.0\.conv1\.weight|layer\.0\.block\.0\.conv_0\.weight", None),
    ("a VGG of another kind", r"features\.[23]\.weight", lambda *shape: True),
    (
        "a residual network of another kind",
        r"layer1\.0\.conv1\.weight|.*encoder\.stages\.0\.layers\.0\.layer\..+",
        None,
    ),
)
