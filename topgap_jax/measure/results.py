"""`evaluation.json`: what was measured of a run, one row an evaluator and split, written row by row and read back.

Also rows of version 0.1.0, whose measures were bare numbers with `name_low` and `name_high` beside them.
"""

import base64
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from topgap_jax.build import names as names_of
from topgap_jax.errors import UserError
from topgap_jax.progress import say, write_text
from topgap_jax.stored import NUMBER, mismatch, read_object, sealed
from topgap_jax.types import Check, Curve, Gallery, Measure

FILE = "evaluation.json"
NOT_AUDITED = "not audited"
TILE, GALLERY = 144, 10**8  # pixels: the side at which a report shows a small picture, all pictures of a gallery
_NUMBER = (*NUMBER, None)
_CURVE = {"x": [_NUMBER], "y": [_NUMBER], "axes?": [str], "label?": str}
_GALLERY = {"tiles": [{"shape": [int], "bytes": str}], "captions": [str], "columns": int, "label": str}
_MEASURE = {
    **dict.fromkeys(("value?", "low?", "high?", "n?"), _NUMBER),
    **dict.fromkeys(("label?", "unit?", "reason?"), str),
    "better?": (str, None),
    "main?": bool,
}
_CHECK = {**dict.fromkeys(("id", "status", "sentence"), str), **dict.fromkeys(("statistic", "threshold", "n"), _NUMBER)}
_ROW = {
    "split": str,
    "evaluator": str,
    "examples": int,
    "overrides?": {str: str},
    "measures?": {str: (_MEASURE, _CURVE, _GALLERY)},
    "cost?": {str: "PLAIN"},
    "audit?": (str, None),
    "norms?": [str],
    "checks?": [_CHECK],
    # of version 0.1.0
    "values?": {str: _NUMBER},
    "curves?": {str: _CURVE},
}
SCHEMA = {"rows": [_ROW], "weights?": str, "data?": str, "digest?": str}


class Row(NamedTuple):
    """One evaluator on one split.

    evaluator is its text; overrides {key: text} what the command line changed in the run's config; measures {name:
    Measure, Curve or Gallery}, the one that stands for the row first; cost {"forward_passes", "gradient_evaluations",
    "seconds", "device"}; audit None for what needs none, of a robust number the verdict of its audit in words; norms
    those of the balls in which it was attacked; checks those of an audit, which stands in a row of its own.
    """

    split: str
    evaluator: str
    overrides: Mapping[str, str]
    examples: int
    measures: Mapping[str, Measure | Curve | Gallery]
    cost: Mapping[str, Any]
    audit: str | None
    norms: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()

    @property
    def key(self) -> tuple[str, str, tuple[tuple[str, str], ...]]:
        """What tells rows apart: split, evaluator and overrides."""
        return self.split, self.evaluator, tuple(sorted(self.overrides.items()))

    @property
    def text(self) -> str:
        """The evaluator, with what the row's config had changed: `robust(fgsm(linf(eps))) with eps=4/255`."""
        changed = ", ".join(f"{key}={text}" for key, text in self.overrides.items())
        return f"{self.evaluator} with {changed}" if changed else self.evaluator

    @property
    def network(self) -> dict[str, str]:
        """The overrides that concern the network or its data: those that are no number of the evaluator's own."""
        return {key: text for key, text in self.overrides.items() if key not in names_of(self.evaluator)}

    @property
    def numbers(self) -> dict[str, Measure]:
        """The measures without curves and pictures."""
        return {name: measure for name, measure in self.measures.items() if isinstance(measure, Measure)}


class Evaluation(NamedTuple):
    """The rows of a run, and of which weights, with their digest ("" where none was kept), and which data they are."""

    rows: list[Row]
    weights: str
    data: str
    digest: str = ""


def read(path: Path) -> Evaluation:
    """The evaluation in a file, without rows if there is no file; UserError for a file that is none."""
    if not path.is_file():
        return Evaluation([], "", "")
    try:
        stored = read_object(path, "an evaluation of this program", SCHEMA)
        rows = with_audits([from_json(row) for row in stored["rows"]])
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # a UserError is a ValueError too
        what = f"{path} is not an evaluation of this program"
        why = str(error).removeprefix(f"{what}: ")
        raise UserError(f"{what} ({' '.join(why.split())[:150]}); move it away") from None
    return Evaluation(rows, *(stored.get(key, "") for key in ("weights", "data", "digest")))


