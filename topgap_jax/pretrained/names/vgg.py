"""VGG with batch norm: the names of torchvision, of timm, and of kuangliu's networks for CIFAR."""

from topgap_jax.pretrained.names.naming import Naming

FEATURES = {
    f"{at}/{layer}{i}": f"features.{{{layer}}}"
    for at in ("stem", "stage")
    for layer in ("conv", "norm")
    for i in (1, 2, 3)
}
TORCHVISION = FEATURES | {
    "head/dense1": "classifier.0",
    "head/dense2": "classifier.3",
    "head/dense3": "classifier.6",
    "head/dense": "classifier",
}
TIMM = FEATURES | {
    "head/dense1": "pre_logits.fc1",
    "head/dense2": "pre_logits.fc2",
    "head/dense3": "head.fc",
}


def _numbers(layers):
    """{"stem/conv1": {"conv": 0, "norm": 1}, ...}: convolution, norm, ReLU, and a pooling after each stage."""
    fields, index = {}, 0
    for stage in ("stem", "stage1", "stage2", "stage3", "stage4"):
        for i in range(1, 1 + sum(layer.startswith(f"{stage}/conv") for layer in layers)):
            numbers = {"conv": index, "norm": index + 1}
            fields |= {f"{stage}/conv{i}": numbers, f"{stage}/norm{i}": numbers}
            index += 3
        index += 1
    return fields


NAMINGS = {"torchvision vgg": Naming(TORCHVISION, _numbers), "timm vgg": Naming(TIMM, _numbers)}
