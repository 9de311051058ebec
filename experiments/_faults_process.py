"""Commands as processes that something happens to: forked from one that has imported everything, so that a training of
the tiny config takes a second or two, and judged by one rule.

What happens is a function that the child calls before its command. Most are hung on Python's audit events: each file
that is opened, renamed or removed below a folder is one, so that "at the 17th of them" is a moment in the middle of a
save. What TensorStore does in C has no such events; a kill by the clock reaches it.
"""

import atexit
import contextlib
import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from topgap_jax import cli

FILES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "os.truncate")
SAID = re.compile(r"(CPU: |topgap: |.*: +\d+%[ ,|]|$)")  # what a command prints on stderr when all is well

Happening = Callable[[], object]


class Ended(NamedTuple):
    """How a command ended. code: its exit code, minus the number of a signal, None where it had to be killed."""

    code: int | None
    out: str
    err: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("topgap: ")]

    @property
    def others(self) -> list[str]:
        """Lines that are neither ours nor progress."""
        return [line for line in self.err.splitlines() if not SAID.match(line)]


class Running:
    """A command under way; `ended` waits for it."""

    def __init__(self, pid: int, folder: Path, name: str):
        self.pid, self.folder, self.name, self.start = pid, folder, name, time.monotonic()

    def kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        """The wait status, None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return status if pid else None

    def ended(self, limit: float = 120.0) -> Ended:
        """limit: seconds after which it is a hang."""
        code = None
        while (status := self.poll()) is None:
            if time.monotonic() - self.start > limit:
                self.kill(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                break
            time.sleep(0.02)
        else:
            code = os.waitstatus_to_exitcode(status)
        text = lambda end: (self.folder / f"{self.name}.{end}").read_text(errors="replace")
        return Ended(code, text("out"), text("err"), round(time.monotonic() - self.start, 2))


def start(
    words: Sequence[object],
    folder: Path,
    name: str = "command",
    happening: Happening = lambda: None,
    out: int | None = None,
    run: Callable[[list[str]], int] = cli.main,
) -> Running:
    """The command in a child. folder: where NAME.out and NAME.err go; out: a descriptor in place of the first."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Running(pid, folder, name)
    code = 1
    try:
        os.setsid()
        for number, end in ((1, "out"), (2, "err")):
            file = os.open(folder / f"{name}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(out if end == "out" and out is not None else file, number)
        # What this process has of its own may be a file, which can be told where it is; a pipe cannot.
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
        for number in (signal.SIGTERM, signal.SIGHUP):  # which nohup, or a shell's &, may have this process ignore
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["topgap", *map(str, words)]
        happening()
        code = run(list(map(str, words))) or 0
        threading._shutdown()
        atexit._run_exitfuncs()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def topgap(words: Sequence[object], folder: Path, happening: Happening = lambda: None, limit: float = 120.0) -> Ended:
    return start(words, folder, happening=happening).ended(limit)


# What happens to a command


def at_event(number: int, act: Callable[[str, str], object], below: Path, only: Sequence[str] = FILES) -> Happening:
    """`act(event, path)` at the number-th event (from 1) on a path below a folder, from whichever thread."""

    def happening():
        left, lock = [number], threading.Lock()

        def hook(event, arguments):
            if event not in only or not arguments or not isinstance(arguments[0], str | os.PathLike):
                return
            path = os.fspath(arguments[0])
            if not path.startswith(str(below)):
                return
            with lock:
                left[0] -= 1
                now = left[0] == 0
            if now:
                act(event, path)

        sys.addaudithook(hook)

    return happening


def noting(file: Path, below: Path) -> Happening:
    """Writes each event below a folder as a line "EVENT PATH" into a file that lies elsewhere."""

    def happening():
        stream = open(file, "w", buffering=1)

        def hook(event, arguments):
            if event in FILES and arguments and isinstance(arguments[0], str | os.PathLike):
                path = os.fspath(arguments[0])
                if path.startswith(str(below)):
                    os.write(stream.fileno(), f"{event} {path}\n".encode())

        sys.addaudithook(hook)

    return happening


def killed(number: int = signal.SIGKILL, after: float = 0.0) -> Callable[[str, str], object]:
    """This process gets a signal, at once or some seconds later."""
    send = lambda: os.kill(os.getpid(), number)
    return lambda event, path: threading.Timer(after, send).start() if after else send()


def fails(number: int) -> Callable[[str, str], object]:
    """The system answers with an error."""

    def act(event, path):
        raise OSError(number, os.strerror(number), path)

    return act


def jumping(seconds: float, after: float) -> Happening:
    """The clock of the day is put forward or back, some seconds from the start."""

    def happening():
        clock, begin = time.time, time.monotonic()
        time.time = lambda: clock() + (seconds if time.monotonic() - begin > after else 0.0)

    return happening


# What a folder holds


def numbers(folder: Path, work: Path) -> dict[str, Any]:
    """What a run's folder says: a digest of the weights, and what it measured, without what was spent on it. Read in a
    child, since JAX must not begin in the process that forks."""
    file = work / "numbers.json"
    ended = start([], work, "numbers", run=lambda words: _numbers(folder, file)).ended()
    return json.loads(file.read_text()) if ended.code == 0 else {"unreadable": ended.err[-300:]}


def _numbers(folder: Path, file: Path) -> int:
    import jax

    from topgap_jax.measure import results
    from topgap_jax.progress import read_metrics
    from topgap_jax.run import checkpoint

    found: dict[str, Any] = {}
    for which in ("last", "best"):
        step = checkpoint.latest_step(folder, which)
        if step is not None:
            digest = hashlib.sha256()
            for leaf in jax.tree.leaves(checkpoint.read(folder / "checkpoints" / which / str(step), "variables")):
                digest.update(np.asarray(leaf).tobytes())
            found[which] = [step, digest.hexdigest()]
    found["metrics"] = read_metrics(folder)
    rows = [results.to_json(row) for row in results.read(folder / results.FILE).rows]
    found["rows"] = sorted(({**row, "cost": None} for row in rows), key=lambda row: (row["split"], row["evaluator"]))
    file.write_text(json.dumps(found))
    return 0


def pictures(folder: Path) -> dict[str, str]:
    """What `explain` and `report` left in a folder, by digest: pictures by their bytes, maps by their numbers, the page
    without the minute it was written in."""
    found = {}
    for path in sorted(folder.glob("sheets/*.png")):
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in folder.glob("maps.npz"):
        with np.load(path) as arrays:
            found["maps"] = hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).hexdigest()
    for path in folder.glob("report.html"):
        text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "", path.read_text()).replace(str(folder), "")
        found["page"] = hashlib.sha256(text.encode()).hexdigest()
    return found


# The judge

SAME, LINE = "same numbers", "one line"
GOOD = (SAME, LINE)


def verdict(ended: Ended, same: bool | None = None, code: int | None = None) -> str:
    """What became of a command: `SAME`, `LINE`, or what must not be.

    same: whether its numbers are those of the undisturbed run (None: it was not to finish); code: the exit code it
    should have where it does not finish, any but 0 if not given.
    """
    if ended.code is None:
        return "hang"
    if "Traceback" in ended.err or "Traceback" in ended.out:
        return "traceback"
    if ended.code == 0 and same is not None:
        return SAME if same else LINE if ended.lines else "silent difference"
    if ended.code == 0:
        return "exit code 0"
    if code is not None and ended.code != code:
        return f"exit code {ended.code}, not {code}"
    if ended.others:
        return "lines that are not ours"
    return LINE if ended.lines else "no line"
