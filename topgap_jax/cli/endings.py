"""How a command ends: by a signal with its own exit code and a line, and not at all because a reader went away or a
disk is full; then it says so when it is done."""

import errno
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Signalled(BaseException):
    """A signal asked the program to end, where nothing is there to be saved; `code` is the exit code of a shell."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class Lasting:
    """A text stream that outlives its reader: what nobody reads any more (`| head`) goes nowhere, and the work goes
    on. So does what cannot be written (a full disk): `fault` is why, None where all was."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.fault: OSError | None = None

    def write(self, text: str) -> int:
        return self._last(lambda: self.stream.write(text), len(text))

    def flush(self) -> None:
        self._last(self.stream.flush, None)

    def _last(self, call, otherwise):
        try:
            return call()
        except OSError as error:
            self.fault = self.fault or (None if isinstance(error, BrokenPipeError) else error)
            # The stream keeps what it could not write, and Python flushes it at the end: into nothing.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
            return otherwise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


FULL = (errno.ENOSPC, errno.EDQUOT)
CACHE = re.compile(r"Error (reading|writing) persistent compilation cache entry for '([^']+)': (.*)", re.DOTALL)
"""What JAX warns of, once a program."""


def line(error: OSError) -> str:
    """What to say of a file or folder that cannot be read or written, "" of an error that no system call raised."""
    if error.errno is None:
        return ""
    where = f"'{error.filename}'" if error.filename is not None else ""
    if error.errno in FULL:
        where = f", writing {where}" if where else ""
        return f"{error.strerror}{where}; make room, then give the same command again"
    return f"{error.strerror}: {where}" if where else f"{error.strerror}"


def after_output(code: int) -> int:
    """The exit code once all that was printed is written: 2, with a line, where it could not be."""
    sys.stdout.flush()
    fault = getattr(sys.stdout, "fault", None)
    if fault is None:
        return code
    print(f"topgap: what was to be printed could not be written: {fault.strerror}", file=sys.stderr)
    return code or 2


def _tell_of_cache_once(show):
    """The `warnings.showwarning` that says one line of a compilation cache that cannot be written or read, and takes
    the entry away, which else would stay cut short for ever; of anything else it does what `show` does."""
    kinds = set()

    def showwarning(message, *rest, **named):
        match = CACHE.match(str(message))
        if match is None:
            return show(message, *rest, **named)
        from topgap_jax.run.cpu import drop_from_cache

        kind, name, reason = match.groups()
        folder = drop_from_cache(name)
        if kind not in kinds:
            done = "what it cannot take is compiled anew each time" if kind == "writing" else "compiled anew"
            reason = " ".join(reason.split())[:200]
            print(f"topgap: {kind} the compilation cache {folder}: {reason}; {done}", file=sys.stderr, flush=True)
        kinds.add(kind)

    return showwarning


@contextmanager
def by_signal() -> Iterator[None]:
    """SIGTERM and SIGHUP end the program by `Signalled`, a second one at once; one that is ignored (nohup) stays so.

    A training that can save takes the signals over while it runs. Streams outlive their readers. A compilation cache
    that cannot be written is one line. Outside the main thread Python delivers no signals.
    """
    streams = sys.stdout, sys.stderr
    # Of a stream that is closed (`>&-`) Python has None; the next file that is opened would be in its place.
    sys.stdout, sys.stderr = (Lasting(stream or open(os.devnull, "w")) for stream in streams)
    before = {}

    def end(number, frame):
        signal.signal(number, before[number])
        raise Signalled(number)

    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        handlers = {number: signal.getsignal(number) for number in numbers}
        before = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
        for number in before:
            signal.signal(number, end)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _tell_of_cache_once(warnings.showwarning)
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = streams
