"""`topgap explain`: maps of a split's pictures or of a user's own, page by page, and the file that keeps them."""

import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax import data, rewrite
from topgap_jax.build import check_number, did_you_mean
from topgap_jax.errors import UserError
from topgap_jax.keys import example_keys, root
from topgap_jax.models import bind
from topgap_jax.progress import bar, say
from topgap_jax.scores import class_of_rank
from topgap_jax.setup import checks, expressions
from topgap_jax.setup.assembly import Experiment, first
from topgap_jax.setup.commands import Loaded, checked_explanations
from topgap_jax.types import Explain

ROWS = 12
"""Pictures on a page: memory is that of one, however many are explained."""


class Page(NamedTuple):
    """Some of the pictures: images (n, h, w, 3) in [0, 1], maps {method: (n, h', w')}, boxes and regions or None.

    ids (n,) rows of the source; names n pairs (true, predicted); files n names of files, "" where there is none;
    predicted and target (n,) classes; probability and target_probability (n,), of these; pixels {method: (n, h, w, 3)},
    the values of every channel where they are asked for and the method has them.
    """

    ids: np.ndarray
    images: np.ndarray
    names: list[tuple[str, str]]
    files: list[str]
    predicted: np.ndarray
    probability: np.ndarray
    target: np.ndarray
    target_probability: np.ndarray
    maps: dict[str, np.ndarray]
    pixels: dict[str, np.ndarray]
    boxes: np.ndarray | None
    regions: np.ndarray | None


class Explained(NamedTuple):
    """What is drawn: `pages`, computed as they are asked for.

    title is fit for a file name; rows: pictures on a page; signed: the methods whose values below 0 mean something;
    count: how many of the total pictures there are; unreadable: a line for each picture that could not be read, filled
    while the pages are made.
    """

    title: str
    heading: str
    classes: tuple[str, ...]
    signed: tuple[str, ...]
    count: int
    total: int
    rows: int
    pages: Iterator[Page]
    unreadable: list[str]


def explain(
    loaded: Loaded,
    *,
    images: str | None = None,
    split: str | None = None,
    methods: str | None = None,
    count: int | None = 12,
    target: str | None = None,
    channels: bool = False,
) -> Explained:
    """Maps for `count` pictures, evenly spaced in a split or in a user's folder; None: for all of them.

    target: the class that is explained, by number or name, or "runner_up"; by default the prediction. channels: the
    values of every channel too. A picture of one's own that cannot be read is said and left out.
    """
    if count is not None:
        check_number("--count", count, 1, whole=True)
    chosen, config = loaded.experiment, loaded.experiment.config
    if not expressions.split_list(config.explain if methods is None else methods):
        raise UserError("nothing to explain with: neither config.explain nor --methods names an explanation")
    split = split or first(config.test)
    source = data.pictures(images) if images else chosen.source(split)
    checks.model(chosen)
    explanations = checked_explanations(chosen, methods)
    label = _target(chosen, target)
    number = len(source) if count is None else min(count, len(source))
    ids = np.unique(np.linspace(0, len(source) - 1, number).round().astype(np.int32))
    unreadable: list[str] = []
    maps = _map_names(explanations)
    path = Path(images or "").expanduser().resolve()
    title = split if not images else path.stem if path.is_file() else path.name
    about = f" for {label if isinstance(label, str) else chosen.classes[label]}" if label is not None else ""
    return Explained(
        title=re.sub(r"[^\w.-]+", "_", title).strip("_") or "pictures",
        heading=f"{title}: {loaded.weights}{about}",
        classes=chosen.classes,
        signed=tuple(name for text, names in maps.items() if explanations[text].signed for name in names),
        count=len(ids),
        total=len(source),
        rows=ROWS,
        pages=_pages(loaded, source, ids, explanations, label, channels, unreadable if images else None),
        unreadable=unreadable,
    )


def _pages(loaded, source, ids, explanations, label, channels, unreadable) -> Iterator[Page]:
    """unreadable: where a picture that cannot be read is noted; None: it ends the work."""
    chosen, config = loaded.experiment, loaded.experiment.config
    compute = _computed(chosen, explanations, label, channels)
    records = _records(source, ids, config.image_size, config.resize, unreadable)
    rows = min(ROWS, len(ids))
    order = [name for names in _map_names(explanations).values() for name in names]
    with bar(len(ids), "explaining", enabled=None if len(ids) > rows else False) as shown:
        while page := _next(records, rows):
            number, read = len(page), [record for _, record in page]
            fill = lambda values: np.concatenate([values, np.repeat(values[-1:], rows - number, 0)])
            indices = np.asarray([index for index, _ in page], np.int32)
            pictures = np.stack([record["image"] for record in read]).astype(np.float32) / 255
            results = jax.device_get(compute(loaded.variables, fill(pictures), fill(indices)))
            results = jax.tree.map(lambda values, number=number: values[:number], results)
            predicted, probability, wanted, wanted_probability, maps, pixels = results
            stacked = lambda key, read=read: np.stack([each[key] for each in read]) if key in read[0] else None
            yield Page(
                indices, pictures, [_names(chosen, record, int(k)) for record, k in zip(read, predicted)],
                [str(record.get("name", "")) for record in read], predicted, probability, wanted, wanted_probability,
                {name: maps[name] for name in order},  # jit sorts the keys of a dict
                pixels, stacked("box"), stacked("region"),
            )  # fmt: skip
            shown.update(number)
    if unreadable and len(unreadable) == len(ids):
        raise UserError(f"none of the {len(ids)} pictures can be read: {unreadable[0]}")


