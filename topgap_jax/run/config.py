"""Configs: Python files with `get_config()`, whose choices are strings that read like code.

Every number of a config is a name in its strings: with `config.eps = 8 / 255`, `'pgd(linf(eps))'` follows `--config.eps=4/255`.
A file may also define `methods()`, {name: function}: a user's own models, pools or data sets, usable in its strings.
"""

import difflib
import json
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from topgap_jax import attacks, balls, data, evaluators, explain, models, pool, scores
from topgap_jax.build import build
from topgap_jax.errors import UserError
from topgap_jax.training import augment, objectives, optimizers, schedules
from topgap_jax.types import Table

ROOMS: dict[str, Table] = {
    "models": models.TABLE,
    "pools": pool.TABLE,
    "data": data.TABLE,
    "objectives": objectives.TABLE,
    "augmentation": augment.TABLE,
    "optimizers": optimizers.TABLE,
    "schedules": schedules.TABLE,
    "balls": balls.TABLE,
    "attacks": attacks.TABLE,
    "explanations": explain.TABLE,
    "evaluators": evaluators.TABLE,
}
TABLE: Table = {name: function for table in ROOMS.values() for name, function in table.items()}

REQUIRED = (
    "seed", "source", "train", "validation", "test", "image_size", "resize", "mean", "std", "pool", "model", "batch",
    "epochs", "augment", "objective", "optimizer", "ema", "evaluators", "explain", "log_every", "checkpoint_every",
)  # fmt: skip


def load(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> tuple[ConfigDict, Table]:
    """The config of a Python file, or of a run's config.json, with `(key, text)` overrides; and the file's own methods."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no config file '{path}'")
    if path.suffix == ".json":
        stored = json.loads(path.read_text(encoding="utf-8"))
        config = ConfigDict({key: _tuples(value) for key, value in stored["config"].items()})
        methods = _module(Path(stored["file"]), needs="methods")[1] if stored.get("file") else {}
    else:
        config, methods = _module(path, needs="get_config")
    for key, text in overrides:
        override(config, key, text)
    missing = [key for key in REQUIRED if key not in config]
    if missing:
        raise UserError(f"{path}: the config lacks {', '.join(missing)}; configs/cifar10.py is a complete one")
    return config, methods


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
    value = build(text, {}, {"True": True, "False": False}, f"--config.{key}")
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(default):
        raise UserError(f"--config.{key}: expected {type(default).__name__} like {default!r}, got {value!r}")
    config[key] = value


def choice(config: ConfigDict, key: str, methods: Table, **known: Any) -> Any:
    """The value of the config's string `key`. `known`: what the run knows beside the config's own numbers."""
    return choose(config, config[key], f"config.{key}", methods, **known)


def choose(config: ConfigDict, text: str, where: str, methods: Table, **known: Any) -> Any:
    """The value of `text`, in which the config's numbers, the scores and `known` are names."""
    return build(text, {**TABLE, **methods}, {**scores.TABLE, **known, **_numbers(config)}, where)


def choices(config: ConfigDict, text: str, where: str, methods: Table, **known: Any) -> dict[str, Any]:
    """{text of each: value} of a list separated by commas; nothing for an empty text."""
    return {part: choose(config, part, where, methods, **known) for part in split_list(text)}


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


def plain(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON can hold it."""
    return json.loads(json.dumps(config.to_dict()))


def _module(path: Path, needs: str) -> tuple[ConfigDict | None, Table]:
    try:
        names = runpy.run_path(str(path))
    except Exception as error:
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if needs not in names:
        raise UserError(f"{path} has no {needs}(); configs/cifar10.py shows what a config looks like")
    methods = names["methods"]() if "methods" in names else {}
    taken = sorted(set(methods) & set(TABLE))
    if taken:
        raise UserError(f"{path}: methods() must not take the names {', '.join(taken)}, which the library has already")
    return (names["get_config"]() if needs == "get_config" else None), methods


def _numbers(config: ConfigDict) -> Mapping[str, Any]:
    number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool)
    numbers = {key: value for key, value in config.items() if number(value)}
    tuples = {key: value for key, value in config.items() if isinstance(value, tuple) and all(number(x) for x in value)}
    return {**numbers, **tuples, **({"dtype": config.dtype} if "dtype" in config else {})}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
