"""Residual networks, plain and pre-activation: the names of torchvision, which timm shares, of timm's ResNet-D, of
Hugging Face, of CIFAR's authors (akamaster, kuangliu, Rice et al.), and of RobustBench's two kinds of WRN-28-10."""

from topgap_jax.pretrained.names.naming import Naming

TORCHVISION = {
    "stem/conv": "conv1",
    "stem/norm": "bn1",
    "block/conv1": "layer{s}.{i}.conv1",
    "block/conv2": "layer{s}.{i}.conv2",
    "block/conv3": "layer{s}.{i}.conv3",
    "block/norm1": "layer{s}.{i}.bn1",
    "block/norm2": "layer{s}.{i}.bn2",
    "block/norm3": "layer{s}.{i}.bn3",
    "block/project": "layer{s}.{i}.downsample.0",
    "block/project_norm": "layer{s}.{i}.downsample.1",
    "head/dense": ("fc", "fc.1"),  # also a head of dropout and a dense layer
}
CIFAR = TORCHVISION | {
    "block/project": ("layer{s}.{i}.shortcut.0", "layer{s}.{i}.downsample.0"),
    "block/project_norm": ("layer{s}.{i}.shortcut.1", "layer{s}.{i}.downsample.1"),
    "stage/norm": "bn",
    "head/dense": ("linear", "fc"),
    "linear1": "linear1",
    "linear2": "linear2",
}
TIMM_D = TORCHVISION | {
    "stem/conv1": "conv1.0",
    "stem/norm1": "conv1.1",
    "stem/conv2": "conv1.3",
    "stem/norm2": "conv1.4",
    "stem/conv": "conv1.6",
    "block/project": "layer{s}.{i}.downsample.1",
    "block/project_norm": "layer{s}.{i}.downsample.2",
}
HUGGING_FACE = {
    "stem/conv": "embedder.embedder.convolution",
    "stem/norm": "embedder.embedder.normalization",
    "block/conv1": "encoder.stages.{s0}.layers.{i}.layer.0.convolution",
    "block/conv2": "encoder.stages.{s0}.layers.{i}.layer.1.convolution",
    "block/conv3": "encoder.stages.{s0}.layers.{i}.layer.2.convolution",
    "block/norm1": "encoder.stages.{s0}.layers.{i}.layer.0.normalization",
    "block/norm2": "encoder.stages.{s0}.layers.{i}.layer.1.normalization",
    "block/norm3": "encoder.stages.{s0}.layers.{i}.layer.2.normalization",
    "block/project": "encoder.stages.{s0}.layers.{i}.shortcut.convolution",
    "block/project_norm": "encoder.stages.{s0}.layers.{i}.shortcut.normalization",
}
TRADES = {
    "stem/conv": "conv1",
    "block/conv1": "block{s}.layer.{i}.conv1",
    "block/conv2": "block{s}.layer.{i}.conv2",
    "block/norm1": "block{s}.layer.{i}.bn1",
    "block/norm2": "block{s}.layer.{i}.bn2",
    "block/project": "block{s}.layer.{i}.convShortcut",
    "stage/norm": "bn1",
    "head/dense": "fc",
}
DEEPMIND = {
    "stem/conv": "init_conv",
    "block/conv1": "layer.{s0}.block.{i}.conv_0",
    "block/conv2": "layer.{s0}.block.{i}.conv_1",
    "block/norm1": "layer.{s0}.block.{i}.batchnorm_0",
    "block/norm2": "layer.{s0}.block.{i}.batchnorm_1",
    "block/project": "layer.{s0}.block.{i}.shortcut",
    "stage/norm": "batchnorm",
    "head/dense": "logits",
}

NAMINGS = {
    "torchvision resnet": Naming(TORCHVISION),
    "cifar resnet": Naming(CIFAR),
    "timm resnet-d": Naming(TIMM_D),
    "hugging face resnet": Naming(
        {layer: (f"resnet.{name}", name) for layer, name in HUGGING_FACE.items()} | {"head/dense": "classifier.1"}
    ),
    "trades wrn": Naming(TRADES),
    "deepmind wrn": Naming(DEEPMIND),
}
