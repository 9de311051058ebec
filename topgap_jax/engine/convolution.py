"""One convolution and its two gradients, each bilinear and each other's transposes, so that derivatives of any order are fast.

With x (n, h, w, c), kernel w (kh, kw, c, o), y (n, p, q, o), strides s and pads (top, bottom), (left, right):

    forward          y[n,i,j,o]  = sum over a, b, c  of  x[n, i s + a - top, j s + b - left, c]  w[a,b,c,o]
    input gradient   dx = the transpose in x, of (dy, w)
    weight gradient  dw = the transpose in w, of (x, dy)

The transposes of forward are the two gradients; those of the input gradient are forward and the weight gradient; those of the
weight gradient are the input gradient and forward. So every derivative of a network, however high, is made of these three.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax._src import dispatch
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from topgap_jax.engine import onednn
from topgap_jax.types import Array

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


class Geometry(NamedTuple):
    """What a convolution is, but for its batch and channels: shards and folded batches need no geometry of their own."""

    size: tuple[int, int]
    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[tuple[int, int], tuple[int, int]]

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the result."""
        sides = zip(self.size, self.kernel, self.strides, self.pads)
        return tuple((size + low + high - kernel) // stride + 1 for size, kernel, stride, (low, high) in sides)


def convolution(x: Array, w: Array, strides: tuple[int, int], pads: tuple[tuple[int, int], tuple[int, int]]) -> Array:
    """x (n, h, w, c) with kernel w (kh, kw, c, o): (n, p, q, o). Pads are at least 0, no side of the result is empty."""
    return _bind(
        forward_p, x, w, Geometry(x.shape[1:3], w.shape[:2], tuple(strides), tuple(tuple(pair) for pair in pads))
    )


def _bind(primitive: Primitive, left: Array, right: Array, geometry: Geometry) -> Array:
    """The primitive, with the operand that varies over fewer axes of a `shard_map` made to vary like the other."""
    first, second = (jax.typeof(operand).manual_axis_type.varying for operand in (left, right))
    if second - first:
        left = lax.pcast(left, tuple(second - first), to="varying")
    if first - second:
        right = lax.pcast(right, tuple(first - second), to="varying")
    return primitive.bind(left, right, geometry=geometry)


def _like(aval, shape, batch):
    """Type of a result: sharded over the batch alone, or not at all; varying as the operands do."""
    spec = PartitionSpec(aval.sharding.spec[0] if batch else None, None, None, None)
    return aval.update(shape=shape, sharding=NamedSharding(aval.sharding.mesh, spec))


def _forward_type(x, w, *, geometry):
    return _like(x, (x.shape[0], *geometry.out, w.shape[3]), batch=True)


def _input_gradient_type(dy, w, *, geometry):
    return _like(dy, (dy.shape[0], *geometry.size, w.shape[2]), batch=True)


def _weight_gradient_type(x, dy, *, geometry):
    return _like(x, (*geometry.kernel, x.shape[3], dy.shape[3]), batch=False)


def _forward(x: Array, w: Array, *, geometry: Geometry) -> Array:
    return lax.conv_general_dilated(x, w, geometry.strides, geometry.pads, dimension_numbers=DIMENSIONS)


def _input_gradient(dy: Array, w: Array, *, geometry: Geometry) -> Array:
    """As a convolution of dy with the flipped kernel, written out: in a loop, XLA's CPU has naive loops alone for lax's own form."""
    sides = zip(geometry.size, geometry.out, geometry.kernel, geometry.strides, geometry.pads)
    pads = [(k - 1 - low, size - (out - 1) * stride - 1 + low) for size, out, k, stride, (low, _) in sides]
    flipped = jnp.flip(w, (0, 1)).swapaxes(2, 3)
    return lax.conv_general_dilated(
        dy, flipped, (1, 1), pads, lhs_dilation=geometry.strides, dimension_numbers=DIMENSIONS
    )


def _weight_gradient(x: Array, dy: Array, *, geometry: Geometry) -> Array:
    """As lax has it: a convolution of the transposed x with a window as large as dy. None of the rewrites tried was faster."""
    shape = jax.ShapeDtypeStruct((*geometry.kernel, x.shape[3], dy.shape[3]), x.dtype)
    return jax.linear_transpose(lambda w: _forward(x, w, geometry=geometry), shape)(dy)[0]


def _primitive(name: str, kind: int, type_of: Callable, by_lax: Callable) -> Primitive:
    primitive = Primitive(f"topgap_{name}")
    primitive.def_abstract_eval(type_of)
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    mlir.register_lowering(primitive, _lowering(by_lax))
    mlir.register_lowering(primitive, _cpu_lowering(kind, by_lax), platform="cpu")
    return primitive


def _lowering(f: Callable) -> Callable:
    """Lowering by f, traced without the axes of an explicit mesh: to them lax's weight gradient has an objection."""

    def lower(ctx, left, right, *, geometry):
        bare = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
        out = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_out]
        within = ctx.replace(avals_in=bare, avals_out=out)
        return mlir.lower_fun(functools.partial(f, geometry=geometry), multiple_results=False)(within, left, right)

    return lower


def _cpu_lowering(kind: int, by_lax: Callable) -> Callable:
    def lower(ctx, left, right, *, geometry):
        f = by_lax
        if onednn.available() and all(aval.dtype == jnp.float32 for aval in ctx.avals_in):
            devices = _devices(ctx.module_context)
            if devices == 1:
                f = functools.partial(_call, kind)
            elif devices > 1:
                f = _partitioned(kind, geometry)
        return _lowering(f)(ctx, left, right, geometry=geometry)

    return lower


