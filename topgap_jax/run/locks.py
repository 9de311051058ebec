"""Locks of a run's folder, one of its trainer and one of its evaluator: files that say whose they are, and that the
system lets go when their process ends, however it ends. Who only reads needs none."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from topgap_jax.errors import UserError
from topgap_jax.progress import is_writer, say

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TRAINING, EVALUATION = "lock", "evaluation.lock"  # names of the files
MISSING = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What a file system without locks answers."""

_files: dict[Path, IO] = {}  # of this process, by path


def _forget() -> None:
    """In a forked child, such as a reader's worker: it must not hold the folder when its parent is gone."""
    while _files:
        _files.popitem()[1].close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def take(workdir: Path, name: str) -> None:
    """Make this process the trainer or the evaluator (`name`) of the folder, which it may be already.

    Raises a UserError where another process is, with its id and host; OSError where nothing can be written there. A
    file system without locks is said in a line, and nothing is locked.
    """
    path = Path(workdir).resolve() / name
    if fcntl is None or path in _files:
        return
    file = path.open("ab+", buffering=0)  # a buffer would be written once more when a full disk closes it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read(200).decode(errors="replace").strip() or "unknown"
        file.close()
        what = {TRAINING: "training", EVALUATION: "evaluation"}[name]
        raise UserError(
            f"another {what} writes in '{workdir}' (process {owner}); wait for its end, or take another workdir"
        ) from None
    except OSError as error:
        file.close()
        if error.errno not in MISSING:
            raise
        say(f"the file system of '{workdir}' has no locks ({error.strerror}): start no second process there yourself")
        return
    try:
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError:
        file.close()
        raise
    _files[path] = file


def release(workdir: Path, name: str) -> None:
    """Let another process be it; nothing where this one is not."""
    file = _files.pop(Path(workdir).resolve() / name, None)
    if file is not None:
        file.close()


@contextmanager
def evaluating(workdir: Path | None) -> Iterator[None]:
    """Be the folder's evaluator meanwhile; of many processes number 0 is. None: of no folder."""
    if workdir is None or not is_writer():
        yield
        return
    try:
        take(workdir, EVALUATION)
    except OSError as error:
        raise UserError(f"cannot write in the workdir '{workdir}': {error.strerror}") from None
    try:
        yield
    finally:
        release(workdir, EVALUATION)
