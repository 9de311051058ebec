"""oneDNN's C functions by ctypes: convolutions of NHWC by HWIO in float32, with what is fused into them.

Primitives are kept ready for the calls that come again, and each is used by one thread at a time.
"""

import collections
import contextlib
import ctypes
import math
import os
import threading
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = 1, 2, 3
STORED = np.zeros(1, np.int64)
"""The numbers of a call that does nothing: its result is its operand."""
LIMIT = 1024
"""Different calls that are kept ready; the least recently used go first."""

# Constants of dnnl_types.h and dnnl_common_types.h, the same in oneDNN 3.2 to 3.13.
CPU, IN_ORDER, FLOAT, BYTE, ANY = 1, 1, 3, 6, 1
INFERENCE, CONVOLUTION, DECONVOLUTION = 96, 0x1, 0xA
RELU, LINEAR, ADD, MULTIPLY = 0x20, 0x26, 0x1FFF0, 0x1FFF1
SLOPE = 1.2e-38
"""Of a ReLU below 0, the least that is not flushed to 0: with 0 itself oneDNN takes max(x, 0), which of NaN is 0."""
USER_SCRATCHPAD, EXECUTION_ARGUMENT = 1, 255
SOURCE, SECOND, DESTINATION, WEIGHTS, BIAS, SCRATCHPAD, OUTPUT_GRADIENT, WEIGHT_RESULT = 1, 2, 17, 33, 41, 80, 145, 161
AFTER_STEP = 32768
ALLOCATE = c_void_p(-1)
NOWHERE = c_void_p(0)


class _Argument(ctypes.Structure):
    _fields_ = [("which", c_int), ("memory", c_void_p)]


class Geometry(NamedTuple):
    """What a convolution is, but for its batch and channels: shards and folded batches need no geometry of their own.

    The taps of a kernel stand `dilation` apart. Channels in and out are in `groups` that lie one after another, and
    each group of the result is made of its own group alone: groups = channels is a depthwise convolution.
    """

    size: tuple[int, int]
    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[tuple[int, int], tuple[int, int]]
    groups: int = 1
    dilation: tuple[int, int] = (1, 1)

    @property
    def reach(self) -> tuple[int, int]:
        """Rows and columns from the first tap of the kernel to its last."""
        return tuple((kernel - 1) * step + 1 for kernel, step in zip(self.kernel, self.dilation))

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the result."""
        sides = zip(self.size, self.reach, self.strides, self.pads)
        return tuple((size + low + high - reach) // stride + 1 for size, reach, stride, (low, high) in sides)

    @property
    def dense(self) -> bool:
        """Whether there is one group, and no dilation."""
        return self.groups == 1 and self.dilation == (1, 1)


class Fused(NamedTuple):
    """What a call does besides the convolution, in this order: bias (o,) added, another array added, ReLU, times 0 or
    1.

    The bias is of a forward call alone. The ReLU has an upper limit: 6 makes it a ReLU6. The mask is bool, flat from
    the second axis on: so XLA computes it faster. What is not finite stays so: oneDNN's ReLU of -inf is -inf, that with
    a limit of inf is inf, and where the mask is 0 an infinity becomes NaN.
    """

    bias: bool = False
    residual: bool = False
    relu: bool = False
    mask: bool = False
    limit: float = math.inf

    @property
    def words(self) -> str:
        """Itself as a reader sees it: "bias, relu6"."""
        relu = "relu" if self.limit == math.inf else f"relu{self.limit:g}"
        parts = (("bias", self.bias), ("residual", self.residual), (relu, self.relu), ("mask", self.mask))
        return ", ".join(word for word, on in parts if on)

    @property
    def numbers(self) -> tuple[int, int]:
        """Itself as two whole numbers: the flags, and the bits of the limit."""
        flags = sum(1 << i for i, on in enumerate(self[:4]) if on)
        return flags, int(np.float32(self.limit).view(np.int32))


def fused_of(flags: int, limit: int) -> Fused:
    """What has these numbers."""
    return Fused(*(bool(flags >> i & 1) for i in range(4)), float(np.int32(limit).view(np.float32)))


NOTHING = Fused()


class Library:
    """oneDNN's functions, its engine, and the calls that are ready."""

    def __init__(self, path: Path):
        given = os.environ.get("OMP_WAIT_POLICY")
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads would take the cores from XLA's own
        try:
            self.functions = ctypes.CDLL(str(path))  # libgomp reads the variable now
            # For what takes no time: to let other threads of Python in, and wait for one's turn, would take longer.
            self.quick = ctypes.PyDLL(str(path))
        finally:
            if given is None:
                del os.environ["OMP_WAIT_POLICY"]
        self.functions.dnnl_primitive_desc_query_md.restype = c_void_p
        wanted = os.environ.get("OMP_NUM_THREADS", "")
        share = len(os.sched_getaffinity(0)) // jax.local_device_count("cpu")
        self.threads = max(1, int(wanted) if wanted.isdecimal() else share)
        self.engine = self.made("engine_create", CPU, c_size_t(0))
        self.lock = threading.Lock()
        self.ready: collections.OrderedDict[bytes, list[Ready]] = collections.OrderedDict()

    def do(self, name: str, *args) -> None:
        """`dnnl_name(*args)`; RuntimeError if it fails."""
        status = getattr(self.functions, f"dnnl_{name}")(*args)
        if status:
            raise RuntimeError(f"dnnl_{name} gives status {status}")

    def made(self, name: str, *args) -> c_void_p:
        """The object that `dnnl_name` makes."""
        pointer = c_void_p()
        self.do(name, byref(pointer), *args)
        return pointer

    def run(self, key: bytes, pointers: list[int]) -> None:
        """One call; `key`: its numbers, the sizes of its buffers among them, `pointers`: where they are."""
        if key == STORED.tobytes():
            return
        with self.lock:
            waiting = self.ready.get(key)
            one = waiting.pop() if waiting else None
        one = one or Ready(self, np.frombuffer(key, np.int64).tolist())
        try:
            one.run(pointers)
        except BaseException:
            one.close()
            raise
        with self.lock:
            self.ready.setdefault(key, []).append(one)
            self.ready.move_to_end(key)
            dropped = []
            while len(self.ready) > LIMIT:
                dropped += self.ready.popitem(last=False)[1]
        for old in dropped:
            old.close()


