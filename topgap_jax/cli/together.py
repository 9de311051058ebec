"""`topgap train` and `topgap evaluate` as one of many processes: its arguments, who prints, and how it ends."""

import os
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

from topgap_jax.cli import endings, texts
from topgap_jax.errors import UserError

STOPPED = 143
"""Of a run that was asked to stop and has saved: all processes end with it, at the same step."""


def add_arguments(parser: ArgumentParser) -> None:
    """--distributed, or --coordinator, --processes and --process."""
    group = parser.add_argument_group("many processes", "the same command in each of them; docs/pods.md has the lines")
    group.add_argument(
        "--distributed", action="store_true", help="as Cloud TPU, GKE, Slurm or Open MPI started this process"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where they meet: an address of process 0")
    group.add_argument("--processes", type=int, metavar="N", help="how many they are")
    group.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")


def place(arguments: Namespace) -> tuple[str | None, int | None, int | None] | None:
    """(coordinator, processes, process) for `hosts.join`, all None where JAX finds them; None of a process alone."""
    numbers = tuple(getattr(arguments, name, None) for name in ("coordinator", "processes", "process"))
    given, found = numbers != (None, None, None), getattr(arguments, "distributed", False)
    if given and found:
        raise UserError("--distributed finds coordinator, processes and process itself; leave those out, or it")
    return numbers if given or found else None


def run(configure: Callable[[], object], command: Callable[[], int | None]) -> int:
    """The exit code of the command in one process of many. Process 0 prints; a mistake is told by whom it meets.

    After anything but success this process ends without waiting for the others, so that they end too.
    """
    import jax

    from topgap_jax.run import hosts

    done = lambda: None
    try:
        configure()
        done = hosts.watch()
        # Gloo and others write lines of their own on the descriptor of stdout, in C: those go where errors go.
        results = os.dup(1) if jax.process_index() == 0 else os.open(os.devnull, os.O_WRONLY)
        sys.stdout.flush()
        sys.stdout = endings.Lasting(os.fdopen(results, "w", encoding=sys.stdout.encoding, errors="replace"))
        os.dup2(2, 1)
        code = command() or 0
    except UserError as error:
        here = f"process {jax.process_index()}: " if jax.distributed.is_initialized() else ""
        print(f"topgap: {here}{texts.line(error)}", file=sys.stderr)
        code = 2
    except jax.errors.JaxRuntimeError as error:
        print(f"topgap: {hosts.lost(error)}", file=sys.stderr)
        code = 3
    except KeyboardInterrupt:
        print("topgap: stopped", file=sys.stderr)
        code = 130
    except OSError as error:
        line = endings.line(error)
        if line:
            print(f"topgap: process {jax.process_index()}: {line}", file=sys.stderr)
        else:
            traceback.print_exc()
        code = 2 if line else 1
    except Exception:
        traceback.print_exc()
        code = 1
    done()
    if code not in (0, STOPPED) and jax.distributed.is_initialized():
        hosts.leave(code)
    return code
