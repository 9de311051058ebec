"""Many processes as one run: joined before the first array, and ended together when one of them is lost."""

import importlib.metadata
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import jax

from topgap_jax import __version__
from topgap_jax.build import check_number
from topgap_jax.errors import UserError
from topgap_jax.run import rollcall, watcher
from topgap_jax.run.provenance import PACKAGES

MISTAKE = 2  # the status after a user's mistake
LOST = 3  # the status where another process is gone
GRACE = 3  # seconds that process 0 then outlives the others, who come by the same: at its end JAX ends them
HEARTBEAT = 15  # seconds without a sign of life after which JAX ends the other processes
SHUTDOWN = 24 * 3600  # seconds that those who are done wait for the rest: process 0 may still write; the dead are seen
DETECT = 300  # seconds that a cluster's own software has to say where process 0 is
JOIN = 60  # seconds that JAX has to join them once all are there

_rolls: list[rollcall.Roll] = []  # the one that this process joined


class Place(NamedTuple):
    """Which of how many processes this is, and where they meet.

    coordinator: "host:port" of process 0. devices: the numbers of this machine's devices that are its own, None: all.
    """

    coordinator: str
    processes: int
    process: int
    devices: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        return f"process {self.process} of {self.processes}"


def locate(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> Place:
    """The place of this process, as the arguments say, or without any as JAX finds it (Cloud TPU, GKE, Slurm, Open
    MPI). Raises UserError where an argument is missing or wrong, or JAX finds nothing."""
    if (coordinator, processes, process) != (None, None, None):
        _check(coordinator, processes, process)
        return Place(coordinator, processes, process)
    try:
        # What `jax.distributed.initialize` asks too; it gives no other way to know who is waited for.
        from jax._src.clusters import ClusterEnv

        *place, devices = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, DETECT)
    except Exception as error:  # those of the cluster's own software, or of a JAX in which this has another name
        raise UserError(_not_found(" ".join(str(error).split())[:200])) from error
    if None in place:
        raise UserError(_not_found("no such cluster started this process"))
    return Place(*place, None if devices is None else tuple(devices))


def join(place: Place, wait: float, facts: rollcall.Facts) -> None:
    """Make this process the one of `place`, once all have come, at most `wait` seconds from now; call it before the
    first array.

    facts: what must be the same in all processes, beside the versions. Raises UserError, which names who is missing, or
    what differs; where one is lost afterwards, before JAX has joined them, a line says so and the process ends.
    """
    say = lambda line: print(f"topgap: {place.name}: {line}", file=sys.stderr, flush=True)
    same = {"topgap_jax": __version__, **{name: _version(name) for name in PACKAGES}, **facts}
    _rolls.append(rollcall.meet(place.coordinator, place.processes, place.process, same, wait, say))

    def end():
        numbers = gone(0)
        who = rollcall.named(numbers, place.processes) if numbers else "one of them"
        say(f"all processes came, and then {who} ended or froze before JAX had joined them; {watcher.AGAIN}")
        os._exit(LOST)

    limit = threading.Timer(JOIN, end)  # at its own limit JAX aborts the process, in pages of C++
    limit.daemon = True
    limit.start()
    # With it JAX takes SIGTERM over in C and Python is never told: a second one, or one where nothing is saved
    # (evaluate), would do nothing.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            place.coordinator, place.processes, place.process, place.devices,
            initialization_timeout=2 * JOIN, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=SHUTDOWN,
        )  # fmt: skip
    except Exception as error:  # ValueError, RuntimeError and those of the cluster's own software
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{place.name} cannot join the others at {place.coordinator}: {reason}") from error
    finally:
        limit.cancel()


def agree(facts: rollcall.Facts) -> None:
    """Compare `facts` of all processes, which all must call this: UserError in all of them where one differs, with its
    number, what differs, and both values. Nothing happens in a process alone."""
    for roll in _rolls:
        roll.agree(facts)


def gone(seconds: float = HEARTBEAT) -> list[int]:
    """The processes that have ended, or do within so many seconds, asked where a computation of all of them has failed;
    [] where it has not failed for that."""
    return [number for roll in _rolls for number in roll.gone(seconds)]


def watch(place: Place, workdir: str | Path | None) -> Callable[[Sequence[int]], None]:
    """Start the small program `watcher` beside this process, and send what C++ writes as errors through it.

    workdir: where a training goes on from. Returns what to call when this process ends by itself, with the numbers of
    those processes that it ends for: then the program says so.
    """
    read, write = os.pipe()
    program = subprocess.Popen(
        [sys.executable, "-I", "-S", watcher.__file__, str(place.process), str(place.processes), str(workdir or ""),
         str(read)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True, pass_fds=[read],
    )  # fmt: skip
    sys.stderr.flush()
    errors = os.dup(2)
    sys.stderr = os.fdopen(errors, "w", encoding="utf-8", errors="replace", buffering=1)
    os.dup2(write, 2)
    os.close(read)
    os.close(write)

    def done(gone):
        sys.stderr.flush()
        program.communicate(b" ".join([watcher.LOST, *(b"%d" % number for number in gone)]) if gone else watcher.DONE)
        if not gone:  # else JAX may yet write its pages, which nobody reads any more
            os.dup2(errors, 2)

    return done


def leave(code: int, place: Place) -> NoReturn:
    """End this process at once, so that the others see it: an ordinary end would wait for them, and they for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    if place.process == 0 and code in (MISTAKE, LOST):
        time.sleep(GRACE)
    os._exit(code)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _not_found(reason: str) -> str:
    return (
        f"--distributed: JAX does not find the other processes ({reason}); it knows Cloud TPU, GKE, Slurm and "
        "Open MPI; elsewhere give --coordinator HOST:PORT --processes N --process I"
    )


def _check(coordinator: str | None, processes: int | None, process: int | None) -> None:
    given = {"--coordinator HOST:PORT": coordinator, "--processes N": processes, "--process I": process}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} missing: {', '.join(given)} go together; or give --distributed alone")
    address = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):(\d{1,5})", coordinator)
    if not address or not 0 < int(address[2]) < 2**16:
        raise UserError(f"--coordinator must be HOST:PORT like 10.0.0.1:1234, got '{coordinator}'")
    check_number("--processes", processes, 1, whole=True)
    check_number("--process", process, 0, processes - 1, whole=True)
