"""Networks: ours, and any Flax module through `linen` or `nnx`."""

from topgap_jax.models.classifier import classifier
from topgap_jax.models.heads import map_head, pyramid_head, vgg_head
from topgap_jax.models.model import bind, fast, linen, nnx
from topgap_jax.models.preact import preact_resnet18, wrn28_10
from topgap_jax.models.resnet import (
    resnet18,
    resnet20,
    resnet32,
    resnet34,
    resnet44,
    resnet50,
    resnet56,
    small_resnet,
)
from topgap_jax.models.resnet4b import resnet4b
from topgap_jax.models.vgg import vgg11, vgg16

__all__ = [
    "bind",
    "classifier",
    "fast",
    "linen",
    "map_head",
    "nnx",
    "preact_resnet18",
    "pyramid_head",
    "resnet4b",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "small_resnet",
    "vgg11",
    "vgg16",
    "vgg_head",
    "wrn28_10",
]

TABLE = {
    "classifier": classifier,
    "linen": linen,
    "nnx": nnx,
    "map_head": map_head,
    "pyramid_head": pyramid_head,
    "vgg_head": vgg_head,
    "small_resnet": small_resnet,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "preact_resnet18": preact_resnet18,
    "wrn28_10": wrn28_10,
    "vgg11": vgg11,
    "vgg16": vgg16,
    "resnet4b": resnet4b,
}
