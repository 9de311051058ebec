"""Any TensorFlow Datasets set that lies prepared as ArrayRecord on the disk, read without TensorFlow."""

import bisect
import io
import itertools
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from topgap_jax.build import table
from topgap_jax.data.source import Record, Source, Splits, choices
from topgap_jax.errors import UserError
from topgap_jax.stored import read_object

FEATURES = "features.json"  # what TFDS writes into the folder of every prepared version
CLASSES = "tensorflow_datasets.core.features."
BUFFER = 2**15  # bytes read at a time, as TFDS does


def tfds(
    name: str,
    *,
    image: str = "image",
    label: str = "label",
    box: str | None = None,
    region: str | None = None,
    region_values: Sequence[int | None] = (1, 2, 3),
    classes: int | Sequence[str] | None = None,
) -> Splits:
    """A TFDS set: `tfds('pets3', box='bbox', region='mask')('train[:250]')`.

    name: 'cifar10', 'name:1.2.0' or 'name/config' below the data folder ($TOPGAP_DATA/tfds, else TFDS's own default),
    or the path of a prepared set. image, label, box, region: keys of its features. region_values: the mask's values
    that mean inside, outside and unsure (None: there is no such value). classes: number or names, where the label is a
    plain integer. Nothing is ever downloaded. Raises a UserError for a set, split or key that is not there.
    """
    folder = find(name)
    shown = f"tfds('{name}')"
    builder = _builder(folder, shown)
    features = builder.info.features
    if not hasattr(features, "keys"):
        raise UserError(f"{shown}: {folder / FEATURES} describes no dictionary of features, but {features!r:.100}")
    keys = {"image": image, "label": label, "box": box, "region": region}
    for argument, key in keys.items():
        if key is not None and key not in features:
            raise UserError(f"{shown} has no feature '{key}' to use as {argument}; {choices(key, features)}")
    if len(region_values) != 3:
        raise UserError(f"region_values are three (inside, outside, unsure), got {tuple(region_values)}")
    _check_image(features[image], image, shown)
    names = _classes(features[label], classes, shown)
    if box is not None:
        _check_box(features[box], box, shown)
    height, width = (features[image].shape or (None, None))[:2]

    def source(split: str) -> Source:
        length = _length(builder, split, shown)
        records = _Records(builder.info.splits[split].file_instructions if length else ())
        decoders = _encoded(features)

        def read(index: int) -> Record:
            return _record(features.deserialize_example_np(records[index], decoders=decoders), keys, region_values)

        size = None if height is None or width is None else (height, width)
        offers = tuple(kind for kind in ("box", "region") if keys[kind])
        shards = tuple(n for name in _whole(builder, split) for n in builder.info.splits[name].shard_lengths)
        return Source(shown, split, names, length, read, size, offers, shards)

    return source


class _Records:
    """The bytes of a split's records, by position; any thread may ask, and a copy in another process opens its own
    files.

    TFDS's own source asks for a list of one, for which ArrayRecord copies the index of the whole file; for a range of
    one it does not (experiments/bench_records.py).
    """

    def __init__(self, parts):
        self.parts = [(os.fspath(part.filename), part.skip) for part in parts]
        self.ends = list(itertools.accumulate(part.take for part in parts))
        self.readers = [None] * len(self.parts)

    def __getitem__(self, index: int) -> bytes:
        file = bisect.bisect_right(self.ends, index)
        reader = self.readers[file] or self._open(file)
        at = self.parts[file][1] + index - (self.ends[file - 1] if file else 0)
        return reader.read(at, at + 1)[0]

    def _open(self, file: int):
        from array_record.python.array_record_module import ArrayRecordReader

        path, options = self.parts[file][0], "readahead_buffer_size:0,max_parallelism:0"
        with _opening:
            if self.readers[file] is None:
                self.readers[file] = ArrayRecordReader(path, options, file_reader_buffer_size=BUFFER)
            return self.readers[file]

    def __getstate__(self):
        return {**self.__dict__, "readers": [None] * len(self.parts)}


