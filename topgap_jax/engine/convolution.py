"""One convolution and its two gradients, each bilinear and each other's transposes, so that derivatives of any order
are fast.

With x (n, h, w, c), kernel w (kh, kw, c/g, o), y (n, p, q, o), strides s, dilation d, pads (top, bottom), (left,
right), and g groups, of which o is in group u:

    forward          y[n,i,j,o]  = sum over a, b, c < c/g  of  x[n, i s + a d - top, j s + b d - left, u c/g + c]
                                                               w[a,b,c,o]
    input gradient   dx = the transpose in x, of (dy, w)
    weight gradient  dw = the transpose in w, of (x, dy)

The transposes of forward are the two gradients; those of the input gradient are forward and the weight gradient; those
of the weight gradient are the input gradient and forward. So every derivative of a network, however high, is made of
these three.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from topgap_jax.engine import onednn
from topgap_jax.engine.forms import BY_LAX, ON_CPU, after, from_places, places, strips, turned
from topgap_jax.engine.library import FORWARD, INPUT_GRADIENT, NOTHING, WEIGHT_GRADIENT, Fused, Geometry
from topgap_jax.errors import UserError
from topgap_jax.types import Array

FEW, STRIP = 4, 3
"""Channels of an image up to which its gradient is computed by places, and columns of a depthwise kernel up to which
its gradient is computed at once."""


def convolution(
    x: Array,
    w: Array,
    strides: tuple[int, int],
    pads: tuple[tuple[int, int], tuple[int, int]],
    *,
    groups: int = 1,
    dilation: tuple[int, int] = (1, 1),
) -> Array:
    """x (n, h, w, c) with kernel w (kh, kw, c/groups, o), both of one floating type: (n, p, q, o), of derivatives of
    any order.

    What is not finite stays so; without oneDNN an infinity or NaN can also make NaN of columns beside those its kernel
    reaches, where a zero of the rearranged kernel meets it. Raises UserError for other types, for channels that differ
    or that there are none of, for negative pads and for a result without rows or columns.
    """
    x, w = jnp.asarray(x), jnp.asarray(w)
    # One tap is not dilated, whatever is said.
    steps = tuple(step if taps > 1 else 1 for step, taps in zip(dilation, w.shape))
    pads = tuple(tuple(pair) for pair in pads)
    geometry = Geometry(x.shape[1:3], w.shape[:2], tuple(strides), pads, groups, steps)
    fits = x.ndim == w.ndim == 4 and groups > 0 and x.shape[3] == w.shape[2] * groups > 0 and w.shape[3] > 0
    if not fits or w.shape[3] % groups or x.dtype != w.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(
            "convolution: give images (n, h, w, c) and a kernel (kh, kw, c / groups, o) of one floating type, "
            f"got {x.dtype} {x.shape} and {w.dtype} {w.shape}" + f" in {groups} groups" * (groups != 1)
        )
    if min(*map(min, geometry.pads), *(step - 1 for step in (*geometry.strides, *dilation))) < 0:
        raise UserError(
            f"convolution: give strides and dilation of at least 1 and no negative pads, got strides {strides}, "
            f"dilation {dilation}, pads {pads}"
        )
    if min(geometry.out) < 1:
        raise UserError(f"convolution: pads {geometry.pads} give {geometry.size} images a result of {geometry.out}")
    return bind(forward_p, x, w, geometry)


def bind(primitive: Primitive, left: Array, right: Array, geometry: Geometry) -> Array:
    """The primitive, with the operand that varies over fewer axes of a `shard_map` made to vary like the other."""
    first, second = (jax.typeof(operand).manual_axis_type.varying for operand in (left, right))
    if second - first:
        left = lax.pcast(left, tuple(second - first), to="varying")
    if first - second:
        right = lax.pcast(right, tuple(first - second), to="varying")
    return primitive.bind(left, right, geometry=geometry)


def _shape(kind: int, left: Sequence[int], right: Sequence[int], geometry: Geometry) -> tuple[int, ...]:
    """Of the result, by those of the operands."""
    if kind == FORWARD:
        return (left[0], *geometry.out, right[3])
    if kind == INPUT_GRADIENT:
        return (left[0], *geometry.size, right[2] * geometry.groups)
    return (*geometry.kernel, left[3] // geometry.groups, right[3])


def result_type(kind: int, left, right, *, geometry: Geometry):
    """Abstract value of the result: sharded over the batch alone, or, of a weight gradient, not at all; varying as the
    operands do."""
    batch = None if kind == WEIGHT_GRADIENT else left.sharding.spec[0]
    sharding = NamedSharding(left.sharding.mesh, PartitionSpec(batch, None, None, None))
    return left.update(shape=_shape(kind, left.shape, right.shape, geometry), weak_type=False, sharding=sharding)


def _primitive(name: str, kind: int) -> Primitive:
    primitive = Primitive(f"topgap_{name}")
    primitive.def_abstract_eval(functools.partial(result_type, kind))
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    mlir.register_lowering(primitive, lowering(BY_LAX[kind]))
    mlir.register_lowering(primitive, _cpu_lowering(kind), platform="cpu")
    needs_devices(primitive)
    return primitive


def needs_devices(primitive: Primitive) -> None:
    """Have programs with the primitive name their devices while they are lowered, or a custom call cannot be
    partitioned.

    JAX has this for itself alone; where it is not found, programs for several devices take XLA's form. Such a program
    may not name two meshes, which is a price that only those pay who have oneDNN.
    """
    if not onednn.found():
        return
    try:
        from jax._src.dispatch import prim_requires_devices_during_lowering
    except ImportError:
        return
    prim_requires_devices_during_lowering.add(primitive)


def lowering(f: Callable) -> Callable:
    """Lowering by f, traced without the explicit mesh and its axes: to them lax's weight gradient has an objection, and
    other functions gather what they split."""

    def without(*operands, **params):
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            return f(*operands, **params)

    def lower(ctx, *operands, **params):
        bare = lambda avals: [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in avals]
        within = ctx.replace(avals_in=bare(ctx.avals_in), avals_out=bare(ctx.avals_out))
        return mlir.lower_fun(functools.partial(without, **params), multiple_results=False)(within, *operands)

    return lower


def _cpu_lowering(kind: int) -> Callable:
    def lower(ctx, *operands, geometry):
        f = custom_call(ctx, kind, geometry, NOTHING) or functools.partial(ON_CPU[kind], geometry=geometry)
        return lowering(f)(ctx, *operands)

    return lower


def custom_call(ctx, kind: int, geometry: Geometry, fused: Fused) -> Callable | None:
    """oneDNN's function of the operands, for the program that is being lowered; None where it takes another path."""
    if not onednn.available() or any(aval.dtype != jnp.float32 for aval in ctx.avals_in[:2]):
        return None
    count = devices(ctx.module_context)
    if count == 1:
        return functools.partial(_call, kind, geometry, fused)
    return _partitioned(kind, geometry, fused) if count > 1 else None


