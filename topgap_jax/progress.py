"""What a run tells while it works: a bar on the terminal, and metrics in `metrics.jsonl` and TensorBoard files."""

import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from tqdm import tqdm

from topgap_jax.errors import printable
from topgap_jax.stored import CHECKSUM, checksum

METRICS = "metrics.jsonl"
QUIET_SECONDS = 30.0  # between two lines where there is no terminal
DRAWN_SECONDS = 0.1  # between two pictures of a bar
# tqdm's own, but never "1.6s/ images".
COUNTS = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
BAR = "{l_bar}{bar}| " + COUNTS


class Bar(Protocol):
    """A progress bar: `update(n)` counts n more units as done, `note(text)` shows a few words behind the counts.

    `at_most(done, left)` tells of units that take very different times how many steps of one length have been done,
    and how many more there can be: the time that is left is at most that of these.
    """

    def update(self, n: int) -> None: ...

    def note(self, text: str) -> None: ...

    def at_most(self, done: int, left: int) -> None: ...


@contextmanager
def bar(total: int, text: str, unit: str = "images", enabled: bool | None = None, *, done: int = 0) -> Iterator[Bar]:
    """Show how far work of `total` units has come: done, units/s, remaining time. `done` of them were done before.

    On a terminal a bar, elsewhere (a log file) at most one line every 30 seconds and one at the end. `enabled=False`
    shows nothing; `None` shows it in process 0 only.
    """
    if enabled is None:
        enabled = is_writer()
    shown = _TerminalBar if sys.stderr.isatty() else _Lines
    current = shown(total, text, unit, done) if enabled else _Silent()
    try:
        yield current
    finally:
        current.close()


class _Silent:
    def update(self, n):
        pass

    def note(self, text):
        pass

    def at_most(self, done, left):
        pass

    def close(self):
        pass


class _TerminalBar:
    def __init__(self, total, text, unit, done):
        self.tqdm = tqdm(
            total=total, desc=text, unit=f" {unit}", initial=done, dynamic_ncols=True, file=sys.stderr, bar_format=BAR
        )
        self.drawn = time.monotonic()

    def update(self, n):
        self.tqdm.update(n)

    def note(self, text):
        self.tqdm.set_postfix_str(text, refresh=False)

    def at_most(self, done, left):
        if time.monotonic() - self.drawn >= DRAWN_SECONDS:
            meter = self.tqdm.format_dict
            remaining = _remaining(meter["n"], meter["total"], meter["initial"], meter["elapsed"], left / done)
            self.tqdm.bar_format = BAR.replace("{remaining}", remaining)
            self.tqdm.refresh()
            self.drawn = time.monotonic()

    def close(self):
        self.tqdm.bar_format = BAR
        self.tqdm.close()


class _Lines:
    """The same figures as plain lines: a log file full of carriage returns cannot be read."""

    def __init__(self, total, text, unit, done):
        self.total, self.text, self.unit = total, text, unit
        self.done = self.initial = done
        self.words, self.times_more = "", math.inf
        self.start = self.shown = time.monotonic()

    def update(self, n):
        self.done += n
        if time.monotonic() - self.shown >= QUIET_SECONDS:
            self._show()

    def note(self, text):
        self.words = text

    def at_most(self, done, left):
        self.times_more = left / done
        self.update(0)

    def close(self):
        self.times_more = math.inf
        self._show()

    def _show(self):
        self.shown = time.monotonic()
        elapsed = self.shown - self.start
        remaining = _remaining(self.done, self.total, self.initial, elapsed, self.times_more)
        meter = tqdm.format_meter(
            self.done,
            self.total,
            elapsed,
            unit=f" {self.unit}",
            initial=self.initial,
            prefix=self.text,
            postfix=self.words or None,
            bar_format="{desc}: {percentage:.0f}% " + COUNTS.replace("{remaining}", remaining),
        )
        print(meter, file=sys.stderr, flush=True)


def _remaining(done: int, total: int, initial: int, elapsed: float, times_more: float) -> str:
    """The time that is left, at the pace so far and at most `times_more` as long as what has passed."""
    times = min(times_more, (total - done) / (done - initial) if done > initial else math.inf)
    return tqdm.format_interval(elapsed * times) if times < math.inf else "?"


