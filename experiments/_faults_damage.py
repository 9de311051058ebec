"""Damage to each kind of file of a run folder: one bit flipped, the end cut off, the file gone; and what its reader
says of it.

Read in one process, thousands of times; `faults.py` has some of them read by whole commands too.
"""

import contextlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
from _faults_process import LINE, SAME

from topgap_jax.errors import UserError
from topgap_jax.measure import results
from topgap_jax.report import attacked, index
from topgap_jax.report.page import embedded
from topgap_jax.report.read import read_run
from topgap_jax.run import checkpoint, manifest, workdir

SILENT = "silent difference"


class Kind(NamedTuple):
    """A kind of file: those of a run folder that are of it, and what reads one, as something that can be compared."""

    pattern: str
    read: Callable[[Path], Any]


def of_checkpoint(path: Path) -> Any:
    """All numbers of the checkpoint that the file is of; its manifest is compared first, as `restore` does."""
    folder = next(each for each in path.parents if each.name.isdecimal())
    if reason := manifest.damage(folder):
        raise UserError(f"the checkpoint {folder} is damaged: {reason}")
    if not manifest.is_there(folder):
        raise UserError(f"{folder} has no {manifest.FILE}: it is read unchecked")
    import jax

    trees = [checkpoint.tree(folder / name) for name in ("variables", "optimizer") if (folder / name).is_dir()]
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trees)], (folder / "meta" / "metadata").read_bytes()


def there(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"there is no {path}")
    return path


def of_metrics(path: Path) -> Any:
    return read_run(path.parent, "run").metrics


def of_evaluation(path: Path) -> Any:
    evaluation = results.read(there(path))
    return json.dumps([results.to_json(row) for row in evaluation.rows]), evaluation[1:]


def of_picture(path: Path) -> Any:
    """What stands on the page; what is damaged is said there, with the file's name."""
    wrong = list(index.faults(there(path).parent))
    if wrong or embedded(path) is None:
        raise UserError("; ".join(wrong) or f"{path} cannot be read as a picture")
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def of_adversarial(path: Path) -> Any:
    examples = attacked.read(path)
    if examples is None:
        return None
    return [each.tobytes() if isinstance(each, np.ndarray) else each for each in examples]


KINDS = {
    "checkpoint": Kind("checkpoints/*/*/**/*", of_checkpoint),
    "config.json": Kind("config.json", lambda path: workdir.read_config(path)),
    "evaluation.json": Kind("evaluation.json", of_evaluation),
    "metrics.jsonl": Kind("metrics.jsonl", of_metrics),
    "versions.json": Kind("versions.json", lambda path: workdir.read_versions(path)),
    "adversarial images": Kind("adversarial/*.npz", of_adversarial),
    "sheets": Kind("sheets/*.png", of_picture),
    "sheets.json": Kind("sheets/sheets.json", lambda path: index.noted(there(path).parent)),
}


def flipped(content: bytes, draw: Random) -> bytes:
    place, data = draw.randrange(8 * len(content)), bytearray(content)
    data[place // 8] ^= 1 << place % 8
    return bytes(data)


def cut(content: bytes, draw: Random) -> bytes:
    return content[: draw.randrange(len(content))]


def gone(content: bytes, draw: Random) -> None:
    return None


DAMAGES: dict[str, Callable[[bytes, Random], bytes | None]] = {
    "flipped bit": flipped,
    "truncation": cut,
    "deletion": gone,
}


def files(kind: str, folder: Path) -> list[Path]:
    """The files of a run folder that are of a kind, and not empty."""
    return [path for path in sorted(folder.glob(KINDS[kind].pattern)) if path.is_file() and path.stat().st_size]


def damages(kind: str, damage: str, number: int, folder: Path, work: Path) -> Iterator[tuple[str, str]]:
    """(verdict, what was said or what was damaged) of so many damages to copies of one kind's files of the run."""
    copy = work / "damaged"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    of_kind = KINDS[kind]
    paths = files(kind, copy)
    draw = Random(f"{kind} {damage}")
    whole: dict[Path, Any] = {}
    for turn in range(number if paths else 0):
        path = paths[turn % len(paths)] if damage == "deletion" else draw.choice(paths)
        content = path.read_bytes()
        key = next(each for each in path.parents if each.name.isdecimal()) if kind == "checkpoint" else path
        if key not in whole:
            whole[key] = of_kind.read(path)
        changed = DAMAGES[damage](content, draw)
        if changed is None:
            path.unlink()
        else:
            path.write_bytes(changed)
        yield _read(of_kind, path, whole[key])
        path.write_bytes(content)


def _read(of_kind: Kind, path: Path, whole: Any) -> tuple[str, str]:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found = of_kind.read(path)
    except UserError as error:
        return LINE, " ".join(str(error).split())[:200]
    except Exception as error:
        return "traceback", f"{path.name}: {type(error).__name__}: {' '.join(str(error).split())[:150]}"
    if _known(found, whole) == whole:
        return SAME, ""
    line = said.getvalue().strip()
    return (LINE, line[:200]) if line else (SILENT, path.name)


def _known(found: Any, whole: Any) -> Any:
    """What was found without keys that nobody reads: those that an undamaged file does not have."""
    if isinstance(found, dict) and isinstance(whole, dict):
        return {key: value for key, value in found.items() if key in whole}
    if isinstance(found, list) and isinstance(whole, list):
        return [_known(*each) for each in zip(found, whole)] + found[len(whole) :]
    return found


def tally(kind: str, damage: str, number: int, folder: Path, work: Path) -> dict[str, Any]:
    """{"verdicts": {verdict: how many}, "examples": {verdict: the first two of what was said}}."""
    verdicts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for verdict, words in damages(kind, damage, number, folder, work):
        verdicts[verdict] += 1
        if len(examples.setdefault(verdict, [])) < 2:
            examples[verdict].append(words)
    return {"verdicts": dict(verdicts), "examples": examples}
