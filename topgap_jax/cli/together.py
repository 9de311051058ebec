"""`topgap train` and `topgap evaluate` as one of many processes: its arguments, who prints, and how it ends."""

import os
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

from topgap_jax.build import check_number
from topgap_jax.cli import endings, texts
from topgap_jax.errors import UserError

SAME = ("split", "evaluators", "batch", "checkpoint", "devices", "arm", "no_evaluate", "again")
"""Arguments that must be the same in all processes."""
PATHS = ("workdir", "config", "weights", "save", "model_info")
"""Those that all must have or none: what they name may have another path on another host."""


def add_arguments(parser: ArgumentParser) -> None:
    """--distributed, or --coordinator, --processes and --process; --wait."""
    group = parser.add_argument_group("many processes", "the same command in each of them; docs/pods.md has the lines")
    group.add_argument(
        "--distributed", action="store_true", help="as Cloud TPU, GKE, Slurm or Open MPI started this process"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where they meet: an address of process 0")
    group.add_argument("--processes", type=int, metavar="N", help="how many they are")
    group.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    group.add_argument(
        "--wait", type=float, default=300, metavar="SECONDS", help="for those that have not come yet (default: 300)"
    )


def place(arguments: Namespace) -> tuple[str | None, int | None, int | None] | None:
    """(coordinator, processes, process) for `hosts.locate`, all None where JAX finds them; None of a process alone."""
    numbers = tuple(getattr(arguments, name, None) for name in ("coordinator", "processes", "process"))
    given, found = numbers != (None, None, None), getattr(arguments, "distributed", False)
    if given and found:
        raise UserError("--distributed finds coordinator, processes and process itself; leave those out, or it")
    return numbers if given or found else None


def same(arguments: Namespace, overrides: list[tuple[str, str]]) -> dict[str, object]:
    """What of a command line must be the same in all processes, by the words of the command line."""
    words = {f"--{name.replace('_', '-')}": getattr(arguments, name, None) for name in SAME}
    paths = {f"--{name.replace('_', '-')}": bool(getattr(arguments, name, None)) for name in PATHS}
    return {"the command": arguments.command, **paths, **words, **{f"--config.{key}": text for key, text in overrides}}


def run(arguments: Namespace, overrides: list[tuple[str, str]], command: Callable[[], int | None]) -> int:
    """The exit code of the command in one process of many. Process 0 prints; a mistake is told by whom it meets.

    After anything but success, or a training that all of them stopped, this process ends without waiting for the
    others, so that they end too.
    """
    import jax

    from topgap_jax.run import hosts

    here = hosts.locate(*place(arguments))
    check_number("--wait", arguments.wait, 1)
    done = hosts.watch(here, arguments.workdir if arguments.command == "train" else None)
    # Gloo and others write lines of their own on the descriptor of stdout, in C: those go where errors go.
    results = os.dup(1) if here.process == 0 else os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    sys.stdout = endings.Lasting(os.fdopen(results, "w", encoding="utf-8", errors="replace"))
    sys.stderr = endings.Lasting(sys.stderr)
    os.dup2(2, 1)
    say = lambda line: print(f"topgap: {line}", file=sys.stderr)
    join = lambda: hosts.join(here, arguments.wait, same(arguments, overrides))
    gone = []
    try:
        code, gone = _outcome(here, join, command, say)
    except KeyboardInterrupt:
        say(f"process {here.process}: stopped")
        code = 130
    except endings.Signalled as signalled:
        say(f"process {here.process}: stopped by {signalled}")
        code = signalled.code
    done(gone)
    if jax.distributed.is_initialized():
        hosts.leave(code, here)
    return code


def _outcome(here, join, command, say) -> tuple[int, list[int]]:
    """The exit code of a command that no signal ended, and the processes for whose end it ends; its mistakes and errors
    are told."""
    import jax

    from topgap_jax.run import hosts

    try:
        join()
        code = command() or 0
        jax.distributed.shutdown()  # waits for the others, while a line can still say that one is lost
        return code, []
    except Exception as error:
        # A collective, or a barrier of Orbax, says that a connection is closed.
        if gone := hosts.gone() if _is_of_jax(error) else []:
            return hosts.LOST, gone
        line = texts.line(error) if isinstance(error, UserError) else ""
        line = endings.line(error) if isinstance(error, OSError) else line
        if line:
            say(f"process {here.process}: {line}")
            return hosts.MISTAKE, []
        traceback.print_exc()
        return 1, []


def _is_of_jax(error: BaseException | None) -> bool:
    """Whether a computation's own error lies behind this one."""
    import jax

    while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
        error = error.__cause__ or error.__context__
    return error is not None
