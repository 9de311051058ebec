"""A split as evaluation wants it: examples in batches of one width, all of them or a chosen few, on the device."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from topgap_jax.data import Stream, as_batch, gather
from topgap_jax.data.source import Source
from topgap_jax.edges import check_split
from topgap_jax.errors import UserError
from topgap_jax.mesh import check_batch, replicated, split
from topgap_jax.types import Array, Batch, Model


class Split(NamedTuple):
    """batches(ids, width=None) -> iterator of (ids (m,), batch of the full width whose first m rows they are, the rest
    masked padding).

    ids (n,) int32 are rows of the split; None: all of them, in order. Every batch has the same width, `batch` if none
    is given, so nothing compiles twice.
    """

    examples: int
    batches: Callable[..., Iterator[tuple[np.ndarray, Batch]]]
    batch: int


def resident_split(arrays: Mapping[str, Array], *, classes: int, batch: int, mesh: Mesh | None = None) -> Split:
    """A split held on the device as `data.resident` decodes it, gathered in batches of `batch` rows."""
    check_width(batch, mesh)
    check_split("split", arrays, classes)
    held = jax.device_put(dict(arrays), None if mesh is None else replicated(mesh))
    make = jax.jit(
        lambda held, ids, mask: gather(held, ids, mask, classes), out_shardings=None if mesh is None else split(mesh)
    )

    def batches(ids=None, width=None):
        for some in _chunks(ids, examples, width or batch):
            padded, mask = _padded(some, width or batch)
            yield some, make(held, padded, mask)

    examples = len(arrays["label"])
    return Split(examples, batches, batch)


def streamed_split(
    source: Source,
    image_size: tuple[int, int],
    resize: str = "stretch",
    *,
    classes: int,
    batch: int,
    mesh: Mesh | None = None,
    threads: int | None = None,
    workers: int = 0,
) -> Split:
    """A split too large to hold: decoded anew for every pass, by grain's threads; each process reads its share of a
    batch."""
    check_width(batch, mesh)
    process = (0, 1) if mesh is None else (jax.process_index(), jax.process_count())
    make = jax.jit(lambda rows: as_batch(rows, classes))

    def place(rows):
        if mesh is None:
            return jax.device_put(rows)
        return {name: jax.make_array_from_process_local_data(split(mesh), value) for name, value in rows.items()}

    def batches(ids=None, width=None):
        chunks = list(_chunks(ids, len(source), width or batch))
        order = lambda step: _padded(chunks[step], width or batch)
        options = {"extras": True, "threads": threads, "workers": workers, "process": process}
        with Stream(source, order, len(chunks), width or batch, image_size, resize, **options) as rows:
            for some, row in zip(chunks, rows):
                yield some, make(place(row))

    return Split(len(source), batches, batch)


def rows_of(data: Split, rows: np.ndarray) -> Split:
    """These rows (m,) of a split as a split of its own. A batch keeps the `id` of the whole split, which randomness
    comes from."""
    rows = np.asarray(rows, np.int32)

    def batches(ids=None, width=None):
        ids = np.arange(len(rows), dtype=np.int32) if ids is None else np.asarray(ids, np.int32)
        start = 0
        for some, batch in data.batches(rows[ids], width):
            yield ids[start : start + len(some)], batch
            start += len(some)

    return Split(len(rows), batches, data.batch)


def narrowed(data: Split, examples: int, mesh: Mesh | None = None) -> Split:
    """The split in batches for so many of its examples, which then fill nearly all slots: a whole number of eighths of
    `batch`, and of devices. One batch, where that holds all: 37 examples in batches of 100 take one of 38; else at
    least half as wide as before, with the fewest slots in all: 915 in batches of 128 take ten of 96."""
    devices = 1 if mesh is None else mesh.size
    widths = [-(-data.batch * eighths // (8 * devices)) * devices for eighths in range(1, 9)]
    whole = examples <= data.batch
    fitting = (width for width in widths if (width >= examples if whole else 2 * width >= data.batch))
    width = min(fitting, key=lambda width: (max(1, -(-examples // width)) * width, -width))
    return data._replace(batches=lambda ids=None, width=width: data.batches(ids, width), batch=width)


def check_model(model: Any) -> None:
    """Raise a UserError for what is no `Model`, such as a function of images."""
    if not isinstance(model, Model):
        raise UserError(
            f"give a Model, such as models.nnx(module) or models.linen(module), got {model!r}; of a function of images"
            " it is Model(None, lambda variables, images, **options: Output(predict(images), {}, {})),"
            " with variables {'params': {}}"
        )


def check_width(batch: int, mesh: Mesh | None) -> None:
    """Raise a UserError unless a batch has at least one example, and the devices divide it."""
    if mesh is not None:
        check_batch(batch, mesh)
    elif batch < 1:
        raise UserError(f"batch={batch} must be at least 1")


def _chunks(ids, examples, batch):
    ids = np.arange(examples, dtype=np.int32) if ids is None else np.asarray(ids, np.int32)
    for start in range(0, len(ids), batch):
        yield ids[start : start + batch]


def _padded(ids, batch):
    """The ids filled up with row 0, and a mask that is False there."""
    return np.pad(ids, (0, batch - len(ids))), np.arange(batch) < len(ids)
