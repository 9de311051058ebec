"""What the authors of files call our layers: one family a file, each naming a table from our layers to theirs."""

from collections.abc import Collection, Mapping

from topgap_jax.errors import UserError
from topgap_jax.pretrained.names import convnext, densenet, inverted_residual, resnet, vgg, vit
from topgap_jax.pretrained.names.naming import Path, Shape

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
    choices = [names for naming in NAMINGS.values() if (names := naming.names(variables, file))]
    if not choices:
        layer = min((naming.nameless(variables) for naming in NAMINGS.values()), key=len)[0]
        raise UserError(
            f"the layer '{layer}' of this model has no name in PyTorch's files: weights are read into backbones "
            "with the head that they were published with, e.g. map_head(pool) or conv_head(pool); head=None leaves the"
            " file's head out"
        )
    return max(choices, key=lambda names: sum(name in file for name in names.values()))
