"""Configs: Python files with `get_config()`, whose choices are strings that read like code.

Every number of a config is a name in its strings: with `config.eps = 8 / 255`, `'pgd(linf(eps))'` follows `--config.eps=4/255`.
A file may also define `methods()`, {name: function}: a user's own models, pools or data sets, usable in its strings.
"""

import difflib
import json
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optax
from ml_collections import ConfigDict

from topgap_jax import (
    attacks,
    balls,
    data,
    drops,
    evaluators,
    explain,
    metrics,
    models,
    penalties,
    pool,
    rules,
    scores,
)
from topgap_jax.build import build, merged, table
from topgap_jax.errors import UserError
from topgap_jax.rewrite import with_drop, with_pool
from topgap_jax.training import augment, objectives, optimizers, schedules
from topgap_jax.types import Evaluator, Model, Robustness, Table

ROOMS: dict[str, Table] = {
    "models": merged(models.TABLE, table(with_pool, with_drop)),
    "pools": pool.TABLE,
    "drops": drops.TABLE,
    "data": data.TABLE,
    "objectives": objectives.TABLE,
    "augmentation": augment.TABLE,
    "optimizers": optimizers.TABLE,
    "schedules": schedules.TABLE,
    "balls": balls.TABLE,
    "penalties": penalties.TABLE,
    "scores": scores.TABLE,
    "attacks": attacks.TABLE,
    "explanations": explain.TABLE,
    "rules": rules.TABLE,
    "metrics": metrics.TABLE,
    "evaluators": evaluators.TABLE,
}
TABLE: Table = merged(*ROOMS.values())
NAMED: dict[str, Mapping[str, Any]] = {"scores": scores.VALUES, "rules": rules.VALUES}
VALUES: Mapping[str, Any] = merged(*NAMED.values())
"""What a string may name without a call, beside the config's numbers and what the run knows."""


class Role(NamedTuple):
    """What the string of a key stands for, in words; the room of the functions it calls; whether a value can be one."""

    words: str
    room: str
    fits: Callable[[Any], bool] = callable


ROLES = {
    "source": Role("a data set", "data"),
    "pool": Role("a pool", "pools"),
    "model": Role("a model", "models", lambda value: isinstance(value, Model)),
    "objective": Role("an objective", "objectives"),
    "augment": Role("an augmentation", "augmentation"),
    "optimizer": Role("an optimizer", "optimizers", lambda value: isinstance(value, optax.GradientTransformation)),
    "evaluators": Role("an evaluator", "evaluators", lambda value: isinstance(value, (Evaluator, Robustness))),
    "explain": Role("an explanation", "explanations"),
}

_number = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)
KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "a whole number": lambda value: type(value) is int and value >= 0,
    "a whole number of at least 1": lambda value: type(value) is int and value >= 1,
    "a number in [0, 1)": lambda value: _number(value) and 0 <= value < 1,
    "numbers, one per channel": lambda value: isinstance(value, tuple) and all(map(_number, value)),
    "(height, width) in pixels": lambda value: (
        isinstance(value, tuple) and len(value) == 2 and all(type(side) is int and side >= 1 for side in value)
    ),
}
WORDS = {int: "a whole number", float: "a number", bool: "True or False", tuple: "a tuple"}
KEYS = {
    "seed": ("a whole number", "of the first weights, the order of the data and every random draw"),
    "source": ("text", "the data set"),
    "train": ("text", "the split to train on, such as 'train' or 'train[:90%]'"),
    "validation": ("text", "the split that the best checkpoint is chosen by; '' for none"),
    "test": ("text", "the splits that are evaluated, separated by commas"),
    "image_size": ("(height, width) in pixels", "of what the network sees"),
    "resize": ("text", "'stretch', or 'crop' to keep the aspect"),
    "mean": ("numbers, one per channel", "subtracted inside the model; images are in [0, 1]"),
    "std": ("numbers, one per channel", "divided by inside the model"),
    "pool": ("text", "the pool that `model` may name"),
    "model": ("text", "the model; it may name pool, classes, mean, std and total_steps"),
    "batch": ("a whole number of at least 1", "examples in a step, over all devices"),
    "epochs": ("a whole number of at least 1", "passes over the training split"),
    "augment": ("text", "augmentations, separated by commas; '' for none"),
    "objective": ("text", "what training lowers"),
    "optimizer": ("text", "the optimizer; it may name total_steps"),
    "ema": ("a number in [0, 1)", "decay of averaged weights, which are then evaluated; 0 for none"),
    "evaluators": ("text", "evaluators, separated by commas; they may name bank and centre (of the training split)"),
    "explain": ("text", "explanations, separated by commas, for `topgap explain`"),
    "log_every": ("a whole number of at least 1", "steps between two rows of metrics.jsonl"),
    "checkpoint_every": ("a whole number of at least 1", "epochs between two checkpoints"),
}
"""What a config must hold: {key: (kind, meaning)}."""


class Loaded(NamedTuple):
    """A config, the methods of its own, and the Python file that both are from (None: none is known)."""

    config: ConfigDict
    methods: Table
    file: str | None


