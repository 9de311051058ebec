"""oneDNN's convolutions as custom calls of XLA: whether there is a library that works, and the call.

A call names its kind, its geometry, what is fused with it and the sizes of its buffers in the numbers of one attribute.
"""

import atexit
import contextlib
import functools
import importlib.metadata
import logging
import os
import platform
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import jaxlib
import numpy as np

from topgap_jax.engine import interface
from topgap_jax.engine.library import (
    FORWARD,
    INPUT_GRADIENT,
    NOTHING,
    STORED,
    WEIGHT_GRADIENT,
    Fused,
    Geometry,
    Library,
)

TARGET = "topgap_onednn"

log = logging.getLogger(__name__)

ONCE = threading.RLock()
KEPT: list = []
"""The library in use."""


def available() -> bool:
    """Whether convolutions go to oneDNN on this machine."""
    return not reason()


def reason() -> str:
    """Why oneDNN is not used, or "" where it is; found out once, and then said in one line of the log."""
    with ONCE:  # two threads at once would load it twice
        return _reason()


@functools.cache
def _reason() -> str:
    try:
        why = _start()
    except Exception as error:  # whatever is wrong with a library that somebody installed, this one goes on without it
        why = f"{type(error).__name__}: {error}"
    log.info(_line(why))
    return why


def status() -> str:
    """Which convolutions this machine has, as one line for the log. Starts JAX's backend."""
    return _line(reason())


def _line(why: str) -> str:
    return f"convolutions: XLA's, not oneDNN's ({why})" if why else "convolutions: oneDNN's"


def call(
    kind: int,
    operands: Sequence[jax.Array],
    shape: Sequence[int],
    geometry: Geometry,
    fused: Fused = NOTHING,
) -> jax.Array:
    """The custom call: (x, w), (dy, w) or (x, dy) and what is fused with it, float32; `shape` is the result's."""
    sizes = [size for buffer in (*(x.shape for x in operands), shape) for size in buffer]
    steps = (*geometry.strides, *geometry.pads[0], *geometry.pads[1], geometry.groups, *geometry.dilation)
    numbers = np.array([kind, *steps, *fused.numbers, *sizes], np.int64)
    return jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(shape, np.float32))(*operands, call=numbers)


def stored(x: jax.Array) -> jax.Array:
    """The custom call that does nothing: x itself, whose producers XLA does not compute again behind it."""
    return jax.ffi.ffi_call(TARGET, jax.typeof(x), input_output_aliases={0: 0})(x, call=STORED)


def found() -> bool:
    """Whether the library seems to be there and meant for this machine, found out without loading it or starting
    JAX."""
    try:
        return not _unfit() and _find() is not None
    except Exception:
        return False


def _unfit() -> str:
    """Why the library is not even looked for, or ""."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"it is for Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    if not jaxlib.__version__.startswith(interface.VERIFIED):
        return f"jaxlib {jaxlib.__version__} is not among those it was tried with"
    if os.environ.get("TOPGAP_ONEDNN") == "off":
        return "it is switched off by TOPGAP_ONEDNN"
    return ""


def _start() -> str:
    if why := _unfit():
        return why
    path = _find()
    if path is None:
        return "it is not installed (pip install 'topgap-jax[cpu]')"
    if not KEPT:  # an interrupt may have ended a first try
        library = Library(path)
        interface.register(TARGET, library.run)
        KEPT.append(library)
        atexit.register(_finish)
    return _self_test()


def _finish() -> None:
    """Wait for what is being computed. When Python ends, JAX waits for its threads, and they would wait for ever to
    enter Python."""
    warnings.simplefilter("ignore")  # a compilation cache that is full has been told
    for array in jax.live_arrays("cpu"):
        with contextlib.suppress(Exception):  # its computation failed, or it is deleted
            array.block_until_ready()
    for device in jax.local_devices(backend="cpu"):  # behind computations whose results nobody holds
        with contextlib.suppress(Exception):
            jax.jit(lambda x: x + 1)(jax.device_put(1.0, device)).block_until_ready()


def _find() -> Path | None:
    """The library: $TOPGAP_ONEDNN, else that of the package `onednn-cpu-gomp`."""
    named = os.environ.get("TOPGAP_ONEDNN")
    if named:
        return Path(named)
    try:
        files = importlib.metadata.files("onednn-cpu-gomp") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(file.locate()).resolve() for file in files if file.name == "libdnnl.so.3"), None)


def _self_test() -> str:
    """What is wrong with its results at one small size, against sums written out; "" if nothing is."""
    random = np.random.default_rng(0)
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)
    x, w, dy, bias = draw(2, 8, 8, 3), draw(3, 3, 3, 5), draw(2, 4, 4, 5), draw(5)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y, dx, dw = np.zeros_like(dy), np.zeros_like(padded), np.zeros_like(w)
    for a, b in np.ndindex(3, 3):
        window = (slice(None), slice(a, a + 7, 2), slice(b, b + 7, 2))
        y += padded[window] @ w[a, b]
        dx[window] += dy @ w[a, b].T
        dw[a, b] = np.tensordot(padded[window], dy, ((0, 1, 2), (0, 1, 2)))
    dx, mask = dx[:, 1:-1, 1:-1], x > 0
    residual = dy.copy()
    residual[0, 0, 0, 0] = np.nan  # a ReLU must not hide it
    everything, masked = Fused(bias=True, residual=True, relu=True), Fused(residual=True, mask=True)
    cases = [
        (FORWARD, (x, w), NOTHING, y),
        (INPUT_GRADIENT, (dy, w), NOTHING, dx),
        (WEIGHT_GRADIENT, (x, dy), NOTHING, dw),
        (FORWARD, (x, w, bias, residual), everything, np.maximum(y + bias + residual, 0)),
        (FORWARD, (x, w, bias, residual), everything._replace(limit=1), np.clip(y + bias + residual, 0, 1)),
        (INPUT_GRADIENT, (dy, w, x, mask.reshape(2, -1)), masked, np.where(mask, dx + x, 0)),
    ]
    geometry = Geometry((8, 8), (3, 3), (2, 2), ((1, 1), (1, 1)))
    # It may be asked for while another function is traced, and must not become a part of that, nor obey a guard meant
    # for it.
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        for kind, operands, fused, result in cases:
            run = lambda *operands: call(kind, operands, result.shape, geometry, fused)
            if not np.allclose(jax.jit(run)(*operands), result, rtol=1e-4, atol=1e-4, equal_nan=True):
                return f"its result of kind {kind} with {fused} is not the definition's"
    return ""
