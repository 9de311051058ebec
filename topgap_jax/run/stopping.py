"""Signals that ask a training to stop: it saves first, and says how to go on."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax.mesh import data_mesh, replicated, split

LAG = 2  # steps after which many processes ask one another's answer: no step waits for it


@contextmanager
def stop_requests() -> Iterator[Callable[[int], int]]:
    """Gives `asked(step)`: the number of the signal that asked the run to stop, SIGTERM, SIGHUP or Ctrl-C, 0 if none
    did. A second one ends it at once; one that was ignored when the program began (nohup, `&`) stays ignored.

    With many processes all of them must ask at every step, and get the same answer at the same step, also if the signal
    reached one. A signal that came too late to be an answer is sent again at the end. Outside the main thread Python
    delivers no signals.
    """
    asked: list[int] = []

    def handle(number, frame):
        asked.append(number)
        signal.signal(number, before[number])

    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name)]
        handlers = {number: signal.getsignal(number) for number in numbers}
        before = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handle)
    here = lambda step: asked[0] if asked else 0
    answers = here if jax.process_count() == 1 else _highest(here)
    answered = False

    def answer(step):
        nonlocal answered
        number = answers(step)
        answered |= bool(number)
        return number

    try:
        yield answer
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked and not answered:
        os.kill(os.getpid(), asked[0])


def _highest(here: Callable[[int], int]) -> Callable[[int], int]:
    """The highest number that any process gave LAG steps ago."""
    mesh, pending = data_mesh(), deque()
    highest = jax.jit(jnp.max, out_shardings=replicated(mesh))
    devices = len(jax.local_devices())

    def answer(step):
        numbers = np.full(devices, here(step), np.int32)
        pending.append(highest(jax.make_array_from_process_local_data(split(mesh), numbers)))
        return int(pending.popleft()) if len(pending) > LAG else 0

    return answer
