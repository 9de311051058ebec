"""PyTorch's own files (.pth, .pt, .bin, ...), of both forms, read without running anything of them.

The zip form holds NAME/data.pkl and one member NAME/data/KEY a storage. The legacy form is a stream of five pickles
(magic number, protocol, system, the object, the keys of its storages), and then each storage behind its size. Pickles
are read by `pickled`.
"""

import io
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from topgap_jax.errors import UserError
from topgap_jax.pretrained.pickled import Refused, Storage, Tensor, unpickled

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


class Contents(NamedTuple):
    """What a file holds: dicts, lists, tuples, texts, numbers, `Tensor` and `Opaque`; and what reads a tensor."""

    tree: Any
    read: Callable[[Tensor], np.ndarray]


@contextmanager
def opened(path: Path) -> Iterator[Contents]:
    """The contents of a file that PyTorch wrote. Raises UserError, in one line, for any other."""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
            file.seek(0)
            if start == b"PK\x03\x04":
                with zipfile.ZipFile(file) as archive:
                    yield _zip(archive)
            else:
                yield _legacy(file)
    except UserError:
        raise
    except Exception as error:  # zipfile, genops and NumPy raise of every kind on damaged bytes
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{path} is not read as a file of PyTorch's: {reason}") from None


def _zip(archive: zipfile.ZipFile) -> Contents:
    members = archive.infolist()
    names = [member.filename for member in members]
    if len(set(names)) < len(names):
        raise Refused("two members of its zip have one name")
    packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
    if packed:  # also: then no member can be larger than the file
        raise Refused(f"'{packed[0]}' is compressed, which PyTorch never does")
    if sum(member.file_size for member in members) > archive.fp.seek(0, io.SEEK_END):
        raise Refused("the members of its zip overlap")
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise Refused("its zip holds no single NAME/data.pkl")
    root, sizes = roots[0], dict(zip(names, (member.file_size for member in members)))
    if sizes.get(f"{root}byteorder") and archive.read(f"{root}byteorder") != b"little":
        raise Refused("it is of a big-endian machine")
    tree = unpickled(io.BytesIO(archive.read(f"{root}data.pkl")))

    def stored(storage):
        name = f"{root}data/{storage.key}"
        if sizes.get(name) != storage.size * storage.dtype.itemsize:
            raise Refused(f"storage '{storage.key}' has not the {storage.size} numbers that it should have")
        return archive.read(name)

    return Contents(tree, _reader(stored))


def _legacy(file: BinaryIO) -> Contents:
    try:
        magic = unpickled(file)
    except Exception as error:
        raise Refused("it is neither of its zip form nor of its legacy form") from error
    if magic != MAGIC or unpickled(file) != PROTOCOL:
        raise Refused("it is neither of its zip form nor of its legacy form")
    system = unpickled(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("it is not of a little-endian machine")
    storages: dict[str, Storage] = {}
    tree = unpickled(file, storages)
    keys = unpickled(file)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or {*keys} != {*storages}:
        raise Refused("its list of storages is not that of its tensors")
    places = {}
    for key in keys:
        size = int.from_bytes(file.read(8), "little", signed=True)
        if size != storages[key].size:
            raise Refused(f"storage '{key}' has not the {storages[key].size} numbers that it should have")
        places[key] = file.tell()
        file.seek(size * storages[key].dtype.itemsize, io.SEEK_CUR)
    end = file.tell()
    if file.seek(0, io.SEEK_END) < end:
        raise Refused("it is cut off")

    def stored(storage):
        file.seek(places[storage.key])
        return file.read(storage.size * storage.dtype.itemsize)

    return Contents(tree, _reader(stored))


def _reader(stored: Callable[[Storage], bytes]) -> Callable[[Tensor], np.ndarray]:
    """Tensor -> a read-only array (a view where storages are shared, as PyTorch's is), each storage read once."""
    read: dict[str, np.ndarray] = {}

    def array(tensor):
        storage = tensor.storage
        if storage.key not in read:
            read[storage.key] = np.frombuffer(stored(storage), storage.dtype)
        if 0 in tensor.shape:
            return np.zeros(tensor.shape, storage.dtype)
        strides = [stride * storage.dtype.itemsize for stride in tensor.strides]
        numbers = read[storage.key][tensor.offset :]
        return np.lib.stride_tricks.as_strided(numbers, tensor.shape, strides, writeable=False)

    return array
