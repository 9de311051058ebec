"""Summaries of a split's numbers: intervals and calibration. NumPy, one value per example."""

import math

import numpy as np

Z = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927): right at 0 and 1, where the normal one has no width.

    >>> [round(x, 3) for x in wilson(500, 1000)]
    [0.469, 0.531]
    """
    share = successes / n
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high): the mean with its normal 95 % interval over images; of one value, that value three times."""
    mean = float(np.mean(values, dtype=np.float64))
    half = Z * float(np.std(values, ddof=1, dtype=np.float64)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return mean, mean - half, mean + half


def calibration(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> tuple[float, dict[str, list[float]]]:
    """Expected calibration error sum share |accuracy - confidence| over equal bins (low, high], and the curve of the filled bins.

    The curve has x = mean confidence, y = accuracy of each bin (Guo et al. 2017, arXiv 1706.04599).
    """
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    filled = count > 0
    x = np.bincount(index, confidence, bins)[filled] / count[filled]
    y = np.bincount(index, correct, bins)[filled] / count[filled]
    error = float((count[filled] * np.abs(y - x)).sum() / len(correct))
    return error, {"x": x.tolist(), "y": y.tolist()}
