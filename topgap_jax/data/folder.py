"""A user's own pictures: a folder with one sub-folder per class, or any pictures without labels."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from topgap_jax.build import table
from topgap_jax.data.source import Record, Source, Splits, slice_split
from topgap_jax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def folder(path: str) -> Splits:
    """Pictures in `path/<split>/<class>/`, or in `path/<class>/` (the split is then called 'all').

    The classes are the sub-folders' names in alphabetical order, over all splits. Within a split the pictures are in
    one fixed random order, so that 'all[:80%]' and 'all[80%:]' are fit for training and validation.
    """
    root, shown = Path(path).expanduser(), f"folder('{path}')"
    if not root.is_dir():
        raise UserError(f"{shown}: there is no such folder")
    tops = _folders(root)
    splits = {"all": root} if any(_pictures(top) for top in tops) else {top.name: top for top in tops if _folders(top)}
    files = {split: [file for each in _folders(top) for file in _pictures(each)] for split, top in splits.items()}
    if not any(files.values()):
        raise UserError(f"{shown} holds no pictures in <class>/ or <split>/<class>/ ({', '.join(SUFFIXES)})")
    classes = tuple(sorted({file.parent.name for each in files.values() for file in each}))

    def source(split: str) -> Source:
        name, rows = slice_split(split, {key: len(each) for key, each in files.items()}, shown)
        order = np.random.default_rng(0).permutation(len(files[name]))[rows.start : rows.stop]
        chosen = [files[name][i] for i in order]

        def read(index: int) -> Record:
            file = chosen[index]
            return {"image": open_picture(file), "label": classes.index(file.parent.name), "name": file.name}

        return Source(shown, split, classes, len(chosen), read)

    return source


def pictures(path: str | Iterable[str]) -> Source:
    """Pictures without labels (label -1): a file, the files of a folder in alphabetical order, or a list of these."""
    files = []
    paths = [path] if isinstance(path, (str, Path)) else list(path)
    for each in map(Path, paths):
        if not each.expanduser().exists():
            raise UserError(f"pictures: there is no file or folder {each}")
        found = _pictures(each.expanduser()) if each.expanduser().is_dir() else [each.expanduser()]
        if not found:
            raise UserError(f"pictures: folder {each} holds no picture ({', '.join(SUFFIXES)})")
        files += found

    def read(index: int) -> Record:
        return {"image": open_picture(files[index]), "label": -1, "name": files[index].name}

    return Source(f"pictures('{', '.join(map(str, paths))}')", "all", (), len(files), read)


def open_picture(file: Path) -> np.ndarray:
    """A picture as (h, w, 3) uint8 RGB, turned the way its EXIF orientation says."""
    try:
        with Image.open(file) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:  # what Pillow raises on broken files
        raise UserError(f"{file.name} cannot be decoded: {error}") from error


def _folders(top: Path) -> list[Path]:
    return sorted(each for each in top.iterdir() if each.is_dir() and not each.name.startswith("."))


def _pictures(top: Path) -> list[Path]:
    return sorted(each for each in top.iterdir() if each.suffix.lower() in SUFFIXES and not each.name.startswith("."))


TABLE = table(folder)
