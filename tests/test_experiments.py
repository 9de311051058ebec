"""The studies: each can be built, their arithmetic, the form of their results, and the documents written from them."""

import json

import _studies
import chex
import demo
import documents
import jax
import jax.numpy as jnp
import numpy as np
import planted_fakes
import pool_surrogates
import pytest
import study as driver
from _faults_process import GOOD, Ended, verdict
from _studies import STUDIES, Arm, Claim
from scipy import stats

from topgap_jax import models, pool
from topgap_jax.measure import results
from topgap_jax.pretrained.files import read
from topgap_jax.rewrite.operations import operations
from topgap_jax.rules import straight_through
from topgap_jax.setup import expressions
from topgap_jax.setup.assembly import context, init


@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_can_be_built_and_measures_what_is_shown_and_claimed(name, request):
    study = STUDIES[name]
    if "tfds(" in (driver.ROOT / "configs" / study.config).read_text(encoding="utf-8"):
        request.getfixturevalue("topgap_data")
    assert study.method in study.arms and study.decides in study.arms
    for arm_name, arm in study.arms.items():
        chosen = driver.experiment(study, arm, 0)
        expressions.choice(chosen.config, "objective", chosen.methods, **context(chosen))
        for split, text in driver.evaluators(study, arm):
            assert chosen.source(split) and expressions.choices(chosen.config, "evaluators", chosen.methods, text, "")
        stored = driver.stored(name)["runs"][arm_name]
        seeds = {int(seed) for seed in stored}
        assert seeds == set(study.seeds)
        assert all(driver.is_there(study, arm, run) for run in stored.values())
    assert {key.split(" | ", 1)[1] for key in driver.stored(name)["comparison"]} <= set(study.shown)
    assert {claim.measure for claim in study.claims} <= set(driver.stored(name)["comparison"])


@pytest.mark.parametrize("name", STUDIES)
def test_a_stored_result_is_what_its_runs_say(name):
    stored = driver.stored(name)
    assert driver.result(name, stored["runs"]) == stored
    for run in (run for seeds in stored["runs"].values() for run in seeds.values()):
        assert [results.to_json(results.from_json(row)) for row in run["rows"]] == run["rows"]
    assert len(json.dumps(stored, indent=1)) < 1e6
    if STUDIES[name].keeps:
        for arm, seed in ((arm, seed) for arm, seeds in stored["runs"].items() for seed in seeds):
            path = driver.KEPT / driver.weights(name, arm, int(seed), driver.ROOT).name
            assert path.stat().st_size <= 1e6 and set(read(path).metadata) >= {"mean", "std"}


def test_the_documents_are_those_of_the_results():
    assert documents.DOCS.read_text(encoding="utf-8") == documents.text(), "docs/results.md is stale: make results"


def test_the_tables_of_reliability_are_those_of_the_results():
    stale = "docs/reliability.md is stale: make results"
    assert documents.RELIABILITY.read_text(encoding="utf-8") == documents.reliability(), stale


@pytest.mark.parametrize(
    "code, err, same, expected",
    [
        (0, "training: 100% 12/12 [00:01<00:00]\n", True, "same numbers"),
        (0, "topgap: the checkpoint 3 is damaged\n", False, "one line"),
        (0, "", False, "silent difference"),
        (0, "", None, "exit code 0"),
        (2, "CPU: as it is\ntopgap: no\n", None, "one line"),
        (2, "topgap: no\nW1130 of another library\n", None, "lines that are not ours"),
        (2, "", None, "no line"),
        (1, "Traceback (most recent call last):\n", None, "traceback"),
        (None, "", None, "hang"),
    ],
)
def test_what_a_disturbed_command_may_end_with(code, err, same, expected):
    words = verdict(Ended(code, "", err, 1.0), same)
    assert words == expected and (words in GOOD) == (expected in ("same numbers", "one line"))
    assert verdict(Ended(130, "", "topgap: stopped\n", 1.0), code=143) == "exit code 130, not 143"


def test_a_surrogate_has_the_logits_of_one_pool_and_the_gradient_of_the_other():
    maps = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 3)), jnp.float32)
    exact, other = pool.top_gap(k=3), pool.gap()
    both = pool_surrogates.through(exact, other)
    np.testing.assert_allclose(both(maps), exact(maps), atol=1e-6)
    weights = jnp.arange(6.0).reshape(2, 3)
    gradient = lambda head: jax.grad(lambda maps: (weights * head(maps)).sum())(maps)
    np.testing.assert_array_equal(gradient(both), gradient(other))
    stored = {"images": 250, "autoattack_left": 54, "rows": {"gap()": {"left": 100, "beyond_autoattack": 2}}}
    assert pool_surrogates.cells(stored, "gap()") == ["`gap()`", "100 of 250, 40.0 % [34.1, 46.2]", "2 of 54"]