def _computed(chosen: Experiment, explanations, label, channels) -> Callable:
    """(variables, pictures, ids) -> prediction, its probability, target, its probability, maps, values of channels."""

    @jax.jit
    @rewrite.fused
    def compute(variables, pictures, ids):
        predict, keys = bind(chosen.model, variables), example_keys(root(chosen.config.seed), ids)
        logits = predict(pictures)
        predicted = logits.argmax(-1).astype(jnp.int32)
        wanted = predicted if label is None else jnp.full_like(predicted, label) if label != "runner_up" else None
        if wanted is None:
            wanted = class_of_rank(logits, predicted, jnp.zeros_like(predicted))
        shares = jax.nn.softmax(logits.astype(jnp.float32))
        of = lambda classes: jnp.take_along_axis(shares, classes[:, None], 1)[:, 0]
        maps, pixels = {}, {}
        for text, names in _map_names(explanations).items():
            method = explanations[text]
            if channels and method.pixels:
                pixels[text] = method.pixels(keys, predict, pictures, wanted)
                maps[text] = method.reduce(pixels[text])
            else:
                result = method(keys, predict, pictures, wanted)
                maps |= dict(zip(names, result if method.names else [result], strict=True))
        return predicted, of(predicted), wanted, of(wanted), maps, pixels

    return compute


def _map_names(explanations: Mapping[str, Explain]) -> dict[str, tuple[str, ...]]:
    """{text: what its maps are called}: the text itself, of a family the names of its members."""
    names, taken = {}, set()
    for text, method in explanations.items():
        names[text] = tuple(name if name not in taken else f"{text}: {name}" for name in method.names) or (text,)
        taken |= set(names[text])
    return names


def _records(source, ids, size, resize, unreadable) -> Iterator[tuple[int, data.Record]]:
    for index in ids:
        try:
            yield int(index), data.decode(source, int(index), size, resize)
        except UserError as error:
            if unreadable is None:
                raise
            unreadable.append(str(error))
            say(f"left out: {error}")


def _next(records, number: int) -> list:
    page = []
    for record in records:
        page.append(record)
        if len(page) == number:
            break
    return page


def _target(chosen: Experiment, text: str | None) -> int | str | None:
    if text is None or text.replace("-", "_") == "runner_up":
        return text and "runner_up"
    if text in chosen.classes:
        return chosen.classes.index(text)
    if text.isdecimal() and len(text) < 10:
        if int(text) < len(chosen.classes):
            return int(text)
        raise UserError(f"--target {text}: there are {len(chosen.classes)} classes, 0 to {len(chosen.classes) - 1}")
    hint = did_you_mean(text, chosen.classes)
    raise UserError(f"--target: '{text}' is no class; {hint}give a number, a class's name or runner_up")


def _names(chosen: Experiment, record: data.Record, predicted: int) -> tuple[str, str]:
    """(true, predicted) names of a picture; of an unknown class, the file's name stands before the prediction."""
    if record["label"] >= 0:
        return chosen.classes[record["label"]], chosen.classes[predicted]
    return "", f"{record['name']}: {chosen.classes[predicted]}"


def saved(path: str | Path, explained: Explained) -> Iterator[Page]:
    """The pages, while they are written into the .npz `path` too, which is there when the last one has been taken.

    One array a method by its text, (n, h', w'), and "METHOD | channels" (n, h, w, 3); `id`, `file`, `predicted`,
    `probability`, `target`, `target_probability` (n,), and `classes` (k,). Memory is that of one page.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise UserError(f"--save {path}: maps are kept in an .npz file; name one, such as {path.stem}.npz")
    if path.exists():
        raise UserError(f"--save {path}: the file is there already; name another one, or move it away")
    return _saved(path, explained)


def _saved(path: Path, explained: Explained) -> Iterator[Page]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}") as folder:
            columns = _Columns(Path(folder))
            for page in explained.pages:
                columns.add(page)
                yield page
            whole = Path(folder) / "whole.npz"
            columns.write(whole, explained.classes)
            whole.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


class _Columns:
    """Arrays that grow by rows in files of their own, until they are put together."""

    def __init__(self, folder: Path):
        self.folder, self.rows, self.columns, self.files = folder, 0, {}, []

    def add(self, page: Page) -> None:
        arrays = page.maps | {f"{name} | channels": values for name, values in page.pixels.items()}
        arrays |= {"id": page.ids, "predicted": page.predicted, "probability": page.probability}
        arrays |= {"target": page.target, "target_probability": page.target_probability}
        self.files += page.files
        self.rows += len(page.ids)
        for name, values in arrays.items():
            values = np.ascontiguousarray(values)
            _, (dtype, shape) = self.columns.setdefault(name, (len(self.columns), (values.dtype, values.shape[1:])))
            with open(self._path(name), "ab") as file:
                file.write(values.astype(dtype, copy=False).tobytes())
            assert values.shape[1:] == shape

    def write(self, path: Path, classes: Sequence[str]) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, (_, (dtype, shape)) in self.columns.items():
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
                header["shape"] = (self.rows, *shape)
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member, open(self._path(name), "rb") as rows:
                    np.lib.format.write_array_header_2_0(member, header)
                    shutil.copyfileobj(rows, member, 2**20)
            for name, texts in (("file", self.files), ("classes", classes)):
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, np.asarray(texts, np.str_), allow_pickle=False)

    def _path(self, name):
        return self.folder / str(self.columns[name][0])
