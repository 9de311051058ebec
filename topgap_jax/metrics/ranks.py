"""How far two maps agree: functions of maps a, b (b, h, w) -> (b,). All but `cosine` see only the order of the values.

(`papers`: art 8.) A map whose values are all equal has no order: Kendall and Spearman are NaN, as SciPy's are; so is
everything of a map that is not finite.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from topgap_jax.build import check_number
from topgap_jax.errors import UserError
from topgap_jax.norms import direction_and_length
from topgap_jax.order import average_ranks, top_mask
from topgap_jax.types import Array

BLOCK = 128  # rows of the n x n comparison that are held at a time


def topk_intersection(a: Array, b: Array, k: int | Array) -> Array:
    """|top_k(a) and top_k(b)| / k (b,), k a number or one for each pair (Ghorbani et al. 2019, arXiv 1710.10547)."""
    a, b = _flat(a, b)
    if isinstance(k, int | np.integer):
        check_number("k", k, 1, a.shape[1], whole=True)
    return _defined(a, b, (top_mask(a, k) & top_mask(b, k)).sum(1) / k)


def kendall_tau_b(a: Array, b: Array) -> Array:
    """Kendall's tau-b, (C - D) / sqrt((n0 - ties of a)(n0 - ties of b)) over all n0 pairs of the n values (b,).

    All n^2 pairs are compared, in blocks that fit: a 64x64 map takes some 20 ms of one CPU core, a 224x224 map seconds.
    """
    a, b = _flat(a, b)
    return _defined(a, b, lax.map(_kendall, (a, b)))


def spearman(a: Array, b: Array) -> Array:
    """Pearson's correlation of the average ranks (b,)."""
    a, b = _flat(a, b)
    return _defined(a, b, pearson(*(jax.vmap(average_ranks)(values) for values in (a, b))))


def pearson(a: Array, b: Array) -> Array:
    """Pearson's correlation of the values (b,); NaN where a map is constant."""
    a, b = (values.astype(jnp.float32) for values in _flat(a, b))
    # By lengths that cannot overflow: the squares of a map of 1e-25 are 0 in float32.
    directions = [direction_and_length(values - values.mean(1, keepdims=True), (1,))[0] for values in (a, b)]
    return jnp.where(is_constant(a) | is_constant(b), jnp.nan, (directions[0] * directions[1]).sum(1))


def cosine(a: Array, b: Array) -> Array:
    """<a, b> / (|a| |b|) of the values themselves (b,); 0 where a map is 0."""
    a, b = (values.astype(jnp.float32) for values in _flat(a, b))
    return (direction_and_length(a, (1,))[0] * direction_and_length(b, (1,))[0]).sum(1)


def is_constant(maps: Array) -> Array:
    """Whether all values of a map (b, ...) are equal: (b,)."""
    return (maps == maps[(slice(None), *(slice(1) for _ in maps.shape[1:]))]).all(tuple(range(1, maps.ndim)))


def _kendall(pair):
    a, b = pair
    sign = lambda values, value: (value > values).astype(jnp.int32) - (value < values)

    def row(values):
        da, db = sign(a, values[0]), sign(b, values[1])
        return (da * db).sum(), jnp.abs(da).sum(), jnp.abs(db).sum()

    # Sums of a row are exact; those of all rows may pass int32, and float32 holds them to 1e-7.
    sums = lax.map(row, (a, b), batch_size=min(BLOCK, len(a)))
    both, untied_a, untied_b = (values.astype(jnp.float32).sum() for values in sums)
    return both / (jnp.sqrt(untied_a) * jnp.sqrt(untied_b))


def _defined(a, b, values):
    """values (b,), NaN where a map is not finite: NaN sorts above every number and would agree with itself."""
    return jnp.where((jnp.isfinite(a) & jnp.isfinite(b)).all(1), values, jnp.nan)


def _flat(a, b):
    if a.shape != b.shape:
        raise UserError(f"maps to compare must have one shape, got {a.shape} and {b.shape}")
    return a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
