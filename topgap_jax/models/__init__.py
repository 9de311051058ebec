"""Networks: ours, and any Flax module through `linen` or `nnx`."""

from topgap_jax.build import merged
from topgap_jax.models import (
    classifier,
    convnext,
    densenet,
    efficientnet,
    frozen,
    heads,
    mobilenet,
    model,
    preact,
    resnet,
    resnet4b,
    vgg,
    vit,
)
from topgap_jax.models.model import bind, fast

TABLE = merged(
    classifier.TABLE,
    convnext.TABLE,
    densenet.TABLE,
    efficientnet.TABLE,
    frozen.TABLE,
    heads.TABLE,
    mobilenet.TABLE,
    model.TABLE,
    preact.TABLE,
    resnet.TABLE,
    resnet4b.TABLE,
    vgg.TABLE,
    vit.TABLE,
)
globals().update(TABLE)  # the methods, also where a file has the name of one
