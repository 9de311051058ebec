"""Boxes from maps, as weakly supervised localisation scores them (Choe et al. 2020, arXiv 2001.07437;
clovaai/wsolevaluation).

NumPy, one image at a time: connected components are host work. Boxes here are (top, left, bottom, right) in whole
pixels and inclusive: a side has length bottom - top + 1.
"""

import numpy as np
import scipy  # scipy.ndimage is imported when it is first used: it takes .3 s

LEVELS = 255  # the published maps are uint8, so 1,000 thresholds tau cut only at 255 levels int(255 tau)
TAUS = np.arange(1000) * 0.001
EIGHT = np.ones((3, 3), bool)


def level_boxes(values: np.ndarray) -> list[np.ndarray]:
    """Boxes of all contours of `values > level` for each level 0 .. 254: uint8 (h, w) -> 255 arrays (m, 4), the largest
    component's first (`contour_boxes`)."""
    boxes, window, place = [], values, np.zeros(2, np.int64)
    present = np.bincount(values.ravel(), minlength=LEVELS + 1) > 0
    for level in range(LEVELS):
        if level and not present[level]:  # without a pixel of exactly this value the cut is the one before
            boxes.append(boxes[-1])
            continue
        corners = _corners(window > level) + np.tile(place, 2)
        boxes.append(_clipped(corners, values.shape))
        # What lies above the next level lies in the extent of this one.
        (top, left), (bottom, right) = (
            (corners[:, :2].min(0), corners[:, 2:].max(0)) if len(corners) else (place, place)
        )
        window, place = values[top:bottom, left:right], np.array([top, left])
    return boxes


def contour_boxes(binary: np.ndarray) -> np.ndarray:
    """Boxes (m, 4) of the components of a bool (h, w) mask, the largest first, and of the holes; none is one (0, 0, 0,
    0).

    Components are 8-connected. As published, size is the area of the outer contour through pixel centres, the bottom
    and right ends lie one pixel too far, except at the border, and the contour of a hole runs through the pixels round
    it.
    """
    return _clipped(_corners(binary), binary.shape)


def _clipped(corners, size):
    h, w = size
    return np.minimum(corners, [h, w, h - 1, w - 1]) if len(corners) else np.zeros((1, 4), np.int64)


def _corners(binary):
    """(m, 4) of the components, the largest first, and of the holes, each one pixel too far; none is (0, 4)."""
    labels, _ = scipy.ndimage.label(binary, EIGHT)
    components = scipy.ndimage.find_objects(labels)
    if not components:
        return np.zeros((0, 4), np.int64)
    largest = 0 if len(components) == 1 else _largest(labels, components)
    corners = [(r.start, c.start, r.stop, c.stop) for r, c in components]
    corners = [corners[largest], *corners[:largest], *corners[largest + 1 :]]
    if len(components) > euler_number(binary):
        background, _ = scipy.ndimage.label(np.pad(~binary, 1, constant_values=True))
        # In the padded image a place is one further, so that a hole starts where its contour does.
        holes = scipy.ndimage.find_objects(background)[1:]
        corners += [(r.start - 2, c.start - 2, r.stop, c.stop) for r, c in holes]
    return np.array(corners, np.int64)


def euler_number(binary: np.ndarray) -> int:
    """Components less holes of a bool (h, w) mask, 8-connected: from its 2 x 2 quads, faster than by labels (Gray
    1971)."""
    padded = np.pad(binary, 1).astype(np.int8)
    a, b, c, d = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    corners = a + b + c + d
    one, three = (np.count_nonzero(corners == n) for n in (1, 3))
    return (one - three - 2 * np.count_nonzero((corners == 2) & (a == d))) // 4


def _largest(labels, slices):
    """Index of the component with the largest contour; of equal ones the last in reading order, as OpenCV's are
    found."""
    bounds = [(s[0].stop - s[0].start - 1) * (s[1].stop - s[1].start - 1) for s in slices]
    best, chosen = -1.0, 0
    for index in sorted(range(len(slices)), key=lambda i: (-bounds[i], -i)):
        if bounds[index] < best:
            break
        area = contour_area(labels[slices[index]] == index + 1)
        if area > best or (area == best and index > chosen):
            best, chosen = area, index
    return chosen


