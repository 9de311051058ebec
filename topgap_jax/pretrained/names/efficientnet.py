"""EfficientNet and its Lite: the names of efficientnet_pytorch, timm and torchvision."""

from topgap_jax.pretrained.names.naming import Naming

EFFICIENTNET_PYTORCH = {
    "stem/conv": "_conv_stem",
    "stem/norm": "_bn0",
    "block/expand": "_blocks.{n}._expand_conv",
    "block/expand_norm": "_blocks.{n}._bn0",
    "block/depthwise": "_blocks.{n}._depthwise_conv",
    "block/depthwise_norm": "_blocks.{n}._bn1",
    "block/squeeze_excite/reduce": "_blocks.{n}._se_reduce",
    "block/squeeze_excite/expand": "_blocks.{n}._se_expand",
    "block/project": "_blocks.{n}._project_conv",
    "block/project_norm": "_blocks.{n}._bn2",
    "head/conv": "_conv_head",
    "head/norm": "_bn1",
    "head/dense": "_fc",
}

NAMINGS = {"efficientnet efficientnet_pytorch": Naming(EFFICIENTNET_PYTORCH)}
