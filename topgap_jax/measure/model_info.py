"""What was measured of a model as one JSON, in the form of RobustBench's model_info (Croce et al. 2021, arXiv
2010.09670), with what it takes to measure it again.

Keys of theirs: `BY_HAND`, which a person fills in, and `dataset`, `eps`, `number_forward_passes`, `clean_acc`,
`autoattack_acc`, `external`, `unreliable`, `footnote`, shares as texts in per cent. Keys of ours, which their tools do
not read: `threat_model`, `background_gap`, `config`, `file` and `data` as in the config.json of a run, `weights`,
`fingerprint`, `split`, `batch`, `rows` as in evaluation.json, `images`, and what it was made with.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from topgap_jax.attacks import autoattack
from topgap_jax.balls import TABLE as BALLS
from topgap_jax.build import build
from topgap_jax.errors import UserError
from topgap_jax.measure.criteria import sign_test
from topgap_jax.measure.results import NOT_AUDITED, Row, from_json
from topgap_jax.metrics.summaries import wilson
from topgap_jax.stored import read_object
from topgap_jax.types import Robustness

BY_HAND = ("link", "name", "authors", "additional_data", "dataset", "venue", "architecture", "reported", "weights_from")
"""What no evaluation can know; `weights_from` is ours: where the weights are to be had."""
ORDER = (
    "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps",
    "clean_acc", "reported", "autoattack_acc", "external", "unreliable", "footnote",
)  # fmt: skip
FOLDERS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
"""RobustBench's names of threat models."""
CHECKED = 256  # images that `topgap verify` measures again
LETTERS = {1: "1", 0: "0", -1: "-"}  # what an image contributes to a measure; "." is nothing


class Info(NamedTuple):
    """A file of this form, read: all its keys, and of them the rows, the config, the split and the batch.

    images {evaluator: {measure: (n,)}}: what each image of the split contributes to a measure that is its mean, NaN for
    one that does not count.
    """

    keys: Mapping[str, Any]
    rows: list[Row]
    images: Mapping[str, Mapping[str, np.ndarray]]


class Comparison(NamedTuple):
    """A measure over `n` images as the file has it, and over `checked` of them, as it has it and measured again.

    differ: how many of these images contribute something else now; p: of the two-sided sign test on them.
    """

    evaluator: str
    measure: str
    stored: float
    n: int
    stored_checked: float
    again: float
    checked: int
    differ: int
    p: float

    @property
    def agrees(self) -> bool:
        """Images that differ lie on both sides, as rounding leaves them, or are too few to tell (p at least .05)."""
        return self.p >= 0.05


