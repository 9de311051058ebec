"""A user's own pictures: a folder with one sub-folder per class, or any pictures without labels."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from topgap_jax.build import table
from topgap_jax.data.formats import SUFFIXES, check_ordinary, open_picture
from topgap_jax.data.source import Record, Source, Splits, slice_split
from topgap_jax.errors import UserError
from topgap_jax.progress import say

SPLIT = re.compile(r"(train(ing)?|val(id(ation)?)?|dev|test(ing)?|eval(uation)?)([^a-z].*)?", re.IGNORECASE)
"""What a folder of a split is called: train, val, test, test_shifted, val2017. Any other name is a class's."""
SHOWN = 5  # names in a message


class Listing(NamedTuple):
    """What a folder holds: {split: {class: files}}, how many things of each kind were skipped, and which."""

    splits: dict[str, dict[str, list[Path]]]
    skipped: Counter[tuple[str, str]]


def folder(path: str) -> Splits:
    """Pictures in `path/<split>/<class>/**`, or in `path/<class>/**` (the split is then called 'all').

    Below its class a picture may lie at any depth. Splits are the folders called train, val, test and the like
    (test_shifted, val2017); every class must be in every split. The classes are in alphabetical order. Within a split
    the pictures are in one fixed random order, so that 'all[:80%]' and 'all[80%:]' are fit for training and validation.
    What is skipped (empty classes, files of other kinds, pictures outside a class, hidden files) is said in one line.
    """
    root, shown = Path(path).expanduser(), f"folder('{path}')"
    if not root.is_dir():
        place = "" if root.is_absolute() else f" in {Path.cwd()}"
        raise UserError(f"{shown}: there is no such folder{place}")
    splits, skipped = _listing(root)
    line = _in_words(skipped)
    if not any(files for classes in splits.values() for files in classes.values()):
        raise UserError(
            f"{shown} holds no pictures in <class>/ or <split>/<class>/ ({', '.join(SUFFIXES)})"
            + (line and f"; {line}")
        )
    classes = _classes(splits, shown)
    if line:
        say(f"{shown}: {line}")
    files = {split: [(file, k) for k, name in enumerate(classes) for file in splits[split][name]] for split in splits}

    def source(split: str) -> Source:
        name = split.partition("[")[0]
        if "all" in splits and name in classes:
            raise UserError(
                f"{shown}: '{name}' is the folder of a class; it would be a split if it were called train, val or test,"
                " and held a folder for each class"
            )
        name, rows = slice_split(split, {key: len(each) for key, each in files.items()}, shown)
        order = np.random.default_rng(0).permutation(len(files[name]))[rows.start : rows.stop]
        pairs = [files[name][i] for i in order]

        def read(index: int) -> Record:
            file, label = pairs[index]
            return {"image": open_picture(file, str(file.relative_to(root))), "label": label, "name": file.name}

        return Source(shown, split, classes, len(pairs), read)

    return source


def pictures(path: str | Iterable[str]) -> Source:
    """Pictures without labels (label -1): a file, the files of a folder in alphabetical order, or a list of these."""
    files, skipped = [], Counter()
    paths = [path] if isinstance(path, (str, Path)) else list(path)
    for each in map(Path, paths):
        top = each.expanduser()
        if not top.exists():
            raise UserError(f"pictures: there is no file or folder {each}")
        if not top.is_dir():
            check_ordinary(top)
            files.append(top)
            continue
        inside, folders = _entries(top, skipped)
        if not inside:
            hint = f"; name one of its folders, such as {folders[0]}" if folders else ""
            raise UserError(f"pictures: folder {each} holds no picture ({', '.join(SUFFIXES)}){hint}")
        skipped.update({("folder", folder.name): 1 for folder in folders})
        files += inside
    shown = f"pictures('{', '.join(map(str, paths))}')"
    if skipped:
        say(f"{shown}: {_in_words(skipped)}")

    def read(index: int) -> Record:
        shown = "/".join(files[index].parts[-2:])
        return {"image": open_picture(files[index], shown), "label": -1, "name": files[index].name}

    return Source(shown, "all", (), len(files), read)


