"""Files of tensors: .safetensors, .npz and PyTorch's own, read without running any code of theirs."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from topgap_jax.errors import UserError
from topgap_jax.pretrained import pth, saved
from topgap_jax.stored import opened_npz

PYTORCH = (".pth", ".pt", ".bin", ".th", ".tar", ".ckpt")
SUFFIXES = (".safetensors", ".npz", *PYTORCH)
FLOATS = tuple(map(np.dtype, ("float16", "float32", "float64", ml_dtypes.bfloat16)))
SAFETENSORS = {"F16": FLOATS[0], "F32": FLOATS[1], "F64": FLOATS[2], "BF16": FLOATS[3]}
COUNTERS = ("num_batches_tracked", "n_averaged")  # integers that say nothing of the network
# What wrappers put in front of every name: DataParallel, Lightning, torch.compile, and people's own modules.
PREFIXES = ("module.", "model.", "_orig_mod.", "backbone.", "state_dict.", "resnet.", "net.", "network.")
# Under which key a checkpoint keeps the network, the likeliest first; and what else in it holds tensors.
NETWORK = (
    "state_dict", "model_state_dict", "model", "net", "network", "last", "weights", "params", "state_dict_ema",
    "model_ema", "ema_state_dict", "ema",
)  # fmt: skip
TRAINING = ("optim", "sched", "scaler", "amp", "args", "hyper_parameters", "callbacks", "loops")
LARGEST = np.finfo(np.float32).max
REPEATED = 2**28  # numbers of tensors that repeat a few by strides of 0: 1 GB
DEPTH, NUMBER, LENGTH = 8, 100_000, 1000  # of nested dictionaries, of tensors, of a name's letters


class Description(NamedTuple):
    """A file's tensors by name, as shapes; its metadata; and what was changed in its names, in words."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()


class _Opened(NamedTuple):
    """A file of any format: the shape and the type (as a text where it is no float) of each tensor, and a reader."""

    tensors: dict[str, tuple[tuple[int, ...], Any]]
    read: Callable[[str], np.ndarray]
    metadata: Mapping[str, str] = {}
    notes: tuple[str, ...] = ()


def read(path: str | Path) -> Description:
    """Names and shapes of a file's tensors, its metadata, and notes on what was taken off its names.

    A prefix that all names share (`module.`, `model.`, ...) and counters (`num_batches_tracked`) are dropped; of a
    checkpoint it is the network's dictionary, not the optimiser's. Raises UserError, in one line, for a file that is
    not there, damaged, of another format, or that holds what weights cannot be: integers, complex numbers, texts, one
    name twice.
    """
    with _opened(path) as file:
        names, notes = _plain(path, file)
        return Description({name: file.tensors[names[name]][0] for name in names}, file.metadata, notes)


def tensors(path: str | Path) -> dict[str, np.ndarray]:
    """The file's tensors by the names that `read` gives, all of them finite; no variance is negative (UserError). A
    file that `save` wrote is compared with its checksum first."""
    with _opened(path) as file:
        saved.check(Path(path), file.metadata)
        arrays = {name: file.read(origin) for name, origin in _plain(path, file)[0].items()}
    check_values(path, arrays)
    return arrays