def test_planted_fakes():
    """Each changes what it says of a network: thresholds behind every batch norm, the statistics of the batch; and what
    its row in the documents says."""
    norm = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    model = models.classifier(models.small_resnet(), models.map_head(pool.gap()), classes=4, **norm)
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 32, 32, 3)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    plain, sparse, batch = (
        models.bind(change(model), variables)
        for change in (lambda model: model, planted_fakes.mean_sparse, planted_fakes.train_mode)
    )
    assert operations(jax.make_jaxpr(sparse)(images).jaxpr) & set(straight_through) == {"threshold"}
    logits, sparser, together, alone = jax.jit(
        lambda images: (plain(images), sparse(images), batch(images), batch(images[:2]))
    )(images)
    assert np.abs(logits - sparser).max() > 1e-3 and np.abs(together[:2] - alone).max() > 1e-3
    check = lambda name, status: {"id": name, "status": status}
    row = lambda *checks: {"eps": "8/255", "due": ["A10"], "cpu_seconds": 90, "commit": "1a2b3c4", "checks": checks}
    noise = row(check("A10", "fail"), check("A17", "warn")) | {"due": ["A11"]}
    rows = {"probabilities": row(check("A10", "fail")), "noise layer": noise}
    text = documents.planted(
        {"split": "test", "networks": rows | {"resnet20": row(check("A17", "warn")) | {"due": []}}}
    )
    assert [line.split(" | ")[2:6] for line in text.splitlines()[-3:]] == [
        ["A10", "A10", "none", "caught"],
        ["A11", "A10", "A17", "caught by others"],
        ["none", "none", "A17", "passes, as it must"],
    ]


def test_paired_is_the_t_interval_of_the_differences():
    random = np.random.default_rng(0)
    a, b = random.normal(0.3, 1, 5), random.normal(0, 1, 5)
    change, expected = driver.paired(a, b), stats.ttest_rel(a, b).confidence_interval(0.95)
    assert change["mean"] == pytest.approx((a - b).mean())
    assert (change["low"], change["high"]) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    "differences, verdict",
    [
        ([1, 1.1, 0.9, 1, 1], "higher"),
        ([-1, -1.1, -0.9, -1, -1], "lower"),
        ([-1, 2, 0.5, -2, 1], "undecided"),
        ([3], "undecided"),
    ],
)
def test_verdict_of_a_difference(differences, verdict):
    assert driver.paired(differences, [0] * len(differences))["verdict"] == verdict


def test_a_network_is_measured_as_it_is_kept(tmp_path):
    chosen = driver.experiment(STUDIES["shapes"], Arm(), 0)
    born = driver.setup.Loaded(chosen, init(chosen), "", None)
    path = tmp_path / "kept.safetensors"
    kept = driver.narrowed(born, path)
    chex.assert_trees_all_equal(driver.narrowed(kept, path).variables, kept.variables)
    chex.assert_trees_all_close(kept.variables, born.variables, rtol=2**-11, atol=2**-24)
    assert kept.weights == path.name and path.stat().st_size < 3 * sum(
        leaf.size for leaf in jax.tree.leaves(born.variables)
    )


TOY = STUDIES["sgdrop"]._replace(
    arms={"plain": Arm(), "l1": Arm(explain="cam()"), "other": Arm()}, method="l1", decides="other",
    evaluators=(("test", "measures(EXPLAIN, gini())"),), shown={"measures(EXPLAIN, gini()) | gini": "Gini index"},
    claims=(Claim("test | measures(EXPLAIN, gini()) | gini", "sparser maps", 1),),
)  # fmt: skip


def run(study, arm, value):
    (_, text), *_ = study.evaluators
    measures = {"gini": {"value": value, "n": 10, "label": "Gini index"}}
    row = {
        "split": "test",
        "evaluator": text.replace("EXPLAIN", study.arms[arm].explain),
        "overrides": {},
        "examples": 10,
    }
    return {"rows": [{**row, "measures": measures, "cost": {}, "audit": None}]}


