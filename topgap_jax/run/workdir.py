"""The folder of a run: it belongs to one config and one training at a time, and says what it was made with."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from topgap_jax.errors import UserError
from topgap_jax.progress import say, write_text
from topgap_jax.run import locks
from topgap_jax.run.provenance import provenance
from topgap_jax.stored import read_object, sealed

CONFIG = {
    "config": {str: "PLAIN"},
    "file?": (str, None),
    "data?": ({"classes": [str], "examples": int}, None),
}
"""The schema of config.json."""
VERSIONS = "versions.json"
CONDITIONS = (
    "versions",
    "convolutions",
    "threefry_partitionable",
    "device",
    "processor",
    "mesh_devices",
    "processes",
    "threads",
)
"""What of a start decides the bits of its results."""
STARTS = 100  # earlier starts that versions.json keeps
LOOKING = ("test", "evaluators", "explain", "log_every")
"""Keys that concern looking at a run and not its weights: they may differ when a folder is used again."""


class Data(NamedTuple):
    """What a run learnt from: the names of its classes, and the number of its training examples."""

    classes: tuple[str, ...]
    examples: int


def claim(workdir: Path, config: Mapping[str, Any], file: str | Path | None = None, data: Data | None = None) -> None:
    """Lock the folder, which is made where it is not there, and write config.json: {"config", "file", "data"}.

    file: the Python file that the config came from. config.json follows keys of `LOOKING`. Raises a UserError for a
    folder that another process trains in, and for one whose run has another config or other classes, naming the first
    key that differs.
    """
    path = Path(workdir) / "config.json"
    classes = data.classes if data else ()
    if jax.process_index() != 0:
        check(workdir, config, classes)
        return
    stored = {"config": _plain(config), "file": None if file is None else str(Path(file).absolute())}
    stored |= {} if data is None else {"data": data._asdict()}
    text = sealed(stored)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        locks.take(path.parent, locks.TRAINING)
        try:
            check(workdir, config, classes)
        except UserError:
            locks.release(path.parent, locks.TRAINING)  # it is another's run, and its own process may go on with it
            raise
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
    except OSError as error:
        raise UserError(f"cannot write in the workdir '{workdir}': {error.strerror}") from None


def learnt(workdir: Path) -> Data | None:
    """What the run in a folder learnt from; None where it does not say, as runs of version 0.1.0 do not."""
    stored = read_config(Path(workdir) / "config.json").get("data")
    return Data(tuple(stored["classes"]), stored["examples"]) if stored else None


def read_config(path: Path) -> dict[str, Any]:
    """What config.json of a run holds: its config, the Python file it came from, the data it learnt from."""
    return read_object(path, "the config.json of a run", CONFIG)


def check(workdir: Path, config: Mapping[str, Any], classes: tuple[str, ...] = ()) -> None:
    """Raise a UserError if the folder cannot be written in, or holds a run whose weights another config decides, or
    data of other classes.

    A key that the stored config lacks is younger than the run: what it says stands in a text that differs too, or
    nowhere.
    """
    path, config = Path(workdir) / "config.json", _plain(config)
    above = next(each for each in path.absolute().parents if each.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "may not be written in" if above.is_dir() else "is a file, no folder"
        raise UserError(f"cannot write in the workdir '{workdir}': '{above}' {why}")
    if not path.is_file():
        return
    try:
        stored = read_config(path)["config"]
    except UserError as error:
        raise UserError(f"{error}; take another workdir, or move that file away") from None
    for key in [key for key in stored if key not in LOOKING]:
        if key not in config or stored[key] != config[key]:
            here = repr(config[key]) if key in config else "absent"
            raise UserError(
                f"'{path.parent}' holds a run with another config: {key} is {stored[key]!r} there and {here} here; "
                "take another workdir"
            )
    before = learnt(workdir)
    if before and classes and before.classes != classes:
        raise UserError(
            f"'{path.parent}' holds a run with other classes: {_names(before.classes)} there and "
            f"{_names(classes)} here; take another workdir"
        )


def record_versions(workdir: Path, mesh: Mesh) -> None:
    """Write versions.json: what this start of the run was made with (`provenance`), on how many devices and threads,
    and the same of the starts before it, as "earlier". A start under other conditions than the one before it is said in
    a line: it goes on with the same arithmetic, but not to the same bits (docs/reproducibility.md)."""
    if jax.process_index() != 0:
        return
    threads = int(os.environ.get("NPROC") or os.cpu_count() or 1)
    about = {**provenance(), "mesh_devices": mesh.size, "processes": jax.process_count(), "threads": threads}
    path = Path(workdir) / VERSIONS
    earlier = []
    if path.is_file():
        before = read_versions(path)
        earlier = [*before.pop("earlier", []), before]
        differ = [key for key in CONDITIONS if key in before and before[key] != json.loads(json.dumps(about[key]))]
        if differ:
            listed = ", ".join(f"{key} {_brief(before[key], about[key])}" for key in differ)
            say(f"'{workdir}' was started under other conditions before ({listed}): the bits may differ from here on")
    write_text(path, sealed({**about, "earlier": earlier[-STARTS:]}))


def read_versions(path: Path) -> dict[str, Any]:
    """What versions.json of a run holds."""
    return read_object(path, "the versions.json of a run", {"earlier?": [{str: "PLAIN"}], "commit?": (str, None)})


def _brief(before: Any, now: Any) -> str:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return "; ".join(f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name])
    return f"{before} -> {now}"


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "")


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples are lists, a ConfigDict is a dict."""
    return json.loads(json.dumps(config, default=dict))
