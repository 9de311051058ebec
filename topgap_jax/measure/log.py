"""Logs of evaluations that are under way: a line per batch, so that one that was killed goes on where it was.

The first line is the header; a log with another header belongs to another evaluation and is started afresh. Before
each line stands its CRC-32: what follows a damaged one, or one that was not written to its end, is made again.
"""

import base64
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from topgap_jax.progress import append, write_text, writing


class Log:
    """`entries` are the lines found, `append` adds one, `remove` ends it. Without a path it keeps nothing."""

    def __init__(self, path: Path | None, header: Mapping[str, Any]):
        self.path, self.entries = path, []
        if path is None:
            return
        found, size = _read(path) if path.exists() else ([], 0)
        with writing(path):
            if found[:1] == [dict(header)]:
                self.entries = found[1:]
                os.truncate(path, size)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, _line(header))

    def append(self, entry: Mapping[str, Any]) -> None:
        if self.path is not None:
            with writing(self.path), self.path.open("ab", buffering=0) as file:
                append(file, _line(entry))

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def packed(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arrays as JSON holds them, every bit of them.

    >>> unpacked(packed({"a": np.float32([1, np.nan])}))
    {'a': array([ 1., nan], dtype=float32)}
    """
    return {
        name: {
            # a type that is not NumPy's own (bfloat16) has only a name
            "dtype": array.dtype.name if array.dtype.kind == "V" else array.dtype.str,
            "shape": array.shape,
            "bytes": base64.b64encode(array.tobytes()).decode(),
        }
        for name, array in ((name, np.asarray(array)) for name, array in arrays.items())
    }


def unpacked(stored: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of `packed`."""
    return {
        name: np.frombuffer(base64.b64decode(each["bytes"]), np.dtype(each["dtype"])).reshape(each["shape"])
        for name, each in stored.items()
    }


def _line(entry: Mapping[str, Any]) -> bytes:
    text = json.dumps(dict(entry)).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _read(path: Path) -> tuple[list[Any], int]:
    """The lines up to the first that is not what was written, and how many bytes they are."""
    found, size = [], 0
    with path.open("rb") as file:
        for line in file:
            checksum, _, text = line.partition(b" ")
            if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text[:-1]):
                break
            try:
                found.append(json.loads(text.decode()))
            except (ValueError, RecursionError):  # a stranger's
                break
            size += len(line)
    return found, size
