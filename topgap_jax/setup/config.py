"""Configs: Python files with `get_config()`, whose choices are texts that read like code.

A key is a name in the texts of the others: a number or a tuple as it is (`'pgd(linf(eps))'` follows
`--config.eps=4/255`), a key whose text is an expression as what it builds (`config.drop = 'sgdrop()'`, `config.model =
"with_drop(network, 'stage3', drop)"`). `KEYS` says which keys every config has, with their defaults, and which of them
are expressions; a text under a key of one's own is one. A file may also define `methods()`, {name: function}: a user's
own models, pools or data sets, usable in its texts; and `arms()`, {name: {key: text}}: overrides that belong together,
`topgap train --arm NAME`.
"""

import runpy
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optax
from ml_collections import ConfigDict

from topgap_jax.build import build, calls, did_you_mean
from topgap_jax.data.source import RESIZES
from topgap_jax.errors import UserError
from topgap_jax.measure.results import today
from topgap_jax.run.workdir import read_config
from topgap_jax.setup.tables import TABLE
from topgap_jax.types import Audit, Evaluator, Model, Robustness, Table


class Role(NamedTuple):
    """What an expression stands for, in words; the room of the functions it calls; whether a value can be one."""

    words: str
    room: str
    fits: Callable[[Any], bool] = callable


class Key(NamedTuple):
    """A key of every config: the kind of its value, what it means, its default (None: a config must state it).

    role: of an expression, what it builds; of the kind "expressions", what each of the list builds.
    """

    kind: str
    about: str
    default: Any = None
    role: Role | None = None


_number = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)
KINDS: dict[str, Callable[[Any], bool]] = {
    "a text": lambda value: isinstance(value, str),
    "an expression": lambda value: isinstance(value, str),
    "expressions": lambda value: isinstance(value, str),
    "'stretch', 'crop' or 'centre'": lambda value: value in RESIZES,
    "a whole number": lambda value: type(value) is int and value >= 0,
    "a whole number of at least 1": lambda value: type(value) is int and value >= 1,
    "a number in [0, 1)": lambda value: _number(value) and 0 <= value < 1,
    "numbers, one per channel": lambda value: isinstance(value, tuple) and all(map(_number, value)),
    "(height, width) in pixels": lambda value: (
        isinstance(value, tuple) and len(value) == 2 and all(type(side) is int and side >= 1 for side in value)
    ),
}
WORDS = {int: "a whole number", float: "a number", bool: "True or False", tuple: "a tuple"}

