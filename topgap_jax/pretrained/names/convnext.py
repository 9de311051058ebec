"""ConvNeXt: the names of torchvision, timm and Hugging Face."""

import re

from topgap_jax.pretrained.names.naming import Naming

TORCHVISION = {  # {stage} counts stages and what is between them
    "stem/conv": "features.0.0",
    "stem/norm": "features.0.1",
    "stage/downsample_norm": "features.{between}.0",
    "stage/downsample": "features.{between}.1",
    "block/depthwise": "features.{stage}.{i}.block.0",
    "block/norm": "features.{stage}.{i}.block.2",
    "block/dense1": "features.{stage}.{i}.block.3",
    "block/dense2": "features.{stage}.{i}.block.5",
    "block/layer_scale": "features.{stage}.{i}.layer_scale",
    "head/norm": "classifier.0",
    "head/dense": "classifier.2",
}
TIMM = {
    "stem/conv": "stem.0",
    "stem/norm": "stem.1",
    "stage/downsample_norm": "stages.{s0}.downsample.0",
    "stage/downsample": "stages.{s0}.downsample.1",
    "block/depthwise": "stages.{s0}.blocks.{i}.conv_dw",
    "block/norm": "stages.{s0}.blocks.{i}.norm",
    "block/dense1": "stages.{s0}.blocks.{i}.mlp.fc1",
    "block/dense2": "stages.{s0}.blocks.{i}.mlp.fc2",
    "block/layer_scale": "stages.{s0}.blocks.{i}.gamma",
    "head/norm": "head.norm",
    "head/dense": "head.fc",
}
HUGGING_FACE = {
    "stem/conv": "embeddings.patch_embeddings",
    "stem/norm": "embeddings.layernorm",
    "stage/downsample_norm": "encoder.stages.{s0}.downsampling_layer.0",
    "stage/downsample": "encoder.stages.{s0}.downsampling_layer.1",
    "block/depthwise": "encoder.stages.{s0}.layers.{i}.dwconv",
    "block/norm": "encoder.stages.{s0}.layers.{i}.layernorm",
    "block/dense1": "encoder.stages.{s0}.layers.{i}.pwconv1",
    "block/dense2": "encoder.stages.{s0}.layers.{i}.pwconv2",
    "block/layer_scale": "encoder.stages.{s0}.layers.{i}.layer_scale_parameter",
    "head/norm": "layernorm",
}


def _numbers(layers):
    """{"stage2/block0/norm": {"stage": 3, "between": 2}, ...}"""
    stages = {layer: int(match[1]) for layer in layers if (match := re.match(r"stage(\d+)/", layer))}
    return {layer: {"stage": 2 * stage - 1, "between": 2 * stage - 2} for layer, stage in stages.items()}


NAMINGS = {
    "torchvision convnext": Naming(TORCHVISION, _numbers),
    "timm convnext": Naming(TIMM),
    "hugging face convnext": Naming(
        {layer: (f"convnext.{name}", name) for layer, name in HUGGING_FACE.items()} | {"head/dense": "classifier"}
    ),
}
