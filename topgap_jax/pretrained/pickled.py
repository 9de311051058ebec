"""A pickle as a value, without running anything of it.

A pickle is a program. Its operations are read one by one (`pickletools.genops`) and carried out by a machine of our
own, on plain values: no name in it is imported, and what PyTorch would call is one of the few functions of `NAMES`,
which describe a tensor instead of making one. Any other name is refused where it is met. Objects that are no tensors
become `Opaque`, whatever is done to them.
"""

import pickletools
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

AXES = 8  # more than any layer's
DTYPES = {
    "FloatStorage": np.dtype("<f4"), "DoubleStorage": np.dtype("<f8"), "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16), "LongStorage": np.dtype("<i8"), "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"), "CharStorage": np.dtype("i1"), "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"), "ComplexFloatStorage": np.dtype("<c8"), "ComplexDoubleStorage": np.dtype("<c16"),
}  # fmt: skip


class Storage(NamedTuple):
    """Numbers in a row; several tensors may share them."""

    key: str
    dtype: np.dtype
    size: int


class Tensor(NamedTuple):
    """A tensor that has not been read: where it begins in its storage, its shape, its strides in numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype


class Opaque:
    """What is no tensor, text, number or container: an optimiser's state, an `argparse.Namespace`."""


class Refused(ValueError):
    """What is wrong with a file, in words that follow its name."""


def _storage(storages: dict[str, Storage], identity: Any) -> Storage:
    """The storage of a persistent id: ("storage", its type, key, device, numbers in it, and in old files a view)."""
    match identity:
        case ("storage", np.dtype() as dtype, str() as key, _, int() as size, *view) if size >= 0 and view in (
            [],
            [None],
        ):
            storage = Storage(key, dtype, size)
            if storages.setdefault(key, storage) != storage:
                raise Refused(f"storage '{key}' has two types or sizes")
            return storage
    raise Refused("its pickle names a storage in a way that PyTorch does not")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    """`torch._utils._rebuild_tensor_v2`, whose further arguments (gradient, hooks) say nothing of the numbers."""
    whole = lambda numbers: isinstance(numbers, tuple) and all(type(x) is int and 0 <= x < 2**62 for x in numbers)
    right = isinstance(storage, Storage) and whole((offset,)) and whole(shape) and whole(strides)
    if not right or len(shape) != len(strides) or len(shape) > AXES:
        raise Refused("a tensor's offset, shape or strides are not what they should be")
    if len(rest) > 2 and rest[2]:
        raise Refused("it holds a conjugated or negated view")
    numbers = int(np.prod(shape, dtype=object))
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides))
    if numbers and last >= storage.size:
        raise Refused(f"a tensor {shape} reaches beyond the {storage.size} numbers of its storage")
    if numbers >= 2**48:  # an expanded one: a few numbers, repeated by strides of 0
        raise Refused(f"a tensor {shape} is larger than any memory")
    return Tensor(storage, offset, shape, strides)


def _parameter(data: Any, *rest: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise Refused("a parameter is no tensor")
    return data


def _typed(function: Any = None, kind: Any = None, arguments: Any = None, *rest: Any) -> Tensor:
    """A tensor with attributes, or of a class of its own, such as a `torch.nn.Buffer`."""
    if function not in (_tensor, _parameter) or not isinstance(arguments, tuple) or not arguments:
        raise Refused("a tensor with attributes is not what it should be")
    return function(*arguments)


def _dict(*items: Any) -> dict:
    """`collections.OrderedDict()`, which old Pythons fill from a list of pairs."""
    pairs = items[0] if items else []
    if (
        len(items) > 1
        or not isinstance(pairs, list)
        or not all(isinstance(x, list | tuple) and len(x) == 2 for x in pairs)
    ):
        raise Refused("an OrderedDict is not what it should be")
    filled: dict = {}
    _fill(filled, [each for pair in pairs for each in pair])
    return filled


def _size(*sizes: Any) -> tuple:
    if len(sizes) != 1 or not isinstance(sizes[0], tuple | list):
        raise Refused("a torch.Size is not what it should be")
    return tuple(sizes[0])


def _opaque(*arguments: Any) -> Opaque:
    return Opaque()


NAMES: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "collections.OrderedDict": _dict,
    "torch.Size": _size,
    **{f"torch.{name}": dtype for name, dtype in DTYPES.items()},
    # What checkpoints carry beside the weights: data without a meaning here.
    **dict.fromkeys(
        (
            "argparse.Namespace", "types.SimpleNamespace", "collections.defaultdict", "collections.Counter",
            "collections.deque", "builtins.set", "builtins.bytearray", "builtins.slice", "builtins.complex",
            "builtins.dict", "builtins.list", "builtins.int", "builtins.float", "builtins.bool", "builtins.str",
            "pathlib.PosixPath",
            "pathlib.PurePosixPath", "pathlib.WindowsPath", "pathlib.Path", "datetime.datetime", "datetime.timedelta",
            "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.core.multiarray._reconstruct",
            "numpy._core.multiarray._reconstruct", "numpy.dtype", "numpy.ndarray", "_codecs.encode", "torch.device",
            "torch.float32", "torch.float64", "torch.float16", "torch.bfloat16", "torch.int64", "torch.int32",
            "torch.int16", "torch.int8", "torch.uint8", "torch.bool", "torch.complex64", "torch.complex128",
            "torch.float8_e4m3fn", "torch.float8_e5m2",
            "torch.serialization._get_layout", "torch.Tensor", "torch.nn.parameter.Buffer",
        ),
        _opaque,
    ),
}  # fmt: skip
"""What a pickle may name, and what stands for it: the type of a storage, or what is called in its place."""

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": Opaque}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip


