"""XLA's foreign function interface in ctypes: a Python function as the target of custom calls, no compiler needed."""

import ctypes
import functools
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_int32, c_int64, c_size_t, c_void_p

import jax

VERIFIED = ("0.10.", "0.12.")
"""Lines of jaxlib whose interface was found to be the one below."""

KEPT: list = []
"""What C code has pointers to."""


class _Extension(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("type", c_int32), ("next", c_void_p)]


class _Version(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("start", c_void_p), ("major", c_int32), ("minor", c_int32)]


class _Metadata(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("version", _Version), ("traits", ctypes.c_uint32), ("state_type", c_int64)]


class _MetadataExtension(ctypes.Structure):
    _fields_ = [("base", _Extension), ("metadata", POINTER(_Metadata))]


class _Error(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("start", c_void_p), ("message", c_char_p), ("code", c_int32)]


_CreateError = ctypes.CFUNCTYPE(c_void_p, POINTER(_Error))


class _Api(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("start", c_void_p),
        ("version", _Version),
        ("internal", c_void_p),
        ("create_error", _CreateError),
    ]


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("start", c_void_p),
        ("dtype", c_int32),
        ("data", c_void_p),
        ("rank", c_int64),
        ("dims", POINTER(c_int64)),
    ]


class _Buffers(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("start", c_void_p),
        ("size", c_int64),
        ("types", c_void_p),
        ("values", POINTER(POINTER(_Buffer))),
    ]


class _Numbers(ctypes.Structure):
    _fields_ = [("dtype", c_int32), ("size", c_size_t), ("data", c_void_p)]


class _Attributes(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("start", c_void_p),
        ("size", c_int64),
        ("types", c_void_p),
        ("names", c_void_p),
        ("values", POINTER(POINTER(_Numbers))),
    ]


class _Frame(ctypes.Structure):
    """XLA_FFI_CallFrame of xla/ffi/api/c_api.h."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("extension", POINTER(_Extension)),
        ("api", POINTER(_Api)),
        ("context", c_void_p),
        ("stage", c_int32),
        ("operands", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    ]


_Handler = ctypes.CFUNCTYPE(c_void_p, POINTER(_Frame))


def register(target: str, run: Callable[[bytes, list[int]], None]) -> None:
    """Make `run(numbers, pointers)` what the custom call `target` does on a CPU.

    numbers: the bytes of the call's one attribute, int64; pointers: where its operands and its result lie.
    """
    handler = _Handler(functools.partial(_handle, target, run))
    KEPT.append(handler)
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu", api_version=1)


def _handle(target: str, run: Callable, pointer) -> int | None:
    """What XLA calls: NULL for success, else an error of XLA's. No exception may leave it."""
    try:
        frame = pointer.contents
        if frame.extension:  # XLA asks which version of its interface this is: the one that it speaks itself
            if frame.extension.contents.type == 1:
                metadata = ctypes.cast(frame.extension, POINTER(_MetadataExtension)).contents.metadata.contents
                metadata.version.major = frame.api.contents.version.major
                metadata.version.minor = frame.api.contents.version.minor
                metadata.traits, metadata.state_type = 0, 0
            return None
        operands = frame.operands
        pointers = [operands.values[i].contents.data for i in range(operands.size)]
        pointers.append(frame.results.values[0].contents.data)
        numbers = frame.attributes.values[0].contents
        run(ctypes.string_at(numbers.data, 8 * numbers.size), pointers)
        return None
    except BaseException as error:  # a KeyboardInterrupt too: what leaves a callback is lost, and the result with it
        message = f"{target}: {type(error).__name__}: {error}".encode()
        return pointer.contents.api.contents.create_error(byref(_Error(ctypes.sizeof(_Error), None, message, 13)))
