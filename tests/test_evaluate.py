"""`evaluate` and `attack_split` over whole splits: resident, streamed, on one device and on eight."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topgap_jax.attacks import fgsm, pgd, topk_attack
from topgap_jax.balls import linf
from topgap_jax.data import Source
from topgap_jax.errors import UserError
from topgap_jax.evaluators import accuracy, attributional_robustness, coverage, localisation, measures, robust
from topgap_jax.explain import cam
from topgap_jax.measure.evaluate import evaluate, evaluation_variables, measure_split
from topgap_jax.measure.robust import attack_split
from topgap_jax.measure.splits import Split, resident_split, streamed_split
from topgap_jax.measure.verdicts import Log, fingerprint
from topgap_jax.mesh import data_mesh
from topgap_jax.metrics import deletion, gini
from topgap_jax.rewrite import name
from topgap_jax.types import Cost, Model, Output

N, BATCH = 21, 8
RNG = np.random.default_rng(0)
ARRAYS = {
    "image": RNG.integers(64, 192, (N, 4, 4, 3)).astype(np.uint8),
    "label": RNG.integers(0, 2, N).astype(np.int32),
    "box": np.tile(np.float32([0, 0, 0.5, 0.5]), (N, 1)),
    "group": RNG.integers(0, 2, N).astype(np.int32),
}


def apply(variables, images, *, train=False, keys=None, targets=None, step=None):
    """Two classes: logits are +- a linear function of the image."""
    maps = ((images - 0.5) * variables["params"]).sum(-1)
    return Output(name(jnp.stack([-maps, maps], -1), "maps").sum((1, 2)), {}, {})


MODEL = Model(None, apply)
WEIGHTS = jnp.asarray(RNG.choice([-1, 1], (4, 4, 3)), jnp.float32)
VARIABLES = {"params": WEIGHTS, "batch_stats": {}}
DISTANCE = (
    np.abs(((ARRAYS["image"] / 255 - 0.5) * np.asarray(WEIGHTS)).sum((1, 2, 3))) / 48
)  # linf distance to the boundary
RIGHT = (((ARRAYS["image"] / 255 - 0.5) * np.asarray(WEIGHTS)).sum((1, 2, 3)) > 0) == ARRAYS["label"]
EPS = float(np.median(DISTANCE[RIGHT])) + 1e-4
STAND = RIGHT & (DISTANCE > EPS)


@pytest.fixture(scope="module")
def data():
    return resident_split(ARRAYS, classes=2, batch=BATCH)


def source(broken=-1):
    def read(index):
        if index == broken:
            raise OSError("truncated")
        return {name: value[index] if value[index].ndim else int(value[index]) for name, value in ARRAYS.items()}

    return Source("mine", "test", ("a", "b"), N, read, (4, 4), ("box", "group"))


# Splits.


def test_resident_and_streamed_splits_agree():
    streamed = streamed_split(source(), (4, 4), classes=2, batch=BATCH)
    resident = resident_split(ARRAYS, classes=2, batch=BATCH)
    for ids in (None, np.array([3, 20, 5, 7, 1, 0, 9, 11, 2])):
        pairs = list(zip(resident.batches(ids), streamed.batches(ids), strict=True))
        seen = np.concatenate([some for (some, _), _ in pairs])
        np.testing.assert_array_equal(seen, np.arange(N) if ids is None else ids)
        for (some, batch), (same, other) in pairs:
            np.testing.assert_array_equal(some, same)
            assert set(batch) == set(other) == {"image", "label", "targets", "id", "mask", "box", "group"}
            assert batch["mask"].shape == (BATCH,) and int(batch["mask"].sum()) == len(some)
            for key in batch:
                np.testing.assert_array_equal(batch[key][: len(some)], other[key][: len(some)])


def test_the_batch_must_divide_over_the_devices():
    with pytest.raises(UserError, match="batch=12 cannot be split evenly over 8 devices; take 8 or 16"):
        resident_split(ARRAYS, classes=2, batch=12, mesh=data_mesh())
    with pytest.raises(UserError, match="batch=0 must be at least 1"):
        streamed_split(source(), (4, 4), classes=2, batch=0)


def test_a_broken_record_is_named():
    with pytest.raises(UserError, match=r"mine split 'test' index 9 cannot be decoded: truncated"):
        measure_split(
            MODEL, VARIABLES, streamed_split(source(9), (4, 4), classes=2, batch=BATCH), accuracy(), progress=False
        )


# Rows and their file.


def test_rows_hold_values_curves_and_cost(data, tmp_path):
    chosen = {"accuracy()": accuracy(), "localisation(cam())": localisation(cam())}
    chosen["robust(pgd)"] = robust(pgd(linf(EPS), steps=3))
    rows = evaluate(
        MODEL, VARIABLES, data, chosen, split="test", workdir=tmp_path, weights="w", source="s", progress=False
    )
    assert [row["evaluator"] for row in rows] == list(chosen)
    for row in rows:
        assert row["split"] == "test" and row["examples"] == N and row["complete"] is True and row["audit"] is None
        assert row["cost"]["seconds"] >= 0 and row["cost"]["device"] == "cpu"
        assert all(isinstance(value, (int, float)) for value in row["values"].values())
    assert rows[0]["values"]["accuracy"] == pytest.approx(RIGHT.mean())
    assert rows[0]["cost"]["forward_passes"] == 1 and rows[0]["cost"]["gradient_evaluations"] == 0
    assert set(rows[0]["curves"]) == {"calibration"} and "worst_group_accuracy" in rows[0]["values"]
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    assert stored == {"rows": rows, "weights": "w", "data": "s"}


def test_a_row_replaces_its_like_and_other_weights_start_anew(data, tmp_path):
    def run(split="test", weights="first", seed=0):
        chosen = {"accuracy()": accuracy()}
        evaluate(
            MODEL, VARIABLES, data, chosen, split=split, workdir=tmp_path, weights=weights, seed=seed, progress=False
        )
        stored = json.loads((tmp_path / "evaluation.json").read_text())
        return stored["weights"], [row["split"] for row in stored["rows"]]

    assert run() == ("first", ["test"])
    assert run("train") == ("first", ["test", "train"])
    assert run() == ("first", ["train", "test"])
    assert run(weights="second") == ("second", ["test"])


def test_partial_results_survive(data, tmp_path):
    """What was written before an evaluator fails stays."""
    chosen = {"accuracy()": accuracy(), "broken": accuracy()._replace(summary=lambda rows: 1 / 0)}
    with pytest.raises(ZeroDivisionError):
        evaluate(MODEL, VARIABLES, data, chosen, split="test", workdir=tmp_path, progress=False)
    assert [row["evaluator"] for row in json.loads((tmp_path / "evaluation.json").read_text())["rows"]] == [
        "accuracy()"
    ]


def test_a_file_that_is_none_of_ours(data, tmp_path):
    (tmp_path / "evaluation.json").write_text("[]")
    with pytest.raises(UserError, match=r"evaluation.json is not an evaluation of this program; move it away"):
        evaluate(MODEL, VARIABLES, data, {"accuracy()": accuracy()}, split="test", workdir=tmp_path, progress=False)


def test_weights_that_are_not_finite(data, tmp_path):
    """An error, before anything is measured or written."""
    path, leaf = jax.tree_util.tree_leaves_with_path(VARIABLES)[0]
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    broken = jax.tree.map(lambda a: a.ravel().at[0].set(jnp.nan).reshape(a.shape) if a is leaf else a, VARIABLES)
    with pytest.raises(UserError, match=f"best: 1 of {leaf.size} values of {name} are not finite; evaluate an earlier"):
        evaluate(
            MODEL,
            broken,
            data,
            {"accuracy()": accuracy()},
            split="test",
            weights="best",
            workdir=tmp_path,
            progress=False,
        )
    assert not list(tmp_path.iterdir())


def test_numbers_that_json_has_not_are_null(data):
    odd = accuracy()._replace(summary=lambda rows: {"nan": np.float32("nan"), "curve": {"x": [1], "y": [float("inf")]}})
    (row,) = evaluate(MODEL, VARIABLES, data, {"odd": odd}, split="test", progress=False)
    assert row["values"] == {"nan": None} and row["curves"] == {"curve": {"x": [1], "y": [None]}}


def test_averaged_parameters_are_evaluated_where_there_are_some():
    averaged = {"params": 2, "batch_stats": 3}
    assert evaluation_variables({"params": 0, "batch_stats": 1, "ema": averaged}) == averaged
    assert evaluation_variables({"params": 0, "batch_stats": 1}) == {"params": 0, "batch_stats": 1}


def test_a_second_evaluation_compiles_nothing(data, caplog):
    chosen, attack = accuracy(), robust(fgsm(linf(EPS)))
    for repeat in range(2):
        caplog.clear()
        with jax.log_compiles():
            measure_split(MODEL, VARIABLES, data, chosen, progress=False)
            attack_split(MODEL, VARIABLES, data, attack, progress=False)
        compiled = [record for record in caplog.records if "Finished XLA compilation" in record.getMessage()]
        assert bool(compiled) == (repeat == 0), compiled


# Robustness.


def test_robust_accuracy_of_a_linear_model(data):
    """linf distance to a plane is |f| / |w|_1: exactly the examples nearer than eps fall, in one step."""
    found, cost, seconds = attack_split(MODEL, VARIABLES, data, robust(fgsm(linf(EPS))), progress=False)
    attacked = RIGHT.sum()
    assert found["clean_accuracy"] == pytest.approx(RIGHT.mean()) and found["robust_accuracy"] == pytest.approx(
        STAND.mean()
    )
    assert 0 < STAND.sum() < attacked == found["attacked"] and found["unconfirmed"] == 0 and found["fragile"] == 0
    assert found["robust_low"] < found["robust_accuracy"] < found["robust_high"]
    # 1 forward for all; the attacked: 1 step, 1 forward to book the last iterate, 1 to judge it.
    step = fgsm(linf(EPS)).cost
    assert cost == Cost(
        pytest.approx(1 + attacked / N * (step.forwards + 2)), pytest.approx(attacked / N * step.gradients)
    )
    assert found["mean_steps"] == 1 and seconds > 0


def test_runs_take_what_is_unbroken(data):
    weak, strong = fgsm(linf(EPS / 1000)), fgsm(linf(EPS))
    found, cost, _ = attack_split(MODEL, VARIABLES, data, robust(weak, strong), progress=False)
    between = (RIGHT & (DISTANCE > EPS / 1000)).mean()
    assert found["after_runs"] == {"x": [0, 1, 2], "y": pytest.approx([RIGHT.mean(), between, STAND.mean()])}
    assert cost.gradients == pytest.approx((RIGHT.mean() + between) * strong.cost.gradients)


def test_nothing_is_attacked_once_all_are_broken(data):
    flipped = {"params": -WEIGHTS, "batch_stats": {}}
    wrong = resident_split({**ARRAYS, "label": (~RIGHT ^ ARRAYS["label"]).astype(np.int32)}, classes=2, batch=BATCH)
    assert (
        attack_split(MODEL, VARIABLES, data, robust(fgsm(linf(0.9)), pgd(linf(0.9))), progress=False)[0][
            "robust_accuracy"
        ]
        == 0
    )
    found, cost, _ = attack_split(MODEL, flipped, wrong, robust(pgd(linf(EPS))), progress=False)
    assert found["clean_accuracy"] == found["robust_accuracy"] == found["attacked"] == 0 and cost == Cost(1, 0)


def test_a_batch_is_left_when_all_its_examples_are_broken(data):
    """A huge radius breaks everything with the first steps: the rest of the 50 is never made."""
    found, cost, _ = attack_split(
        MODEL, VARIABLES, data, robust(pgd(linf(0.9), steps=50, step_size=0.9)), progress=False
    )
    assert found["robust_accuracy"] == 0 and cost.gradients < 4


def test_what_the_last_forward_pass_does_not_confirm_stands(data):
    """An attack that books a break that is none: the verdict is the forward pass on its images."""
    honest = fgsm(linf(EPS / 1000))
    lying = honest._replace(step=lambda predict, state: state._replace(status=jnp.ones_like(state.status)))
    found, _, _ = attack_split(MODEL, VARIABLES, data, robust(lying), progress=False)
    assert found["robust_accuracy"] == found["clean_accuracy"] and found["unconfirmed"] == found["attacked"]


def test_verdicts_depend_neither_on_order_nor_on_width(data):
    attack = robust(pgd(linf(EPS), steps=2))

    def shuffled(ids):
        rows = np.arange(N, dtype=np.int32) if ids is None else ids
        yield from data.batches(np.random.default_rng(3).permutation(rows))

    plain, _, _ = attack_split(MODEL, VARIABLES, data, attack, seed=4, progress=False)
    for other in (Split(N, shuffled), resident_split(ARRAYS, classes=2, batch=3)):
        again, _, _ = attack_split(MODEL, VARIABLES, other, attack, seed=4, progress=False)
        # Early leaving depends on who is in a batch, the verdicts do not.
        assert {k: again[k] for k in ("robust_accuracy", "after_runs", "attacked")} == {
            k: plain[k] for k in ("robust_accuracy", "after_runs", "attacked")
        }


def test_a_stopped_attack_goes_on(data, tmp_path):
    """Killed after some batches, with half a line written: the rest is attacked, and the row is the same."""
    chosen = {"robust": robust(pgd(linf(EPS), steps=2), pgd(linf(EPS), steps=3))}
    run = lambda data, folder: evaluate(
        MODEL, VARIABLES, data, chosen, split="t", workdir=folder, seed=4, progress=False
    )
    asked = []

    def watched(stop):
        def batches(ids):
            asked.append(ids)
            for number, pair in enumerate(data.batches(ids)):
                if ids is not None and number == stop:
                    raise KeyboardInterrupt
                yield pair

        return Split(N, batches)

    (whole,) = run(data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(watched(1), tmp_path / "cut")
    (log,) = (tmp_path / "cut").glob("attack-*.jsonl")
    with log.open("a") as file:
        file.write('{"run": 0, "ids": [')
    (resumed,) = run(watched(None), tmp_path / "cut")
    for row in (whole, resumed):
        row["cost"].pop("seconds")
    assert resumed == whole
    assert len(asked[3]) == RIGHT.sum() - BATCH and not list((tmp_path / "cut").glob("attack-*"))


def test_a_log_of_other_weights_is_not_used(tmp_path):
    path = tmp_path / "log.jsonl"
    Log(path, {"weights": fingerprint(VARIABLES)}).append({"run": 0})
    assert Log(path, {"weights": fingerprint(VARIABLES)}).entries == [{"run": 0}]
    assert Log(path, {"weights": fingerprint({"params": WEIGHTS + 1e-6})}).entries == []


def test_eight_devices_agree_with_one(data):
    mesh = data_mesh()
    many = resident_split(ARRAYS, classes=2, batch=BATCH, mesh=mesh)
    chosen = {
        "accuracy()": accuracy(),
        "localisation(cam())": localisation(cam()),
        "measures": measures(cam(), gini(), deletion(steps=3)),
        "attributional": attributional_robustness(cam(), topk_attack(cam(), linf(EPS), steps=2, restarts=2, beta=None)),
        "coverage": coverage("maps"),
        "robust": robust(pgd(linf(EPS), steps=2)),
    }
    one = evaluate(MODEL, VARIABLES, data, chosen, split="test", progress=False)
    eight = evaluate(MODEL, VARIABLES, many, chosen, split="test", mesh=mesh, progress=False)
    for row, other in zip(one, eight):
        assert other["values"] == pytest.approx(row["values"], rel=1e-5) and other["cost"]["device"] == "8 x cpu"
