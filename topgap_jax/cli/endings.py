"""How a command ends: by a signal with its own exit code and a line, and not at all because a reader went away."""

import os
import signal
import sys
import threading
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
    on."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        return self._last(lambda: self.stream.write(text), len(text))

    def flush(self) -> None:
        self._last(self.stream.flush, None)

    def _last(self, call, otherwise):
        try:
            return call()
        except BrokenPipeError:
            # The stream keeps what it could not write, and Python flushes it at the end: into nothing.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
            return otherwise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def by_signal() -> Iterator[None]:
    """SIGTERM and SIGHUP end the program by `Signalled`, a second one at once; one that is ignored (nohup) stays so.

    A training that can save takes the signals over while it runs. Streams outlive their readers. Outside the main
    thread Python delivers no signals.
    """
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Lasting, streams)
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
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = streams
