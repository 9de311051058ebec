"""Does a map find the object? Measures against a region or, where the data have none, against the box.

Maps (b, h', w') are resized to the image (bilinear, half-pixel centres, no antialiasing) and min-max scaled after that;
a constant map becomes 0. Pixels whose region is unsure (2) count on no side.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.grids import resized, scaled
from topgap_jax.types import Array, Batch, Cost, Curve, Measure, Metric

LEVELS = 1001  # bins of PxAP as published: a thousand of .001, and one for the largest value, 1


def box_mask(box: Array, size: tuple[int, int]) -> Array:
    """Pixels (b, h, w) whose centre lies in the box (b, 4), (ymin, xmin, ymax, xmax) in [0, 1]."""
    rows, columns = (jnp.arange(size[0]) + 0.5) / size[0], (jnp.arange(size[1]) + 0.5) / size[1]
    inside = lambda centres, low, high: (centres >= low[:, None]) & (centres < high[:, None])
    return inside(rows, box[:, 0], box[:, 2])[:, :, None] & inside(columns, box[:, 1], box[:, 3])[:, None, :]


def object_masks(batch: Batch) -> tuple[Array, Array]:
    """(inside, known), bool (b, h, w): the object's pixels, and those that are not unsure. Raises UserError without
    region and box."""
    if "region" in batch:
        return batch["region"] == 1, batch["region"] != 2
    if "box" not in batch:
        raise UserError("localisation needs a data set with 'region' or 'box'; this one offers neither")
    inside = box_mask(batch["box"], batch["image"].shape[1:3])
    return inside, jnp.ones_like(inside)


def mask_iou(mask: Array, inside: Array, known: Array) -> Array:
    """|mask and inside| / |mask or inside| over known pixels (b,); NaN for an image without an object."""
    both, either = (mask & inside & known).sum((1, 2)), ((mask | inside) & known).sum((1, 2))
    return jnp.where((inside & known).any((1, 2)), both / jnp.maximum(either, 1), jnp.nan)


def iou(tau: float = 0.5) -> Metric:
    """IoU of the pixels where the scaled map is >= tau with the object: {"iou": (b,)}."""
    check_number("tau", tau, 0, 1)

    def rows(keys, predict, maps, batch):
        inside, known = object_masks(batch)
        return {"iou": mask_iou(scaled(maps, inside.shape[1:]) >= tau, inside, known)}

    about = Measure(better="higher", label=f"IoU at {tau:g}")
    return Metric(rows, {"iou": about}, lambda predict, images: Cost())


def iou_curve(taus: Sequence[float]) -> Metric:
    """IoU at each threshold: {"ious": (b, t)}."""
    for tau in taus:
        check_number("tau", tau, 0, 1)

    def rows(keys, predict, maps, batch):
        inside, known = object_masks(batch)
        full = scaled(maps, inside.shape[1:])
        return {"ious": jnp.stack([mask_iou(full >= tau, inside, known) for tau in taus], 1)}

    return Metric(
        rows,
        {"ious": Curve(tuple(map(float, taus)), axes=("threshold", "IoU"), label="IoU by threshold")},
        lambda predict, images: Cost(),
    )


def in_region() -> Metric:
    """Share of the scaled map's sum inside the object, and that over the object's share of the area (chance is 1).

    {"in_region": (b,), "lift": (b,)}; NaN for a constant map, and for an image without an object.
    """

    def rows(keys, predict, maps, batch):
        inside, known = object_masks(batch)
        full = scaled(maps, inside.shape[1:]) * known
        total, area = full.sum((1, 2)), inside.sum((1, 2)) / jnp.maximum(known.sum((1, 2)), 1)
        share = jnp.where((total > 0) & (area > 0), (full * inside).sum((1, 2)) / total, jnp.nan)
        return {"in_region": share, "lift": share / area}

    about = {
        "in_region": Measure(better="higher", label="share of the map in the object"),
        "lift": Measure(better="higher", label="lift of the map in the object", unit="times chance"),
    }
    return Metric(rows, about, lambda predict, images: Cost())


def energy() -> Metric:
    """Share of the sum of the map's positive part that lies inside the object, and that over the object's share of the
    area.

    {"energy": (b,), "energy_lift": (b,)}: the energy pointing game (Wang et al. 2020, arXiv 1910.01279), with a region
    where the data have one. Negative values are cut off before the resize, nothing is min-max scaled. A map without a
    positive value is NaN, and so is the lift of an image without an object.
    """

    def rows(keys, predict, maps, batch):
        inside, known = object_masks(batch)
        full = resized(jax.nn.relu(maps), inside.shape[1:]) * known
        share = (full * inside).sum((1, 2)) / full.sum((1, 2))
        area = inside.sum((1, 2)) / jnp.maximum(known.sum((1, 2)), 1)
        return {"energy": share, "energy_lift": jnp.where(area > 0, share / area, jnp.nan)}

    about = {
        "energy": Measure(better="higher", label="energy in the object"),
        "energy_lift": Measure(better="higher", label="lift of the energy in the object", unit="times chance"),
    }
    return Metric(rows, about, lambda predict, images: Cost())


def pointing(*, tolerance: float = 0) -> Metric:
    """Does the map's largest value lie on the object, or at most `tolerance` pixels away? {"pointing": (b,)}, 1 or 0.

    The pointing game (Zhang et al. 2016, arXiv 1608.00507); of equal values the first in reading order points.
    TorchRay's tolerance is 15 pixels, for images of 224, and strict, so that its 0 never hits: here 0 is on the object.
    {"pointing_chance": (b,)} is the share of places that hit, {"pointing_centre": (b,)} whether the image's centre
    does. An image without an object is NaN.
    """
    check_number("tolerance", tolerance, 0)

    def rows(keys, predict, maps, batch):
        inside, known = object_masks(batch)
        h, w = inside.shape[1:]
        near = within(inside & known, tolerance)
        places = jnp.where(known, resized(maps, (h, w)), -jnp.inf).reshape(-1, h * w).argmax(1)
        hit = lambda place: jnp.take_along_axis(near.reshape(-1, h * w), place[:, None], 1)[:, 0]
        defined = (inside & known).any((1, 2))
        values = {
            "pointing": hit(places),
            "pointing_chance": (near & known).sum((1, 2)) / jnp.maximum(known.sum((1, 2)), 1),
            "pointing_centre": hit(jnp.full_like(places, (h // 2) * w + w // 2)),
        }
        return {name: jnp.where(defined, value.astype(jnp.float32), jnp.nan) for name, value in values.items()}

    return Metric(rows, dict(POINTING), lambda predict, images: Cost())


POINTING = {
    "pointing": Measure(better="higher", label="pointing game"),
    "pointing_chance": Measure(label="pointing game of a random place"),
    "pointing_centre": Measure(label="pointing game of the centre"),
}


def within(mask: Array, distance: float) -> Array:
    """Pixels (b, h, w) at most `distance` pixels from a pixel of the mask (b, h, w), itself included."""
    h, w = mask.shape[1:]
    reach = min(int(distance), max(h, w))
    if not reach:
        return mask
    near = mask
    # A disc is a stack of rows of its widths: one running maximum for each row of it.
    for shift in range(-reach, reach + 1):
        width = math.isqrt(int(distance**2 - shift**2))
        rows = jnp.pad(mask, ((0, 0), (max(shift, 0), max(-shift, 0)), (0, 0)))[:, max(-shift, 0) :][:, :h]
        window = {"window_dimensions": (1, 1, 2 * width + 1), "window_strides": (1, 1, 1), "padding": "SAME"}
        near |= lax.reduce_window(rows, False, lax.bitwise_or, **window)
    return near


def pixel_counts(maps: Array, inside: Array, known: Array) -> tuple[Array, Array]:
    """How many pixels of the object, and of the rest, have a scaled value in each bin: int32 (b, LEVELS) each."""
    h, w = inside.shape[1:]
    bins = (scaled(maps, (h, w)) * (LEVELS - 1)).astype(jnp.int32).reshape(-1, h * w)
    count = lambda values, counted: jnp.zeros(LEVELS, jnp.int32).at[values].add(counted.astype(jnp.int32))
    counts = lambda mask: jax.vmap(count)(bins, mask.reshape(-1, h * w))
    return counts(inside & known), counts(~inside & known)


def average_precision(true: np.ndarray, false: np.ndarray) -> float | None:
    """Area under precision over recall of pixels, of counts in ascending bins (n,): PxAP of Choe et al. 2020, arXiv
    2001.07437.

    sum over the thresholds, from the top, of precision x (recall - recall before); bins with nothing above are skipped.
    None without a true pixel. Counts of images add up: pooled, it is exact whatever the batches were.

    >>> round(average_precision(np.array([0, 1, 1, 2]), np.array([1, 1, 0, 1])), 6)
    0.6875
    """
    above, wrong = np.cumsum(true[::-1], dtype=np.float64), np.cumsum(false[::-1], dtype=np.float64)
    if not len(above) or above[-1] == 0:
        return None
    precision = above / np.maximum(above + wrong, 1)
    return float((precision * np.diff(above / above[-1], prepend=0)).sum())


TABLE = table(iou, iou_curve, in_region, energy, pointing)