def contour_area(component: np.ndarray) -> float:
    """Area of the polygon through the outer pixel centres of one component, holes filled: a line has 0, a 2 x 2 block
    1."""
    background, _ = scipy.ndimage.label(~np.pad(component, 1))
    filled = (background != background[0, 0]).astype(np.int8)
    corners = filled[:-1, :-1] + filled[1:, :-1] + filled[:-1, 1:] + filled[1:, 1:]
    return float((corners == 4).sum() + 0.5 * (corners == 3).sum())


def pixel_boxes(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Boxes (n, 4) in [0, 1] as whole pixels of an (h, w) image: min(int(corner * size), size - 1), as published."""
    h, w = size
    # A corner on the pixel grid must not fall below it through float32.
    corners = np.floor(np.asarray(boxes, np.float64) * [h, w, h, w] + 1e-4).astype(np.int64)
    return np.clip(corners, 0, [h - 1, w - 1, h - 1, w - 1])


def region_boxes(regions: np.ndarray) -> np.ndarray:
    """Tight boxes (n, 4) in [0, 1] round the pixels of value 1 of regions (n, h, w); none is (0, 0, 0, 0)."""
    sides = []
    for axis in (2, 1):
        line = (regions == 1).any(axis)
        size = line.shape[1]
        sides.append((line.argmax(1) / size, np.where(line.any(1), size - line[:, ::-1].argmax(1), 0) / size))
    (top, bottom), (left, right) = sides
    return np.stack([top, left, bottom, right], 1)


def has_area(boxes: np.ndarray) -> np.ndarray:
    """Which boxes (n, 4) are of an object, bool (n,): none is (0, 0, 0, 0)."""
    return (boxes[:, 2:] > boxes[:, :2]).all(1)


def centred_boxes(sides: tuple[float, float], n: int) -> np.ndarray:
    """n centred boxes (n, 4) in [0, 1] with the given share of the image's (height, width)."""
    height, width = sides
    box = [(1 - height) / 2, (1 - width) / 2, (1 + height) / 2, (1 + width) / 2]
    return np.tile(np.array(box), (n, 1))


def mean_box_sides(boxes: np.ndarray) -> tuple[float, float]:
    """Mean (height, width) of boxes (n, 4) in [0, 1]: the centre-box baseline, to be taken from training images."""
    boxes = np.asarray(boxes, np.float64)
    return float((boxes[:, 2] - boxes[:, 0]).mean()), float((boxes[:, 3] - boxes[:, 1]).mean())


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of inclusive pixel boxes (..., 4), broadcast against each other.

    >>> float(box_iou(np.array([1, 1, 3, 3]), np.array([2, 2, 4, 4])).round(6))
    0.285714
    """
    sides = lambda low, high: np.maximum(high - low + 1, 0)
    area = lambda box: sides(box[..., 0], box[..., 2]) * sides(box[..., 1], box[..., 3])
    height = sides(np.maximum(a[..., 0], b[..., 0]), np.minimum(a[..., 2], b[..., 2]))
    width = sides(np.maximum(a[..., 1], b[..., 1]), np.minimum(a[..., 3], b[..., 3]))
    both = height * width
    return both / (area(a) + area(b) - both)


def level_ious(values: np.ndarray, true: np.ndarray) -> np.ndarray:
    """IoU with the true box (4,) at each level of uint8 (h, w), (255, 2): of the largest component's box (MaxBoxAcc),
    and of the best of all contours' boxes (MaxBoxAccV2)."""
    boxes = level_boxes(values)
    starts = np.cumsum([0, *(len(of_level) for of_level in boxes[:-1])])
    ious = box_iou(np.concatenate(boxes), true)
    return np.stack([ious[starts], np.maximum.reduceat(ious, starts)], 1)


def box_accuracy(ious: np.ndarray, least: float = 0.5) -> np.ndarray:
    """Share of images whose box is right, IoU >= `least`, at each tau of `TAUS`: IoUs per level (n, 255) -> (1000,)."""
    return (ious >= least).mean(0)[(TAUS * LEVELS).astype(int)]