def load(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> Loaded:
    """The config of a Python file, or of a run's config.json, with `(key, text)` overrides.

    Modules beside the file can be imported in it. Raises UserError for a file that is not there, cannot be run or has no
    config, and for a key that is unknown, missing or of the wrong kind.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no config file '{path}'")
    loaded = _stored(path) if path.suffix == ".json" else _written(path)
    config = loaded.config
    for key, text in overrides:
        override(config, key, text)
    missing = [key for key in KEYS if key not in config]
    if missing:
        raise UserError(f"{path}: the config lacks {', '.join(missing)}; 'topgap help config' says what they are")
    for key, (kind, _) in KEYS.items():
        if not KINDS[kind](config[key]):
            raise UserError(f"config.{key} must be {kind}, got {config[key]!r}")
    return loaded


def override(config: ConfigDict, key: str, text: str) -> None:
    """Set config.key from text, with the type of its default: `4/255` for a number, `(64, 64)` for a tuple, text as it is."""
    if key not in config:
        near = difflib.get_close_matches(key, list(config), n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UserError(f"--config.{key}: there is no such key; {hint}the config has {', '.join(sorted(config))}")
    default = config[key]
    if isinstance(default, str):
        config[key] = text
        return
    try:
        value = build(text, {})
        value = float(value) if isinstance(default, float) and type(value) is int else value
    except (UserError, OverflowError):
        value = None
    if type(value) is not type(default) or (type(value) is int and abs(value) >= 2**63):
        kind = WORDS.get(type(default), type(default).__name__)
        raise UserError(f"--config.{key}: expected {kind} like {default!r}, got {text!r}")
    config[key] = value


def choice(config: ConfigDict, key: str, methods: Table, **known: Any) -> Any:
    """The value of the config's string `key`. `known`: what the run knows beside the config's own numbers."""
    return _value(config, key, config[key], f"config.{key}", methods, known)


def choices(
    config: ConfigDict, key: str, methods: Table, text: str | None = None, argument: str = "", **known: Any
) -> dict[str, Any]:
    """{text of each: value} of the config's list `key`, or of `text`, what the command line's `argument` gives in its place."""
    where = f"config.{key}" if text is None else argument
    return {
        part: _value(config, key, part, where, methods, known)
        for part in split_list(config[key] if text is None else text)
    }


def split_list(text: str) -> list[str]:
    """The parts of a list at its top-level commas.

    >>> split_list("accuracy(), robust(pgd(linf(eps), steps=20))")
    ['accuracy()', 'robust(pgd(linf(eps), steps=20))']
    """
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([":
            depth += 1
        elif letter in ")]":
            depth -= 1
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def mentions(call: str, name: str) -> bool:
    """Is `name` a value in this call, and neither a keyword nor a text?

    >>> mentions("robust(pgd(linf(eps)))", "eps"), mentions("linf(eps=.1)", "eps"), mentions("layer('eps')", "eps")
    (True, False, False)
    """
    return re.search(rf"\b{name}\b(?!\s*=)", _unquoted(call)) is not None


def _unquoted(text: str) -> str:
    return re.sub(r"'[^']*'|\"[^\"]*\"", "", text)


def _value(config: ConfigDict, key: str, text: str, where: str, methods: Table, known: Mapping[str, Any]) -> Any:
    """The value of `text`, checked to be what `key` stands for."""
    role = ROLES[key]
    choices = [*ROOMS[role.room], *methods]
    name, call, _ = text.partition("(")
    if call and name.strip().isidentifier() and name.strip() not in choices:
        near = difflib.get_close_matches(name, choices, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UserError(
            f"{where}: '{name.strip()}' is not {role.words}; {hint}choose from {', '.join(sorted(choices))}"
        )
    value = build(text, {**TABLE, **methods}, {**VALUES, **known, **_names(config)}, where)
    if not role.fits(value):
        kind = type(value).__name__
        raise UserError(f"{where}: '{text}' is not {role.words}, it is of type {kind}; 'topgap help' lists {role.room}")
    return value


def _names(config: ConfigDict) -> Mapping[str, Any]:
    """The numbers of the config, its tuples of numbers, and the text `dtype`: what its strings may name."""
    numbers = lambda value: _number(value) or (isinstance(value, tuple) and all(map(_number, value)))
    return {key: value for key, value in config.items() if numbers(value) or key == "dtype"}


def _written(path: Path) -> Loaded:
    config, methods = _run(path)
    if type(config) is not ConfigDict:
        raise UserError(
            f"{path} has no get_config() that returns an ml_collections.ConfigDict; configs/cifar10.py shows one"
        )
    return Loaded(config, methods, str(path))


def _stored(path: Path) -> Loaded:
    """The config of a run, and the methods of the Python file that it was written in."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        config = ConfigDict({key: _tuples(value) for key, value in stored["config"].items()})
        file = stored.get("file") and str(Path(stored["file"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not the config.json of a run") from None
    if file is not None and Path(file).is_file():
        return Loaded(config, _run(Path(file))[1], file)
    calls = " ".join(_unquoted(str(config.get(key, ""))) for key in ROLES)
    own = [name for name in re.findall(r"(\w+)\s*\(", calls) if name not in TABLE]
    if own and file is not None:
        raise UserError(
            f"{path}: '{own[0]}' comes from {file}, which is not there any more; put it back, or correct \"file\" in {path}"
        )
    return Loaded(config, {}, file)


def _run(path: Path) -> tuple[Any, Table]:
    """What get_config() of a Python file returns (None: there is none), and its methods()."""
    folder = str(path.absolute().parent)
    sys.path.insert(0, folder)
    try:
        names = runpy.run_path(str(path))
        config = names["get_config"]() if "get_config" in names else None
        methods = dict(names["methods"]()) if "methods" in names else {}
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        at = f" line {lines[-1]}" if lines else ""
        raise UserError(
            f"{path}{at} cannot be run: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
    finally:
        sys.path.remove(folder)
    taken = sorted(set(methods) & set(TABLE))
    if taken:
        raise UserError(f"{path}: methods() must not take the names {', '.join(taken)}, which the library has already")
    if not all(isinstance(name, str) and callable(function) for name, function in methods.items()):
        raise UserError(f"{path}: methods() must return {{name: function}}")
    return config, methods


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
