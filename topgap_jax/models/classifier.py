"""A backbone, a head, and the normalisation in front of them."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.models.model import linen
from topgap_jax.rewrite.normalisation import channels, normalise
from topgap_jax.types import Array, Model


class Classifier(nn.Module):
    """head(backbone((images - mean) / std)): images (b, h, w, c) in [0, 1] -> logits (b, classes), float32."""

    backbone: nn.Module
    head: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Array, train: bool = False, step: Array | None = None) -> Array:
        features = self.backbone(normalise(images, self.mean, self.std), train)
        return self.head(features, train, step).astype(jnp.float32)


def classifier(
    backbone: nn.Module,
    head: nn.Module,
    *,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: str = "float32",
) -> Model:
    """The classifier of a backbone (`resnet20()`) and a head (`map_head(gap())`), with its normalisation inside.

    mean and std, one number per channel, are of images in [0, 1]. dtype "bfloat16" computes backbone and head in bf16;
    parameters, batch statistics, class maps, pooling and logits stay float32. A backbone of your own is any Linen
    module with `__call__(images, train)` -> {"stem": (b, h, w, c), "stage1": ...} and, for bf16, a field `dtype`.
    """
    if not isinstance(backbone, nn.Module) or not isinstance(head, nn.Module) or not hasattr(head, "classes"):
        raise UserError("classifier needs a backbone and a head, e.g. classifier(resnet20(), map_head(gap()), ...)")
    check_number("classes", classes, 2, whole=True)
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
    mean, std = channels(mean, std)
    head = _with_dtype(head.clone(classes=classes), dtype)
    return linen(Classifier(_with_dtype(backbone, dtype), head, mean, std))


def _with_dtype(module, dtype):
    return module.clone(dtype=jnp.dtype(dtype)) if hasattr(module, "dtype") else module


TABLE = table(classifier)
