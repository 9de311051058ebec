"""The arithmetic of the studies: paired intervals, and what the data set `shapes` must be."""

import numpy as np
import pytest
import shapes as study
import systems
from scipy import stats

from topgap_jax.setup import config as configs


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


ROW = {"l1 - plain": {"verdict": "higher"}, "l1 - other": {"verdict": "higher"}}


@pytest.mark.parametrize(
    "row, sign, verdict",
    [
        (ROW, 1, "reproduced"),
        (ROW, -1, "not reproduced"),
        ({**ROW, "l1 - other": {"verdict": "undecided"}}, 1, "undecided"),
        ({**ROW, "l1 - other": {"verdict": "lower"}}, 1, "not reproduced"),
        (None, 1, "undefined"),
    ],
)
def test_a_claim_needs_both_controls(row, sign, verdict):
    system = systems.SYSTEMS["sgdrop"]._replace(method="l1", decides="other")
    assert systems.judge(row, system, systems.Claim("", "", sign), "plain") == verdict


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_every_arm_of_the_systems_can_be_built(name, topgap_data):
    system = systems.SYSTEMS[name]
    assert system.method in system.arms and system.decides in system.arms
    for arm in system.arms.values():
        experiment = systems.arm_experiment(system, arm, 0)
        configs.choice(experiment.config, "objective", experiment.methods, classes=10, total_steps=100)
        for _, evaluator in system.evaluators:
            text = evaluator.replace("EXPLAIN", arm.explain)
            assert configs.choices(experiment.config, "evaluators", experiment.methods, text, "")
    measured = {f"{split} | {evaluator}" for split, evaluator in system.evaluators}
    assert all(claim.measure.rsplit(" | ", 1)[0] in measured for claim in system.claims)
