"""Weights as files of ours: .safetensors with a checksum of all their bytes, compared when they are read."""

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from topgap_jax.errors import UserError
from topgap_jax.progress import write_text

KEY = "topgap_crc32"
"""Of the metadata: CRC-32 of the whole file, where its own eight digits are zeros."""
CHUNK = 2**18  # bytes: what the processor's cache holds


def write(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write the arrays and their checksum, whole or not at all. UserError: it cannot be written."""
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    data = save(arrays, {**metadata, KEY: "0" * 8})
    try:
        write_text(path, data.replace(_entry("0" * 8), _entry(f"{zlib.crc32(data):08x}"), 1))
    except OSError as error:
        raise UserError(f"cannot write the weights '{path}': {error.strerror}") from None


def check(path: Path, metadata: Mapping[str, str]) -> None:
    """UserError where the file is not what was written; nothing of a file without a checksum, as others write them."""
    if KEY not in metadata:
        return
    with path.open("rb") as file:
        size = file.read(8)
        header = size + file.read(int.from_bytes(size, "little"))
        checksum = zlib.crc32(header.replace(_entry(metadata[KEY]), _entry("0" * 8), 1))
        while chunk := file.read(CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    if f"{checksum:08x}" != metadata[KEY]:
        raise UserError(f"{path} is damaged: its checksum is {checksum:08x}, it was written with {metadata[KEY]}")


def _entry(digits: str) -> bytes:
    return f'"{KEY}":"{digits}"'.encode()
