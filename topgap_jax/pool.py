"""From class maps to logits: the pools, among them Top-GAP (Nieradzik, Stephani & Keuper 2024, arXiv 2409.04819).

Every pool takes maps (b, h, w, k) of any float type and returns logits (b, k), computed in float32.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from topgap_jax.build import check_number
from topgap_jax.errors import UserError
from topgap_jax.types import Array, Pool

LAST = 2**30  # a step beyond every schedule's end


def gap() -> Pool:
    """Global average pooling: the mean over all positions."""

    def pool(maps, step=None):
        return maps.astype(jnp.float32).mean((1, 2))

    return pool


def gmp() -> Pool:
    """Global max pooling: the largest position; ties share the gradient evenly."""

    def pool(maps, step=None):
        return maps.astype(jnp.float32).max((1, 2))

    return pool


def lse(r: float = 2.0) -> Pool:
    """(1/r) log(mean(exp(r x))), between the mean (r -> 0) and the maximum (r -> inf) (Pinheiro & Collobert 2015, arXiv 1411.6228)."""
    check_number("r", r, 1e-6)

    def pool(maps, step=None):
        n = maps.shape[1] * maps.shape[2]
        return (jax.nn.logsumexp(r * maps.astype(jnp.float32), (1, 2)) - math.log(n)) / r

    return pool


def top_gap(k: int | float | Callable | None = None, *, fraction: float | Callable | None = None) -> Pool:
    """Mean of the k largest positions of every class map: k = 1 is global max pooling, k = h * w global average pooling.

    Either `k`, or `fraction` of the h * w positions (rounded half up, at least one), is a number or a schedule step ->
    number. A schedule gives a real k: the weights are clip(k - rank, 0, 1) / k, and no gradient flows into k. Ties share
    evenly: with t the k-th largest value, the gradient is 1/k above t and (k - #above) / (k #equal) at t. The second
    derivative is 0. A NaN anywhere in a map gives NaN.
    """
    if (k is None) == (fraction is None):
        raise UserError("give exactly one of k and fraction: top_gap(k=4) or top_gap(fraction=.1)")
    amount = fraction if k is None else k
    if not callable(amount):
        check_number("fraction" if k is None else "k", amount, 1e-9 if k is None else 1, 1 if k is None else math.inf)
        if k is not None and k == int(k):
            amount = int(k)

    def pool(maps, step=None):
        n = maps.shape[1] * maps.shape[2]
        if callable(amount):
            count = amount(LAST if step is None else step)
            count = lax.stop_gradient(jnp.clip(count * n if k is None else count, 1.0, n))
        elif k is None:
            count = positions(amount, n)
        elif amount > n:
            raise UserError(
                f"top_gap: k={amount} is more than the {n} positions of {maps.shape[1]}x{maps.shape[2]} maps; give k <= {n}"
            )
        else:
            count = amount
        values = maps.astype(jnp.float32)
        if isinstance(count, int) and count == n:
            return values.mean((1, 2))
        # A NaN in a map has weight 0 or NaN, and 0 * NaN is NaN: the logit says so.
        return (values * top_weights(values, count)).sum((1, 2))

    return pool


def positions(fraction: float, n: int) -> int:
    """How many of n positions a fraction is: floor(fraction n + 1/2), at least 1; 1e-9 because .145 * 100 is 14.499999999999998.

    >>> positions(0.145, 100), positions(0.001, 49)
    (15, 1)
    """
    return min(max(math.floor(fraction * n + 0.5 + 1e-9), 1), n)


def top_weights(maps: Array, k: int | Array) -> Array:
    """Weights (b, h, w, c) with which the positions enter Top-GAP: 1/k above the k-th value, ties even, summing to 1; constant in the gradient."""
    b, h, w, c = maps.shape
    values = lax.stop_gradient(maps.astype(jnp.float32)).reshape(b, h * w, c)
    threshold = kth_largest(values, k)[:, None, :]
    above, ties = values > threshold, values == threshold
    # Not maximum(x, 0), which is what a ReLU looks like to `with_rules`.
    rest = jnp.maximum(0.0, k - above.sum(1, keepdims=True)) / jnp.maximum(ties.sum(1, keepdims=True), 1)
    return (jnp.where(above, 1.0, jnp.where(ties, rest, 0.0)) / k).reshape(b, h, w, c)


@jax.jit  # called eagerly, the loop below would be compiled anew each time
def kth_largest(values: Array, k: int | Array) -> Array:
    """The ceil(k)-th largest of values (b, n, c) along axis 1: (b, c), exact; k may be traced.

    The bit patterns are ordered like the floats: first their high 16 bits are found by 16 halvings, then the low ones among
    those that share them. On a CPU up to 17 times as fast as a sort, 1.2 to 5.6 times as `lax.top_k`, and with 256 positions
    1.6 times as 32 halvings of all bits (results/bench_pool.json).
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
    """The count-th largest of int16 values (b, n, c) along axis 1, count a number or (b, c): the largest m with count values >= m.

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


TABLE = {"gap": gap, "gmp": gmp, "lse": lse, "top_gap": top_gap}