def unpickled(file: BinaryIO, storages: dict[str, Storage] | None = None) -> Any:
    """The value of the pickle at the file's position, which ends behind it; its storages are noted in `storages`."""
    storages = {} if storages is None else storages
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}

    def top():
        nonlocal stack
        items, stack = stack, marks.pop()
        return items

    for operation, argument, _ in pickletools.genops(file):
        name = operation.name
        if name in LITERALS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name == "MARK":
            marks.append(stack)
            stack = []
        elif name in TUPLES:
            _enough(stack, TUPLES[name])
            stack[-TUPLES[name] :] = [tuple(stack[-TUPLES[name] :])]
        elif name == "TUPLE":
            items = top()
            stack.append(tuple(items))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            _enough(stack, 1)
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("APPENDS", "SETITEMS", "ADDITEMS"):
            items = top()
            _enough(stack, 1)
            _fill(stack[-1], items)
        elif name in ("APPEND", "SETITEM"):
            number = 1 if name == "APPEND" else 2
            _enough(stack, 1 + number)
            items = [stack.pop() for _ in range(number)][::-1]
            _fill(stack[-1], items)
        elif name == "FROZENSET":
            top()
            stack.append(Opaque())
        elif name == "GLOBAL":
            stack.append(_known(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            _enough(stack, 2)
            attribute, module = stack.pop(), stack.pop()
            stack.append(_known(f"{module}.{attribute}" if isinstance(module, str) else ""))
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            _enough(stack, 3 if name == "NEWOBJ_EX" else 2)
            words = stack.pop() if name == "NEWOBJ_EX" else None
            arguments, function = stack.pop(), stack.pop()
            if not callable(function) or not isinstance(arguments, tuple) or (words and function is not _opaque):
                raise Refused("its pickle calls what is no function")
            stack.append(function(*arguments))
        elif name == "BUILD":  # attributes: of a state_dict its _metadata, of an Opaque anything
            _enough(stack, 2)
            stack.pop()
        elif name == "BINPERSID":
            _enough(stack, 1)
            stack.append(_storage(storages, stack.pop()))
        elif name == "STOP":
            _enough(stack, 1)
            if marks or len(stack) != 1:
                raise Refused("its pickle ends in the middle")
            return stack[0]
        elif name not in ("PROTO", "FRAME"):
            raise Refused(f"its pickle holds the operation {name}, which PyTorch does not write")
    raise Refused("its pickle has no end")


def _known(name: str) -> Any:
    if name.startswith("__builtin__."):  # Python 2's, which PyTorch still writes
        name = name.replace("__builtin__", "builtins", 1)
    if name not in NAMES:
        raise Refused(
            f"its pickle names {name[:80]!r}, which no file of tensors needs, and nothing of it is run; in PyTorch,"
            " torch.save(model.state_dict(), FILE) writes one that can be read"
        )
    return NAMES[name]


def _fill(container: Any, items: list[Any]) -> None:
    """Append to a list, set in a dict; what an Opaque is given is dropped."""
    if isinstance(container, list):
        container.extend(items)
    elif isinstance(container, dict) and len(items) % 2 == 0:
        for key, value in zip(items[::2], items[1::2]):
            # Other keys (tuples may be nested as deep as the file is long) are never looked up.
            key = key if isinstance(key, str | int | float | bytes | None) else Opaque()
            if key in container:
                raise Refused(f"it holds {key!r:.80} twice")
            container[key] = value
    elif not isinstance(container, Opaque):
        raise Refused("its pickle fills what is no container")


def _enough(stack: list[Any], number: int) -> None:
    if len(stack) < number:
        raise Refused("its pickle takes from an empty stack")