def contributions(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{measure: (n,)} in {1, 0, -1, NaN}, of which the measures are means; of the columns (n, ...) of an attack (clean
    and robust accuracy) or of `regions` (the background gap), {} of others."""
    if "radius" in columns:
        return {
            "clean_accuracy": (columns["radius"] > 0).astype(float),
            "robust_accuracy": np.isinf(columns["radius"]).astype(float),
        }
    if "own_background" in columns:
        gap = columns["own_background"].astype(float) - columns["other_background"]
        return {"background_gap": np.where(columns["used"], gap, np.nan)} if columns["used"].any() else {}
    return {}


def ball_of(robustness: Mapping[str, Robustness]) -> str:
    """The ball that all attacks are made in, as a text; UserError where there are several, or an attack names none."""
    by_attack = {attack.name: _balls(attack.name) for each in robustness.values() for attack in each.runs}
    balls = {ball for names in by_attack.values() for ball in names}
    if len(balls) != 1 or not all(by_attack.values()):
        raise UserError(f"a model's file is about one ball, linf, l2 or l1; the attacks are {'; '.join(by_attack)}")
    return balls.pop()


def measured(
    robustness: Mapping[str, Robustness],
    rows: Mapping[str, Row],
    images: Mapping[str, Mapping[str, np.ndarray]],
    split: str,
) -> dict[str, Any]:
    """What the file says of the model in RobustBench's keys, and `threat_model` and `background_gap`.

    robustness and rows by evaluator. AutoAttack is told by what it is made of. `external` is the lowest accuracy under
    another attack where that is below AutoAttack's, or where there is none. `unreliable` is left out, as theirs for
    "unknown", where nothing was audited in that ball.
    """
    ball = ball_of(robustness)
    name, _, eps = ball.rstrip(")").partition("(")
    robust = {text: np.mean(images[text]["robust_accuracy"]) for text in robustness}
    versions = [_names(autoattack(build(ball, BALLS), version=version)) for version in ("standard", "rand")]
    complete = {text for text in robust if _names(robustness[text].runs) in versions}
    lowest = min(robust, key=robust.get)
    best = min(complete, key=robust.get, default=None)
    audits = {text: rows[text].audit or NOT_AUDITED for text in robust}
    percent = lambda share: f"{100 * share:.2f}"
    keys = {
        "number_forward_passes": max(attack.samples or 1 for each in robustness.values() for attack in each.runs),
        "eps": eps,
        "threat_model": FOLDERS[name],
        "clean_acc": percent(np.mean(images[lowest]["clean_accuracy"])),
    }
    keys |= {} if best is None else {"autoattack_acc": percent(robust[best])}
    keys |= {"external": percent(robust[lowest])} if best is None or robust[lowest] < robust[best] else {}
    audited = [text for text in audits.values() if f"audit at {ball}:" in text]  # another radius says nothing
    if audited:
        keys["unreliable"] = any("UPPER BOUND ONLY" in text for text in audited)
    n = len(images[lowest]["robust_accuracy"])
    low, high = (percent(bound) for bound in wilson(int(images[lowest]["robust_accuracy"].sum()), n))
    sentences = [f"{n:,} images of {split}, 95 % interval [{low}, {high}]"]
    sentences += [f"{keys['external']} % is under {lowest}"] if "external" in keys else []
    sentences += sorted(set(audits.values()))
    keys["footnote"] = ". ".join(text[0].upper() + text[1:] for text in sentences) + "."
    gaps = [np.nanmean(each["background_gap"]) for each in images.values() if "background_gap" in each]
    return keys | ({"background_gap": percent(gaps[0])} if gaps else {})


def by_hand(path: Path) -> dict[str, Any]:
    """What a person wrote into a file that may be there already; UserError for one that is no JSON object."""
    if not path.exists():
        return {}
    stored = _object(path)
    return {key: stored[key] for key in BY_HAND if key in stored}


def text(keys: Mapping[str, Any], images: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """The file: RobustBench's keys first, in their order; what nobody filled in is null, as in what they write."""
    filled = dict.fromkeys(BY_HAND) | dict(keys)
    ordered = {key: filled.pop(key) for key in ORDER if key in filled} | filled
    ordered["images"] = {
        evaluator: {measure: "".join(LETTERS.get(value, ".") for value in values) for measure, values in each.items()}
        for evaluator, each in images.items()
    }
    return json.dumps(ordered, indent=1) + "\n"


def read(path: Path) -> Info:
    """The file; UserError where there is none, where it is no such JSON, and where it is RobustBench's own, which does
    not say what its numbers were measured of."""
    if not path.is_file():
        raise UserError(f"there is no file '{path}'")
    stored = _object(path)
    if "clean_acc" in stored and "config" not in stored:
        raise UserError(
            f"{path} has RobustBench's numbers alone, and not what they were measured of; 'topgap evaluate "
            "--model-info FILE' writes a file that can be verified"
        )
    values = {letter: value for value, letter in LETTERS.items()} | {".": np.nan}
    try:
        rows = [from_json(row) for row in stored["rows"]]
        images = {
            row.evaluator: {
                str(measure): np.array([values[letter] for letter in letters])
                for measure, letters in stored["images"].get(row.evaluator, {}).items()
            }
            for row in rows
        }
        if any(len(letters) != row.examples for row in rows for letters in images[row.evaluator].values()):
            raise ValueError("as many letters as images are needed")
        kinds = {"config": dict, "data": dict, "split": str, "batch": int, "fingerprint": str, "weights": str | None}
        wrong = [key for key, kind in kinds.items() if not isinstance(stored[key], kind)]
        if wrong or not any(images.values()):
            raise ValueError(f"{wrong[0]} is of another kind" if wrong else "it has no images")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:100]
        raise UserError(
            f"{path} is no model's file that can be verified ({why}); topgap evaluate --model-info writes one"
        ) from None
    return Info(stored, rows, {evaluator: each for evaluator, each in images.items() if each})


def compare(info: Info, ids: np.ndarray, again: Mapping[str, Mapping[str, np.ndarray]]) -> list[Comparison]:
    """Each measure of the file beside what its images `ids` (m,) contribute now, again {evaluator: {measure: (m,)}}."""
    return [
        _compared(evaluator, measure, values, values[ids], again[evaluator][measure])
        for evaluator, each in info.images.items()
        for measure, values in each.items()
    ]


def _compared(evaluator, measure, stored, before, now):
    change = np.nan_to_num(now) - np.nan_to_num(before)
    more, less = int((change > 0).sum()), int((change < 0).sum())
    differ = int((np.nan_to_num(now, nan=2) != np.nan_to_num(before, nan=2)).sum())
    p = min(1.0, 2 * sign_test(max(more, less), min(more, less)))  # two-sided: McNemar's exact test
    mean = lambda values: float(np.nanmean(values)) if np.isfinite(values).any() else math.nan
    return Comparison(evaluator, measure, mean(stored), len(stored), mean(before), mean(now), len(now), differ, p)


def _object(path):
    return read_object(path, "the JSON of a model", {str: "PLAIN"})


def _balls(name: str) -> list[str]:
    return re.findall(rf"\b(?:{'|'.join(FOLDERS)})\([^()]+\)", name)


def _names(runs):
    return [attack.name for attack in runs]