def test_arms_are_compared_over_the_seeds_that_all_have_each_with_its_own_explanation():
    values = {"plain": (1.0, 2.0, 9.0), "l1": (2.0, 4.0), "other": (0.0, 1.0)}
    runs = {arm: {str(seed): run(TOY, arm, v) for seed, v in enumerate(column)} for arm, column in values.items()}
    (row,) = driver.compare(TOY, runs).values()
    assert {arm: about["mean"] for arm, about in row["arms"].items()} == {"plain": 1.5, "l1": 3.0, "other": 0.5}
    assert row["arms"]["l1"]["std"] == pytest.approx(2**0.5)
    assert {pair: change["mean"] for pair, change in row["differences"].items()} == {
        "l1 - plain": 1.5, "other - plain": -1.0, "l1 - other": 2.5,
    }  # fmt: skip
    assert "| test | Gini index | 1.500 ± 0.707 | 3.000; +1.500 [" in driver.table(TOY, driver.compare(TOY, runs))


@pytest.mark.parametrize(
    "plain, other, sign, verdict",
    [
        ("higher", "higher", 1, "reproduced"),
        ("higher", "higher", -1, "not reproduced"),
        ("lower", "lower", -1, "reproduced"),
        ("higher", "undecided", 1, "undecided"),
        ("higher", "lower", 1, "not reproduced"),
    ],
)
def test_a_claim_needs_both_controls(plain, other, sign, verdict):
    comparison = {"m": {"differences": {"l1 - plain": {"verdict": plain}, "l1 - other": {"verdict": other}}}}
    assert driver.judge(TOY, comparison, Claim("m", "", sign)) == verdict


@pytest.mark.parametrize(
    "intervals, sign, verdict",
    [
        ([(0.51, 0.55), (0.6, 0.7)], 1, "reproduced"),
        ([(0.51, 0.55), (0.45, 0.55)], 1, "undecided"),
        ([(0.51, 0.55), (0.4, 0.49)], 1, "not reproduced"),
        ([(0.4, 0.49)], -1, "reproduced"),
        ([], 1, "undefined"),
    ],
)
def test_a_claim_about_the_method_itself_needs_its_intervals(intervals, sign, verdict):
    def made(low, high):
        of_a_seed = run(TOY, "l1", 0.5)
        of_a_seed["rows"][0]["measures"]["gini"] |= {"low": low, "high": high}
        return of_a_seed

    runs = {"l1": {str(seed): made(*ends) for seed, ends in enumerate(intervals)}}
    claim = TOY.claims[0]._replace(sign=sign, bound=0.5)
    assert driver.verdict(TOY, runs, {}, claim) == verdict
    assert driver.verdict(TOY, runs, {}, claim._replace(measure="test | other | gini")) == "undefined"


def test_a_claim_about_a_number_that_no_run_has_is_undefined():
    assert driver.judge(TOY, {}, Claim("m", "", 1)) == "undefined"


def test_the_data_set_is_hard_enough_to_ask_the_question():
    """With GAP, in every seed: 85 % on test, 20 points less on test_shifted, and 10 points above chance there."""
    for stored in driver.stored("shapes")["runs"]["gap"].values():
        values = driver.numbers(STUDIES["shapes"], "gap", map(results.from_json, stored["rows"]))
        test, shifted = (values[f"{split} | accuracy() | accuracy"] for split in ("test", "test_shifted"))
        assert test >= 0.85 and test - shifted >= 0.2 and shifted >= 1 / 6 + 0.1


def test_a_run_made_again_is_compared_number_by_number():
    lines = driver.check(TOY, "l1", run(TOY, "l1", 0.5), run(TOY, "l1", 0.5 + 1e-8))
    assert lines == ["1 numbers, 0 of them differ"]
    lines = driver.check(TOY, "l1", run(TOY, "l1", 0.5), run(TOY, "l1", 0.6))
    assert lines[0] == "1 numbers, 1 of them differ" and "stored 0.5, now 0.6" in lines[1]


def test_the_demo_stands_beside_the_study():
    assert set(demo.ARMS) <= set(STUDIES["shapes"].arms)
    rows = {}
    for arm in demo.ARMS:
        stored = [results.from_json(row) for row in driver.stored("shapes")["runs"][arm]["0"]["rows"]]
        few = [row for row in stored if any(row.evaluator in texts for texts in demo.EVALUATORS.values())]
        rows[arm] = [
            row._replace(split=row.split + images) for images, texts in demo.EVALUATORS.items() for row in few if row.evaluator in texts
        ]  # fmt: skip
    table = demo.beside_the_study(rows)
    assert "accuracy  " in table and "0.954" in table and "0.930" in table and "undecided" in table
    assert len([line for line in table.splitlines()[2:] if line.startswith("  ")]) == 2 * len(STUDIES["shapes"].shown)


def test_systems_are_studies():
    assert set(_studies.SYSTEMS) < set(STUDIES) and all(STUDIES[name].claims for name in _studies.SYSTEMS)