class Metrics:
    """Writes rows of numbers to `metrics.jsonl` and to TensorBoard files in `tensorboard/`, both in `folder`.

    `step` is where the run goes on: rows of later steps, left by a process that was killed after its last checkpoint,
    are cut off, so that no step appears twice; nothing else is. Only process 0 writes. `rows` counts those in the file.
    """

    rows = 0

    def __init__(self, folder: Path, step: int = 0):
        self.file = self.board = None
        if not is_writer():
            return
        self.path = Path(folder) / METRICS
        cut(self.path, step)
        self.rows = rows_in(folder)
        self.file = self.path.open("ab", buffering=0)  # a buffer would be written once more when a full disk closes it
        self.board = _Board(Path(folder) / "tensorboard", step)

    def write(self, step: int, kind: str, numbers: Mapping[str, float], **more: float) -> None:
        """One row: {"step", "kind", **more, **numbers}; `numbers` are drawn by TensorBoard as kind/name."""
        if self.file is None:
            return
        row = {"step": step, "kind": kind, **more, **{name: float(value) for name, value in numbers.items()}}
        with writing(self.path):
            append(self.file, json.dumps(row | {CHECKSUM: checksum(row)}).encode() + b"\n")
        self.rows += 1
        self.board.write(step, {f"{kind}/{name}": float(value) for name, value in numbers.items()})

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.board.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


class _Board:
    """The same for TensorBoard, written by this thread: tensorboardX's own dies of a full disk in pages of traceback,
    and with it everyone who waits for its queue."""

    def __init__(self, folder: Path, step: int):
        # here, since it takes 2 s that `topgap compare` need not wait
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar

        self.path = folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self.event, self.scalar, self.flushed = Event, scalar, time.monotonic()
        with writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self.records = RecordWriter(str(self.path))
        self._write(file_version="brain.Event:2")
        # What a killed process wrote of later steps is not shown.
        self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        with writing(self.path):
            for name, value in numbers.items():
                self._write(step=step, summary=self.scalar(name, value))
            if time.monotonic() - self.flushed >= QUIET_SECONDS:  # waits for the disk
                self.records.flush()
                self.flushed = time.monotonic()

    def close(self) -> None:
        with writing(self.path):
            self.records.close()

    def _write(self, **fields):
        self.records.write(self.event(wall_time=time.time(), **fields).SerializeToString())


def read_metrics(folder: Path) -> list[dict]:
    """The rows of `metrics.jsonl` in a run folder, in order. Damaged lines are passed over, and one line says how
    many; a last line without an end is one that is being written, or was when its process died."""
    path = Path(folder) / METRICS
    rows = [_row(line) for line in _lines(path)[:-1]]
    if damaged := rows.count(None):
        say(f"{path}: {damaged} of {len(rows)} lines are damaged and passed over")
    return [row for row in rows if row is not None]


def rows_in(folder: Path) -> int:
    """How many rows a run's file of metrics has, damaged ones included."""
    return len(_lines(Path(folder) / METRICS)) - 1


def cut(path: Path, step: int) -> None:
    """Take the rows of later steps out of a file of metrics, and a last line without an end; a damaged line stays."""
    *lines, rest = _lines(path)
    kept = [line for line in lines if (row := _row(line)) is None or row["step"] <= step]
    if rest or len(kept) < len(lines):
        write_text(path, b"".join(line + b"\n" for line in kept))


def _lines(path: Path) -> list[bytes]:
    """The lines of a file without their ends; last what follows the last end, mostly nothing."""
    return path.read_bytes().split(b"\n") if path.is_file() else [b""]


def _row(line: bytes) -> dict[str, Any] | None:
    """A row of metrics: a step, and numbers or words under names; None of a line that is anything else, or does not
    hold what was written."""
    try:
        row = json.loads(line.decode())
        if CHECKSUM in row and row.pop(CHECKSUM) != checksum(row):
            return None
        for value in row.values():
            value is None or isinstance(value, str) or float(value)
        whole = type(row["step"]) is int and row["step"] >= 0
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
        return None
    return row if whole else None


def write_text(path: Path, text: str | bytes) -> None:
    """Write a file whole or not at all: a process killed in the middle, or a full disk, leaves the old one. A device or
    a pipe (/dev/stdout) is written to, and not replaced by a file."""
    content = text if isinstance(text, bytes) else text.encode()
    with writing(path):
        if path.absolute().parent == Path("/dev") or (path.exists() and not path.is_file()):
            path.write_bytes(content)
            return
        part = Path(f"{path}.part")
        try:
            part.write_bytes(content)
            os.replace(part, path)
        except OSError:
            part.unlink(missing_ok=True)
            raise


def append(file: IO[bytes], content: bytes) -> None:
    """Add to a file without a buffer: all of it, or nothing and an OSError."""
    start = file.tell()
    try:
        while content:
            content = content[file.write(content) :]
    except OSError:
        file.truncate(start)
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError from inside names the path, which Python leaves out where a disk is full."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def say(line: str) -> None:
    """One line for the person at the terminal, from process 0; nothing in it (a stranger's name of a file) moves the
    cursor."""
    if is_writer():
        print(f"topgap: {printable(line)}", file=sys.stderr, flush=True)


def is_writer() -> bool:
    """Whether this process prints and writes: of many, number 0. Asking starts no device."""
    import jax

    return not jax.distributed.is_initialized() or jax.process_index() == 0