def check_values(where: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """UserError unless all numbers are finite, in float32 too, and no variance is negative."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"{where}: '{name}' holds numbers that are not finite")
        if array.dtype == np.float64 and array.size and abs(array).max() > LARGEST:
            raise UserError(f"{where}: '{name}' holds numbers that are too large for float32")
        if re.search(r"(^|[./])(running_)?var$", name) and (array < 0).any():
            raise UserError(f"{where}: '{name}' is negative, which no variance is")


@contextmanager
def _opened(path: str | Path) -> Iterator[_Opened]:
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: weights are read from {', '.join(SUFFIXES)} files, not from '{path.suffix}'")
    if not path.is_file():
        raise UserError(f"there is no weights file '{path}'")
    if path.suffix in PYTORCH:
        with pth.opened(path) as contents:
            yield _pytorch(path, contents)
        return
    kind = "safetensors file" if path.suffix == ".safetensors" else ".npz file of plain arrays"
    try:
        with _safetensors(path) if path.suffix == ".safetensors" else _npz(path) as file:
            yield file
    except UserError:
        raise
    except Exception as error:  # the formats' readers raise of every kind on damaged bytes
        raise UserError(f"{path} is not a readable {kind}: {_line(error)}") from None


@contextmanager
def _safetensors(path: Path) -> Iterator[_Opened]:
    with safetensors.safe_open(path, "np") as file:  # which checks the header, its size, and every tensor's place
        with open(path, "rb") as raw:
            header = raw.read(int.from_bytes(raw.read(8), "little"))
        json.loads(header, object_pairs_hook=lambda pairs: _once(key for key, _ in pairs))
        slices = {name: file.get_slice(name) for name in file.keys()}
        found = {
            name: (tuple(part.get_shape()), SAFETENSORS.get(part.get_dtype(), part.get_dtype()))
            for name, part in slices.items()
        }
        yield _Opened(found, file.get_tensor, file.metadata() or {})


@contextmanager
def _npz(path: Path) -> Iterator[_Opened]:
    with opened_npz(path) as arrays:
        found = {name: (shape, _kind(dtype)) for name, (shape, dtype) in arrays.about.items()}
        yield _Opened(found, lambda name: arrays.read(name).view(found[name][1]))


def _kind(dtype: np.dtype) -> Any:
    if dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None:  # how NumPy writes a type not its own
        return FLOATS[3]
    return dtype if dtype in FLOATS else str(dtype)


def _pytorch(path: Path, contents: pth.Contents) -> _Opened:
    """The network's dictionary in a checkpoint, nested ones with dots between their keys."""
    tree, notes = contents.tree, []
    for _ in range(DEPTH):
        inner = [key for key in NETWORK if isinstance(tree, dict) and isinstance(tree.get(key), dict)]
        inner = [key for key in inner if any(True for _ in _leaves(path, tree[key]))]
        if not inner:
            break
        notes.append(f"its network is '{inner[0]}'" + (f" (not {', '.join(inner[1:])})" if inner[1:] else ""))
        tree = tree[inner[0]]
    leaves = list(_leaves(path, tree))
    _once(name for name, _ in leaves)
    found = dict(leaves)
    if not found or "" in found:  # the name of a tensor that is the whole file
        raise UserError(
            f"{path} holds no tensors by name; in PyTorch, torch.save(model.state_dict(), FILE) writes them"
        )
    sizes = {name: math.prod(leaf.shape) for name, leaf in found.items()}
    repeated = {name: size for name, size in sizes.items() if size > found[name].storage.size}
    if sum(repeated.values()) > REPEATED:
        name = max(repeated, key=repeated.get)
        stored = found[name].storage.size
        raise UserError(f"{path}: '{name}' repeats {stored} numbers to {repeated[name]}, which no weights do")
    kinds = {
        name: (leaf.shape, leaf.dtype if leaf.dtype in FLOATS else str(leaf.dtype)) for name, leaf in found.items()
    }
    return _Opened(kinds, lambda name: contents.read(found[name]), {}, tuple(notes))


def _leaves(path: Path, tree: Any) -> Iterator[tuple[str, pth.Tensor]]:
    """(name, tensor) of nested dictionaries, without those of a training's state."""
    waiting, count = [("", tree, 0)], 0
    while waiting:
        name, value, depth = waiting.pop()
        count += 1
        if depth > DEPTH or count > NUMBER or len(name) > LENGTH:
            raise UserError(f"{path}: its dictionaries are nested too deep, or hold too much, for a file of weights")
        if isinstance(value, pth.Tensor):
            yield name, value
        elif isinstance(value, dict):
            keys = [key for key in value if isinstance(key, str | int)]
            keys = [key for key in keys if depth or not str(key).startswith(TRAINING)]
            waiting += [(f"{name}.{key}" if name else str(key), value[key], depth + 1) for key in reversed(keys)]


def _plain(path: str | Path, file: _Opened) -> tuple[dict[str, str], tuple[str, ...]]:
    """{name without prefixes: name in the file} of the tensors that are weights, and what was done, in words."""
    names = {name: name for name in file.tensors if not name.endswith(COUNTERS)}
    for name in names:
        kind = file.tensors[name][1]
        if not isinstance(kind, np.dtype):
            raise UserError(f"{path}: '{name}' is of type {kind}; weights are float16, bfloat16, float32 or float64")
    taken = ""
    while names and (shared := [prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in names)]):
        names = {name.removeprefix(shared[0]): origin for name, origin in names.items()}
        taken += shared[0]
    twice = [name for name in names for prefix in PREFIXES if prefix + name in names]
    if twice:
        other = next(prefix + twice[0] for prefix in PREFIXES if prefix + twice[0] in names)
        raise UserError(
            f"{path} holds both '{other}' and '{twice[0]}': which of them is the network's is not to be told"
        )
    return names, (*file.notes, *([f"'{taken}' was taken off its names"] if taken else []))


def _once(names: Iterable[str]) -> None:
    listed = set()
    for name in names:
        if name in listed:
            raise ValueError(f"'{name}' stands in it twice")
        listed.add(name)


def _line(error: BaseException) -> str:
    text = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
    return " ".join(text.split())[:300] or type(error).__name__
