"""What is said of a training that diverged: what is not finite, since when, and how to begin another before that."""

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from topgap_jax.errors import UserError
from topgap_jax.progress import read_metrics
from topgap_jax.run import checkpoint

CHECKED = ("loss", "gradient", "parameter")
"""What each step looks at, in this order: its loss, the gradient, and all that it leaves."""
SOUND = 10.0  # times the median loss of the run: a state whose next loss is above that was exploding already


def advice(
    workdir: Path,
    config: Mapping[str, Any],
    step: int,
    finite: Sequence[bool],
    loss: float,
    window: Sequence[float],
) -> UserError:
    """The error to raise. step: the first whose loss, gradient or parameters are not `finite`; window: the losses of
    the steps before it that are in no row of metrics yet."""
    what = CHECKED[list(finite).index(False)]
    said = f"the {what} is not finite at step {step} (loss {loss:.4g}); "
    before = sound_step(workdir, step, window)
    if before is None:
        return UserError(f"{said}no checkpoint is sound yet: lower the learning rate or clip, in another workdir")
    path, number = workdir / "checkpoints" / "last" / str(before), 2
    while Path(f"{workdir}_{number}").exists():
        number += 1
    words = ["topgap", "train", "--config", workdir / "config.json", f"--config.init={path}"]
    if "optimizer" in config:
        words.append(f"--config.optimizer={config['optimizer']}")
    words += ["--workdir", f"{workdir}_{number}"]
    text = f"{said}from the last sound checkpoint, with a lower learning rate or clipping: "
    return UserError(text, shlex.join(map(str, words)))


def sound_step(workdir: Path, step: int, window: Sequence[float]) -> int | None:
    """The newest step of "last" before `step` after which the loss was still sane: that of the next step, of the next
    row of metrics, or else that of its validation."""
    rows = [row for row in read_metrics(workdir) if isinstance(row.get("loss"), int | float) and row["step"] < step]
    trained = [(row["step"], row["loss"]) for row in rows if row.get("kind") == "train"]
    validated = {row["step"]: row["loss"] for row in rows if row.get("kind") == "validation"}
    trained += [(step - len(window) + i, loss) for i, loss in enumerate(window)]
    usual = statistics.median([loss for _, loss in trained if math.isfinite(loss)] or [math.inf])

    def sane(before: int) -> bool:
        after = next((loss for at, loss in trained if at > before), validated.get(before, 0.0))
        return math.isfinite(after) and after <= SOUND * abs(usual)

    return next((each for each in checkpoint.steps(workdir) if each < step and sane(each)), None)
