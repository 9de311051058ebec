"""The pooling process of bench_pool.py: ways of top-k pooling that all give the same logits and the same even-tie
gradient.

Exception: `top_k` with its own gradient gives one of the tied positions everything.
"""

import jax
import jax.numpy as jnp
from _bench_worker import serve
from jax import lax

import topgap_jax as tg
from topgap_jax.run.cpu import configure_cpu


def weighted(kth_largest):
    """Mean of the k largest positions as a weighted sum; kth_largest(values (b, n, c), k) -> (b, 1, c)."""

    def way(k):
        def pool(maps):
            b, h, w, c = maps.shape
            values = maps.reshape(b, h * w, c)
            threshold = kth_largest(lax.stop_gradient(values), k)
            above, ties = values > threshold, values == threshold
            share = (k - above.sum(1, keepdims=True)) / (k * ties.sum(1, keepdims=True))
            return (values * lax.stop_gradient(jnp.where(above, 1 / k, jnp.where(ties, share, 0.0)))).sum(1)

        return pool

    return way


def own_gradient(k):
    """`lax.top_k`, differentiated by JAX."""

    def pool(maps):
        b, h, w, c = maps.shape
        return lax.top_k(maps.reshape(b, h * w, c).swapaxes(1, 2), k)[0].mean(-1)

    return pool


def by_top_k(values, k):
    """The least of the k values of `lax.top_k`. (Its last one, `[..., -1]`, is compiled as a sort.)"""
    return lax.top_k(values.swapaxes(1, 2), k)[0].min(-1)[:, None, :]


def by_sort(values, k):
    """The k-th from the end of the sorted values."""
    return jnp.sort(values, axis=1)[:, -k][:, None, :]


def by_maxima(values, k):
    """Take the maximum, leave everything from there upwards out, again, until k positions are taken."""

    def following(_, carry):
        threshold, left = carry
        highest = jnp.where(values < threshold, values, -jnp.inf).max(1, keepdims=True)
        taken = (values == highest).sum(1, keepdims=True, dtype=jnp.int32)
        return jnp.where(left > 0, highest, threshold), left - taken

    start = values.max(1, keepdims=True)
    return lax.fori_loop(0, k, following, (jnp.full_like(start, jnp.inf), jnp.full_like(start, k, jnp.int32)))[0]


def by_bisection(values, k):
    """32 halvings of the interval of ordered bit patterns."""
    bits = lax.bitcast_convert_type(values, jnp.int32)
    ordered = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

    def halve(_, bounds):
        low, high = bounds
        gap = low ^ high
        middle = (low & high) + (gap >> 1) + (gap & 1)
        enough = (ordered >= middle).sum(1, keepdims=True, dtype=jnp.int32) >= k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    start = ordered.min(1, keepdims=True), ordered.max(1, keepdims=True)
    threshold, _ = lax.fori_loop(0, 32, halve, start)
    return lax.bitcast_convert_type(jnp.where(threshold < 0, threshold ^ 0x7FFFFFFF, threshold), jnp.float32)


WAYS = {
    "gap": lambda k: tg.pool.gap(),
    "top_gap (ours)": tg.pool.top_gap,
    "bisection in 32 bits": weighted(by_bisection),
    "maximum, k times": weighted(by_maxima),
    "lax.top_k, own gradient": own_gradient,
    "lax.top_k, threshold": weighted(by_top_k),
    "sort, threshold": weighted(by_sort),
}


def prepare(way, shape, k):
    maps = jax.random.normal(jax.random.key(0), shape)
    cotangent = jax.random.normal(jax.random.key(1), (shape[0], shape[3]))

    @jax.jit
    def forward_backward(maps, cotangent):
        logits, backward = jax.vjp(WAYS[way](k), maps)
        return logits, backward(cotangent)[0]

    def run():
        return jax.block_until_ready(forward_backward(maps, cotangent))

    logits, gradient = run()
    return run, run, {"logits": float(logits.sum()), "gradient": float((gradient * maps).sum())}


if __name__ == "__main__":
    configure_cpu()
    serve(prepare)