def devices(module) -> int:
    """Over how many devices the program is still to be partitioned; 0 where nobody knows, or where it leaves this
    machine."""
    context = module.axis_context
    if module.lowering_parameters.for_export:
        return 0
    if hasattr(context, "num_devices"):  # jit
        # Without a mesh, or with the old partitioner, nothing says how a call is divided.
        divisible = context.device_assignment and context.abstract_mesh and jax.config.jax_use_shardy_partitioner
        return context.num_devices if context.num_devices == 1 or divisible else 0
    if hasattr(context, "manual_axes"):  # shard_map: each device has its own part already, where all axes are manual
        return 1 if set(context.manual_axes) == set(context.mesh.axis_names) else 0
    return 1  # pmap


def _call(kind: int, geometry: Geometry, fused: Fused, *operands: Array) -> Array:
    if kind == WEIGHT_GRADIENT and geometry.kernel == (1, 1) and geometry.strides != (1, 1):
        # oneDNN 3.2 has a kernel of its own for it that writes past its buffer (jit_1x1, AVX-512, 8 to 16 channels).
        x, dy = operands
        (rows, columns), (down, right) = geometry.out, geometry.strides
        padded = jnp.pad(x, ((0, 0), *geometry.pads, (0, 0)))
        taken = padded[:, ::down, ::right][:, :rows, :columns]
        close = geometry._replace(size=geometry.out, strides=(1, 1), pads=((0, 0), (0, 0)))
        return _call(kind, close, fused, taken, dy)
    if (
        kind == WEIGHT_GRADIENT
        and geometry.groups == operands[0].shape[3] > 1
        and geometry.kernel[1] > STRIP
        and geometry.strides == (1, 1)
    ):
        # Of depthwise kernels that are wider oneDNN has the weight gradient pixel by pixel.
        return jnp.concatenate([_call(kind, close, fused, *pair) for close, pair in strips(geometry, *operands)], 1)
    if kind == INPUT_GRADIENT and geometry.dense and geometry.strides != (1, 1) and operands[1].shape[2] <= FEW:
        # The gradient by the image, at the stem of a network, for which oneDNN's own call is slow.
        dy, w, *extras = operands
        kernel, close = places(w, geometry)
        if min(map(min, close.pads)) >= 0:
            return after(from_places(_call(FORWARD, close, NOTHING, dy, kernel), geometry), extras, fused)
    if kind == INPUT_GRADIENT and not geometry.dense:
        # Behind a deconvolution in groups oneDNN does what is fused pixel by pixel.
        dy, w, *extras = operands
        kernel, straight = turned(w, geometry)
        if geometry.strides == (1, 1) and min(map(min, straight.pads)) >= 0:
            return _call(FORWARD, straight, fused, dy, kernel, *extras)
        if fused != NOTHING:
            return after(_call(kind, geometry, NOTHING, dy, w), extras, fused)
    shape = _shape(kind, operands[0].shape, operands[1].shape, geometry)
    return onednn.call(kind, operands, shape, geometry, fused)


