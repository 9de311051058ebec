"""Which network a file of weights is: recognised by the names and shapes of its tensors."""

from pathlib import Path
from typing import Any

from topgap_jax.errors import UserError
from topgap_jax.pretrained.architectures import alike, recognise
from topgap_jax.pretrained.files import read
from topgap_jax.pretrained.hub import check_normalisation, settings


def describe(path: str | Path) -> dict[str, Any]:
    """What a file says of itself, and a hub's config.json beside it: {"mean": tuple, "std": tuple, "model": text for a
    config}, None for what they do not say; and where a hub says it, of how the network was tested: "image_size" (h, w),
    "crop_pct", "interpolation", "labels" (names of the classes), "num_classes". "alike": the model that it may be as
    well, where nothing tells one from the other.

    The model is recognised by names and shapes; mean and std stand in the metadata of a safetensors file
    ("0.485,0.456,0.406"), else in config.json, and are else those of the published weights that go by these names.
    UserError for numbers that cannot be a mean or a std.
    """
    description, hub = read(path), settings(path)
    name = hub.pop("architecture", description.metadata.get("architecture", ""))
    architecture = recognise(description.shapes, name)
    said = {"mean": None, "std": None, **(architecture.published if architecture else {}), **hub}
    for key in ("mean", "std"):
        if key in description.metadata:
            said[key] = _numbers(path, key, description.metadata[key])
    check_normalisation(path, said["mean"], said["std"])
    others = [row.model for row in alike(description.shapes) if row.hub] if architecture and not name else []
    return {**said, **({"alike": others[0]} if others else {}), "model": architecture.model if architecture else None}


def _numbers(path, key, text):
    try:
        return tuple(float(x) for x in text.split(","))
    except ValueError:
        raise UserError(f"{path}: the metadata say {key}={text!r}; expected numbers like '0.485,0.456,0.406'") from None
