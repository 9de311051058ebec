"""Large sets: read through grain, a few batches ahead, with bounded memory, in the same order as resident ones.

The order is a pure function of the step, so the state of a stream is the number of its next step: a resumed run reads
what the uninterrupted one would have read, with any number of threads or workers. A thread decodes a part of a batch at
a time: of small records one by one, grain's bookkeeping and threads that wait for each other take as long as decoding.
Two batches of decoded records wait at most, beside the one being put together and the one handed out; with worker
processes, about three batches in each of them.
"""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from topgap_jax.data.resident import epoch_ids, evaluation_ids, layout
from topgap_jax.data.source import Source, decode, threads_for
from topgap_jax.errors import UserError

ENDLESS = 2**40  # steps
PART = 16  # records at most that a thread decodes at a time


def stream(
    source: Source, image_size: tuple[int, int], resize: str = "stretch", *, seed: int, batch: int, **options
) -> "Stream":
    """Training batches without end, epoch after epoch as `epoch_ids(seed, epoch, n, batch)` orders them.

    options: extras=False, threads (as `threads_for` says), workers=0 (processes, for decoding that Python holds up, as
    it does that of small pictures), process=(0, 1).
    """
    order = functools.partial(_training_ids, seed, len(source), batch)
    return Stream(source, order, ENDLESS, batch, image_size, resize, **{"extras": False, **options})


def evaluation_stream(
    source: Source, image_size: tuple[int, int], resize: str = "stretch", *, batch: int, **options
) -> "Stream":
    """Every record once, in order, the last batch padded: what `evaluation_batches` gives, for large sets."""
    order = functools.partial(evaluation_ids, n=len(source), batch=batch)
    steps = -(-len(source) // batch)
    return Stream(source, order, steps, batch, image_size, resize, **{"extras": True, **options})


class Stream:
    """An iterator over host batches {image (b, h, w, 3) uint8, label, id, mask, ...} for `as_batch`; close it after
    use.

    `order(step)` -> ids (batch,), mask (batch,). process=(i, n): only the i-th n-th of the rows of every batch, for
    process i of n. A broken record ends the iteration with the UserError that names it.
    """

    def __init__(
        self,
        source: Source,
        order: Callable[[int], tuple[np.ndarray, np.ndarray]],
        steps: int,
        batch: int,
        image_size: tuple[int, int],
        resize: str = "stretch",
        *,
        extras: bool = True,
        threads: int | None = None,
        workers: int = 0,
        process: tuple[int, int] = (0, 1),
    ):
        if batch % process[1]:
            raise UserError(
                f"batch {batch} does not divide among {process[1]} processes; give a multiple of {process[1]}"
            )
        share = batch // process[1]
        threads = threads or threads_for(source)
        # Of a small batch less: the parts of the two batches that are read ahead give every thread its work.
        part = share if threads == 1 else max(1, min(PART, 2 * share // threads))
        self._parts = _Parts(order, steps, share, process[0], share if workers else part)
        self._decode = functools.partial(_decode, source, tuple(image_size), resize, extras)
        self._threads, self._workers = threads, workers
        self._step, self._iterator = 0, None

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._step >= self._parts.steps:
            raise StopIteration
        if self._iterator is None:
            self._iterator = self._start()
        try:
            rows = next(self._iterator)
        except Exception as error:
            self.close()
            mistake = _user_error(error)
            if mistake is None:
                raise
            raise UserError(str(mistake)) from error  # a fresh one: grain adds notes to those it lets through
        self._step += 1
        # Workers hand over arrays in shared memory, which goes when grain's wrapper does: keep ordinary ones.
        return {key: np.array(value) for key, value in rows.items()} if self._workers else rows

    def get_state(self) -> dict[str, int]:
        """Where the stream stands, for a checkpoint: {"step": number of the next batch}."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Go on at a state that `get_state` gave."""
        self.close()
        self._step = state["step"]

    def close(self) -> None:
        """End the threads and processes. The stream can still be used; it then starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _start(self):
        import grain  # here, because it is slow to import and only large sets need it

        parts = grain.MapDataset.source(self._parts).slice(slice(self._step * self._parts.of_a_step, None))
        decoded = parts.map(self._decode)
        if not self._workers:
            # Reading ahead by parts, not by batches: grain's default buffer of 500 elements would be 500 batches.
            ahead = 2 * self._parts.of_a_step
            read = grain.ReadOptions(num_threads=min(self._threads, ahead), prefetch_buffer_size=ahead)
            return iter(decoded.to_iter_dataset(read).batch(self._parts.of_a_step, batch_fn=_joined))
        from absl import flags

        flags.FLAGS.is_parsed() or flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags
        # Workers take whole batches in turn.
        batches = decoded.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        return iter(batches.mp_prefetch(grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=1)))


@dataclass(frozen=True)
class _Parts:
    """All rows that a process reads, one part of a step after the other, as grain's random-access source: [position] ->
    (ids (m,), mask (m,)), m <= part."""

    order: Callable[[int], tuple[np.ndarray, np.ndarray]]
    steps: int
    share: int  # rows of a batch that are this process's
    process: int
    part: int

    @property
    def of_a_step(self) -> int:
        return -(-self.share // self.part)

    def __len__(self) -> int:
        return self.steps * self.of_a_step

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        step, number = divmod(position, self.of_a_step)
        ids, mask = self.order(step)
        start, end = self.process * self.share + number * self.part, (self.process + 1) * self.share
        rows = slice(start, min(start + self.part, end))
        return ids[rows], mask[rows]


def _decode(source: Source, image_size, resize: str, extras: bool, rows) -> dict[str, np.ndarray]:
    """The records of a part as arrays (m, ...)."""
    ids, mask = rows
    arrays = {key: np.empty((len(ids), *shape), kind) for key, shape, kind in layout(source, image_size, extras)}
    for row, index in enumerate(ids.tolist()):
        record = decode(source, index, image_size, resize, extras)
        for key, array in arrays.items():
            array[row] = record[key]
    return {**arrays, "id": np.asarray(ids, np.int32), "mask": np.asarray(mask, bool)}


def _joined(parts) -> dict[str, np.ndarray]:
    """A batch of its parts."""
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _epoch(seed: int, epoch: int, n: int, batch: int) -> np.ndarray:
    with _one_at_a_time:  # or every thread would draw the same permutation when an epoch begins
        return _kept_epoch(seed, epoch, n, batch)


_one_at_a_time = threading.Lock()
_kept_epoch = functools.lru_cache(maxsize=2)(epoch_ids)  # two: at the end of one threads read the next already


def _training_ids(seed: int, n: int, batch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    steps = max(1, n // batch)
    return _epoch(seed, step // steps, n, batch)[step % steps], np.ones(batch, bool)


def _user_error(error: BaseException | None) -> UserError | None:
    """The UserError behind what grain raised, if there is one."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        error = error.__cause__ or error.__context__
    return None
