"""What XLA is given to compute a convolution and its two gradients: by lax, and in the forms that are fast on a CPU.

XLA's CPU copies the window around each pixel of the result into a matrix and multiplies that by the kernel. With few
channels it is the copying that takes the time, so `by_columns` has each window serve several pixels of a row. The
weight gradient is lax's own. For groups it has naive loops: depthwise convolutions are sums of products of shifted
images here (`by_taps`), other groups a few plain convolutions (`in_parts`). `experiments/bench_forms.py` compares them
(results/bench_forms.json).
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from topgap_jax.engine.library import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Fused, Geometry
from topgap_jax.types import Array

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
TAPS, PARTS, DENSE = 64, 8, 16
"""Limits of the forms of groups: taps of a depthwise kernel, parts that a convolution is divided into, and groups in a
part, of whose products all but one are zeros."""


def after(out: Array, extras: Sequence[Array], fused: Fused) -> Array:
    """What is fused with a convolution, done to its result."""
    rest = iter(extras)
    out = out + next(rest).reshape(1, 1, 1, -1) if fused.bias else out
    out = out + next(rest) if fused.residual else out
    out = jax.nn.relu(out) if fused.relu else out
    out = jnp.minimum(out, fused.limit) if fused.relu and fused.limit < math.inf else out
    return jnp.where(next(rest).reshape(out.shape), out, 0) if fused.mask else out


def turned(w: Array, geometry: Geometry) -> tuple[Array, Geometry]:
    """The kernel and geometry with which the input gradient is itself a convolution, of dy with its pixels `strides`
    apart.

    Its pads can be negative: where those of the convolution reach over the kernel, and where strides leave pixels out.
    """
    pads = tuple(
        (reach - 1 - low, size - (out - 1) * stride - 1 + low)
        for size, out, reach, stride, (low, _) in zip(
            geometry.size, geometry.out, geometry.reach, geometry.strides, geometry.pads
        )
    )
    size = tuple((out - 1) * stride + 1 for out, stride in zip(geometry.out, geometry.strides))
    kh, kw, i, o = w.shape
    kernel = jnp.flip(w, (0, 1)).reshape(kh, kw, i, geometry.groups, o // geometry.groups)
    kernel = kernel.transpose(0, 1, 4, 3, 2).reshape(kh, kw, o // geometry.groups, geometry.groups * i)
    return kernel, geometry._replace(size=size, strides=(1, 1), pads=pads)


def forward(x: Array, w: Array, *, geometry: Geometry) -> Array:
    """The convolution as lax has it."""
    return lax.conv_general_dilated(
        x,
        w,
        geometry.strides,
        geometry.pads,
        rhs_dilation=geometry.dilation,
        dimension_numbers=DIMENSIONS,
        feature_group_count=geometry.groups,
    )


def input_gradient(dy: Array, w: Array, *, geometry: Geometry) -> Array:
    """Its transpose in x."""
    shape = jax.ShapeDtypeStruct((dy.shape[0], *geometry.size, w.shape[2] * geometry.groups), dy.dtype)
    return jax.linear_transpose(lambda x: forward(x, w, geometry=geometry), shape)(dy)[0]


def weight_gradient(x: Array, dy: Array, *, geometry: Geometry) -> Array:
    """Its transpose in w."""
    shape = jax.ShapeDtypeStruct((*geometry.kernel, x.shape[3] // geometry.groups, dy.shape[3]), x.dtype)
    return jax.linear_transpose(lambda w: forward(x, w, geometry=geometry), shape)(dy)[0]


def by_columns(x: Array, w: Array, *, geometry: Geometry) -> Array:
    """The convolution with `f` neighbouring columns of its result side by side as channels.

    A window that serves f columns is (f - 1) strides wider, and the kernel stands in it at f places: y[i, f j + r] is
    channel r of a convolution with f times the stride. Zeros are multiplied as well, so it is for few channels.
    """
    if not geometry.dense:
        return _in_groups(geometry, w)(x, w, geometry=geometry)
    (kh, kw), (down, along) = geometry.kernel, geometry.strides
    c, o = w.shape[2:]
    f = _columns(c, o, kw, geometry.out[1])
    if f == 1:
        return forward(x, w, geometry=geometry)
    wide = kw + (f - 1) * along
    places = [jnp.pad(w, ((0, 0), (r * along, wide - kw - r * along), (0, 0), (0, 0))) for r in range(f)]
    kernel = jnp.stack(places, 3).reshape(kh, wide, c, f * o)
    y = lax.conv_general_dilated(x, kernel, (down, f * along), geometry.pads, dimension_numbers=DIMENSIONS)
    return y.reshape(x.shape[0], *geometry.out, o)


def _columns(c: int, o: int, width: int, columns: int) -> int:
    """How many columns a window should serve, of those numbers that divide them."""
    few = 4 if min(c, o) <= 4 else 2 if min(c, o) <= 16 and c + o <= 40 else 1
    return next(f for f in (4, 2, 1) if f <= few and columns % f == 0 and (width > 1 or f == 1))


def by_flipped_kernel(dy: Array, w: Array, *, geometry: Geometry) -> Array:
    """The input gradient as a convolution of dy with the flipped kernel, written out.

    In a loop, XLA's CPU has nothing but naive loops for what lax writes. With strides dy stands among zeros, but for
    few channels: dx[s u + r - top] is the sum over b of dy[u - b] w[s b + r], so that each of the s x s places of r is
    a channel of a convolution with a small kernel.
    """
    if geometry.groups > 1:
        return _gradient_in_groups(dy, w, geometry)
    (down, along), c = geometry.strides, w.shape[2]
    if (down, along) == (1, 1) or c > 16 or not geometry.dense:
        kernel, straight = turned(w, geometry)
        if (down, along) == (1, 1) and min(map(min, straight.pads)) >= 0:
            return by_columns(dy, kernel, geometry=straight)
        return lax.conv_general_dilated(
            *(dy, kernel, (1, 1), straight.pads), (down, along), geometry.dilation, dimension_numbers=DIMENSIONS
        )
    kernel, close = places(w, geometry)
    return from_places(forward(dy, kernel, geometry=close), geometry)


def places(w: Array, geometry: Geometry) -> tuple[Array, Geometry]:
    """The kernel and geometry of the convolution of dy that gives the input gradient with each s x s places as
    channels."""
    (kh, kw), (p, q), ((top, _), (left, _)) = geometry.kernel, geometry.out, geometry.pads
    ((h, width), (down, along)), (c, o) = (geometry.size, geometry.strides), w.shape[2:]
    high, wide = -(-kh // down), -(-kw // along)  # taps that one place has
    taps = jnp.pad(w, ((0, high * down - kh), (0, wide * along - kw), (0, 0), (0, 0)))
    taps = taps.reshape(high, down, wide, along, c, o).transpose(0, 2, 5, 1, 3, 4)
    kernel = jnp.flip(taps.reshape(high, wide, o, down * along * c), (0, 1))
    rows, columns = (h - 1 + top) // down + 1, (width - 1 + left) // along + 1
    pads = ((high - 1, rows - p), (wide - 1, columns - q))
    return kernel, Geometry((p, q), (high, wide), (1, 1), pads)


def from_places(values: Array, geometry: Geometry) -> Array:
    """Pixels (n, h, w, c) of their places' channels."""
    ((h, width), (down, along)), ((top, _), (left, _)) = (geometry.size, geometry.strides), geometry.pads
    n, rows, columns, channels = values.shape
    c = channels // (down * along)
    values = values.reshape(n, rows, columns, down, along, c).transpose(0, 1, 3, 2, 4, 5)
    return values.reshape(n, rows * down, columns * along, c)[:, top : top + h, left : left + width]