class Ready:
    """A call that can be made: oneDNN's primitive with a memory for each buffer. For one thread at a time."""

    def __init__(self, library: Library, numbers: list[int]):
        self.library, self.steps = library, []
        with contextlib.ExitStack() as self.kept, contextlib.ExitStack() as self.passing:
            self.stream = self._object("stream", self.kept, "stream_create", library.engine, IN_ORDER)
            self._build(*numbers[:10], fused_of(*numbers[10:12]), numbers[12:])
            self.kept = self.kept.pop_all()  # all went well

    def _build(self, kind, down, along, top, bottom, near, far, groups, rows, columns, fused, sizes):
        steps = (down, along), (rows - 1, columns - 1), (top, near), (bottom, far)  # strides, dilation, pads
        geometry = [_numbers(pair) for pair in steps]
        left, right, result = sizes[:4], sizes[4:8], sizes[-4:]
        first, bias = self._images(left), self._layout(result[3:], (1,)) if fused.bias else None
        same, zeros_and_ones = self._images(result), self._images(result, BYTE)
        attributes = self._attributes(fused, same, zeros_and_ones)
        if kind == WEIGHT_GRADIENT:
            second, third, which = self._images(right), self._kernel(result, groups), 2
            free, names = self._kernel(result, groups, order=False), (SOURCE, OUTPUT_GRADIENT, WEIGHT_RESULT)
            forward = (INFERENCE, CONVOLUTION, first, free, None, second, *geometry, attributes)
            hint = self._description("convolution_forward", *forward)
            backward = (CONVOLUTION, first, free, None, second, *geometry, hint, attributes)
            description = self._description("convolution_backward_weights", *backward)
        else:
            # An input gradient is a deconvolution: so oneDNN needs no flipped kernel at any stride, and takes few
            # channels faster than its own backward pass does.
            back = kind == INPUT_GRADIENT
            second, third, which = self._kernel(right, groups, back), same, 1
            free, names = self._kernel(right, groups, back, order=False), (SOURCE, WEIGHTS, DESTINATION)
            name, algorithm = ("deconvolution", DECONVOLUTION) if back else ("convolution", CONVOLUTION)
            forward = (INFERENCE, algorithm, first, free, bias, third, *geometry, attributes)
            description = self._description(f"{name}_forward", *forward)
        arguments = {name: self._memory(buffer, NOWHERE) for name, buffer in zip(names, (first, second, third))}
        kernel, place = (first, second, third)[which], arguments[names[which]]
        # In the order of the operands, the result last; what is fused stands where oneDNN looks for it: after-steps are
        # numbered.
        after = iter(range(1, 8))
        extras = {BIAS: self._memory(bias, NOWHERE)} if fused.bias else {}
        extras |= {next(after) * AFTER_STEP | SECOND: self._memory(same, NOWHERE)} if fused.residual else {}
        _ = [next(after) for _ in self._relu(fused)]
        extras |= {next(after) * AFTER_STEP | SECOND: self._memory(zeros_and_ones, NOWHERE)} if fused.mask else {}
        self.memories = [*list(arguments.values())[:2], *extras.values(), arguments[names[2]]]
        arguments |= extras
        chosen = self._argument(description, names[which])
        if self.library.functions.dnnl_memory_desc_equal(chosen, kernel):
            self._step(description, arguments)
            return
        # oneDNN wants the kernel in an order of its own.
        arguments[names[which]] = inner = self._memory(chosen, ALLOCATE)
        engine, plain = self.library.engine, self._attributes(NOTHING, None, None)
        if kind == WEIGHT_GRADIENT:
            self._step(description, arguments)
            reorder = self._description("reorder", chosen, engine, kernel, engine, plain)
            self._step(reorder, {SOURCE: inner, DESTINATION: place})
        else:
            reorder = self._description("reorder", kernel, engine, chosen, engine, plain)
            self._step(reorder, {SOURCE: place, DESTINATION: inner})
            self._step(description, arguments)

    def _attributes(self, fused, same, zeros_and_ones):
        """Of a primitive: what is done after it, in the order of `Fused`."""
        made = self._object("primitive_attr", self.passing, "primitive_attr_create")
        # The library's own scratchpad belongs to the thread that builds a primitive; another one may run it.
        self.library.do("primitive_attr_set_scratchpad_mode", made, USER_SCRATCHPAD)
        steps = self._object("post_ops", self.passing, "post_ops_create")
        if fused.residual:
            self.library.do("post_ops_append_binary", steps, ADD, same)
        for algorithm, alpha, beta in self._relu(fused):
            self.library.do("post_ops_append_eltwise", steps, algorithm, c_float(alpha), c_float(beta))
        if fused.mask:
            self.library.do("post_ops_append_binary", steps, MULTIPLY, zeros_and_ones)
        self.library.do("primitive_attr_set_post_ops", made, steps)
        return made

    def _relu(self, fused):
        """The steps of a ReLU; min(x, limit) = limit - relu(limit - x), for oneDNN's own clip makes 0 of NaN.

        Its rounding error is that of the limit, 2.4e-7 of 6, everywhere.
        """
        relu, turn = (RELU, SLOPE, 0.0), (LINEAR, -1.0, fused.limit)
        return [relu] * fused.relu + [turn, relu, turn] * (fused.relu and fused.limit < math.inf)

    def run(self, pointers: list[int]) -> None:
        """The call on the buffers that are there."""
        quick, status = self.library.quick, 0
        for memory, pointer in zip(self.memories, pointers):
            status |= quick.dnnl_memory_set_data_handle(memory, c_void_p(pointer))
        if status:
            raise RuntimeError("dnnl_memory_set_data_handle fails")
        quick.omp_set_num_threads(self.library.threads)  # it is a setting of the thread that calls, any one of XLA's
        for primitive, arguments in self.steps:
            self.library.do("primitive_execute", primitive, self.stream, len(arguments), arguments)
        if quick.dnnl_stream_wait(self.stream):  # nothing to wait for, unless somebody named a library of another kind
            raise RuntimeError("dnnl_stream_wait fails")

    def close(self) -> None:
        """Give everything back to oneDNN."""
        self.kept.close()

    def _object(self, word, stack, name, *args):
        made = self.library.made(name, *args)
        stack.callback(self.library.do, f"{word}_destroy", made)
        return made

    def _description(self, name, *args):
        engine = () if name == "reorder" else (self.library.engine,)
        return self._object("primitive_desc", self.passing, f"{name}_primitive_desc_create", *engine, *args)

    def _argument(self, description, which):
        """How a primitive wants one of its arguments."""
        return c_void_p(self.library.functions.dnnl_primitive_desc_query_md(description, EXECUTION_ARGUMENT, which))

    def _memory(self, description, where):
        return self._object("memory", self.kept, "memory_create", description, self.library.engine, where)

    def _images(self, shape, kind=FLOAT):
        """NHWC: oneDNN's sizes are (n, c, h, w), and the strides say how they lie."""
        n, h, w, c = shape
        return self._layout((n, c, h, w), (h * w * c, 1, w * c, c), kind)

    def _kernel(self, shape, groups, back=False, order=True):
        """HWIO, or any order; oneDNN's sizes are (o, i, h, w), of a deconvolution (i, o, h, w), of groups (g, ...)."""
        h, w, i, o = shape
        each = o // groups
        sizes, strides = ((i, each), (o, 1)) if back else ((each, i), (1, o))
        sizes, strides = (*sizes, h, w), (*strides, w * i * o, i * o)
        if groups > 1:
            sizes, strides = (groups, *sizes), (each, *strides)
        return self._layout(sizes, strides if order else None)

    def _layout(self, sizes, strides, kind=FLOAT):
        name, how = ("tag", ANY) if strides is None else ("strides", _numbers(strides))
        create = f"memory_desc_create_with_{name}"
        return self._object("memory_desc", self.passing, create, len(sizes), _numbers(sizes), kind, how)

    def _step(self, description, arguments):
        primitive = self._object("primitive", self.kept, "primitive_create", description)
        scratchpad = self._argument(description, SCRATCHPAD)
        arguments = {**arguments, SCRATCHPAD: self._memory(scratchpad, ALLOCATE)}
        pairs = (_Argument * len(arguments))(*((which, memory) for which, memory in arguments.items()))
        self.steps.append((primitive, pairs))


def _numbers(values) -> ctypes.Array:
    """dnnl_dims_t."""
    return (c_int64 * 12)(*values)
