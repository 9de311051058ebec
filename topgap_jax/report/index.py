"""`sheets.json`: which contact sheets were drawn into a run's folder, so that one that is gone or damaged is missed."""

from collections.abc import Iterator
from pathlib import Path

from topgap_jax.errors import UserError
from topgap_jax.progress import say, write_text
from topgap_jax.run import manifest
from topgap_jax.stored import read_object, sealed

FOLDER, FILE = "sheets", "sheets.json"
"""Of a run, and in that folder."""


def note(path: Path) -> None:
    """Add a sheet that is written to the list beside it, with the CRC-32 of its file: Pillow reads a PNG whose pixels
    have changed without a word."""
    write_text(path.parent / FILE, sealed({"sheets": {**noted(path.parent), path.name: manifest.checksum(path)}}))


def noted(folder: Path) -> dict[str, int]:
    """{name: CRC-32} of the sheets that were drawn into a folder; a list that is damaged is said, and begun anew."""
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        return read_object(path, "a list of sheets", {"sheets": {str: int}})["sheets"]
    except UserError as error:
        say(f"{error}; sheets that are gone or damaged are not missed")
        return {}


def faults(folder: Path) -> Iterator[str]:
    """What is wrong with the sheets of a folder: those that are gone, and those that are no longer what was drawn."""
    for name, expected in noted(folder).items():
        path = folder / name
        if path.parent != folder or not path.is_file():
            yield f"{FOLDER}/{name} is gone: topgap explain draws it again"
        elif manifest.checksum(path) != expected:
            yield f"{FOLDER}/{name} is damaged, or was changed: topgap explain draws another"
