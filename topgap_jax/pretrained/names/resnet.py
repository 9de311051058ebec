"""Residual networks, plain and pre-activation: torchvision's names, which timm shares, and those of CIFAR's networks
(akamaster's, kuangliu's)."""

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
    "block/project": ("layer{s}.{i}.downsample.0", "layer{s}.{i}.shortcut.0"),
    "block/project_norm": ("layer{s}.{i}.downsample.1", "layer{s}.{i}.shortcut.1"),
    "stage/norm": "bn",
    "head/dense": ("fc", "linear", "classifier"),
    "linear1": "linear1",
    "linear2": "linear2",
}

NAMINGS = {"resnet torchvision": Naming(TORCHVISION)}
