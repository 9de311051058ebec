"""Files that a run keeps, which a stranger may have written: JSON that is read whole, checked against a schema, or
refused in a line; and .npz archives that run no code and unpack to no gigabytes."""

import json
import math
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from topgap_jax.errors import UserError

LARGEST = 64 * 2**20  # bytes, far more than a run's files have
NUMBER = (int, float)
CHECKSUM = "crc32"  # the last key of what we write: one flipped bit makes another number of a number
LARGE, DENSEST = 2**28, 20
"""Bytes up to which any .npz is unpacked, and how many times its own size a larger one may become."""
PLAIN = (str, int, float, bool, None, ["PLAIN"], {str: "PLAIN"})
"""What a config may hold: texts, numbers, and lists and tables of these."""


def read_object(path: Path, what: str, schema: Mapping) -> dict[str, Any]:
    """The JSON object in a file that fits the schema, and its checksum where it has one, which is left out; UserError
    "PATH is not WHAT: ..." for anything else.

    schema: {"key": schema, "key?": schema} (the second may be absent, other keys are allowed), {str: schema} (any
    keys), [schema] (a list), a tuple of schemas (any of them), a type, None, or "PLAIN". A bool is no number, a number
    is finite, and no text holds half a character (a lone surrogate, which no file can hold).
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise ValueError(f"it has more than {LARGEST // 2**20} MB")
        value = json.loads(data.decode("utf-8"), parse_constant=lambda _: None)  # NaN and infinity say nothing
        wrong = mismatch(value, schema) or _changed(value)
    except (OSError, ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:100]
        raise UserError(f"{path} is not {what}: {why}") from None
    if wrong:
        raise UserError(f"{path} is not {what}: {wrong}")
    return value


def sealed(value: Mapping[str, Any]) -> str:
    """A JSON object as the text of a file, with a checksum of what it holds."""
    plain = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps({**value, CHECKSUM: checksum(plain)}, indent=1) + "\n"


def checksum(value: Mapping[str, Any]) -> str:
    """Of a JSON object, eight hexadecimal digits, whatever the order and the spaces of its text.

    >>> checksum({"b": 1, "a": [0.5]}) == checksum({"a": [0.5], "b": 1})
    True
    """
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def _changed(value: dict[str, Any]) -> str:
    said = value.pop(CHECKSUM, None)
    if said is None or said == checksum(value):
        return ""
    return f"it does not hold what was written; it is damaged, or edited (then take its '{CHECKSUM}' out)"


def files_inside(folder: Path, pattern: str) -> list[Path]:
    """The files of a run's folder that match, by name; UserError for a link that leads out of the folder: what it
    shows is not the run's."""
    files = sorted(folder.glob(pattern))
    for path in files:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path} is a link to {path.resolve()}, outside the run; put a copy there, or remove it")
    return files


def mismatch(value: Any, schema: Any, at: str = "") -> str:
    """Where and how a value does not fit a schema, "" if it does.

    >>> mismatch({"a": [1, "x"]}, {"a": [(int, float)]})
    "a[1] is 'x', not a number"
    """
    schema = PLAIN if schema == "PLAIN" else schema
    if isinstance(schema, tuple):
        alike = [each for each in schema if isinstance(each, list | dict) and type(value) is type(each)]
        if len(alike) == 1:  # asked once: asking twice a level takes for ever in a deep tree
            return mismatch(value, alike[0], at)
        if any(not mismatch(value, each, at) for each in schema):
            return ""
        return mismatch(value, alike[0], at) if alike else _not(value, schema, at)
    if isinstance(schema, list):
        if not isinstance(value, list):
            return _not(value, schema, at)
        return next((wrong for i, each in enumerate(value) if (wrong := mismatch(each, schema[0], f"{at}[{i}]"))), "")
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return _not(value, schema, at)
        inside = lambda key: f"{at}.{key}"[:80] if at else f"{key}"[:80]
        if str in schema:
            texts = (wrong for key in value if (wrong := mismatch(key, str, inside(key))))
            items = (wrong for key, each in value.items() if (wrong := mismatch(each, schema[str], inside(key))))
            return next(texts, "") or next(items, "")
        for name, each in schema.items():
            key = name.removesuffix("?")
            if key not in value and name == key:
                return f"{inside(key)} is missing"
            if key in value and (wrong := mismatch(value[key], each, inside(key))):
                return wrong
        return ""
    fits = value is None if schema is None else type(value) is schema
    if fits and isinstance(value, float):
        fits = math.isfinite(value)
    if fits and isinstance(value, int) and not isinstance(value, bool):
        fits = abs(value) < 2**63
    if fits and isinstance(value, str):
        fits = not any("\ud800" <= letter <= "\udfff" for letter in value)
    return "" if fits else _not(value, schema, at)


WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", None: "null"}


def _not(value, schema, at):
    several = schema if isinstance(schema, tuple) else (schema,)
    words = {float: "a number"} if float in several else {}
    kinds = [
        "a list" if isinstance(each, list) else "an object" if isinstance(each, dict) else WORDS[each]
        for each in several
        if not (each is int and words)
    ]
    shown = ascii(value)
    shown = shown if len(shown) < 60 else f"{shown[:50]}..."
    return f"{at or 'the whole'} is {shown}, not {' or '.join(dict.fromkeys(kinds))}"


class Arrays(NamedTuple):
    """An .npz archive: shape and type of each array by its name, and what reads one."""

    about: dict[str, tuple[tuple[int, ...], np.dtype]]
    read: Callable[[str], np.ndarray]


@contextmanager
def opened_npz(path: Path) -> Iterator[Arrays]:
    """The arrays of an archive, each read when it is asked for.

    ValueError for one that holds objects, a name twice, or arrays of other sizes than they claim; of what is no archive
    zipfile, zlib and NumPy raise of every kind.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.namelist()
        if len(set(members)) < len(members):
            raise ValueError(f"'{next(name for name in members if members.count(name) > 1)}' stands in it twice")
        size = sum(member.file_size for member in archive.infolist())
        if size > max(LARGE, DENSEST * path.stat().st_size):
            raise ValueError(f"{path.stat().st_size:,} bytes become {size:,}: no weights are packed so densely")
        names = {name.removesuffix(".npy"): name for name in members}

        def read(name):
            with archive.open(names[name]) as member:
                return _quietly(lambda: np.lib.format.read_array(member, allow_pickle=False))

        yield Arrays({name: _npy_header(archive, member) for name, member in names.items()}, read)


def _npy_header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array, once it is seen that the member holds as many bytes as they claim."""
    with archive.open(name) as member:
        version = np.lib.format.read_magic(member)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in reader:
            raise ValueError(f"'{name}' is of version {version}")
        shape, _, dtype = _quietly(lambda: reader[version](member))
        if dtype.hasobject:
            raise ValueError("Object arrays cannot be loaded without running code")
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if min(shape, default=0) < 0 or member.tell() + size != archive.getinfo(name).file_size:
            raise ValueError(f"'{name}' claims {size} bytes, and has {archive.getinfo(name).file_size}")
    return shape, dtype


def _quietly(read: Callable[[], Any]) -> Any:
    """Python and NumPy warn of what they meet in a header, on the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read()
