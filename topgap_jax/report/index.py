"""`sheets.json`: which contact sheets were drawn into a run's folder, so that one that is gone is missed."""

from pathlib import Path

from topgap_jax.errors import UserError
from topgap_jax.progress import say, write_text
from topgap_jax.stored import read_object, sealed

FOLDER, FILE = "sheets", "sheets.json"
"""Of a run, and in that folder."""


def note(path: Path) -> None:
    """Add a sheet that is written to the list beside it."""
    names = dict.fromkeys([*noted(path.parent), path.name])
    write_text(path.parent / FILE, sealed({"sheets": list(names)}))


def noted(folder: Path) -> list[str]:
    """The names of the sheets that were drawn into a folder; a list that is damaged is said, and begun anew."""
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        return read_object(path, "a list of sheets", {"sheets": [str]})["sheets"]
    except UserError as error:
        say(f"{error}; sheets that are gone are not missed")
        return []
