"""Checkpoints, and the one file that knows Orbax: `last` (to go on) and `best` (highest validation accuracy).

A checkpoint is a few named trees of arrays, and `meta`, numbers and texts as JSON. Trees are read one by one, so that
an evaluation reads variables without knowing the optimiser. Its manifest is compared with its files before they are
read; of a damaged one the next older one of its kind takes the place, and a line says so.
"""

import functools
import logging
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from topgap_jax.errors import UserError
from topgap_jax.progress import is_writer, say
from topgap_jax.run import manifest

KEPT = 2  # of each kind: a kill during a save leaves the one before, damage to one leaves the other
DAMAGED = "damaged"  # the folder beside last and best to which a training moves what is damaged
SPARE = 16 * 10**6  # bytes, for a checkpoint's own files, metrics and results: a disk is not to be filled to its end
READS = 5  # a training that goes on may remove a checkpoint while it is read
NONE, DAMAGE = -1, -2  # no step is there, none that is whole
READING = ocp.CheckpointManagerOptions(create=False, enable_async_checkpointing=False)


class Checkpoints(NamedTuple):
    """The open checkpoint folders of a run."""

    last: ocp.CheckpointManager
    best: ocp.CheckpointManager


@contextmanager
def opened(workdir: Path) -> Iterator[Checkpoints]:
    """Open `workdir`/checkpoints/{last,best} for writing; every process of a run calls this, and every `save`."""
    _tell_once()
    options = ocp.CheckpointManagerOptions(
        max_to_keep=KEPT,
        cleanup_tmp_directories=True,
        # Saving in the background would read arrays that the next training step, whose state is donated, writes over.
        enable_async_checkpointing=False,
    )
    managers = [ocp.CheckpointManager(_folder(workdir, which), options=options) for which in Checkpoints._fields]
    try:
        yield Checkpoints(*managers)
    finally:
        for manager in managers:
            manager.close()


def save(manager: ocp.CheckpointManager, step: int, trees: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Write a checkpoint; returns when it is whole on the disk. A step that is there already is left as it is.

    A resumed run may come by a step again: its arithmetic is exact, so the checkpoint would be the same. Raises
    UserError where the disk has no room for it, or it cannot be written; the checkpoints that were there are whole.
    """
    if step in manager.all_steps():
        return
    _check_room(manager.directory, step, trees)
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    try:
        # What Orbax's threads raise is raised again here; its logger tells it too, in pages.
        with _unlogged(lambda record: record.exc_info):
            manager.save(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(dict(meta))), force=True)
            manager.wait_until_finished()
        if is_writer():
            manifest.write(Path(manager.directory) / str(step))
    except Exception as error:  # Orbax and TensorStore raise of every kind, of many lines
        reason = re.sub(' "/[^"]*"', "", " ".join(str(error).split()))[:250]  # without paths, which are long
        raise UserError(
            f"the checkpoint of step {step} cannot be written in {manager.directory}: {reason}; mend that, then give "
            "the same command again: it goes on from the checkpoint before"
        ) from error


def set_aside(workdir: Path) -> bool:
    """Move damaged checkpoints to checkpoints/damaged, each with a line: their steps can be saved again, and training
    goes on from the newest that is whole. Whether there were any; every process of a run calls this."""
    moved = 0
    if is_writer():
        for which in Checkpoints._fields:
            for step in steps(workdir, which):
                path = _folder(workdir, which) / str(step)
                if reason := manifest.damage(path):
                    place = _folder(workdir, DAMAGED) / f"{which}_{step}"
                    shutil.rmtree(place, ignore_errors=True)
                    place.parent.mkdir(exist_ok=True)
                    path.rename(place)
                    say(f"the checkpoint {path} is damaged: {reason}; moved to {place}")
                    moved += 1
    return bool(_from_process_0(moved))


def steps(workdir: Path, which: str = "last") -> list[int]:
    """All steps of `which`, the newest first, as this process sees them. What is not written whole has no bare number
    for a name."""
    folder = _folder(workdir, which)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def latest_step(workdir: Path, which: str = "last") -> int | None:
    """The newest step of `which` ("last" or "best"), damaged or not, None if there is none.

    Of many processes, which all must ask, process 0 looks: a folder that one of them has made already, and another has
    not seen, would send them different ways.
    """
    step = _from_process_0(next(iter(steps(workdir, which)), NONE) if is_writer() else NONE)
    return None if step == NONE else step


def restore(workdir: Path, which: str, templates: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the newest whole checkpoint of `which` ("last" or "best"): -> ({name: tree}, meta).

    templates: {name: tree of arrays or ShapeDtypeStruct}; only these trees are read. A leaf's `sharding` says where it
    goes (the first device where it has none), on any number of devices, whatever it was saved from. Raises UserError if
    there is no checkpoint, if it cannot be read, or if it does not fit.
    """
    folder = _folder(workdir, which)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def described(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)

    items = {name: ocp.args.StandardRestore(jax.tree.map(described, tree)) for name, tree in templates.items()}

    def read(step):
        _tell_once()
        with _unlogged(_warning), ocp.CheckpointManager(folder, options=READING) as manager:
            found = manager.restore(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonRestore()))
        return {name: found[name] for name in templates}, found["meta"]

    return _of_newest(workdir, which, read)