def of(path: Path, weights: str, data: str, digest: str = "") -> Evaluation:
    """The evaluation of these weights and data, in the file or beside it; without rows if there is none."""
    kept = (read(each) for each in (path, _beside(path, weights, data, digest)))
    return next((each for each in kept if each[1:] == (weights, data, digest)), Evaluation([], weights, data, digest))


def turn_to(path: Path, weights: str, data: str, digest: str = "") -> None:
    """Make the file that of these weights: rows of others are moved to a file beside it, from where they come back when
    it is turned to them again."""
    before = read(path)
    if before[1:] == (weights, data, digest):
        return
    if before.rows:
        aside = _beside(path, *before[1:])
        path.replace(aside)
        say(f"{path}: the rows of {before.weights or 'other weights'} are now in {aside.name}")
    if of(path, weights, data, digest).rows:
        _beside(path, weights, data, digest).replace(path)


def _beside(path: Path, weights: str, data: str, digest: str) -> Path:
    """evaluation-checkpoint_last_step_8-90fd10e1.json, with a number for weights, data and digest together."""
    name = re.sub(r"\W+", "_", weights).strip("_")[:100]
    number = zlib.crc32(repr((weights, data, digest)).encode())
    return path.with_name(f"{path.stem}-{name or 'before'}-{number:08x}{path.suffix}")


def write(path: Path, row: Row, weights: str, data: str, digest: str = "") -> None:
    """Put a row into the file, in place of the one with its key; rows of other weights or other data are moved to a
    file beside it."""
    turn_to(path, weights, data, digest)
    rows = read(path).rows
    rows = with_audits([*(other for other in rows if other.key != row.key), row])
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {"rows": [to_json(row) for row in rows], "weights": weights, "data": data, "digest": digest}
    write_text(path, sealed(stored))


def with_audits(rows: Sequence[Row]) -> list[Row]:
    """The rows, where every robust number says what the audits of its network say, on its split and in its norms.

    Of several radii all are said, each audit names its own.
    """
    audits = [row for row in rows if row.checks]

    def audited(row: Row) -> Row:
        if row.checks or not row.norms:
            return row
        words = []
        for norm in row.norms:
            same = [a for a in audits if (a.split, a.network, a.norms) == (row.split, row.network, (norm,))]
            words += [a.audit for a in same] or [NOT_AUDITED if len(row.norms) == 1 else f"{NOT_AUDITED} in {norm}"]
        return row._replace(audit="; ".join(dict.fromkeys(words)))

    return [audited(row) for row in rows]


def to_json(row: Row) -> dict[str, Any]:
    """The row as JSON holds it; of a measure only what it says, NaN and infinity as null."""
    stored = row._asdict() | {
        "overrides": dict(row.overrides),
        "measures": {name: _fields(measure) for name, measure in row.measures.items()},
        "cost": dict(row.cost),
        "norms": list(row.norms),
        "checks": [
            check._asdict() | {name: plain(getattr(check, name)) for name in ("statistic", "threshold", "n")}
            for check in row.checks
        ],
    }
    # A row without an attack has neither, and is written as it was before there were audits.
    return {name: value for name, value in stored.items() if value or name not in ("norms", "checks")}


def from_json(stored: Mapping[str, Any]) -> Row:
    """The row that `to_json` wrote, or one of version 0.1.0."""
    if "values" in stored:
        stored = _from_0_1(stored)
    measures = {str(name): _measure(fields) for name, fields in stored["measures"].items()}
    overrides = {str(key): str(text) for key, text in stored["overrides"].items()}
    return Row(
        split=str(stored["split"]),
        evaluator=str(stored["evaluator"]),
        overrides=overrides,
        examples=int(stored["examples"]),
        measures=measures,
        cost=dict(stored["cost"]),
        audit=None if stored["audit"] is None else str(stored["audit"]),
        norms=tuple(map(str, stored.get("norms", ()))),
        checks=tuple(Check(**check) for check in stored.get("checks", ())),
    )


def _fields(measure: Measure | Curve | Gallery) -> dict[str, Any]:
    if isinstance(measure, Gallery):
        return measure._asdict() | {"tiles": [_tile_to_json(np.asarray(tile)) for tile in measure.tiles]}
    defaults = measure._field_defaults
    said = {name: value for name, value in measure._asdict().items() if value != defaults.get(name, value is None)}
    if isinstance(measure, Curve):
        said |= {"x": [plain(value) for value in measure.x], "y": [plain(value) for value in measure.y]}
        return said
    return {name: plain(value) for name, value in said.items()}


