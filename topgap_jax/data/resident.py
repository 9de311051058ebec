"""Small sets: decoded once, kept on the device as uint8, gathered into batches inside the jitted step."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax.data.source import Source, decode, threads_for
from topgap_jax.types import Array, Batch

ALIGNMENT = 64  # bytes, XLA's on a CPU
CHUNK = 64  # records a thread decodes before it reports


def resident(
    source: Source,
    image_size: tuple[int, int],
    resize: str = "stretch",
    *,
    extras: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, np.ndarray]:
    """The whole split as arrays: `image` (n, h, w, 3) uint8, `label` (n,) int32, and `box`, `region`, `group` where
    offered.

    extras=False leaves box, region and group out (training does not need them). progress(done, total) is called now and
    then.
    """
    n = len(source)
    arrays = {key: _aligned((n, *shape), kind) for key, shape, kind in layout(source, image_size, extras)}

    def read(start: int) -> int:
        stop = min(start + CHUNK, n)
        for i in range(start, stop):
            record = decode(source, i, image_size, resize, extras)
            for key, array in arrays.items():
                array[i] = record[key]
        return stop - start

    done = 0
    with ThreadPoolExecutor(threads_for(source)) as pool:
        for count in pool.map(read, range(0, n, CHUNK)):
            done += count
            if progress is not None:
                progress(done, n)
    return arrays


def _aligned(shape: tuple[int, ...], kind: type) -> np.ndarray:
    """Zeros at an address that a CPU device takes over as it is: else JAX makes a copy, and a set is held twice."""
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(kind).reshape(shape)


def layout(source: Source, image_size: tuple[int, int], extras: bool = True) -> list[tuple[str, tuple[int, ...], type]]:
    """Name, shape and type of what one record of a source takes on the device."""
    rows = [("image", (*image_size, 3), np.uint8), ("label", (), np.int32)]
    more = [("box", (4,), np.float32), ("region", tuple(image_size), np.uint8), ("group", (), np.int32)]
    return rows + [row for row in more if extras and row[0] in source.offers]


def memory(source: Source, image_size: tuple[int, int], extras: bool = True) -> int:
    """Bytes that `resident` would take."""
    sizes = [int(np.prod(shape)) * np.dtype(kind).itemsize for _, shape, kind in layout(source, image_size, extras)]
    return len(source) * sum(sizes)


def gather(arrays: Mapping[str, Array], ids: Array, mask: Array, classes: int) -> Batch:
    """The batch of the rows `ids` (b,) of resident arrays; mask (b,) is False for padding. Pure, for use inside jit."""
    rows = {key: array[ids] for key, array in arrays.items()}
    return as_batch({**rows, "id": ids, "mask": mask}, classes)


def as_batch(rows: Mapping[str, Array], classes: int) -> Batch:
    """A batch of host rows (uint8 images, as `stream` yields them) as methods want it: images / 255, one-hot targets.

    A label of -1 has targets of 0. Pure, for use inside jit, so that images travel as bytes.
    """
    image = jnp.asarray(rows["image"]).astype(jnp.float32) / 255
    label = jnp.asarray(rows["label"], jnp.int32)
    return {**rows, "image": image, "label": label, "targets": jax.nn.one_hot(label, classes, dtype=jnp.float32)}


def epoch_ids(seed: int, epoch: int, n: int, batch: int) -> np.ndarray:
    """The rows (steps, batch) int32 of one epoch: a permutation of n from (seed, epoch), the incomplete batch dropped.

    With fewer rows than a batch, one batch that repeats them.
    """
    order = np.random.default_rng([seed, epoch]).permutation(n).astype(np.int32)
    steps = n // batch
    return order[: steps * batch].reshape(steps, batch) if steps else np.resize(order, (1, batch))


def evaluation_batches(n: int, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every row once, in order: pairs ids (batch,) int32, mask (batch,); the last batch is padded with row 0, mask
    False."""
    for start in range(0, n, batch):
        yield evaluation_ids(start // batch, n, batch)


def evaluation_ids(step: int, n: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of the evaluation batch number `step`."""
    ids = np.arange(step * batch, (step + 1) * batch, dtype=np.int32)
    return np.where(ids < n, ids, 0), ids < n
