"""Does what the map gives to a part go with what the part does? `single_deletion` of cells, `sensitivity_n` of random
sets of pixels."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax.build import check_number, table
from topgap_jax.grids import cell_numbers, resized
from topgap_jax.keys import fold_in
from topgap_jax.metrics.ranks import is_constant, pearson, spearman
from topgap_jax.metrics.substrates import Substrate, checked, substrate_images
from topgap_jax.rewrite.speed import map_over
from topgap_jax.scores import logit
from topgap_jax.types import Array, Cost, Curve, Measure, Metric, Score


def single_deletion(*, grid: int = 4, substrate: Substrate = "mean", score: Score = logit) -> Metric:
    """Spearman's correlation of the map's sums over grid x grid cells with the drops of the score when one cell at a
    time is replaced by the substrate: {"single_deletion": (b,)} in [-1, 1].

    Hesse et al. 2024, arXiv 2407.11910. One cell leaves more of an image than deletion does, and a rank correlation has
    no scale, so that values of different networks may be compared; it is their in-domain score (IDSDS) where each
    network was trained with a random cell of half of its images replaced by the same substrate. A constant map has 0,
    and is counted: {"single_deletion_constant": (b,)}. Signed maps count with their sign.
    """
    check_number("grid", grid, 2, whole=True)
    substrate, words = checked("single_deletion", substrate)

    def rows(keys, predict, maps, batch):
        images, labels = batch["image"], batch["label"]
        cells = cell_numbers("single_deletion", grid, images.shape[1:3])
        members = jax.nn.one_hot(cells, grid**2)
        sums = jnp.einsum("bhw,hwg->bg", resized(maps, cells.shape), members)
        other = substrate_images("single_deletion", substrate, predict, images)
        after = map_over(
            lambda cell: score(predict(jnp.where((cells == cell)[..., None], other, images)), labels),
            (jnp.arange(grid**2),),
        )
        constant = is_constant(maps)
        value = jnp.where(constant, 0, _or_zero(spearman(sums, score(predict(images), labels)[:, None] - after.T)))
        return {"single_deletion": value, "single_deletion_constant": constant.astype(jnp.float32)}

    about = {
        "single_deletion": Measure(better="higher", label=f"single deletion, {grid} x {grid} cells ({words})"),
        "single_deletion_constant": Measure(label="share of maps that are constant", main=False),
    }
    return Metric(rows, about, lambda predict, images: Cost(grid**2 + 1, 0))


def sensitivity_n(
    *,
    shares: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 0.8),
    subsets: int = 100,
    substrate: Substrate = "mean",
    score: Score = logit,
) -> Metric:
    """Pearson's correlation, over random sets of n pixels, of the map's sum over the set with the drop of the score
    when the set is replaced by the substrate (Ancona et al. 2018, arXiv 1711.06104).

    {"sensitivity_n": (b,)}, the mean over the `shares` n / (h w), and {"sensitivity_n_curve": (b, shares)}; 1 for input
    x gradient of an affine score. The sets are drawn by the example's key. A correlation with something constant is 0.
    """
    check_number("subsets", subsets, 2, whole=True)
    for share in shares:
        check_number("shares", share, 0, 1)
    substrate, words = checked("sensitivity_n", substrate)

    def rows(keys, predict, maps, batch):
        images, labels = batch["image"], batch["label"]
        full, clean = resized(maps, images.shape[1:3]), score(predict(images), labels)
        other = substrate_images("sensitivity_n", substrate, predict, images)
        size = full[0].size
        counts = np.repeat([max(1, round(share * size)) for share in shares], subsets)

        def one(index, count):
            removed = _random_set(fold_in(keys, index), count, full.shape[1:])
            after = score(predict(jnp.where(removed[..., None], other, images)), labels)
            return (full * removed).sum((1, 2)), clean - after

        sums, drops = map_over(one, (jnp.arange(len(counts)), jnp.asarray(counts)))
        b = len(clean)
        divided = lambda values: values.reshape(len(shares), subsets, b).swapaxes(1, 2).reshape(-1, subsets)
        values = _or_zero(pearson(divided(sums), divided(drops))).reshape(len(shares), b)
        values = jnp.where(is_constant(maps), 0, values)
        return {"sensitivity_n": values.mean(0), "sensitivity_n_curve": values.T}

    about = {
        "sensitivity_n": Measure(better="higher", label=f"sensitivity-n ({words})"),
        "sensitivity_n_curve": Curve(
            tuple(map(float, shares)), axes=("share of pixels", "correlation"), label=f"sensitivity-n ({words})"
        ),
    }
    return Metric(rows, about, lambda predict, images: Cost(len(shares) * subsets + 1, 0))


def _random_set(keys: Array, count: Array, size: tuple[int, int]) -> Array:
    """`count` random pixels of each example, bool (b, h, w)."""
    n = size[0] * size[1]
    place = jax.vmap(lambda key: jax.random.permutation(key, n))(keys)
    return (place < count).reshape(-1, *size)


def _or_zero(values: Array) -> Array:
    """The correlations, 0 where one side is constant."""
    return jnp.where(jnp.isnan(values), 0, values)


TABLE = table(single_deletion, sensitivity_n)