def _tile_to_json(tile: np.ndarray) -> dict[str, Any]:
    return {"shape": list(tile.shape), "bytes": base64.b64encode(tile.astype(np.uint8).tobytes()).decode()}


def _tile(stored: Mapping[str, Any]) -> np.ndarray:
    tile = np.frombuffer(base64.b64decode(stored["bytes"]), np.uint8).reshape(stored["shape"])
    if tile.ndim not in (2, 3) or not tile.size or tile.shape[2:] not in ((), (3,)):
        raise ValueError(f"a picture of shape {tile.shape}")
    return tile


def _measure(fields: Mapping[str, Any]) -> Measure | Curve | Gallery:
    if "tiles" in fields:
        if wrong := mismatch(fields, _GALLERY):  # it, and a curve, fit a measure too, of which nothing must be there
            raise ValueError(wrong)
        gallery = Gallery(**fields)
        if not gallery.tiles or len(gallery.tiles) != len(gallery.captions) or gallery.columns < 1:
            raise ValueError(f"{len(gallery.tiles)} pictures with {len(gallery.captions)} captions")
        tiles = [_tile(tile) for tile in gallery.tiles]
        height, width = (max(TILE, *(tile.shape[axis] for tile in tiles)) for axis in (0, 1))
        if len(tiles) * height * width > GALLERY:
            raise ValueError(f"{len(tiles)} pictures of up to {height} x {width} pixels")
        return gallery._replace(tiles=tiles)
    if "x" in fields:
        if wrong := mismatch(fields, _CURVE):
            raise ValueError(wrong)
        curve = Curve(**fields)
        if len(curve.x) != len(curve.y):
            raise ValueError(f"a curve of {len(curve.x)} and {len(curve.y)} numbers")
        return curve._replace(axes=tuple(curve.axes))
    return Measure(**fields)


def plain(value: Any) -> Any:
    """A value that JSON has: numbers of NumPy as Python's, NaN and infinity as None."""
    number = value.item() if hasattr(value, "item") else value
    return None if isinstance(number, float) and not math.isfinite(number) else number


def _from_0_1(old: Mapping[str, Any]) -> dict[str, Any]:
    """A row of version 0.1.0 in today's form; nothing says there which side of a measure is better."""
    call, _, note = old["evaluator"].partition(" with ")
    call = today(call)
    values, measures, bounds = dict(old["values"]), {}, {}
    for stem in [name.removesuffix("_low") for name in values if name.endswith("_low")]:
        owner = stem if stem in values else f"{stem}_accuracy"
        if owner in values and f"{stem}_high" in values:
            bounds[owner] = {"low": values.pop(f"{stem}_low"), "high": values.pop(f"{stem}_high")}
    robust = call.startswith("robust(")
    if robust:  # the number that stands for the row comes first
        values = {"robust_accuracy": values.pop("robust_accuracy"), **values}
    for name, value in values.items():
        group = f"{name.removesuffix('_accuracy')}_examples"  # of groups alone
        fields = {"value": value, "n": int(values.get(group, old["examples"])), **bounds.get(name, {})}
        name = "effective_share" if name == "effective_area" and call.startswith("measures(") else name
        if not name.endswith("_examples"):
            measures[name] = {**fields, "label": name.replace("_", " ")}
    curves = {name: {**curve, "label": name.replace("_", " ")} for name, curve in old.get("curves", {}).items()}
    return {
        "split": old["split"],
        "evaluator": call,
        "overrides": dict(part.split("=", 1) for part in note.split(", ") if "=" in part),
        "examples": old["examples"],
        "measures": measures | curves,
        "cost": old.get("cost", {}),
        "audit": old.get("audit") or (NOT_AUDITED if robust else None),
    }


def today(text: str) -> str:
    """An evaluator's text of version 0.1.0 as it is written now: what is made of the training split is no argument any
    more.

    >>> today("regions(bank, fill=mean), localisation(cam(), centre=centre, boxes=False)")
    'regions(fill=mean), localisation(cam(), boxes=False)'
    """
    text = re.sub(r"\bregions\(\s*(bank\s*=\s*)?bank\s*(,\s*)?", "regions(", text)
    return re.sub(r",\s*centre\s*=\s*centre\b", "", text)
