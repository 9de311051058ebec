"""Manifests: which files a folder had when it was written, and what was in them. Orbax and TensorStore notice next to
nothing: of a checkpoint with one flipped bit they read other weights without a word."""

import json
import zlib
from pathlib import Path

from topgap_jax.progress import write_text

FILE = "manifest.json"
CHUNK = 2**18  # bytes: what the processor's cache holds


def write(folder: Path) -> None:
    """List the files of the folder, with size and CRC-32; the last that is written of it, and whole or not at all."""
    files = {name: [path.stat().st_size, checksum(path)] for name, path in _files(folder).items()}
    write_text(folder / FILE, json.dumps({"files": files}, indent=1) + "\n")


def is_there(folder: Path) -> bool:
    """Whether the folder has a manifest; one that an older version wrote, or whose save was cut short, has none."""
    return (folder / FILE).is_file()


def damage(folder: Path) -> str:
    """The first difference between the folder and its manifest, in words with the file; "" where there is none, or no
    manifest."""
    if not is_there(folder):
        return ""
    try:
        listed = json.loads((folder / FILE).read_text(encoding="utf-8"))["files"]
        listed = {str(name): (int(size), int(number)) for name, (size, number) in listed.items()}
        files = _files(folder)
        for name in sorted(listed.keys() | files.keys()):
            if name in files and files[name].is_symlink():
                return f"{name} is a link"
            if name not in files:
                return f"{name} is missing"
            if name not in listed:
                return f"{name} is not of this checkpoint"
            size = files[name].stat().st_size
            if size != listed[name][0]:
                return f"{name} has {size} bytes instead of {listed[name][0]}"
            if checksum(files[name]) != listed[name][1]:
                return f"{name} has another content than was written"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return f"{FILE} is not what was written"
    return ""


def digest(folder: Path) -> str:
    """Eight hexadecimal digits that stand for what the folder's files hold, as its manifest says; "" without one."""
    return f"{checksum(folder / FILE):08x}" if is_there(folder) else ""


def digests(workdir: Path) -> dict[str, str]:
    """{"checkpoint best, step 3": digest} of every checkpoint of a run that has a manifest, the newest of a kind first:
    what tells whether an evaluation is of these weights."""
    named = {}
    for which in ("last", "best"):
        steps = [int(path.name) for path in Path(workdir).glob(f"checkpoints/{which}/*") if path.name.isdecimal()]
        for step in sorted(steps, reverse=True):
            named[label(which, step)] = digest(Path(workdir) / "checkpoints" / which / str(step))
    return {name: each for name, each in named.items() if each}


def label(which: str, step: int) -> str:
    """How a result names the checkpoint that it is of."""
    return f"checkpoint {which}, step {step}"


def _files(folder: Path) -> dict[str, Path]:
    """All files below the folder but the manifest."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {name: path for name, path in paths.items() if name not in (FILE, f"{FILE}.part") and not path.is_dir()}


def checksum(path: Path) -> int:
    """The CRC-32 of a file, which is never in memory as a whole."""
    number = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            number = zlib.crc32(chunk, number)
    return number