_model = Role("a model", "models", lambda value: isinstance(value, Model))
_optimizer = Role("an optimizer", "optimizers", lambda value: isinstance(value, optax.GradientTransformation))
_evaluator = Role("an evaluator", "evaluators", lambda value: isinstance(value, (Audit, Evaluator, Robustness)))
KEYS = {
    "seed": Key("a whole number", "of the first weights, the order of the data and every random draw", 0),
    "source": Key("an expression", "the data set", None, Role("a data set", "data")),
    "train": Key("a text", "the split to train on, such as 'train' or 'train[:90%]'", "train"),
    "validation": Key("a text", "the split that the best checkpoint is chosen by; '' for none", ""),
    "test": Key("a text", "the splits that are evaluated, separated by commas", "test"),
    "image_size": Key("(height, width) in pixels", "of what the network sees"),
    "resize": Key(
        "'stretch', 'crop' or 'centre'",
        "how a picture gets that size: a crop keeps the aspect, the centre its pixels too",
        "stretch",
    ),
    "mean": Key("numbers, one per channel", "subtracted inside the model; images are in [0, 1]", (0.5, 0.5, 0.5)),
    "std": Key("numbers, one per channel", "divided by inside the model", (0.25, 0.25, 0.25)),
    "dtype": Key("a text", "'float32' or 'bfloat16', of the network's arithmetic", "float32"),
    "pool": Key("an expression", "class maps to logits", "gap()", Role("a pool", "pools")),
    "backbone": Key("an expression", "images to features", "resnet20()", Role("a backbone", "models")),
    "head": Key("an expression", "features to logits", "map_head(pool)", Role("a head", "models")),
    "network": Key(
        "an expression",
        "backbone and head; a text may also name classes and total_steps",
        "classifier(backbone, head, classes=classes, mean=mean, std=std, dtype=dtype)",
        _model,
    ),
    "model": Key("an expression", "what is trained: the network, or the network changed", "network", _model),
    "init": Key(
        "a text",
        "the weights to begin with: a file, the name of a published network, the folder of a run or of Orbax's; '' for "
        "fresh ones",
        "",
    ),
    "batch": Key("a whole number of at least 1", "examples in a step, over all devices", 100),
    "epochs": Key("a whole number of at least 1", "passes over the training split"),
    "augment": Key("expressions", "augmentations; '' for none", "", Role("an augmentation", "augmentation")),
    "objective": Key("an expression", "what training lowers", "standard()", Role("an objective", "objectives")),
    "optimizer": Key("an expression", "the optimizer; it may name total_steps", None, _optimizer),
    "ema": Key("a number in [0, 1)", "decay of averaged weights, which are then evaluated; 0 for none", 0.0),
    "evaluators": Key("expressions", "what `topgap evaluate` measures", "accuracy()", _evaluator),
    "explain": Key("expressions", "what `topgap explain` draws", "gradient()", Role("an explanation", "explanations")),
    "log_every": Key("a whole number of at least 1", "steps between two rows of metrics.jsonl", 10),
    "checkpoint_every": Key("a whole number of at least 1", "epochs between two checkpoints", 1),
}
"""What every config holds; lists are separated by commas."""


class Loaded(NamedTuple):
    """A config, the methods of its file, that Python file (None: none is known), its arms, and the keys that it states.

    stated: those that the file, the arm or the command line sets; of config.json, those not at their default.
    """

    config: ConfigDict
    methods: Table
    file: str | None
    arms: Mapping[str, Mapping[str, str]] = {}
    stated: frozenset[str] = frozenset()


def load(
    path: str | Path, overrides: Sequence[tuple[str, str]] = (), arm: str = "", file: str | Path | None = None
) -> Loaded:
    """The config of a Python file or of a run's config.json, with the overrides of an arm, then `(key, text)` ones.

    file: the Python file whose methods and arms a config.json may name. The one that config.json itself names is never
    run: a run may come from anywhere. Modules beside a Python file can be imported in it. Raises UserError for a file
    that is not there, cannot be run or has no config, for an arm that it does not have, for a method whose file is not
    given, and for a key that is unknown, missing or of the wrong kind.
    """
    path = Path(path)
    for each in filter(None, (path, file)):
        if not Path(each).is_file():
            raise UserError(f"there is no config file '{each}'")
    if file is not None and (path.suffix != ".json" or Path(file).suffix == ".json"):
        raise UserError(
            f"of two config files the first is the config.json of a run, the second a Python file; got '{path}' and "
            f"'{file}'"
        )
    if path.suffix == ".json":
        loaded = _stored(path, file)
    else:
        loaded = _written(path)
    foreign = _foreign(loaded.config) if path.suffix == ".json" and file is None else []
    config, arms = loaded.config, loaded.arms
    for key in KEYS:
        if key not in config and KEYS[key].default is not None:
            config[key] = KEYS[key].default
    if arm and arm not in arms:
        listed = ", ".join(arms) or "none: it defines no arms()"
        raise UserError(f"{path} has no arm '{arm}'; {did_you_mean(arm, arms)}its arms are {listed}")
    for name, changes in arms.items():
        for key, text in changes.items():  # of the other arms too: a mistake in one is told when the file is used
            override(
                config if name == arm else config.copy_and_resolve_references(),
                key,
                text,
                f"{path}: arm '{name}': {key}",
            )
    for key, text in overrides:
        override(config, key, text)
    missing = [key for key in KEYS if key not in config]
    if missing:
        raise UserError(f"{path}: the config lacks {', '.join(missing)}; 'topgap help config' says what they are")
    for key, (kind, *_) in KEYS.items():
        if not KINDS[kind](config[key]):
            raise UserError(f"config.{key} must be {kind}, got {config[key]!r}")
    foreign = [
        name for name in _foreign(config) if name in foreign
    ]  # what the command line misspells is told otherwise
    if foreign and loaded.file:
        raise UserError(
            f"{path}: '{foreign[0]}' is no name of the library; the Python file of a run is run only if the command "
            f"names it: add --config {shlex.quote(loaded.file)}"
        )
    stated = {*loaded.stated, *arms.get(arm, {}), *(key for key, _ in overrides)}
    return loaded._replace(stated=frozenset(stated))