def _warning(record: logging.LogRecord) -> bool:
    """Orbax warns, on the terminal, of checkpoints that go while it lists them."""
    return record.levelno < logging.ERROR


def _of_newest(workdir: Path, which: str, read: Callable[[int], Any]) -> Any:
    """What `read` gives of the newest whole step; once more where a training that goes on removed a checkpoint, or
    wrote one, while it was read."""
    for attempt in range(READS):
        before, step = steps(workdir, which), NONE
        try:
            step = _whole_step(workdir, which)
            return read(step)
        except Exception as error:  # Orbax, TensorStore and JSON raise of every kind, of many lines
            if jax.process_count() == 1 and attempt + 1 < READS and steps(workdir, which) != before:
                continue
            if isinstance(error, UserError):
                raise
            reason = " ".join(str(error).split())[:300]
            path = _folder(workdir, which) / str(step)
            why = "is of another model" if manifest.is_there(path) else "is of another model, or damaged"
            raise UserError(f"the checkpoint {path} {why}: {reason}") from error


def stored(workdir: Path, which: str, name: str) -> Any:
    """The tree `name` of the newest whole checkpoint of `which` as it was saved, whatever its shapes, on the first
    device."""
    return _of_newest(workdir, which, lambda step: tree(_folder(workdir, which) / str(step) / name))


def read(folder: Path, name: str) -> Any:
    """The tree `name` of the checkpoint in this very folder, likewise. UserError where it is damaged."""
    if reason := manifest.damage(folder):
        raise UserError(f"the checkpoint {folder} is damaged: {reason}")
    return tree(folder / name)


def tree(folder: Path) -> Any:
    """A tree of arrays that Orbax wrote in a folder, on the first device. UserError where it is none."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.PyTreeCheckpointer() as reader:
        try:
            with _unlogged(lambda record: "_CHECKPOINT_METADATA" in record.getMessage()):  # a step's, not a tree's
                described = reader.metadata(folder.absolute()).item_metadata
            if described is None:
                raise FileNotFoundError("none of its files is there")
            saved = described.tree
            whole = jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(sharding=here, global_shape=leaf.shape), saved)
            return reader.restore(folder.absolute(), restore_args=whole)
        except Exception as error:  # as in restore
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"'{folder}' is no folder that Orbax wrote a tree of arrays in: {reason}") from error


@contextmanager
def _unlogged(records: Callable[[logging.LogRecord], Any]) -> Iterator[None]:
    """Leave out what Orbax's logger says where `records` is true of it."""
    logger, keep = logging.getLogger("absl"), lambda record: not records(record)
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


@functools.cache
def _tell_once() -> None:
    """Leave out tracebacks on the terminal of what is raised anyway.

    Of Orbax's threads, whose errors the next save raises again, and its logger tells in pages; and of TensorStore's,
    which after a save or a restore has failed still answer to Orbax's event loop: it is closed by then.
    """
    hook = sys.unraisablehook

    def told(event):
        if event.object is not None or str(event.exc_value) != "Event loop is closed":
            hook(event)

    sys.unraisablehook = told
    logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "Thread.run()" in record.getMessage()))


def _check_room(folder: Path, step: int, trees: Mapping[str, Any]) -> None:
    """Asked before it is written: Orbax and TensorStore tell a full disk in pages of tracebacks of many threads."""
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(trees)) + SPARE
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the checkpoint of step {step} needs {needed / 1e6:.0f} MB in {folder}, and {free / 1e6:.0f} MB are free "
            "on that disk; make room, then give the same command again: it goes on from the checkpoint before"
        )


def _folder(workdir: Path, which: str) -> Path:
    return Path(workdir).absolute() / "checkpoints" / which


def _whole_step(workdir: Path, which: str) -> int:
    """The newest step of `which` whose files are those of its manifest, the same for every process; what is passed over
    is said in one line. Raises UserError where there is none."""
    folder, step, damaged = _folder(workdir, which), NONE, []
    if is_writer():
        for step in steps(workdir, which):
            if not (reason := manifest.damage(folder / str(step))):
                break
            if (folder / str(step)).is_dir():  # and was not removed by a training that goes on
                damaged.append(f"the checkpoint {folder / str(step)} is damaged: {reason}")
            step = DAMAGE
    step = _from_process_0(step)
    if step == NONE:
        raise UserError(f"there is no checkpoint in {folder}; train first: topgap train --workdir {workdir} ...")
    if step == DAMAGE:
        first = damaged[0] if damaged else f"no checkpoint in {folder} is whole"
        raise UserError(f"{first}; there is no older one of its kind")
    if damaged:
        say(f"{damaged[0]}; the one of step {step} is read in its place")
    if is_writer() and not manifest.is_there(folder / str(step)):
        say(
            f"{folder / str(step)} has no {manifest.FILE}: an older version wrote it, or its save was cut short; it is "
            "read unchecked"
        )
    return step


def _from_process_0(number: int) -> int:
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))
