"""From class maps to logits: the pools, among them Top-GAP (Nieradzik, Stephani & Keuper 2024, arXiv 2409.04819).

Every pool takes maps (b, h, w, k) of any float type and returns logits (b, k), computed in float32.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.order import kth_largest
from topgap_jax.types import Array, Pool

LAST = 2**30  # a step beyond every schedule's end


def gap() -> Pool:
    """Global average pooling: the mean over positions, maps (b, h, w, k) -> (b, k) (Lin et al. 2013, arXiv
    1312.4400)."""

    def pool(maps, step=None):
        return maps.astype(jnp.float32).mean((1, 2))

    return pool


def gmp() -> Pool:
    """Global max pooling: the largest position, maps (b, h, w, k) -> (b, k); ties share the gradient evenly."""

    def pool(maps, step=None):
        return maps.astype(jnp.float32).max((1, 2))

    return pool


def lse(r: float = 2.0) -> Pool:
    """(1/r) log(mean(exp(r x))), between the mean (r -> 0) and the maximum (r -> inf), maps (b, h, w, k) -> (b, k).

    Pinheiro & Collobert 2015, arXiv 1411.6228.
    """
    check_number("r", r, 1e-6)

    def pool(maps, step=None):
        n = maps.shape[1] * maps.shape[2]
        return (jax.nn.logsumexp(r * maps.astype(jnp.float32), (1, 2)) - math.log(n)) / r

    return pool


def top_gap(k: int | float | Callable | None = None, *, fraction: float | Callable | None = None) -> Pool:
    """Mean of the k largest positions of every class map: k = 1 is global max pooling, k = h * w global average
    pooling.

    Maps (b, h, w, k) -> (b, k) (Nieradzik, Stephani & Keuper 2024, arXiv 2409.04819). Either `k`, or `fraction` of the
    h * w positions (rounded half up, at least one), is a number or a schedule step -> number. A schedule gives a real
    k: the weights are clip(k - rank, 0, 1) / k, and no gradient flows into k. Ties share evenly: with t the k-th
    largest value, the gradient is 1/k above t and (k - #above) / (k #equal) at t. The second derivative is 0. A NaN
    anywhere in a map gives NaN.
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
                f"top_gap: k={amount} is more than the {n} positions of {maps.shape[1]}x{maps.shape[2]} maps; give k"
                f" <= {n}"
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
    """How many of n positions a fraction is: floor(fraction n + 1/2), at least 1; 1e-9 because .145 * 100 is
    14.499999999999998.

    >>> positions(0.145, 100), positions(0.001, 49)
    (15, 1)
    """
    return min(max(math.floor(fraction * n + 0.5 + 1e-9), 1), n)


def top_weights(maps: Array, k: int | Array) -> Array:
    """Weights (b, h, w, c) with which the positions enter Top-GAP: 1/k above the k-th value, ties even, summing to 1;
    constant in the gradient."""
    b, h, w, c = maps.shape
    values = lax.stop_gradient(maps.astype(jnp.float32)).reshape(b, h * w, c)
    threshold = kth_largest(values, k)[:, None, :]
    above, ties = values > threshold, values == threshold
    # Not maximum(x, 0), which is what a ReLU looks like to `with_rules`.
    rest = jnp.maximum(0.0, k - above.sum(1, keepdims=True)) / jnp.maximum(ties.sum(1, keepdims=True), 1)
    return (jnp.where(above, 1.0, jnp.where(ties, rest, 0.0)) / k).reshape(b, h, w, c)


TABLE = table(gap, gmp, lse, top_gap)
