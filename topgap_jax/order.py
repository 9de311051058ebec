"""Order among values: the k-th largest, who is among the k largest, average ranks."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from topgap_jax.errors import UserError
from topgap_jax.types import Array


@jax.jit  # called eagerly, the loop below would be compiled anew each time
def kth_largest(values: Array, k: int | Array) -> Array:
    """The ceil(k)-th largest of values (b, n, c) along axis 1: (b, c), exact; k may be traced.

    The bit patterns are ordered like the floats: first their high 16 bits are found by 16 halvings, then the low ones
    among those that share them. On a CPU up to 17 times as fast as a sort, 1.2 to 5.6 times as `lax.top_k`, and with
    256 positions 1.6 times as 32 halvings of all bits (results/bench_pool.json).
    """
    bits = lax.bitcast_convert_type(values, jnp.int32)
    ordered = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # as integers, in the order of the floats
    count = jnp.ceil(k).astype(jnp.int32)
    high = (ordered >> 16).astype(jnp.int16)
    top = _kth_largest_short(high, count)
    level = high == top[:, None, :]
    low = jnp.where(level, (ordered & 0xFFFF) - 2**15, -(2**15)).astype(jnp.int16)
    rest = _kth_largest_short(low, count - (high > top[:, None, :]).sum(1, dtype=jnp.int32))
    threshold = (top.astype(jnp.int32) << 16) | (rest.astype(jnp.int32) + 2**15)
    return lax.bitcast_convert_type(jnp.where(threshold < 0, threshold ^ 0x7FFFFFFF, threshold), jnp.float32)


def _kth_largest_short(values: Array, count: Array) -> Array:
    """The count-th largest of int16 values (b, n, c) along axis 1, count a number or (b, c): the largest m with count
    values >= m.

    The bounds come from the data, so that the loop's carry keeps sharding and varying axes.
    """
    number = jnp.int16 if values.shape[1] < 2**15 else jnp.int32
    count = count.astype(number)

    def halve(_, bounds):
        low, high = bounds
        gap = low ^ high
        middle = (low & high) + (gap >> 1) + (gap & 1)  # ceil((low + high) / 2) without overflow
        enough = (values >= middle[:, None, :]).sum(1, dtype=number) >= count
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    return lax.fori_loop(0, 16, halve, (values.min(1), values.max(1)))[0]


def largest_float(fits: Callable[[Array], Array], top: Array) -> Array:
    """The largest float32 t in [0, top] with fits(t), each of (b,), where fits holds up to some t and not beyond; 0
    where it never holds.

    By halving the bit patterns, which are ordered like the floats: exact after 31 rounds. Where each is one reduction
    over 128 x 3,072 values, a twentieth of the time of their sort on a CPU.
    """
    number = lambda bits: lax.bitcast_convert_type(bits, jnp.float32)
    high = lax.bitcast_convert_type(top.astype(jnp.float32), jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low + 1) // 2
        fit = fits(number(middle))
        return jnp.where(fit, middle, low), jnp.where(fit, high, middle - 1)

    # The bounds come from the data, so that the loop's carry keeps sharding and varying axes.
    return number(lax.fori_loop(0, 31, halve, (high - high, high))[0])


def top_mask(values: Array, k: int | Array) -> Array:
    """Whether a value is among the k largest of its example: (b, ...) -> bool (b, ...); of equal ones the first
    count."""
    order = jnp.argsort(values.reshape(values.shape[0], -1), axis=1, stable=True, descending=True)
    chosen = jnp.broadcast_to(jnp.arange(order.shape[1]) < jnp.reshape(jnp.asarray(k), (-1, 1)), order.shape)
    return jax.vmap(lambda row, index: jnp.zeros_like(row).at[index].set(row))(chosen, order).reshape(values.shape)


def average_ranks(values: Array) -> Array:
    """Ranks (n,) float32 of values (n,), 1 the smallest; equal values share the mean of their ranks."""
    ascending = jnp.sort(values)
    below, up_to = (jnp.searchsorted(ascending, values, side=side) for side in ("left", "right"))
    return (below + up_to + 1).astype(jnp.float32) / 2


def top_count(k: int | None, n: int) -> int:
    """How many of a map's n positions are its top: k, or by default 100, above 64x64 positions 1000, at most a tenth of
    them.

    >>> top_count(None, 1024), top_count(None, 64), top_count(5, 64)
    (100, 7, 5)
    """
    if k is None:
        return min(100 if n <= 64 * 64 else 1000, math.ceil(n / 10))
    if k > n:
        raise UserError(f"k={k} is more than the {n} positions of the map; give k <= {n}")
    return k
