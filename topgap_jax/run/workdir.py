"""The folder of a run: it belongs to one config, and says with which versions and on what it was made."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from topgap_jax.errors import UserError
from topgap_jax.progress import write_text
from topgap_jax.run.provenance import provenance


def claim(workdir: Path, config: Mapping[str, Any], file: str | Path | None = None) -> None:
    """Make the folder and write config.json: {"config", "file"}; `file` is the Python file that the config came from.

    A folder that holds a run with another config raises a UserError that names the first key that differs.
    """
    path = Path(workdir) / "config.json"
    plain = json.loads(json.dumps(config, default=dict))  # tuples become lists, a ConfigDict a dict
    if path.is_file():
        _compare(path, plain)
        return
    if jax.process_index() != 0:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = {"config": plain, "file": None if file is None else str(Path(file).absolute())}
        write_text(path, json.dumps(stored, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write in the workdir '{workdir}': {error.strerror}") from None


def record_versions(workdir: Path, mesh: Mesh) -> None:
    """Write versions.json: what this start of the run was made with (`provenance`), and on how many devices."""
    if jax.process_index() == 0:
        about = {**provenance(), "mesh_devices": mesh.size, "processes": jax.process_count()}
        write_text(Path(workdir) / "versions.json", json.dumps(about, indent=1) + "\n")


def _compare(path: Path, config: dict[str, Any]) -> None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not the config of a run; take another workdir, or move that file away") from None
    for key in [*stored, *config]:
        if stored.get(key, "absent") != config.get(key, "absent"):
            there, here = (repr(values[key]) if key in values else "absent" for values in (stored, config))
            raise UserError(
                f"'{path.parent}' holds a run with another config: {key} is {there} there and {here} here; take another workdir"
            )
