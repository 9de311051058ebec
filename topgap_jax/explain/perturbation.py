"""Explanations by hiding one part of the image after another: `occlusion` by windows, `feature_ablation` by
segments."""

import jax.numpy as jnp
import numpy as np

from topgap_jax.baselines import Baseline, baseline_images, check_baseline
from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.explain.masking import (
    Segments,
    check_chunk,
    checked_segments,
    masked_scores,
    paint,
    segment_ids,
)
from topgap_jax.scores import logit
from topgap_jax.types import Cost, Explain, Score

SIGNED = "hiding it raises the class's score"


def occlusion(
    *,
    window: int | tuple[int, int] | None = None,
    stride: int | tuple[int, int] | None = None,
    baseline: Baseline = "mean",
    score: Score = logit,
    chunk: int | None = None,
) -> Explain:
    """Mean over the windows that cover a pixel of s(x) - s(x with the window replaced), maps (b, h, w), signed.

    Zeiler & Fergus 2014, arXiv 1311.2901, as captum has it: windows start every `stride` pixels, ceil((size - window) /
    stride) + 1 of them along an axis, the last one cut at the border; each window hides every channel. window, stride:
    pixels, or (rows, columns); by default an eighth of each side, and half of the window. baseline: what a window shows
    instead, "mean" (what the network's normalisation maps to zero), "black", "blur" or another of `baselines.NAMES`, a
    colour, or a picture. chunk:
    copies of each image evaluated at a time, which changes memory and speed only; by default so many that 32 images
    are. One forward pass a window, and one more.
    """
    check_chunk(chunk)
    check_baseline("occlusion: baseline", baseline)
    window, stride = _pair("window", window), _pair("stride", stride)

    def axes(images):
        """For each axis which windows (n, size) hold which pixels."""
        size = images.shape[1:3]
        sides = window or tuple(max(1, length // 8) for length in size)
        steps = stride or tuple(max(1, side // 2) for side in sides)
        if any(side > length for side, length in zip(sides, size)):
            raise UserError(
                f"occlusion: a window of {sides[0]} x {sides[1]} is larger than images of {size[0]} x {size[1]}"
            )
        if any(step > side for step, side in zip(steps, sides)):
            raise UserError(
                f"occlusion: a stride of {steps[0]} x {steps[1]} leaves gaps between windows of {sides[0]} x"
                f" {sides[1]}; give stride <= window"
            )
        return [_windows(*each) for each in zip(size, sides, steps)]

    def maps(keys, predict, images, labels):
        rows, columns = axes(images)
        places = np.stack(np.meshgrid(range(len(rows)), range(len(columns)), indexing="ij"), -1).reshape(-1, 2)
        rows, columns = jnp.asarray(rows), jnp.asarray(columns)
        places = np.concatenate([places, [[-1, -1]]])  # nothing hidden, last
        other = baseline_images("occlusion: baseline", baseline, predict, images, keys)
        keep = lambda place: ~(rows[place[0], :, None] & columns[place[1]] & (place[0] >= 0))[None]
        scores = masked_scores(keep, (places,), predict, score, images, labels, other, chunk)
        drops = (scores[-1] - scores[:-1]).T.reshape(-1, len(rows), len(columns))
        # A window is the product of a row and a column of them, and so is the number of windows over a pixel.
        total = jnp.einsum("bnm,nh,mw->bhw", drops, jnp.float32(rows), jnp.float32(columns), precision="highest")
        return total / (rows.sum(0)[:, None] * columns.sum(0))

    def cost(predict, images):
        rows, columns = axes(images)
        return Cost(len(rows) * len(columns) + 1, 0)

    return Explain(maps, cost, signed=SIGNED)


def feature_ablation(
    segments: Segments = 7, *, baseline: Baseline = "mean", score: Score = logit, chunk: int | None = None
) -> Explain:
    """s(x) - s(x with the pixel's segment replaced), maps (b, h, w), signed; captum's FeatureAblation.

    segments: n, a grid of n x n cells, or the number of each pixel's segment as an int array (h, w), or (b, h, w) of
    the batch that is explained (`data.slic`). The drop stands on each pixel of its segment, not divided by their
    number. baseline, chunk: as in `occlusion`. One forward pass a segment, and one more.
    """
    check_chunk(chunk)
    check_baseline("feature_ablation: baseline", baseline)
    segments, count = checked_segments("feature_ablation", segments)

    def maps(keys, predict, images, labels):
        ids = segment_ids("feature_ablation", segments, images)
        other = baseline_images("feature_ablation: baseline", baseline, predict, images, keys)
        hidden = np.append(np.arange(count), -1)  # nothing hidden, last
        scores = masked_scores(lambda i: ids != i, (hidden,), predict, score, images, labels, other, chunk)
        return paint((scores[-1] - scores[:-1]).T, ids)

    return Explain(maps, lambda predict, images: Cost(count + 1, 0), signed=SIGNED)


def _pair(name: str, value: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if value is None:
        return None
    pair = value if isinstance(value, tuple) and len(value) == 2 else (value, value)
    for number in pair:
        check_number(name, number, 1, whole=True)
    return pair


def _windows(size: int, side: int, step: int) -> np.ndarray:
    """Whether each window holds each pixel of an axis, bool (n, size).

    >>> _windows(4, 3, 2).astype(int)
    array([[1, 1, 1, 0],
           [0, 0, 1, 1]])
    """
    starts = step * np.arange(-(-(size - side) // step) + 1)[:, None]
    pixels = np.arange(size)
    return (pixels >= starts) & (pixels < starts + side)


TABLE = table(occlusion, feature_ablation)
