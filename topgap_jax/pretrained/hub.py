"""What a hub says of a file of weights: the `config.json` beside it (timm's, Hugging Face's)."""

import math
import re
from pathlib import Path
from typing import Any

from topgap_jax.errors import UserError
from topgap_jax.stored import mismatch, read_object

RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers

LEAST, MOST = 1e-6, 2.0  # above which a std is one, and to which a mean or std is of pixels in [0, 1]
BLANK = re.compile(r"LABEL_\d+")  # what Hugging Face calls a class that has no name

NAMES = {"label_names?": ([str], None), "id2label?": ({str: str}, [str], None), "resample?": (int, None)}
"""What is looked up, or gone through, before it is checked by its meaning."""


def settings(path: str | Path) -> dict[str, Any]:
    """What config.json and preprocessor_config.json beside the file say of how the network was tested.

    {"architecture": text, "mean": tuple, "std": tuple, "image_size": (h, w), "crop_pct": float, "interpolation": text,
    "labels": tuple, "num_classes": int}, without what they do not say; {} where they are not there or are of another
    kind. timm's test settings (`test_input_size`, `test_crop_pct`) go before those of training. UserError for a file
    that is no JSON, and for numbers that cannot be right.
    """
    folder = Path(path).parent
    config, preprocessor = _json(folder / "config.json"), _json(folder / "preprocessor_config.json")
    inner = config.get("pretrained_cfg")
    config = {**config, **(inner if isinstance(inner, dict) else {})}
    for name, values in (("config.json", config), ("preprocessor_config.json", preprocessor)):
        if wrong := mismatch(values, NAMES):
            raise UserError(f"{folder / name}: {wrong}")
    if "pretrained_cfg" in config:
        return _checked(folder, _timm(config))
    if "id2label" in config or "model_type" in config:
        return _checked(folder, _hugging_face(config, preprocessor))
    return _checked(folder, _timm(config)) if "architecture" in config else {}


def check_normalisation(where: str | Path, mean: Any, std: Any) -> None:
    """UserError unless mean and std (None: not said) are those of pixels in [0, 1], one per channel, std positive."""
    for key, values, low in (("mean", mean, -math.inf), ("std", std, LEAST)):
        if values is None:
            continue
        right = isinstance(values, tuple) and values and all(isinstance(x, float) for x in values)
        if not right or not all(math.isfinite(x) and x > low for x in values):
            due = "finite numbers" if key == "mean" else "finite numbers above 0"
            raise UserError(f"{where}: {key} is {values!r:.80}; expected {due}, one per channel")
        if max(map(abs, values)) > MOST:
            raise UserError(f"{where}: {key} is {values!r:.80}, of pixels from 0 to 255; give {key} / 255")
    if mean and std and len(mean) != len(std):
        raise UserError(f"{where}: mean has {len(mean)} numbers and std {len(std)}; both have one per channel")


def _timm(config):
    size = config.get("test_input_size") or config.get("input_size")
    named = config.get("label_names")
    said = config.get("label_descriptions")
    labels = [said.get(name, name) for name in named] if named and isinstance(said, dict) else named
    return {
        "architecture": config.get("architecture"),
        "mean": config.get("mean"),
        "std": config.get("std"),
        "image_size": size[1:] if isinstance(size, list) and size[:1] in ([1], [3]) else size,
        "crop_pct": config.get("test_crop_pct") or config.get("crop_pct"),
        "interpolation": config.get("interpolation"),
        "labels": labels,
        "num_classes": config.get("num_classes"),
    }


def _hugging_face(config, preprocessor):
    labels = config.get("id2label")
    size = preprocessor.get("crop_size") or preprocessor.get("size")
    if isinstance(size, dict):
        size = size.get("shortest_edge") or [size.get("height"), size.get("width")]
    if isinstance(labels, dict):
        labels = [labels.get(str(i)) for i in range(len(labels))]
    count = len(labels) if labels else config.get("num_labels")
    if labels and all(BLANK.fullmatch(str(name)) for name in labels):
        labels = None
    mean, std = _normalisation(preprocessor)
    return {
        "mean": mean,
        "std": std,
        "image_size": [size, size] if isinstance(size, int) else size,
        "crop_pct": preprocessor.get("crop_pct"),
        "interpolation": RESAMPLING.get(preprocessor.get("resample")),
        "labels": labels,
        "num_classes": count,
    }


def _normalisation(preprocessor):
    """Mean and std of images in [0, 1], where the preprocessor may leave out what it does to bytes: x / 255, or
    (x - mean) / std."""
    mean, std = preprocessor.get("image_mean"), preprocessor.get("image_std")
    if preprocessor.get("do_normalize") is False:
        mean, std = [0.0] * 3, [1.0] * 3
    factor = 1.0 if preprocessor.get("do_rescale") is False else preprocessor.get("rescale_factor", 1 / 255)
    numbers = [factor, *(mean or ()), *(std or ())] if isinstance(mean, list) and isinstance(std, list) else [None]
    if not all(type(x) in (int, float) for x in numbers) or factor <= 0 or abs(255 * factor - 1) < 1e-3:
        return mean, std
    return [x / (255 * factor) for x in mean], [x / (255 * factor) for x in std]


def _checked(folder, said):
    """The settings with tuples for lists, without None. UserError for what cannot be right."""
    said = {key: tuple(value) if isinstance(value, list) else value for key, value in said.items() if value is not None}
    floats = lambda values: tuple(float(x) if isinstance(x, int) else x for x in values)
    for key in ("mean", "std"):
        if isinstance(said.get(key), tuple):
            said[key] = floats(said[key])
    where = folder / "config.json"
    check_normalisation(where, said.get("mean"), said.get("std"))
    whole = lambda x: type(x) is int and 0 < x < 100_000
    right = {
        "image_size": lambda x: isinstance(x, tuple) and len(x) == 2 and all(map(whole, x)),
        "crop_pct": lambda x: isinstance(x, int | float) and not isinstance(x, bool) and 0 < x <= 1,
        "interpolation": lambda x: isinstance(x, str),
        "architecture": lambda x: isinstance(x, str),
        "labels": lambda x: isinstance(x, tuple) and all(isinstance(name, str) for name in x),
        "num_classes": whole,
    }
    for key, test in right.items():
        if key in said and not test(said[key]):
            raise UserError(f"{where}: {key} is {said[key]!r:.80}, which it cannot be")
    return said


def _json(path: Path) -> dict[str, Any]:
    return read_object(path, "the JSON object of a model", {str: "PLAIN"}) if path.is_file() else {}
