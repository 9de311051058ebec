"""Signals that ask a training to stop: it saves first, and says how to go on."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils


@contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Gives `asked(step)`: has somebody asked the run to stop, by SIGTERM or Ctrl-C? A second Ctrl-C ends it at once.

    With many processes all of them get the same answer at the same step, also if the signal reached one (JAX's
    preemption service, which listens to SIGTERM). Outside the main thread Python delivers no signals, and the answer is
    no.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    asked = []

    def handle(number, frame):
        asked.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