def override(config: ConfigDict, key: str, text: str, where: str = "") -> None:
    """Set config.key from text, with the type of its value: `4/255` for a number, `(64, 64)` a tuple, text as it is.

    where: what an error begins with, in place of `--config.key`.
    """
    where = where or f"--config.{key}"
    if key not in config:
        own = ", ".join(sorted(set(config) - set(KEYS)))
        raise UserError(
            f"{where}: there is no such key; {did_you_mean(key, config, n=1)}'topgap help config' lists the keys"
            + (f"; the config's own are {own}" if own else "")
        )
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
        raise UserError(f"{where}: expected {kind} like {default!r}, got {text!r}")
    config[key] = value


def is_expression(config: Mapping[str, Any], key: str) -> bool:
    """Is the value of `key` a text that is built before it is used: an expression of `KEYS`, or a text of one's own?"""
    return isinstance(config[key], str) and (key not in KEYS or KEYS[key].kind in ("an expression", "expressions"))


def _written(path: Path) -> Loaded:
    config, methods, arms = _run(path)
    if type(config) is not ConfigDict:
        raise UserError(
            f"{path} has no get_config() that returns an ml_collections.ConfigDict; configs/cifar10.py shows one"
        )
    return Loaded(config, methods, str(path), arms, frozenset(config))


def _stored(path: Path, file: str | Path | None) -> Loaded:
    """The config of a run, with the methods and arms of a Python file where one is given."""
    stored = read_config(path)
    values = {key: _tuples(value) for key, value in stored["config"].items()}
    if isinstance(values.get("evaluators"), str):
        values["evaluators"] = today(values["evaluators"])
    try:
        config = ConfigDict(values)
    except (ValueError, TypeError) as error:  # names that it keeps for itself
        raise UserError(f"{path} is not the config.json of a run: {' '.join(str(error).split())[:100]}") from None
    origin = stored.get("file")
    stated = frozenset(key for key in config if key not in KEYS or config[key] != KEYS[key].default)
    if file is None:
        return Loaded(config, {}, origin, {}, stated)
    _, methods, arms = _run(Path(file))
    return Loaded(config, methods, str(file), arms, stated)


def _foreign(config: ConfigDict) -> list[str]:
    """What the texts of a config call and the library does not have."""
    return [name for key in config if is_expression(config, key) for name in calls(config[key]) if name not in TABLE]


def _run(path: Path) -> tuple[Any, Table, Mapping[str, Mapping[str, str]]]:
    """What get_config() of a Python file returns (None: there is none), its methods() and its arms()."""
    folder = str(path.absolute().parent)
    sys.path.insert(0, folder)
    try:
        module = runpy.run_path(str(path))
        config = module["get_config"]() if "get_config" in module else None
        methods, arms = (dict(module[name]()) if name in module else {} for name in ("methods", "arms"))
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
    texts = lambda arm: isinstance(arm, Mapping) and all(isinstance(x, str) for pair in arm.items() for x in pair)
    if not all(isinstance(name, str) and texts(arm) for name, arm in arms.items()):
        raise UserError(f"{path}: arms() must return {{name: {{key: text}}}}, as --config.key=text gives them")
    return config, methods, arms


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
