"""Verdicts on attacked examples. They do not depend on which examples share a batch, so that what a killed evaluation
has left may be batched anew."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from topgap_jax.attacks.state import BROKEN, RUNNING
from topgap_jax.types import Attack, Variables

FRAGILE = 1e-4  # of the logits' range: a margin below this may change its sign with the batch width or the device


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
        "not_finite": int((broken & ~np.isfinite(logits[: len(over)]).all(1)).sum()),
    }


def fingerprint(variables: Variables) -> str:
    """A hash of all values: whether two sets of weights are the same."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(variables):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]
