"""Many processes as one run: joined before the first array, and ended together when one of them is lost."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable

import jax

from topgap_jax.build import check_number
from topgap_jax.errors import UserError

MISTAKE = 2  # the status after a user's mistake, which all processes meet at nearly the same time
GRACE = 3  # seconds that process 0 then outlives the others: without it JAX ends them in pages of text of its own
AGAIN = "give the same command to all of them again: they go on from the last checkpoint"
WATCHER = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
if sys.stdin.read() != "done":
    print(sys.argv[1], file=sys.stderr)
"""
HEARTBEAT = 60  # seconds without a sign of life after which JAX ends the other processes
JOIN = 300  # seconds to wait for all processes at the start


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Make this process number `process` of `processes`, which meet at `coordinator`, "host:port" of process 0.

    Without arguments JAX finds all three (Cloud TPU, GKE, Slurm, Open MPI). Call it before the first array, with the
    same command in every process. Raises UserError where an argument is missing or wrong, or JAX finds nothing.
    """
    if (coordinator, processes, process) != (None, None, None):
        _check(coordinator, processes, process)
    try:
        jax.distributed.initialize(
            coordinator, processes, process, initialization_timeout=JOIN, heartbeat_timeout_seconds=HEARTBEAT
        )
    except Exception as error:  # ValueError, RuntimeError and those of the cluster's own software
        reason = " ".join(str(error).split())[:200]
        if coordinator is None:
            raise UserError(
                f"--distributed: JAX does not find the other processes ({reason}); it knows Cloud TPU, GKE, Slurm and "
                "Open MPI; elsewhere give --coordinator HOST:PORT --processes N --process I"
            ) from error
        raise UserError(f"--coordinator {coordinator}: process {process} cannot join there: {reason}") from error


def lost(error: Exception) -> str:
    """What to say where a computation of all processes ended in `error`."""
    reason = " ".join(str(error).split())[:200]
    return f"{_name()}: another process is gone, or does not answer ({reason}); {AGAIN}"


def watch() -> Callable[[], None]:
    """Start a small program that says a line if this process is killed, or ended by JAX, which asks nobody before.

    Returns what to call when this process ends by itself.
    """
    line = f"topgap: {_name()} was killed, or ended by JAX because another one is gone; {AGAIN}"
    watcher = subprocess.Popen(
        [sys.executable, "-S", "-c", WATCHER, line],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip

    def done():
        watcher.communicate("done")

    return done


def _name() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


def leave(code: int) -> None:
    """End this process at once, so that the others see it: an ordinary end would wait for them, and they for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0 and code == MISTAKE:
        time.sleep(GRACE)
    os._exit(code)


def _check(coordinator: str | None, processes: int | None, process: int | None) -> None:
    given = {"--coordinator HOST:PORT": coordinator, "--processes N": processes, "--process I": process}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} missing: {', '.join(given)} go together; or give --distributed alone")
    if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):\d{1,5}", coordinator):
        raise UserError(f"--coordinator must be HOST:PORT like 10.0.0.1:1234, got '{coordinator}'")
    check_number("--processes", processes, 1, whole=True)
    check_number("--process", process, 0, processes - 1, whole=True)
