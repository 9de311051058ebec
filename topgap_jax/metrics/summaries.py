"""Summaries of a split's numbers: shares and means with their intervals, calibration. NumPy, one value per example."""

import math

import numpy as np

from topgap_jax.types import Curve, Measure

NO_IMAGE = "no image defines it"
Z = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927): right at 0 and 1, where the normal one has no width.

    >>> [round(x, 3) for x in wilson(500, 1000)]
    [0.469, 0.531]
    """
    share = successes / n
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    # Exact at the ends, where rounding leaves 1e-18.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high): the mean with its normal 95 % interval over images; of one value, that value three times."""
    mean = float(np.mean(values, dtype=np.float64))
    half = Z * float(np.std(values, ddof=1, dtype=np.float64)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return mean, mean - half, mean + half


def share(right: np.ndarray, about: Measure, reason: str = NO_IMAGE) -> Measure:
    """The share of True in right (n,) with Wilson's interval, as `about` says; of no image it has no value, and
    `reason` is why."""
    n = len(right)
    if n == 0:
        return about._replace(n=0, reason=reason)
    low, high = wilson(int(np.sum(right)), n)
    return about._replace(value=float(np.mean(right, dtype=np.float64)), low=low, high=high, n=n)


def by_group(right: np.ndarray, group: np.ndarray | None, about: Measure, name: str) -> dict[str, Measure]:
    """`share` of right (n,) in the worst of the groups (n,), "worst_group_<name>", and in each, "group_<group>_<name>";
    {} where the data have no groups, or no images."""
    if group is None or not len(group):
        return {}
    of = lambda each: about._replace(label=f"{about.label} of group {each}", main=False)
    groups = {each: share(right[group == each], of(each)) for each in np.unique(group)}
    worst = min(groups.values(), key=lambda measure: measure.value)
    return {
        f"worst_group_{name}": worst._replace(label=f"worst-group {about.label}", main=about.main),
        **{f"group_{each}_{name}": measure for each, measure in groups.items()},
    }


def average(values: np.ndarray, about: Measure, reason: str = NO_IMAGE) -> Measure:
    """The mean of values (n,) with its interval over the images that define it (are not NaN); none do: no value, and
    `reason`."""
    defined = values[~np.isnan(values)]
    if len(defined) == 0:
        return about._replace(n=0, reason=reason)
    mean, low, high = mean_interval(defined)
    return about._replace(value=mean, low=low, high=high, n=len(defined))


def average_curve(values: np.ndarray, about: Curve) -> Curve:
    """The curve of means over the images that define them, of values (n, x)."""
    defined = ~np.isnan(values)
    count = defined.sum(0)
    means = np.where(defined, values, 0).sum(0, dtype=np.float64) / np.maximum(count, 1)
    return about._replace(y=[float(mean) if n else None for mean, n in zip(means, count)])


def calibration(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> tuple[float, Curve]:
    """Expected calibration error sum share |accuracy - confidence| over equal bins (low, high], and the curve of the
    filled bins.

    The curve has x = mean confidence, y = accuracy of each bin (Guo et al. 2017, arXiv 1706.04599).
    """
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    filled = count > 0
    x = np.bincount(index, confidence, bins)[filled] / count[filled]
    y = np.bincount(index, correct, bins)[filled] / count[filled]
    error = float((count[filled] * np.abs(y - x)).sum() / len(correct))
    return error, Curve(x.tolist(), y.tolist(), ("confidence", "accuracy"), "calibration")
