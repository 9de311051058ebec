"""How wide a map is: over its own cells, at its own resolution, of its positive part a = relu(map), p = a / sum a.

Compare maps of one resolution only: a 7x7 map and a 224x224 map of the same object differ in all of these. A map
without a positive value has no shape and is NaN, which evaluators leave out and count. (`papers`: sgdrop 6.1; the
formulas are ours.)
"""

import jax
import jax.numpy as jnp

from topgap_jax.build import table
from topgap_jax.types import Array, Cost, Measure, Metric


def gini() -> Metric:
    """Gini coefficient sum_i (2 i - N - 1) p_(i) / N, p ascending, i = 1 ... N: {"gini": (b,)}; 0 even, 1 - 1/N one
    cell.

    Sparse is not right: it rises just as well for a few cells of the background (Hurley & Rickard 2009, arXiv
    0811.4706).
    """

    def rows(keys, predict, maps, batch):
        ascending = jnp.sort(_shares(maps), 1)
        n = ascending.shape[1]
        value = (ascending * (2 * jnp.arange(1, n + 1) - n - 1)).sum(1) / n
        return {"gini": jnp.maximum(value, 0)}  # of an even map it is 0 but for rounding

    return Metric(rows, {"gini": Measure(label="Gini index of the map")}, lambda predict, images: Cost())


def extent() -> Metric:
    """Four shares of the map's cells, each in (0, 1] and larger for a wider map, (b,) each.

    effective_share exp(-sum p ln p) / N; area50 and area90 the fewest cells that hold .5 and .9 of the sum; above_half
    the cells with at least half of the largest value.
    """

    def rows(keys, predict, maps, batch):
        shares = _shares(maps)
        n = shares.shape[1]
        # p ln p is 0 at 0, also where p stands in a product of gradients.
        entropy = -(shares * jnp.log(jnp.where(shares > 0, shares, 1))).sum(1)
        cumulated = jnp.cumsum(-jnp.sort(-shares, 1), 1)
        # Sums are rounded: a sum of .1 nine times is not below .9.
        cells = lambda share: jnp.where(jnp.isnan(entropy), jnp.nan, (cumulated < share - 1e-6).sum(1) + 1.0)
        above = (shares >= 0.5 * shares.max(1, keepdims=True)).sum(1)
        return {
            "effective_share": jnp.exp(entropy) / n,
            "area50": cells(0.5) / n,
            "area90": cells(0.9) / n,
            "above_half": jnp.where(jnp.isnan(entropy), jnp.nan, above) / n,
        }

    about = {
        "effective_share": Measure(label="effective share of the cells"),
        "area50": Measure(label="cells that hold half of the map"),
        "area90": Measure(label="cells that hold nine tenths"),
        "above_half": Measure(label="cells above half of the largest"),
    }
    return Metric(
        rows,
        {name: one._replace(unit="share of cells", main=name == "effective_share") for name, one in about.items()},
        lambda predict, images: Cost(),
    )


def total_variation() -> Metric:
    """sum of |a(i + 1, j) - a(i, j)| and |a(i, j + 1) - a(i, j)| over the cells, by N max a: {"total_variation": (b,)}.

    0 of an even map, 2 at most on each axis: how ragged a map is.
    """

    def rows(keys, predict, maps, batch):
        a = jax.nn.relu(maps.astype(jnp.float32))
        a = a / a.max((1, 2), keepdims=True)
        differences = sum(jnp.abs(jnp.diff(a, axis=axis)).sum((1, 2)) for axis in (1, 2))
        return {"total_variation": differences / a[0].size}

    about = Measure(label="total variation of the map", unit="of its largest value per cell", main=False)
    return Metric(rows, {"total_variation": about}, lambda predict, images: Cost())


def _shares(maps: Array) -> Array:
    """p (b, N), NaN in all cells of a map without a positive value."""
    positive = jax.nn.relu(maps.astype(jnp.float32)).reshape(maps.shape[0], -1)
    # By the largest first: the sum of values near float32's ends is 0 or infinite.
    scaled = positive / positive.max(1, keepdims=True)
    return scaled / scaled.sum(1, keepdims=True)


TABLE = table(gini, extent, total_variation)
