"""Signals that ask a training to stop: it saves first, and says how to go on."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils


@contextmanager
def stop_requests() -> Iterator[Callable[[int], int]]:
    """Gives `asked(step)`: the number of the signal that asked the run to stop, SIGTERM, SIGHUP or Ctrl-C, 0 if none
    did. A second one ends it at once; one that was ignored when the program began (nohup, `&`) stays ignored.

    With many processes all of them get the same answer at the same step, also if the signal reached one (JAX's
    preemption service, which listens to SIGTERM). Outside the main thread Python delivers no signals.
    """
    if jax.process_count() > 1:
        yield lambda step: signal.SIGTERM * multihost_utils.reached_preemption_sync_point(step)
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: 0
        return
    asked = []

    def handle(number, frame):
        asked.append(number)
        signal.signal(number, before[number])

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handle)
    try:
        yield lambda step: asked[0] if asked else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
