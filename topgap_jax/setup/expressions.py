"""What the texts of a config mean: lists are divided, and each expression is built when it is asked for."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from topgap_jax.build import LONGEST, build, did_you_mean, names
from topgap_jax.errors import UserError
from topgap_jax.setup.config import KEYS, Role, is_expression
from topgap_jax.setup.tables import ROOMS, TABLE, VALUES
from topgap_jax.types import Table


def choice(config: ConfigDict, key: str, methods: Table, **context: Any) -> Any:
    """The value of the config's expression `key`.

    context: what the run knows beside the config, such as classes; a function stands for what it returns, and is called
    if a text names it.
    """
    return _Reader(config, methods, context).key(key)


def choices(
    config: ConfigDict, key: str, methods: Table, text: str | None = None, argument: str = "", **context: Any
) -> dict[str, Any]:
    """{text: value} of the config's list `key`, or of `text`, which the command line's `argument` gives instead."""
    reader, where = _Reader(config, methods, context), f"config.{key}" if text is None else argument
    parts = split_list(config[key] if text is None else text)
    return {part: reader.text(part, where, KEYS[key].role, (key,) if text is None else ()) for part in parts}


def reads(config: Mapping[str, Any], text: str) -> set[str]:
    """The keys that the value of an expression depends on, those behind other keys included."""
    read: set[str] = set()
    waiting = [text]
    while waiting:
        for key in names(waiting.pop()):
            if key in config and key not in read:
                read.add(key)
                waiting += [config[key]] if is_expression(config, key) else []
    return read


def split_list(text: str) -> list[str]:
    """The parts of a list at its top-level commas.

    >>> split_list("accuracy(), robust(pgd(linf(eps), steps=20))")
    ['accuracy()', 'robust(pgd(linf(eps), steps=20))']
    """
    if len(text) > LONGEST:
        raise UserError(f"a list of {len(text):,} characters: at most {LONGEST:,} are read")
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


class _Reader:
    """Builds the texts of a config, each key once."""

    def __init__(self, config: Mapping[str, Any], methods: Table, context: Mapping[str, Any]):
        self.config, self.context, self.table = config, context, {**TABLE, **methods}
        self.methods, self.built = methods, {}

    def key(self, key: str, path: tuple[str, ...] = ()) -> Any:
        """What a text means by the name `key`; path: the keys whose texts led here."""
        if key in path:
            around = " -> ".join([*path[path.index(key) :], key])
            raise UserError(f"config.{key} needs its own value: {around}; give one of these another text")
        if not is_expression(self.config, key):
            return self.config[key]
        if key not in self.built:
            role = KEYS[key].role if key in KEYS and KEYS[key].kind == "an expression" else None
            self.built[key] = self.text(self.config[key], f"config.{key}", role, (*path, key))
        return self.built[key]

    def text(self, text: str, where: str, role: Role | None, path: tuple[str, ...]) -> Any:
        """The value of `text`, checked to be what `role` says."""
        self._check_call(text, where, role)
        values = {name: self.key(name, path) for name in names(text) if name in self.config}
        values |= {name: self.context[name]() for name in names(text) if callable(self.context.get(name))}
        # The other keys only stand there to be proposed where a name is misspelt.
        value = build(text, self.table, {**VALUES, **self.context, **dict.fromkeys(self.config), **values}, where)
        if role and not role.fits(value):
            kind = type(value).__name__
            raise UserError(
                f"{where}: '{text}' is not {role.words}, it is of type {kind}; 'topgap help' lists {role.room}"
            )
        return value

    def _check_call(self, text, where, role):
        """A function of another room is told in the words of the key, not in those of a type."""
        name, call, _ = text.partition("(")
        name = name.strip()
        if role and call and name.isidentifier() and name not in (choices := [*ROOMS[role.room], *self.methods]):
            hint = did_you_mean(name, choices, n=1)
            raise UserError(f"{where}: '{name}' is not {role.words}; {hint}choose from {', '.join(sorted(choices))}")
