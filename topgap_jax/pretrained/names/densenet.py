"""DenseNet: torchvision's names, which timm shares, and those of its old files (`norm.1`, `conv.1`)."""

from topgap_jax.pretrained.names.naming import Naming

LAYER = "features.denseblock{s}.denselayer{i1}"
TORCHVISION = {
    "stem/conv": "features.conv0",
    "stem/norm": "features.norm0",
    "block/norm1": (f"{LAYER}.norm1", f"{LAYER}.norm.1"),
    "block/conv1": (f"{LAYER}.conv1", f"{LAYER}.conv.1"),
    "block/norm2": (f"{LAYER}.norm2", f"{LAYER}.norm.2"),
    "block/conv2": (f"{LAYER}.conv2", f"{LAYER}.conv.2"),
    "stage/transition_norm": "features.transition{s0}.norm",
    "stage/transition": "features.transition{s0}.conv",
    "stage/norm": "features.norm5",
    "head/dense": "classifier",
}

NAMINGS = {"torchvision densenet": Naming(TORCHVISION)}
