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
    files = {name: [path.stat().st_size, _checksum(path)] for name, path in _files(folder).items()}
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
        listed = {str(name): (int(size), int(checksum)) for name, (size, checksum) in listed.items()}
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
            if _checksum(files[name]) != listed[name][1]:
                return f"{name} has another content than was written"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{FILE} is not what was written"
    return ""


def _files(folder: Path) -> dict[str, Path]:
    """All files below the folder but the manifest."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {name: path for name, path in paths.items() if name not in (FILE, f"{FILE}.part") and not path.is_dir()}


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
