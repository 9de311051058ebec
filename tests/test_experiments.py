"""The arithmetic of the studies: paired intervals, and what the data set `shapes` must be."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

SPEC = importlib.util.spec_from_file_location(
    "shapes_study", Path(__file__).parent.parent / "experiments" / "shapes.py"
)
study = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(study)


def test_paired_is_the_t_interval_of_the_differences():
    random = np.random.default_rng(0)
    a, b = random.normal(0.3, 1, 5), random.normal(0, 1, 5)
    found = study.paired(a, b)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found["mean"] == pytest.approx((a - b).mean())
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    "differences, verdict",
    [([1, 1.1, 0.9, 1, 1], "higher"), ([-1, -1.1, -0.9, -1, -1], "lower"), ([-1, 2, 0.5, -2, 1], "undecided")],
)
def test_verdict(differences, verdict):
    assert study.paired(differences, [0] * 5)["verdict"] == verdict


@pytest.mark.parametrize(
    "test, shifted, holds", [(0.9, 0.5, True), (0.84, 0.5, False), (0.9, 0.71, False), (0.9, 0.26, False)]
)
def test_requirement(test, shifted, holds):
    run = {"measures": {"test": {"accuracy.accuracy": test}, "test_shifted": {"accuracy.accuracy": shifted}}}
    assert study.requirement({"gap": {"3": run}}) == [
        {"seed": 3, "test": test, "test_shifted": shifted, "holds": holds}
    ]
