"""What the studies share: CPU time, and the comparison of two arms paired by seed."""

import resource

import numpy as np
from scipy import stats


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def paired(a: list[float], b: list[float]) -> dict:
    """Mean difference a - b with its 95 % t interval and a verdict."""
    difference = np.subtract(a, b)
    if not np.isfinite(difference).all():
        raise ValueError(f"not every seed has a number: {a} and {b}")
    n = len(difference)
    half = float(stats.t.ppf(0.975, n - 1) * difference.std(ddof=1) / np.sqrt(n)) if n > 1 else float("inf")
    mean = float(difference.mean())
    verdict = "undecided" if abs(mean) <= half else ("higher" if mean > 0 else "lower")
    return {"mean": mean, "low": mean - half, "high": mean + half, "verdict": verdict}
