"""Verdicts on attacked examples, and their log: a line per batch of them, so that a killed evaluation goes on where it
was.

Verdicts do not depend on which examples share a batch, so what is left may be batched anew. Every line is a JSON
object; the first is the header, and a log with another header belongs to another evaluation and is started afresh. What
follows a line that is no entry is measured again: a process was killed there, or a disk or a stranger changed it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from topgap_jax.attacks.state import BROKEN, RUNNING
from topgap_jax.progress import write_text
from topgap_jax.stored import NUMBER, mismatch
from topgap_jax.types import Attack, Variables

FRAGILE = 1e-4  # of the logits' range: a margin below this may change its sign with the batch width or the device
COLUMNS = {
    "ids": [int], "run": [int], "broken": [bool], "step": [int], "steps": [int], "radius": [(*NUMBER, None)],
    "ended": [bool], "margin": [(*NUMBER, None)], "predicted": [int], "fragile": [bool],
}  # fmt: skip
ENTRY = {**COLUMNS, "phase": int, "unconfirmed": int, "slot_steps": NUMBER, "seconds": NUMBER}
"""What a line of a log holds: columns over the runs that were over together, and numbers of all of them."""


class Over(NamedTuple):
    """A run that is over: the example, its number, and of its state status, steps taken, the step of the break, and the
    radius (of an attack on the norm the norm)."""

    index: int
    run: int
    status: int
    count: int
    broken_at: int
    radius: float


class Seen(NamedTuple):
    """What logits (n, k) say of the images they are of, (n,) each."""

    wrong: np.ndarray  # bool: another class, or NaN
    margin: np.ndarray  # float32: the largest logit of another class minus that of the label
    predicted: np.ndarray  # int32
    fragile: np.ndarray  # bool: floating point might change it


def seen(logits: np.ndarray, labels: np.ndarray) -> Seen:
    """Whether images are misclassified, by which margin, and whether that might be rounding. (n, k), (n,)."""
    predicted = logits.argmax(1).astype(np.int32)
    rows = np.arange(len(labels))
    others = np.where(np.arange(logits.shape[1]) == labels[:, None], -np.inf, logits).max(1)
    margin = others - logits[rows, labels]
    fragile = np.abs(margin) < FRAGILE * (logits.max(1) - logits.min(1))
    return Seen((predicted != labels) | np.isnan(logits).any(1), margin, predicted, fragile)


def judge(attack: Attack, over: Sequence[Over], logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The verdicts on runs that are over, as lists, from a forward pass of its own: logits (b, k), the first rows of
    which are those of the runs' images.

    The image is the one that broke, else the last iterate, which no step has evaluated: what is misclassified there is
    broken too, unless the run had finished before. A break that this pass does not confirm is none, `unconfirmed`.
    ended: no other run of the attack follows.
    """
    ids = np.array([run.index for run in over])
    status = np.array([run.status for run in over])
    result = seen(logits[: len(over)], labels[ids])
    last = (status == RUNNING) & (attack.aim == "label")
    broken = result.wrong & ((status == BROKEN) | last)
    column = lambda name: np.array([getattr(run, name) for run in over])
    return {
        "ids": ids.tolist(),
        "run": column("run").tolist(),
        "broken": broken.tolist(),
        "step": np.where(status == BROKEN, column("broken_at"), column("count")).tolist(),
        "steps": column("count").tolist(),
        "radius": column("radius").tolist(),
        "ended": (broken | (column("run") == attack.runs - 1)).tolist(),
        "margin": result.margin.tolist(),
        "predicted": result.predicted.tolist(),
        "fragile": result.fragile.tolist(),
        "unconfirmed": int(((status == BROKEN) & ~broken).sum()),
    }


class Log:
    """`entries` are the lines found, `append` adds one, `remove` ends it. Without a path it keeps nothing."""

    def __init__(self, path: Path | None, header: Mapping[str, Any]):
        self.path, self.header = path, dict(header)
        self.entries = _entries(path, self.header) if path is not None and path.exists() else []
        self._write()

    def restart(self) -> None:
        """Forget what is noted."""
        self.entries = []
        self._write()

    def _write(self):
        """Without the line that a killed process may have left half done."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in [self.header, *self.entries]))

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


def _entries(path: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a log with this header, up to the first line that is none."""
    first, *lines = path.read_bytes().split(b"\n")
    entries = []
    try:
        if json.loads(first) != header:
            return []
        for line in lines:
            # Infinity is a radius that was not found, NaN a margin of a network that overflows.
            if not _is_entry(json.loads(line, parse_constant=lambda _: None)):
                break
            entries.append(json.loads(line))
    except (ValueError, RecursionError):
        pass
    return entries


def _is_entry(value: Any) -> bool:
    if mismatch(value, ENTRY) or min([*value["ids"], *value["run"], 0]) < 0:
        return False
    return len({len(value[name]) for name in COLUMNS}) == 1