def _in_groups(geometry: Geometry, w: Array) -> Callable:
    """The form of a convolution with this kernel in groups, or dilated."""
    if geometry.groups > 1 and w.shape[2] == 1 and math.prod(geometry.kernel) <= TAPS:
        return by_taps
    return in_parts if geometry.groups // _parts(geometry) <= DENSE else forward


def _taps(x: Array, geometry: Geometry):
    """For each tap of the kernel, row by row, the pixel of x that each pixel of the result sees through it; in float32
    at least."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*pair, 0) for pair in geometry.pads), (0, 0, 0)))
    for tap in np.ndindex(*geometry.kernel):
        start = [place * step for place, step in zip(tap, geometry.dilation)]
        end = [first + (out - 1) * step + 1 for first, out, step in zip(start, geometry.out, geometry.strides)]
        yield lax.slice(x, (0, *start, 0), (x.shape[0], *end, x.shape[3]), (1, *geometry.strides, 1))


def _repeated(x: Array, times: int) -> Array:
    """Each channel several times; jnp's own would gather images that an explicit mesh has split."""
    n, h, w, c = x.shape
    return x if times == 1 else jnp.broadcast_to(x[..., None], (n, h, w, c, times)).reshape(n, h, w, c * times)


def by_taps(x: Array, w: Array, *, geometry: Geometry) -> Array:
    """A depthwise convolution as the sum of its taps' products, which XLA makes one loop of."""
    dtype, x = x.dtype, _repeated(x, w.shape[3] // geometry.groups)
    return sum(pixels * taps for pixels, taps in zip(_taps(x, geometry), w.reshape(-1, w.shape[3]))).astype(dtype)


def weight_gradient_by_taps(x: Array, dy: Array, geometry: Geometry) -> Array:
    """The gradient of `by_taps` by the kernel.

    One reduction of all taps' products together may be faster, but no partitioner divides it.
    """
    dtype, x = x.dtype, _repeated(x, dy.shape[3] // geometry.groups)
    sums = [(pixels * dy).sum((0, 1)).sum(0) for pixels in _taps(x, geometry)]
    return jnp.stack(sums).reshape(*geometry.kernel, 1, -1).astype(dtype)


def strips(geometry: Geometry, x: Array, dy: Array, width: int = 3):
    """For each `width` columns of the kernel, of which the weight gradient is made: geometry, and (x, dy).

    The images are padded beforehand: oneDNN is slow with pads that are wider than half a kernel.
    """
    (rows, _), (kernel, taps) = geometry.size, geometry.kernel
    (top, left), stride, step = geometry.pads, geometry.strides[1], geometry.dilation[1]
    x = jnp.pad(x, ((0, 0), (0, 0), left, (0, 0)))
    for first in range(0, taps, width):
        narrow = min(width, taps - first)
        columns = (geometry.out[1] - 1) * stride + (narrow - 1) * step + 1
        close = geometry._replace(size=(rows, columns), kernel=(kernel, narrow), pads=(top, (0, 0)))
        yield close, (x[:, :, first * step : first * step + columns], dy)


def _parts(geometry: Geometry) -> int:
    """Into how many convolutions one in groups is divided: each costs time to compile."""
    return next(parts for parts in range(PARTS, 0, -1) if geometry.groups % parts == 0)


def in_parts(x: Array, w: Array, *, geometry: Geometry) -> Array:
    """A convolution in groups as a few without, each of several groups, whose kernel has zeros between them."""
    parts, (kh, kw, i, o) = _parts(geometry), w.shape
    groups, one = geometry.groups // parts, geometry._replace(groups=1)
    kernels = w.reshape(kh, kw, i, parts, groups, o // geometry.groups)
    kernels = jnp.einsum("abipgo,gf->pabfigo", kernels, jnp.eye(groups, dtype=w.dtype))
    kernels = kernels.reshape(parts, kh, kw, groups * i, o // parts)
    images = jnp.split(x, parts, 3)
    return jnp.concatenate([forward(*pair, geometry=one) for pair in zip(images, kernels)], 3)


def _gradient_in_groups(dy: Array, w: Array, geometry: Geometry) -> Array:
    form, alike = _in_groups(geometry, w), w.shape[3] == geometry.groups
    kernel, straight = turned(w, geometry)
    if form is by_taps and alike:
        space = tuple((*pair, stride - 1) for pair, stride in zip(straight.pads, geometry.strides))
        dy = lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), *space, (0, 0, 0)))
        return by_taps(dy, kernel, geometry=straight._replace(size=dy.shape[1:3], pads=((0, 0), (0, 0))))
    if form is in_parts and geometry.strides == (1, 1) and min(map(min, straight.pads)) >= 0:
        return in_parts(dy, kernel, geometry=straight)
    shape = jax.ShapeDtypeStruct((dy.shape[0], *geometry.size, w.shape[2] * geometry.groups), dy.dtype)
    return jax.linear_transpose(lambda x: form(x, w, geometry=geometry), shape)(dy)[0]


def weight_gradient_in_groups(x: Array, dy: Array, *, geometry: Geometry) -> Array:
    """The weight gradient, for groups in another form than lax's own, which XLA's CPU has naive loops for."""
    shape = jax.ShapeDtypeStruct((*geometry.kernel, x.shape[3] // geometry.groups, dy.shape[3]), x.dtype)
    form = _in_groups(geometry, shape) if geometry.groups > 1 else forward
    if form is by_taps:
        return weight_gradient_by_taps(x, dy, geometry)
    return jax.linear_transpose(lambda w: form(x, w, geometry=geometry), shape)(dy)[0]


BY_LAX = {FORWARD: forward, INPUT_GRADIENT: input_gradient, WEIGHT_GRADIENT: weight_gradient}
ON_CPU = {FORWARD: by_columns, INPUT_GRADIENT: by_flipped_kernel, WEIGHT_GRADIENT: weight_gradient_in_groups}
