"""A source: one split of a data set with random access, and what is checked and done to every record of it."""

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from topgap_jax.errors import UserError

Record: TypeAlias = dict[str, Any]
"""`image` (h, w, 3) uint8 RGB, `label` int (-1: none), and where offered `box` (4,) float32 (ymin, xmin, ymax, xmax) in
[0, 1], `region` (h, w) uint8 (0 outside, 1 inside, 2 unsure), `group` int, `name` str (the set's own id)."""

RESIZES = ("stretch", "crop", "centre")
SMALL = 128 * 128  # pixels of a picture


@dataclass(frozen=True)
class Source:
    """A split of a data set: `len(source)` records, `source[i]` the i-th, decoded and checked.

    read(i) -> Record, unchecked; `image_size` (h, w) is None where it varies; `offers`: which of box, region and group
    exist; `classes` is empty where there are no labels; `shards`: records in each file of the set, () where they have
    files of their own or none. An empty split is a UserError.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    length: int
    read: Callable[[int], Record]
    image_size: tuple[int, int] | None = None
    offers: tuple[str, ...] = ()
    shards: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "classes", tuple(self.classes))  # a list is not equal to what a run remembers
        if self.length == 0:
            raise UserError(f"{self.name} split '{self.split}' is empty; give a split with examples")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Record:
        """The record `index` of the split. Raises a UserError that names data set, split and index."""
        if not 0 <= index < self.length:  # what ends a for loop over a source
            raise IndexError(index)
        try:
            record = self.read(index)
        except UserError as error:
            raise UserError(f"{self._at(index)}: {error}") from error
        except Exception as error:  # whatever a decoder raises on a broken record
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{self._at(index)} cannot be decoded: {reason}") from error
        wrong = _fault(record, len(self.classes))
        if wrong:
            raise UserError(f"{self._at(index)}: {wrong}")
        return record

    def _at(self, index: int) -> str:
        return f"{self.name} split '{self.split}' index {index}"


Splits: TypeAlias = Callable[[str], Source]
"""What a data set of the table is: the text of a split, like 'train[:45000]', -> its source."""


def threads_for(source: Source) -> int:
    """How many threads to decode the records with: as many as cores, at most 16, of small pictures one.

    Python's lock is held for most of the time that a small picture takes: threads that wait for it decode less than one
    does (experiments/bench_records.py). Where sizes vary the first record stands for all.
    """
    try:
        height, width = source.image_size or source[0]["image"].shape[:2]
    except UserError:  # it is told when its turn comes
        height, width = SMALL, SMALL
    if height * width <= SMALL:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)


def decode(
    source: Source, index: int, image_size: tuple[int, int], resize: str = "stretch", extras: bool = True
) -> Record:
    """Record `index` of the source with its image at `image_size` (h, w); box and region move along.

    resize: "stretch" squashes the whole image (bilinear, antialiased); "crop" scales the image until it covers the size
    and cuts out the centre; "centre" cuts it out of the image as it is, which is enlarged first (bicubic) where a side
    is too small. A box is cut at the border (one that is wholly outside has no area); a region is resized by
    nearest neighbour. extras=False leaves box, region and group out.
    """
    left_out = () if extras else ("box", "region", "group")
    record = {key: value for key, value in source[index].items() if key not in left_out}
    if resize == "centre":
        _enlarge(record, image_size)
    h, w = record["image"].shape[:2]
    top, left, height, width = window = crop_window((h, w), image_size, resize)
    if (h, w) == tuple(image_size):
        return record
    record["image"] = _cut(record["image"], image_size, window, Image.Resampling.BILINEAR)
    if "region" in record:
        record["region"] = _cut(record["region"], image_size, window, Image.Resampling.NEAREST)
    if "box" in record:
        corners = record["box"] * np.array([h, w, h, w]) - np.array([top, left, top, left])
        record["box"] = np.clip(corners / np.array([height, width, height, width]), 0, 1).astype(np.float32)
    return record


def crop_window(
    size: tuple[int, int], image_size: tuple[int, int], resize: str = "stretch"
) -> tuple[float, float, float, float]:
    """The part (top, left, height, width), in pixels, of an image of `size` that becomes the image of `image_size`.

    >>> crop_window((144, 192), (128, 128), "crop")
    (0.0, 24.0, 144.0, 144.0)
    """
    if resize not in RESIZES:
        raise UserError(f"resize '{resize}' is unknown; {choices(resize, RESIZES)}")
    (h, w), (height, width) = size, image_size
    if resize == "stretch":
        return 0.0, 0.0, float(h), float(w)
    scale = max(height / h, width / w)
    if resize == "centre" and scale <= 1:  # whole pixels: nothing is resampled
        return float((h - height) // 2), float((w - width) // 2), float(height), float(width)
    part_h, part_w = min(height / scale, float(h)), min(width / scale, float(w))  # 8 / (8 / 49) is 49.00000000000001
    return (h - part_h) / 2, (w - part_w) / 2, part_h, part_w


def with_classes(source: Source, classes: tuple[str, ...]) -> Source:
    """The source with its labels as positions in `classes`, those of a network, matched by name.

    Raises a UserError that lists both where a name is only in one of them.
    """
    if source.classes == classes:
        return source
    unknown, absent = sorted(set(source.classes) - set(classes)), sorted(set(classes) - set(source.classes))
    if unknown or absent or len(set(classes)) < len(classes):
        what = [f"{_names(unknown)} {_is(unknown)} not among the network's"] if unknown else []
        what += [f"{_names(absent)} {_is(absent)} not in the data"] if absent else []
        what = what or ["the same name stands twice among the network's"]
        near = [difflib.get_close_matches(name, absent, n=1) for name in unknown[:1]]
        hint = f" (did you mean '{near[0][0]}'?)" if near and near[0] else ""
        raise UserError(
            f"{source.name} has other classes than the network: {', and '.join(what)}{hint}; the network's are "
            f"{_names(classes)}; the data's are {_names(source.classes)}; rename them, or train on these data"
        )
    positions = [classes.index(name) for name in source.classes]

    def read(index: int) -> Record:
        record = source.read(index)
        label = record["label"]  # one out of range stays so, and is told
        return {**record, "label": positions[label] if 0 <= label < len(positions) else label}

    return dataclasses.replace(source, classes=classes, read=read)


def slice_split(text: str, sizes: Mapping[str, int], name: str) -> tuple[str, range]:
    """The split and the rows that 'train', 'train[:800]' or 'train[-20%:]' mean; name: the data set, for errors.

    >>> slice_split("train[80%:]", {"train": 50}, "folder('pets')")
    ('train', range(40, 50))
    """
    match = re.fullmatch(r"(.+?)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", text)
    if match is None or match[1] not in sizes:
        known = match[1] if match else text
        raise UserError(
            f"{name} has no split '{known}'; {choices(known, sizes)}, or a part like '{next(iter(sizes))}[:80%]'"
        )
    n = sizes[match[1]]
    start, stop = _bound(match[2], 0, n), _bound(match[3], n, n)
    if not 0 <= start <= n or not 0 <= stop <= n:
        raise UserError(f"{name} split '{text}' reaches beyond the {n} examples of '{match[1]}'")
    return match[1], range(start, max(start, stop))


def choices(name: str, options: Iterable[str]) -> str:
    """What to write instead of `name`: the closest option, and all of them (the first 30).

    >>> choices("trian", ["train", "test"])
    "did you mean 'train'? choose from test, train"
    """
    options = sorted(options)
    near = difflib.get_close_matches(name, options, n=1)
    shown = _names(options) or "nothing: there is none"
    return (f"did you mean '{near[0]}'? " if near else "") + f"choose from {shown}"


def _names(names: Iterable[str]) -> str:
    """cat, dog, fish: the first 30."""
    names = list(names)
    return ", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "")


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _fault(record: Record, classes: int) -> str:
    """What is wrong with a record, or nothing."""
    absent = [key for key in ("image", "label") if key not in record]
    if absent:
        return f"the record has no '{absent[0]}'"
    image, label = record["image"], record["label"]
    if not isinstance(image, np.ndarray):
        return f"the image must be a NumPy array, it is {type(image).__name__}"
    if not isinstance(label, int | np.integer):
        return f"the label must be a whole number, it is {type(label).__name__}"
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        return f"the image must be uint8 (h, w, 3), it is {image.dtype} {image.shape}"
    if classes and not 0 <= label < classes:
        return f"label {label} is not in 0..{classes - 1}"
    if "region" in record and record["region"].shape != image.shape[:2]:
        return f"the region has shape {record['region'].shape}, its image {image.shape[:2]}"
    if "box" in record:
        ymin, xmin, ymax, xmax = record["box"]
        if not (-1e-3 <= ymin <= ymax <= 1 + 1e-3 and -1e-3 <= xmin <= xmax <= 1 + 1e-3):
            return f"box {[round(float(x), 4) for x in record['box']]} is not (ymin, xmin, ymax, xmax) in [0, 1]"
    return ""


def _enlarge(record: Record, image_size: tuple[int, int]) -> None:
    """Enlarge image and region until they cover the size, where a side does not."""
    h, w = record["image"].shape[:2]
    scale = max(image_size[0] / h, image_size[1] / w)
    if scale > 1:
        size, whole = (round(h * scale), round(w * scale)), (0.0, 0.0, float(h), float(w))
        record["image"] = _cut(record["image"], size, whole, Image.Resampling.BICUBIC)
        if "region" in record:
            record["region"] = _cut(record["region"], size, whole, Image.Resampling.NEAREST)


def _cut(image: np.ndarray, image_size, window, method) -> np.ndarray:
    top, left, height, width = window
    size, part = (image_size[1], image_size[0]), (left, top, left + width, top + height)
    return np.asarray(Image.fromarray(image).resize(size, method, box=part))


def _bound(text: str | None, default: int, n: int) -> int:
    if text is None:
        return default
    number = round(n * int(text[:-1]) / 100) if text.endswith("%") else int(text)
    return number + n if text.startswith("-") else number
