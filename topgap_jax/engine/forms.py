"""What XLA is given to compute a convolution and its two gradients: by lax, and in the forms that are fast on a CPU.

XLA's CPU copies the window around each pixel of the result into a matrix and multiplies that by the kernel. With few
channels it is the copying that takes the time, so `by_columns` has each window serve several pixels of a row. The
weight gradient is lax's own. `experiments/bench_forms.py` compares the two (results/bench_forms.json).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from topgap_jax.engine.library import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Fused, Geometry
from topgap_jax.types import Array

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def after(out: Array, extras: Sequence[Array], fused: Fused) -> Array:
    """What is fused with a convolution, done to its result."""
    rest = iter(extras)
    out = out + next(rest).reshape(1, 1, 1, -1) if fused.bias else out
    out = out + next(rest) if fused.residual else out
    out = jax.nn.relu(out) if fused.relu else out
    return jnp.where(next(rest).reshape(out.shape), out, 0) if fused.mask else out


def turned(w: Array, geometry: Geometry) -> tuple[Array, Geometry] | None:
    """The kernel and geometry with which the input gradient of stride 1 is itself a convolution of dy; None where it is
    none: with strides, and where pads reach over the kernel."""
    pads = tuple((reach - 1 - low, reach - 1 - high) for reach, (low, high) in zip(geometry.reach, geometry.pads))
    if geometry.strides != (1, 1) or min(map(min, pads)) < 0:
        return None
    kh, kw, i, o = w.shape
    kernel = jnp.flip(w, (0, 1)).reshape(kh, kw, i, geometry.groups, o // geometry.groups)
    kernel = kernel.transpose(0, 1, 4, 3, 2).reshape(kh, kw, o // geometry.groups, geometry.groups * i)
    return kernel, geometry._replace(size=geometry.out, pads=pads)


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
        return forward(x, w, geometry=geometry)
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
    if not geometry.dense:
        return input_gradient(dy, w, geometry=geometry)
    if found := turned(w, geometry):
        return by_columns(dy, found[0], geometry=found[1])
    (kh, kw), (down, along) = geometry.kernel, geometry.strides
    (h, width), (p, q), ((top, _), (left, _)) = geometry.size, geometry.out, geometry.pads
    n, c, o = dy.shape[0], *w.shape[2:]
    if (down, along) == (1, 1) or c > 16:
        flipped = jnp.flip(w, (0, 1)).swapaxes(2, 3)
        sides = zip((h, width), (p, q), (kh, kw), (down, along), (top, left))
        pads = tuple((k - 1 - low, size - (out - 1) * stride - 1 + low) for size, out, k, stride, low in sides)
        return lax.conv_general_dilated(
            dy, flipped, (1, 1), pads, lhs_dilation=(down, along), dimension_numbers=DIMENSIONS
        )
    high, wide = -(-kh // down), -(-kw // along)  # taps that one place has
    taps = jnp.pad(w, ((0, high * down - kh), (0, wide * along - kw), (0, 0), (0, 0)))
    taps = taps.reshape(high, down, wide, along, c, o).transpose(0, 2, 5, 1, 3, 4)
    kernel = jnp.flip(taps.reshape(high, wide, o, down * along * c), (0, 1))
    rows, columns = (h - 1 + top) // down + 1, (width - 1 + left) // along + 1
    pads = ((high - 1, rows - p), (wide - 1, columns - q))
    places = lax.conv_general_dilated(dy, kernel, (1, 1), pads, dimension_numbers=DIMENSIONS)
    places = places.reshape(n, rows, columns, down, along, c).transpose(0, 1, 3, 2, 4, 5)
    return places.reshape(n, rows * down, columns * along, c)[:, top : top + h, left : left + width]


BY_LAX = {FORWARD: forward, INPUT_GRADIENT: input_gradient, WEIGHT_GRADIENT: weight_gradient}
ON_CPU = {FORWARD: by_columns, INPUT_GRADIENT: by_flipped_kernel, WEIGHT_GRADIENT: weight_gradient}
