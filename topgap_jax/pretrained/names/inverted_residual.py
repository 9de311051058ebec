"""EfficientNet, its Lite, and MobileNetV3: the names of efficientnet_pytorch, timm and torchvision.

What files count beside our numbers: {g} and {j}, a group of blocks with the same channels from 0 and the block in it;
{g1} and {n1}, group and block from 1; {last_g} and {last_n}, what follows the last of them; and since an author numbers
the layers of a block, whether it expands and squeezes or not, {depthwise}, {squeeze}, {project} from 0 by torchvision,
{norm_d} and {norm_p} from 1 by timm, for which {pointwise} is the projection.
"""

import re

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
TIMM = {
    "stem/conv": "conv_stem",
    "stem/norm": "bn1",
    "block/expand": "blocks.{g}.{j}.conv_pw",
    "block/expand_norm": "blocks.{g}.{j}.bn1",
    "block/depthwise": "blocks.{g}.{j}.conv_dw",
    "block/depthwise_norm": "blocks.{g}.{j}.bn{norm_d}",
    "block/squeeze_excite/reduce": "blocks.{g}.{j}.se.conv_reduce",
    "block/squeeze_excite/expand": "blocks.{g}.{j}.se.conv_expand",
    "block/project": "blocks.{g}.{j}.{pointwise}",
    "block/project_norm": "blocks.{g}.{j}.bn{norm_p}",
    "head/conv": "conv_head",
    "head/norm": "bn2",
    "head/dense": "classifier",
}
TIMM_MOBILENET = TIMM | {
    "head/conv": "blocks.{last_g}.0.conv",
    "head/norm": "blocks.{last_g}.0.bn1",
    "head/hidden": "conv_head",
}


def _torchvision(block, conv):
    """Names with blocks as `block` and the head's convolution as `conv`."""
    return {
        "stem/conv": "features.0.0",
        "stem/norm": "features.0.1",
        "block/expand": f"{block}.0.0",
        "block/expand_norm": f"{block}.0.1",
        "block/depthwise": f"{block}.{{depthwise}}.0",
        "block/depthwise_norm": f"{block}.{{depthwise}}.1",
        "block/squeeze_excite/reduce": f"{block}.{{squeeze}}.fc1",
        "block/squeeze_excite/expand": f"{block}.{{squeeze}}.fc2",
        "block/project": f"{block}.{{project}}.0",
        "block/project_norm": f"{block}.{{project}}.1",
        "head/conv": f"{conv}.0",
        "head/norm": f"{conv}.1",
    }


TORCHVISION = _torchvision("features.{g1}.{j}.block", "features.8") | {"head/dense": "classifier.1"}
TORCHVISION_MOBILENET = _torchvision("features.{n1}.block", "features.{last_n}") | {
    "head/hidden": "classifier.0",
    "head/dense": "classifier.3",
}


def _numbers(layers):
    places = {}  # {(stage, block): "stage1/block0"} in the order of the network
    for layer in layers:
        match = re.match(r"(?:stem|stage(\d+))/block(\d+)", layer)
        if match:
            places[int(match[1] or 0), int(match[2])] = match[0]
    fields, g, j, channels = {}, -1, 0, None
    for n, (_, at) in enumerate(sorted(places.items())):
        before, channels = channels, layers[f"{at}/project"][-1]
        g, j = (g, j + 1) if channels == before else (g + 1, 0)
        expand, squeeze = f"{at}/expand" in layers, f"{at}/squeeze_excite/reduce" in layers
        numbers = {
            "g": g, "g1": g + 1, "j": j, "n1": n + 1,
            "depthwise": 0 + expand, "squeeze": 1 + expand, "project": 1 + expand + squeeze,
            "norm_d": 1 + expand, "norm_p": 2 + expand, "pointwise": "conv_pwl" if expand else "conv_pw",
        }  # fmt: skip
        fields |= {layer: numbers for layer in layers if layer.startswith(f"{at}/")}
    last = {"last_g": g + 1, "last_n": len(places) + 1}
    return fields | {"head/conv": last, "head/norm": last}


NAMINGS = {
    "efficientnet_pytorch efficientnet": Naming(EFFICIENTNET_PYTORCH, _numbers),
    "timm efficientnet": Naming(TIMM, _numbers),
    "torchvision efficientnet": Naming(TORCHVISION, _numbers),
    "timm mobilenet": Naming(TIMM_MOBILENET, _numbers),
    "torchvision mobilenet": Naming(TORCHVISION_MOBILENET, _numbers),
}
