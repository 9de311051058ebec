"""Explanations from random masks: `rise` (smooth grids) and `mfpp` (segments of several sizes).

The masks come from each example's own key, one for each number, and are made where they are used.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax.baselines import Baseline, baseline_images, check_baseline
from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.explain.masking import Segments, check_chunk, checked_segments, mixed, paint, segment_ids, sum_of
from topgap_jax.keys import fold_in, split
from topgap_jax.scores import probability
from topgap_jax.types import Array, Cost, Explain, Keys, Score

SIGNED = "seen, it lowers the class's score"


def rise(
    *,
    masks: int = 4000,
    cells: int = 7,
    p: float = 0.5,
    debias: bool = False,
    baseline: Baseline = "mean",
    score: Score = probability,
    chunk: int | None = None,
) -> Explain:
    """Mean over random masks of p_y(masked image) mask / p, maps (b, h, w) (RISE, Petsiuk et al. 2018, arXiv
    1806.07421).

    A mask is a grid of `cells` x `cells` zeros and ones, 1 with probability `p`, enlarged linearly by whole cells of
    ceil(size / cells) pixels and shifted by less than one; beyond the grid it is mirrored about the centre of the cells
    at its border, as in the official code. Where a mask is 0 the image shows `baseline` ("mean", "blur", a colour or a
    picture). Of a score that is a sum of parts v_j of the pixels the map is (1 - p) v_i + p sum_j v_j: a high floor
    under every pixel, which `debias` takes away by the mean of p_y (mask - p) / (p (1 - p)): it is signed, and v_i for
    masks that are 0 or 1. The paper takes 4,000 masks for VGG-16 and 8,000 for ResNet-50. chunk: masked copies of each
    image evaluated at a time, which changes memory and speed only; by default so many that 32 images are. One forward
    pass a mask.
    """
    check_number("masks", masks, 1, whole=True)
    check_number("cells", cells, 2, whole=True)
    check_number("p", p, 0, 1)
    if p in (0, 1):
        raise UserError(f"rise: p must lie between 0 and 1, got {p}: masks that are all alike tell nothing")
    check_chunk(chunk)
    check_baseline("rise: baseline", baseline)

    def maps(keys, predict, images, labels):
        other, size = baseline_images("rise: baseline", baseline, predict, images, keys), images.shape[1:3]

        def one(index):
            mask = _smooth_masks(*_grids(fold_in(keys, index), cells, p, size), size)
            return _weighted(score(predict(mixed(mask, images, other)), labels), mask, p, debias)

        return sum_of(one, masks, images, chunk) / masks

    signed = SIGNED if debias or score is not probability else None
    return Explain(maps, lambda predict, images: Cost(masks, 0), signed=signed)


def mfpp(
    *segments: Segments,
    masks: int = 20000,
    p: float = 0.5,
    baseline: Baseline = "mean",
    score: Score = probability,
    chunk: int | None = None,
) -> Explain:
    """Mean of p_y(masked image) over the masks that show a pixel, maps (b, h, w): MFPP (Yang et al. 2020, arXiv
    2006.02659).

    Each mask shows every segment of one level with probability `p`; the levels take turns. segments: one or more
    levels, each as in `feature_ablation`: n (n x n cells) or an int array, such as SLIC segments (`data.slic`
    of 50, 100, 200, 400 and 800 of them are the paper's); by default grids of about as many. H = sum_n p_y m_n / sum_n
    m_n, and 0 where no mask shows the pixel. Unlike the official code the masks are not enlarged by 3 and shifted
    against the image, each has draws of its own, the score is softmax, and H is divided by the mean mask. Other options
    as in `rise`. One forward pass a mask.
    """
    check_number("masks", masks, 1, whole=True)
    check_number("p", p, 0, 1)
    check_chunk(chunk)
    check_baseline("mfpp: baseline", baseline)
    levels = [checked_segments("mfpp", level) for level in segments or (7, 10, 14, 20, 28)]
    most = max(count for _, count in levels)

    def maps(keys, predict, images, labels):
        other = baseline_images("mfpp: baseline", baseline, predict, images, keys)
        ids = [segment_ids("mfpp", level, images) for level, _ in levels]
        b = max(map(len, ids))
        ids = jnp.stack([jnp.broadcast_to(level, (b, *level.shape[1:])) for level in ids])

        def one(index):
            # float: of the whole numbers 0 and 1 `bernoulli` says that they are no probabilities.
            shown = jax.vmap(lambda key: jax.random.bernoulli(key, float(p), (most,)))(fold_in(keys, index))
            mask = paint(shown, ids[index % len(levels)])
            values = score(predict(mixed(mask, images, other)), labels)
            return jnp.where(mask, values[:, None, None], 0), mask

        total, count = sum_of(one, masks, images, chunk)
        return total / jnp.maximum(count, 1)

    signed = SIGNED if score is not probability else None
    return Explain(maps, lambda predict, images: Cost(masks, 0), signed=signed)


def _grids(keys: Keys, cells: int, p: float, size: tuple[int, int]) -> tuple[Array, Array]:
    """Random grids (b, cells, cells) of 0 and 1, and by how many pixels they are shifted, (b, 2)."""
    grid_keys, shift_keys = split(keys)
    grids = jax.vmap(lambda key: jax.random.bernoulli(key, p, (cells, cells)))(grid_keys)
    most = np.array([_cell(length, cells) for length in size])
    shifts = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, most))(shift_keys)
    return grids.astype(jnp.float32), shifts


def _smooth_masks(grids: Array, shifts: Array, size: tuple[int, int]) -> Array:
    """Masks (b, h, w) in [0, 1] of grids (b, s, s) and shifts (b, 2) in pixels."""
    rows, columns = (jnp.asarray(_enlarging(grids.shape[1], _cell(length, grids.shape[1]))) for length in size)

    def one(grid, shift):
        from_row, from_column = (
            jax.lax.dynamic_slice_in_dim(whole, start, length)
            for whole, start, length in zip((rows, columns), shift, size)
        )
        return jnp.einsum("hi,ij,wj->hw", from_row, grid, from_column, precision="highest")

    return jax.vmap(one)(grids, shifts)


def _cell(length: int, cells: int) -> int:
    return math.ceil(length / cells)


def _enlarging(s: int, cell: int) -> np.ndarray:
    """((s + 1) cell, s): what each of the pixels takes of the s values of a line, by linear interpolation between their
    centres; beyond the first and the last the values are mirrored about them.

    >>> 8 * _enlarging(3, 3)[:6] @ [1, 0, 1]  # an eighth of .625, .875, ...
    array([5., 7., 7., 5., 3., 1.])
    """
    places = (np.arange((s + 1) * cell) + 0.5) * s / ((s + 1) * cell) - 0.5
    below = np.floor(places).astype(int)
    mirror = lambda i: np.where(i < 0, -i, np.where(i >= s, 2 * (s - 1) - i, i))
    share, one = (places - below)[:, None], np.eye(s)
    return np.float32((1 - share) * one[mirror(below)] + share * one[mirror(below + 1)])


def _weighted(scores: Array, masks: Array, p: float, debias: bool) -> Array:
    """What masks (b, h, w) with scores (b,) add to N times the map."""
    scores = scores[:, None, None]
    return scores * (masks - p) / (p * (1 - p)) if debias else scores * masks / p


TABLE = table(rise, mfpp)