RULES = {  # operands and result by axis, i = c / groups; what is fused has the axes of the result
    FORWARD: (["n h w c", "a b i o"], "n p q o"),
    INPUT_GRADIENT: (["n p q o", "a b i o"], "n h w c"),
    WEIGHT_GRADIENT: (["n h w c", "n p q o"], "a b i o"),
}


@functools.lru_cache(1024)
def _partitioned(kind: int, geometry: Geometry, fused: Fused) -> Callable:
    """The custom call, told to the partitioner: the batch may be split, nothing else; weight gradients are then
    summed."""
    alone = functools.partial(_call, kind, geometry, fused)
    operands, result = RULES[kind]
    extras = zip(fused[:4], ("o", result, None, "n m"))
    operands = operands + [axes for present, axes in extras if present and axes]
    split_result = kind != WEIGHT_GRADIENT

    def partition(mesh, given, _):
        spec = given[0].sharding.spec
        batch = spec[0] if len(spec) else None
        parts = math.prod(mesh.shape[axis] for axis in ((batch,) if isinstance(batch, str) else batch or ()))
        if not split_result and given[0].shape[0] % parts:
            batch = None  # what pads the last part would be summed with the rest
        split, whole = NamedSharding(mesh, PartitionSpec(batch)), NamedSharding(mesh, PartitionSpec())

        def summed(x, dy):
            # Without an explicit mesh around it, which the sum's own little program could not be partitioned by.
            with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
                return alone(x, dy) if batch is None else lax.psum(alone(x, dy), batch)

        shardings = tuple(split if axes.startswith("n") else whole for axes in operands)
        return mesh, alone if split_result else summed, split if split_result else whole, shardings

    rule = f"{', '.join(operands)} -> {result}"
    kept = tuple(axis for axis in dict.fromkeys(rule.replace(",", "").replace("->", "").split()) if axis != "n")
    call = custom_partitioning(alone)
    call.def_partition(
        partition=partition,
        sharding_rule=rule,
        reduction_factors=() if split_result else ("n",),
        need_replication_factors=kept,
    )
    return call


forward_p = _primitive("convolution", FORWARD)
input_gradient_p = _primitive("convolution_input_gradient", INPUT_GRADIENT)
weight_gradient_p = _primitive("convolution_weight_gradient", WEIGHT_GRADIENT)
KINDS = {forward_p: "convolution", input_gradient_p: "input gradient", weight_gradient_p: "weight gradient"}

ad.defbilinear(
    forward_p,
    lambda ct, x, w, *, geometry: bind(input_gradient_p, ct, w, geometry),
    lambda ct, x, w, *, geometry: bind(weight_gradient_p, x, ct, geometry),
)
ad.defbilinear(
    input_gradient_p,
    lambda ct, dy, w, *, geometry: bind(forward_p, ct, w, geometry),
    lambda ct, dy, w, *, geometry: bind(weight_gradient_p, ct, dy, geometry),
)
ad.defbilinear(
    weight_gradient_p,
    lambda ct, x, dy, *, geometry: bind(input_gradient_p, dy, ct, geometry),
    lambda ct, x, dy, *, geometry: bind(forward_p, x, ct, geometry),
)


# Which axis of each operand a `vmap` is folded into, and in which axis of the result it then is.
FOLDS = {forward_p: ((0, 0), (3, 3)), input_gradient_p: ((0, 0), (2, 3)), weight_gradient_p: ((3, 2), (3, 3))}


def _batched(primitive: Primitive, operands, axes, *, geometry: Geometry):
    """`vmap` of one operand is a larger batch or more channels; of both, or over nothing, a loop.

    Of channels the mapped axis is the inner one, so that each group keeps its own.
    """
    mapped = [axis is not None for axis in axes]
    which = mapped.index(True)
    size = operands[which].shape[axes[which]]
    if all(mapped) or size == 0:
        rows = {i: jnp.moveaxis(operands[i], axes[i], 0) for i in range(2) if mapped[i]}
        one = lambda row: bind(primitive, *(row.get(i, operands[i]) for i in range(2)), geometry)
        return lax.map(one, rows), 0
    into, out_of = FOLDS[primitive][which]
    inner = into != 0
    folded = list(operands)
    operand = jnp.moveaxis(operands[which], axes[which], into + inner)
    folded[which] = operand.reshape(
        *operand.shape[:into], operand.shape[into] * operand.shape[into + 1], *operand.shape[into + 2 :]
    )
    out = bind(primitive, *folded, geometry)
    pair = (out.shape[out_of] // size, size) if inner else (size, out.shape[out_of] // size)
    return out.reshape(*out.shape[:out_of], *pair, *out.shape[out_of + 1 :]), out_of + inner


for _each in FOLDS:
    batching.primitive_batchers[_each] = functools.partial(_batched, _each)