def _listing(root: Path) -> Listing:
    """The folder as splits and classes; where no folder has the name of a split, they are the classes of 'all'."""
    skipped: Counter[tuple[str, str]] = Counter()
    strays, tops = _entries(root, skipped)
    direct, inside = {}, {}  # of each top folder: its own pictures, and {sub-folder: the pictures below it}
    for top in tops:
        direct[top.name], folders = _entries(top, skipped)
        inside[top.name] = {each.name: _below(each, skipped) for each in folders}
    # A few pictures that lie beside the folders of the classes do not make a split a class.
    divided = {name for name, each in inside.items() if sum(map(len, each.values())) > len(direct[name])}
    named = {name for name in divided if SPLIT.fullmatch(name)}
    plain = [name for name in direct if direct[name] and name not in divided and not SPLIT.fullmatch(name)]
    if named and len(named) >= len(plain):  # among many classes, `train` is one of a vehicle
        splits = {name: inside[name] for name in inside if name in divided}
        strays += [file for files in direct.values() for file in files]
    else:
        splits = {"all": {name: direct[name] + [f for each in inside[name].values() for f in each] for name in direct}}
    skipped.update(("stray picture", file.name) for file in strays)
    filled = {name for classes in splits.values() for name, files in classes.items() if files}
    skipped.update(("empty class", name) for name in {name for each in splits.values() for name in each} - filled)
    return Listing(
        {split: {name: files for name, files in each.items() if files} for split, each in splits.items()}, skipped
    )


def _classes(splits: Mapping[str, Mapping[str, list[Path]]], shown: str) -> tuple[str, ...]:
    classes = sorted({name for each in splits.values() for name in each})
    for name in classes:
        there = [split for split, each in splits.items() if name in each]
        if len(there) < len(splits):
            without = [split for split in splits if split not in there]
            raise UserError(
                f"{shown}: only {_list(there)} {'has' if len(there) == 1 else 'have'} pictures of class '{name}', "
                f"{_list(without)} {'has' if len(without) == 1 else 'have'} none; every split needs every class: add "
                "pictures of it there, or move its folder away"
            )
    return tuple(classes)


def _below(top: Path, skipped: Counter, above: tuple[tuple[int, int], ...] = ()) -> list[Path]:
    """The pictures at any depth below a folder, in alphabetical order; a link to a folder above it is not followed."""
    about = top.stat()
    if (about.st_dev, about.st_ino) in above:
        return []
    files, folders = _entries(top, skipped)
    return files + [file for each in folders for file in _below(each, skipped, (*above, (about.st_dev, about.st_ino)))]


def _entries(top: Path, skipped: Counter) -> tuple[list[Path], list[Path]]:
    """The pictures and the folders in a folder, by name; what is neither is counted in `skipped`."""
    files, folders = [], []
    try:
        with os.scandir(top) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"folder '{top}' cannot be read: {error.strerror}") from None
    for entry in ordered:
        suffix = Path(entry.name).suffix.lower()
        if entry.name.startswith("."):
            skipped["hidden file", entry.name] += 1
        elif entry.is_dir():
            folders.append(Path(entry.path))
        elif suffix in SUFFIXES:
            if not entry.is_file():
                check_ordinary(Path(entry.path))
            files.append(Path(entry.path))
        else:
            skipped["file of another kind", suffix or entry.name] += 1
    return files, folders


def _in_words(skipped: Counter[tuple[str, str]]) -> str:
    """skipped 2 empty classes (bird, fish), 31 files of other kinds (.heic, .txt), 4 hidden files"""
    plurals = {
        "empty class": "empty classes", "folder": "folders", "stray picture": "pictures outside a class",
        "file of another kind": "files of other kinds", "hidden file": "hidden files",
    }  # fmt: skip
    parts = []
    for kind, plural in plurals.items():
        names = sorted(name for some, name in skipped if some == kind)
        count = sum(skipped[kind, name] for name in names)
        if count:
            word = plural if count > 1 else "picture outside a class" if kind == "stray picture" else kind
            parts.append(f"{count} {word}" + ("" if kind == "hidden file" else f" ({_list(names)})"))
    return f"skipped {', '.join(parts)}" if parts else ""


def _list(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


TABLE = table(folder)
