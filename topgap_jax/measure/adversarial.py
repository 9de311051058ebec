"""Adversarial images that stay: all of them in one file (`--save`), and a few in a run's folder for the report."""

import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from topgap_jax.errors import UserError
from topgap_jax.progress import writing

FOLDER = "adversarial"
"""In the folder of a run, with a file for each robust evaluator and split."""
PICTURES = 24  # images of a split, evenly spaced, of which the report shows those that broke


class Kept:
    """Images (m, h, w, c) of the examples `ids` (m,), in ascending order; of a `few` of them also the `clean` ones.

    With a path they lie in that file, where a killed evaluation finds them again: `complete` says so.
    """

    def __init__(self, path: Path | None, ids: np.ndarray, few: np.ndarray, clean: np.ndarray, resumes: bool = False):
        self.path, self.ids, self.few, self.clean = path, ids, few, clean
        shape = (len(ids), *clean.shape[1:])
        self.images = _mapped(path, shape) if path is not None and resumes else None
        self.complete = self.images is not None
        if self.complete:
            return
        if path is not None:
            self.images = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
            _reserve(path)
        else:
            self.images = np.zeros(shape, np.float32)

    def put(self, ids: np.ndarray, images: np.ndarray) -> None:
        """Keep the images (k, h, w, c) of the examples ids (k,), as far as these are kept."""
        there = np.isin(ids, self.ids)
        self.images[np.searchsorted(self.ids, ids[there])] = images[there]
        if self.path is not None:
            self.images.flush()

    def remove(self) -> None:
        """End the file."""
        if self.path is not None:
            self.images = None
            self.path.unlink(missing_ok=True)


def _reserve(path: Path) -> None:
    """Take a file's bytes on the disk now: of one that is full when a page of it is written the system kills us."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with path.open("r+b") as file, writing(path):
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError:
        path.unlink()
        raise


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The images in a file; None where it is not there, or holds something else."""
    try:
        images = np.lib.format.open_memmap(path, mode="r+")
    except Exception:  # NumPy raises of every kind on damaged bytes
        return None
    return images if images.shape == shape and images.dtype == np.float32 else None


def file_name(split: str, evaluator: str) -> str:
    """The file of an evaluator on a split: the longer ones of two that begin alike have a digest too.

    >>> file_name("test[:100]", "robust(pgd(linf(8/255)))")
    'test_100_robust_pgd_linf_8_255.npz'
    >>> file_name("test", "robust(pgd(linf(.5/255)))")
    'test_robust_pgd_linf_.5_255.npz'
    """
    text = f"{split} {evaluator}"
    name = re.sub(r"[^\w.-]+", "_", text).strip("_")  # .5/255 and 5/255 are two
    return f"{name}.npz" if len(name) <= 120 else f"{name[:110]}_{zlib.crc32(text.encode()):08x}.npz"


def save(
    path: Path,
    ids: np.ndarray,
    images: np.ndarray,
    examples: Any,
    attacks: Sequence[str],
    **about: str | np.ndarray,
) -> None:
    """Write an .npz of the examples ids (m,): `id`, `adversarial` (m, h, w, c), the clean image where one stands, their
    columns of `measure.robust.Examples`, the names of the `attacks`, and what `about` says. UserError: it cannot be
    written."""
    columns = {name: values[ids] for name, values in examples._asdict().items()}
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, id=ids, adversarial=images, attacks=np.array(attacks), **columns, **about)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write the adversarial images '{path}': {error.strerror}") from None
