"""The log of an attack that may be stopped: one line per finished batch, so that a killed evaluation goes on where it
was.

Verdicts do not depend on which examples share a batch, so what is left may be batched anew. Every line is a JSON
object; the first is the header, and a log with another header belongs to another evaluation and is started afresh.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from topgap_jax.types import Variables


class Log:
    """`entries` are the lines found, `append` adds one, `remove` ends it. Without a path it keeps nothing."""

    def __init__(self, path: Path | None, header: Mapping[str, Any]):
        self.path = path
        lines = _lines(path) if path is not None and path.exists() else []
        self.entries = lines[1:] if lines[:1] == [dict(header)] else []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Written again, without the line that a killed process may have left half done.
            path.write_text(
                "".join(json.dumps(line) + "\n" for line in [dict(header), *self.entries]), encoding="utf-8"
            )

    def append(self, entry: Mapping[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dict(entry)) + "\n")

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def fingerprint(variables: Variables) -> str:
    """A hash of all values: whether two sets of weights are the same."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(variables):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _lines(path):
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