def _devices(module) -> int:
    """Over how many devices the program is still to be partitioned; 0 where nobody knows, or where it leaves this machine."""
    context = module.axis_context
    if module.lowering_parameters.for_export:
        return 0
    if hasattr(context, "num_devices"):  # jit
        return context.num_devices if context.num_devices == 1 or context.device_assignment else 0
    if hasattr(context, "manual_axes"):  # shard_map: each device has its own part already, where all axes are manual
        return 1 if set(context.manual_axes) == set(context.mesh.axis_names) else 0
    return 1  # pmap


def _call(kind: int, left: Array, right: Array, *, geometry: Geometry) -> Array:
    """oneDNN's result, by a custom call."""
    n, (_, _, c, o) = left.shape[0], right.shape
    if kind == onednn.FORWARD:
        shape = (n, *geometry.out, o)
    elif kind == onednn.INPUT_GRADIENT:
        shape = (n, *geometry.size, c)
    else:
        shape = (*geometry.kernel, left.shape[3], o)
    return onednn.call(kind, left, right, shape, geometry.strides, geometry.pads)


@functools.lru_cache(1024)
def _partitioned(kind: int, geometry: Geometry) -> Callable:
    """The custom call, told to the partitioner: the batch may be split, nothing else; weight gradients are then summed."""
    alone = lambda left, right: _call(kind, left, right, geometry=geometry)
    call = custom_partitioning(alone)

    def partition(mesh, operands, result):
        spec = operands[0].sharding.spec
        batch = spec[0] if len(spec) else None
        split, whole = NamedSharding(mesh, PartitionSpec(batch)), NamedSharding(mesh, PartitionSpec())

        def summed(x, dy):
            # Without an explicit mesh around it, which the sum's own little program could not be partitioned by.
            with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
                return alone(x, dy) if batch is None else lax.psum(alone(x, dy), batch)

        if kind == onednn.WEIGHT_GRADIENT:
            return mesh, summed, whole, (split, split)
        return mesh, alone, split, (split, whole)

    if kind == onednn.WEIGHT_GRADIENT:
        rule, kept, summed = "n h w c, n p q o -> a b c o", ("h", "w", "c", "p", "q", "o", "a", "b"), ("n",)
    elif kind == onednn.FORWARD:
        rule, kept, summed = "n h w c, a b c o -> n p q o", ("h", "w", "c", "a", "b", "o", "p", "q"), ()
    else:
        rule, kept, summed = "n p q o, a b c o -> n h w c", ("p", "q", "o", "a", "b", "c", "h", "w"), ()
    call.def_partition(partition=partition, sharding_rule=rule, reduction_factors=summed, need_replication_factors=kept)
    return lambda left, right, *, geometry: call(left, right)


forward_p = _primitive("convolution", onednn.FORWARD, _forward_type, _forward)
input_gradient_p = _primitive(
    "convolution_input_gradient", onednn.INPUT_GRADIENT, _input_gradient_type, _input_gradient
)
weight_gradient_p = _primitive(
    "convolution_weight_gradient", onednn.WEIGHT_GRADIENT, _weight_gradient_type, _weight_gradient
)

KINDS = {forward_p: "convolution", input_gradient_p: "input gradient", weight_gradient_p: "weight gradient"}

ad.defbilinear(
    forward_p,
    lambda ct, x, w, *, geometry: _bind(input_gradient_p, ct, w, geometry),
    lambda ct, x, w, *, geometry: _bind(weight_gradient_p, x, ct, geometry),
)
ad.defbilinear(
    input_gradient_p,
    lambda ct, dy, w, *, geometry: _bind(forward_p, ct, w, geometry),
    lambda ct, dy, w, *, geometry: _bind(weight_gradient_p, ct, dy, geometry),
)
ad.defbilinear(
    weight_gradient_p,
    lambda ct, x, dy, *, geometry: _bind(input_gradient_p, dy, ct, geometry),
    lambda ct, x, dy, *, geometry: _bind(forward_p, x, ct, geometry),
)


# Which axis of each operand a `vmap` is folded into, and in which axis of the result it then is.
FOLDS = {forward_p: ((0, 0), (3, 3)), input_gradient_p: ((0, 0), (2, 3)), weight_gradient_p: ((3, 2), (3, 3))}


def _batched(primitive: Primitive, operands, axes, *, geometry: Geometry):
    """`vmap` of one operand is a larger batch or more channels; of both, a loop."""
    mapped = [axis is not None for axis in axes]
    if all(mapped):
        stacked = [jnp.moveaxis(operand, axis, 0) for operand, axis in zip(operands, axes)]
        return lax.map(lambda pair: _bind(primitive, *pair, geometry), tuple(stacked)), 0
    which = mapped.index(True)
    into, out_of = FOLDS[primitive][which]
    size = operands[which].shape[axes[which]]
    folded = list(operands)
    folded[which] = _fold(operands[which], axes[which], into)
    out = _bind(primitive, *folded, geometry)
    return out.reshape(*out.shape[:out_of], size, -1, *out.shape[out_of + 1 :]), out_of


def _fold(operand: Array, axis: int, into: int) -> Array:
    """The mapped axis before axis `into` of the rest, the two made one."""
    operand = jnp.moveaxis(operand, axis, into)
    return operand.reshape(*operand.shape[:into], -1, *operand.shape[into + 2 :])


for _each in FOLDS:
    batching.primitive_batchers[_each] = functools.partial(_batched, _each)
    # A program for several devices must name them while it is lowered, else a custom call cannot be partitioned. Private,
    # and asked for by name: without it such programs take lax's form.
    getattr(dispatch, "prim_requires_devices_during_lowering", set()).add(_each)
