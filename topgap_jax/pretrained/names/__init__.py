"""What the authors of files call our layers: one family a file, each naming a table from our layers to theirs."""

from collections.abc import Collection, Mapping

from topgap_jax.errors import UserError
from topgap_jax.pretrained.names import efficientnet, resnet, vgg
from topgap_jax.pretrained.names.naming import Path, Shape

NAMINGS = {**resnet.NAMINGS, **vgg.NAMINGS, **efficientnet.NAMINGS}


def torch_names(variables: Mapping[Path, Shape], file: Collection[str]) -> dict[Path, str]:
    """What a file calls each of our variables, e.g. ("params", "backbone", "stem", "conv", "kernel") -> "conv1.weight".

    variables: their shapes by path; file: its names of tensors, which decide where authors differ: of the namings that
    have a name for every variable, the one that most of the file's names agree with. UserError where a layer of ours
    has no name.
    """
    choices = [names for naming in NAMINGS.values() if (names := naming.names(variables, file))]
    if not choices:
        raise UserError(_nameless(variables))
    return max(choices, key=lambda names: sum(name in file for name in names.values()))


def _nameless(variables):
    """Which layer it is: of the naming that goes furthest, the first layer that it has no name for."""

    def missing(naming):
        return [path for path, shape in variables.items() if naming.names({path: shape}) is None]

    path = min((missing(naming) for naming in NAMINGS.values()), key=len)[0]
    layer = "/".join(path[1:-1]).removeprefix("backbone/")
    return (
        f"the layer '{layer}' of this model has no name in PyTorch's files: weights are read into backbones "
        "with the head that they were published with, e.g. map_head(pool) or conv_head(pool)"
    )