_opening = threading.Lock()


def find(name: str) -> Path:
    """The folder of a prepared set: the version named, else the newest one."""
    path, _, version = name.partition(":")
    root = data_folder()
    for folder in (Path(path).expanduser(), root / path):
        if (folder / FEATURES).is_file() and not version:
            return folder
        versions = [each.parent for each in folder.glob(f"{version or '*'}/{FEATURES}")]
        if versions:
            return max(versions, key=lambda each: [int(x) if x.isdigit() else -1 for x in each.name.split(".")])
    there = {
        each.relative_to(root).parts[0] for each in (*root.glob(f"*/*/{FEATURES}"), *root.glob(f"*/*/*/{FEATURES}"))
    }
    raise UserError(
        f"tfds('{name}') is not prepared in {root} (set TOPGAP_DATA to a folder that holds tfds/, or TFDS_DATA_DIR to"
        f" the folder of the sets); {choices(path, there)}"
    )


def data_folder() -> Path:
    """$TOPGAP_DATA/tfds, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    if os.environ.get("TOPGAP_DATA"):
        return Path(os.environ["TOPGAP_DATA"]) / "tfds"
    return Path(os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets")


def _builder(folder: Path, shown: str):
    _check_classes(read_object(folder / FEATURES, "the features.json of a TFDS set", {str: "PLAIN"}), folder, shown)
    import tensorflow_datasets  # here, because it is slow to import and `shapes` and `folder` do not need it

    try:
        builder = tensorflow_datasets.builder_from_directory(folder)
        formats = {each.value for each in builder.info.available_file_formats()}
    except Exception as error:  # a broken features.json or dataset_info.json ends in many kinds of them
        raise UserError(f"{shown}: {folder} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if "array_record" not in formats:
        raise UserError(
            f"{shown} is prepared as {', '.join(sorted(formats))}; prepare it with file_format='array_record'"
        )
    return builder


def _check_classes(tree, folder: Path, shown: str) -> None:
    """Refuse a features.json that names a class outside TFDS: TFDS would import its module, and so run it."""
    if isinstance(tree, list):
        for each in tree:
            _check_classes(each, folder, shown)
        return
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        if key in ("pythonClassName", "python_class_name", "type") and isinstance(value, str) and "." in value:
            if not value.startswith(CLASSES):
                raise UserError(
                    f"{shown}: {folder / FEATURES} names the class '{value}'; only those of TFDS, {CLASSES}*, are known"
                )
        _check_classes(value, folder, shown)


def _check_shards(builder, split: str, shown: str) -> None:
    """Refuse shards that hold other numbers of records than dataset_info.json says: what is more is dropped in silence,
    what is less ends the reading somewhere."""
    from array_record.python.array_record_module import ArrayRecordReader

    info = builder.info.splits[split]
    try:
        shards = list(zip(info.filepaths, info.shard_lengths))
    except Exception as error:  # names that TFDS cannot make of what dataset_info.json says
        raise UserError(f"{shown}: split '{split}' names no files: {' '.join(str(error).split())[:200]}") from error
    for path, length in shards:
        try:
            reader = ArrayRecordReader(str(path))
            records = reader.num_records()
            reader.close()
        except Exception as error:  # of C++, of many kinds
            raise UserError(f"{shown}: {path} cannot be read: {' '.join(str(error).split())[:200]}") from error
        if records != length:
            raise UserError(
                f"{shown}: {path} holds {records} records, dataset_info.json says {length}; prepare it again"
            )


def _classes(feature, classes, shown: str) -> tuple[str, ...]:
    if isinstance(classes, int):
        return tuple(str(k) for k in range(classes))
    if classes is not None:
        return tuple(classes)
    if not hasattr(feature, "names"):
        raise UserError(f"{shown}: the label is a plain {type(feature).__name__}; give classes=<their number or names>")
    return tuple(feature.names)


def _check_image(feature, key: str, shown: str) -> None:
    kind, shape = feature.np_dtype, feature.shape
    if isinstance(shape, dict):  # a dictionary of features, each with a type and a shape of its own
        holds = f"a {type(feature).__name__} of {len(shape)} features"
    elif kind != np.uint8 or len(shape) != 3 or shape[-1] not in (1, 3):
        holds = f"{np.dtype(kind)} of shape {shape}"
    else:
        return
    raise UserError(f"{shown}: '{key}' holds {holds}; an image is uint8, (h, w, 3) or (h, w, 1)")


def _check_box(feature, key: str, shown: str) -> None:
    form = getattr(getattr(feature, "bbox_format", None), "value", None)
    if getattr(feature, "shape", None) != (4,) or form not in (None, "REL_YXYX"):
        is_ = f"boxes in the form {form}" if form else f"a {type(feature).__name__} of shape {feature.shape}"
        raise UserError(
            f"{shown}: '{key}' holds {is_}; a box is (ymin, xmin, ymax, xmax) in [0, 1], TFDS's form REL_YXYX"
        )


def _encoded(features) -> dict:
    """Decoders that leave images as they are stored: those that nobody asked for (masks while training, say) stay so,
    and TFDS decodes with whatever library it finds, which says so for each of them."""
    import tensorflow_datasets

    image = tensorflow_datasets.features.Image
    return {
        key: tensorflow_datasets.decode.SkipDecoding()
        for key, feature in features.items()
        if isinstance(feature, image)
    }


def _length(builder, split: str, shown: str) -> int:
    splits = builder.info.splits
    known = split.partition("[")[0]
    if not splits:
        raise UserError(f"{shown} has no splits: its dataset_info.json names none")
    if "+" not in split and known not in splits:
        raise UserError(
            f"{shown} has no split '{known}'; {choices(known, splits)}, or a part like '{next(iter(splits))}[:80%]'"
        )
    try:
        number = splits[split].num_examples
    except (ValueError, KeyError, AssertionError) as error:
        raise UserError(f"{shown} split '{split}': {' '.join(str(error).split())[:200]}") from None
    for name in _whole(builder, split):
        _check_shards(builder, name, shown)
    return number


def _whole(builder, split: str) -> list[str]:
    """The splits, whole, that a text like 'train[:80%]+test' names."""
    names = dict.fromkeys(part.partition("[")[0].strip() for part in split.split("+"))
    return [name for name in names if name in builder.info.splits]


def _record(example, keys: dict[str, str | None], region_values) -> Record:
    pixels = _pixels(example[keys["image"]])
    record = {
        "image": np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels,
        "label": int(example[keys["label"]]),
    }
    if keys["box"]:
        record["box"] = np.asarray(example[keys["box"]], np.float32)
    if keys["region"]:
        record["region"] = _region(_pixels(example[keys["region"]]), region_values)
    if isinstance(example.get("id"), bytes):
        record["name"] = example["id"].decode(errors="replace")
    return record


def _pixels(value) -> np.ndarray:
    """An image (h, w, c) of its file's bytes; of a feature that holds pixels, these."""
    if not isinstance(value, bytes):
        return value
    with Image.open(io.BytesIO(value)) as image:
        pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _region(mask, region_values) -> np.ndarray:
    mask = mask[..., 0] if mask.ndim == 3 else mask
    inside, outside, unsure = (
        np.zeros(mask.shape, bool) if value is None else mask == value for value in region_values
    )
    unknown = ~(inside | outside | unsure)
    if unknown.any():
        raise UserError(f"its mask holds {mask[unknown][0]}, which is none of region_values={tuple(region_values)}")
    return np.where(inside, 1, np.where(unsure, 2, 0)).astype(np.uint8)


TABLE = table(tfds)
