"""What the authors of files call our layers: one family a file, each naming a table from our layers to theirs."""

from collections.abc import Collection, Mapping

import jax
import numpy as np

from topgap_jax.build import did_you_mean
from topgap_jax.errors import UserError
from topgap_jax.pretrained.names import convnext, densenet, inverted_residual, resnet, vgg, vit
from topgap_jax.pretrained.names.naming import Path, Shape
from topgap_jax.types import Variables

NAMINGS = {
    **resnet.NAMINGS,
    **vgg.NAMINGS,
    **inverted_residual.NAMINGS,
    **convnext.NAMINGS,
    **densenet.NAMINGS,
    **vit.NAMINGS,
}


def unused(name: str) -> bool:
    """Whether it is a tensor that a published definition has and never uses: TRADES's second first block."""
    return name.startswith("sub_block1.")


def torch_names(variables: Mapping[Path, Shape], file: Collection[str]) -> dict[Path, str]:
    """What a file calls each of our variables, e.g. ("params", "backbone", "stem", "conv", "kernel") -> "conv1.weight".

    variables: their shapes by path; file: its names of tensors, which decide where authors differ: of the namings that
    have a name for every variable, the one that most of the file's names agree with. UserError where a layer of ours
    has no name.
    """
    return NAMINGS[naming_of(variables, file)].names(variables, file)


def naming_of(variables: Mapping[Path, Shape], file: Collection[str]) -> str:
    """The key in NAMINGS of the naming that `torch_names` goes by."""
    choices = {key: names for key, naming in NAMINGS.items() if (names := naming.names(variables, file))}
    if not choices:
        layer = min((naming.nameless(variables) for naming in NAMINGS.values()), key=len)[0]
        raise UserError(
            f"the layer '{layer}' of this model has no name in PyTorch's files: weights are read into backbones "
            "with the head that they were published with, e.g. map_head(pool) or conv_head(pool); head=None leaves the"
            " file's head out"
        )
    return max(choices, key=lambda key: sum(name in file for name in choices[key].values()))


def to_torch(variables: Variables, naming: str) -> dict[str, np.ndarray]:
    """The variables of one of our networks as PyTorch's authors save them, {name: tensor} in their layout: what `save`
    writes and `load` reads.

    naming: a key of NAMINGS ("torchvision resnet", "timm mobilenet"). UserError for another, and for a layer that has
    no name by it.
    """
    if naming not in NAMINGS:
        raise UserError(
            f"there is no naming '{naming}'; {did_you_mean(naming, NAMINGS, n=1)}choose from {', '.join(NAMINGS)}"
        )
    leaves = jax.tree.flatten_with_path(variables)[0]
    arrays = {tuple(str(getattr(key, "key", key)) for key in keys): np.asarray(leaf) for keys, leaf in leaves}
    if nameless := NAMINGS[naming].nameless(arrays):
        raise UserError(f"the layer '{nameless[0]}' has no name by '{naming}'")
    return NAMINGS[naming].tensors(arrays)
