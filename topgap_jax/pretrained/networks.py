"""Which network a file of weights is: recognised by the names and shapes of its tensors."""

from pathlib import Path
from typing import Any

from topgap_jax.errors import UserError
from topgap_jax.pretrained.architectures import recognise
from topgap_jax.pretrained.files import read


def describe(path: str | Path) -> dict[str, Any]:
    """What a file says of itself: {"mean": tuple, "std": tuple, "model": text for a config}, None for what it does not
    say.

    The model is recognised by names and shapes; mean and std stand in the metadata of a safetensors file
    ("0.485,0.456,0.406"), and are else those of the published weights that go by these names.
    """
    description = read(path)
    architecture = recognise(description.shapes, description.metadata.get("architecture", ""))
    normalisation = {"mean": None, "std": None, **(architecture.published if architecture else {})}
    for key in ("mean", "std"):
        if key in description.metadata:
            normalisation = {**normalisation, key: _numbers(path, key, description.metadata[key])}
    return {**normalisation, "model": architecture.model if architecture else None}


def _numbers(path, key, text):
    try:
        return tuple(float(x) for x in text.split(","))
    except ValueError:
        raise UserError(f"{path}: the metadata say {key}={text!r}; expected numbers like '0.485,0.456,0.406'") from None
