"""`evaluate` and `attack_split` over whole splits: resident, streamed, on one device and on eight."""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topgap_jax.attacks import fgsm, pgd, topk_attack
from topgap_jax.balls import linf
from topgap_jax.data import Source
from topgap_jax.errors import UserError
from topgap_jax.evaluators import accuracy, attributional_robustness, coverage, curve, localisation, measures, robust
from topgap_jax.explain import cam
from topgap_jax.measure import evaluate as evaluate_module
from topgap_jax.measure import results
from topgap_jax.measure.evaluate import evaluate, evaluation_variables
from topgap_jax.measure.log import Log, packed, unpacked
from topgap_jax.measure.robust import attack_split
from topgap_jax.measure.rows import measure_split
from topgap_jax.measure.splits import Split, resident_split, streamed_split
from topgap_jax.measure.verdicts import fingerprint
from topgap_jax.mesh import data_mesh
from topgap_jax.metrics import deletion, gini
from topgap_jax.metrics.summaries import share
from topgap_jax.rewrite import name
from topgap_jax.types import Cost, Curve, Gallery, Measure, Model, Output

N, BATCH = 21, 8
values = lambda summary: {key: one.value if isinstance(one, Measure) else one for key, one in summary.items()}
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


def run(data, evaluators, model=MODEL, variables=VARIABLES, **options):
    options = {"split": "test", "classes": 2, "progress": False} | options
    return evaluate(model, variables, data, evaluators, **options)


def test_rows_hold_measures_curves_and_cost(data, tmp_path):
    evaluators = {"accuracy()": accuracy(), "localisation(cam())": localisation(cam())}
    evaluators["robust(pgd)"] = robust(pgd(linf(EPS), steps=3))
    changed = {"robust(pgd)": {"eps": "4/255"}}
    rows = run(
        data,
        evaluators,
        workdir=tmp_path,
        weights="w",
        source="s",
        training=lambda: ARRAYS,
        overrides=lambda text: changed.get(text, {}),
    )
    assert [row.evaluator for row in rows] == list(evaluators)
    for row in rows:
        assert row.split == "test" and row.examples == N and row.overrides == changed.get(row.evaluator, {})
        assert row.cost["seconds"] >= 0 and row.cost["device"] == "cpu"
        assert row.audit == ("not audited" if row.evaluator == "robust(pgd)" else None)
    assert rows[0].measures["accuracy"].value == pytest.approx(RIGHT.mean())
    assert rows[0].cost["forward_passes"] == 1 and rows[0].cost["gradient_evaluations"] == 0
    assert set(rows[0].measures) - set(rows[0].numbers) == {"calibration"}
    assert next(iter(rows[2].measures)) == "robust_accuracy", "the number that stands for the row"
    assert results.read(tmp_path / "evaluation.json") == results.Evaluation(rows, "w", "s")


def test_a_row_replaces_its_like_and_those_of_other_weights_are_moved_aside(data, tmp_path, capsys):
    def again(split="test", weights="first", seed=0, overrides=None):
        options = {"split": split, "workdir": tmp_path, "weights": weights, "seed": seed}
        run(data, {"accuracy()": accuracy()}, overrides=lambda text: overrides or {}, **options)
        stored = results.read(tmp_path / "evaluation.json")
        return stored.weights, [(row.split, *row.overrides.values()) for row in stored.rows]

    assert again() == ("first", [("test",)])
    assert again("train") == ("first", [("test",), ("train",)])
    assert again(overrides={"pool": "gmp()"}) == ("first", [("test",), ("train",), ("test", "gmp()")])
    assert again() == ("first", [("train",), ("test", "gmp()"), ("test",)])
    assert capsys.readouterr().err == ""
    assert again(weights="second") == ("second", [("test",)])
    said = r"evaluation\.json: the rows of first are now in (evaluation-first-[0-9a-f]{8}\.json)\n"
    (first,) = re.findall(said, capsys.readouterr().err)
    assert again("train", weights="second") == ("second", [("test",), ("train",)])
    assert again() == ("first", [("train",), ("test", "gmp()"), ("test",)]), "nothing that was measured is lost"
    assert len(results.of(tmp_path / "evaluation.json", "second", "").rows) == 2
    second = {path.name for path in tmp_path.glob("evaluation*.json")} - {"evaluation.json", first}
    assert len(second) == 1 and second.pop().startswith("evaluation-second-") and not (tmp_path / first).exists()


def test_partial_results_survive(data, tmp_path):
    """What was written before an evaluator fails stays."""
    evaluators = {"accuracy()": accuracy(), "broken": accuracy()._replace(summary=lambda rows: 1 / 0)}
    with pytest.raises(UserError, match=r"^broken: its summary of the split: ZeroDivisionError: division by zero$"):
        run(data, evaluators, workdir=tmp_path)
    untyped = accuracy()._replace(summary=lambda rows: {"share": 0.5})
    with pytest.raises(UserError, match=r"^own: 'share' of its summary must be a Measure or Curve, it is float$"):
        run(data, {"own": untyped})
    assert [row.evaluator for row in results.read(tmp_path / "evaluation.json").rows] == ["accuracy()"]


@pytest.mark.parametrize(
    "text",
    ["[]", "{", '{"rows": 3}', '{"rows": [{"split": "test"}]}', '{"rows": [{"values": 3}]}', "\x00"],
)
def test_a_file_that_is_none_of_ours(text, data, tmp_path):
    """It is noticed before anything is measured, and stays as it is."""
    path = tmp_path / "evaluation.json"
    path.write_text(text)
    untouched = accuracy()._replace(rows=lambda *arguments: 1 / 0)
    with pytest.raises(UserError, match=r"evaluation.json is not an evaluation of this program \(.*\); move it away"):
        run(data, {"accuracy()": untouched}, workdir=tmp_path)
    assert path.read_text() == text


def test_a_row_of_version_0_1_0_is_read():
    old = {"split": "test", "evaluator": "robust(pgd(linf(eps))) with eps=4/255", "examples": 50, "complete": True}
    values = {"clean_accuracy": 0.9, "robust_accuracy": 0.5, "robust_low": 0.4, "robust_high": 0.6, "attacked": 45}
    old |= {"values": values, "curves": {"after_runs": {"x": [0, 1], "y": [0.9, 0.5]}}, "cost": {"seconds": 1.0}}
    row = results.from_json(old | {"audit": None})
    assert (row.evaluator, row.overrides, row.audit) == ("robust(pgd(linf(eps)))", {"eps": "4/255"}, "not audited")
    assert list(row.numbers) == ["robust_accuracy", "clean_accuracy", "attacked"]
    robust_accuracy = row.measures["robust_accuracy"]
    assert (robust_accuracy.value, robust_accuracy.low, robust_accuracy.high, robust_accuracy.n) == (0.5, 0.4, 0.6, 50)
    assert row.measures["after_runs"].y == [0.9, 0.5]
    grouped = {
        "accuracy": 0.8,
        "accuracy_low": 0.7,
        "accuracy_high": 0.9,
        "group_1_accuracy": 0.5,
        "group_1_examples": 8,
    }
    row = results.from_json(old | {"evaluator": "accuracy()", "values": grouped, "audit": None})
    assert list(row.numbers) == ["accuracy", "group_1_accuracy"] and row.measures["group_1_accuracy"].n == 8
    spread = {"evaluator": "measures(cam(), extent())", "values": {"effective_area": 0.5}, "audit": None}
    assert list(results.from_json(old | spread).numbers) == ["effective_share"]
    assert results.from_json(results.to_json(row)) == row


def test_pictures_are_stored_and_read_back_and_checked():
    tiles = [np.arange(6, dtype=np.uint8).reshape(2, 3), np.full((1, 2, 3), 200, np.uint8)]
    row = results.Row("test", "receptive_field()", {}, 3, {"fields": Gallery(tiles, ["a", "b"], 2, "c")}, {}, None)
    stored = json.loads(json.dumps(results.to_json(row)))
    again = results.from_json(stored)
    assert again.numbers == {} and again.measures["fields"][1:] == (["a", "b"], 2, "c")
    for tile, expected in zip(again.measures["fields"].tiles, tiles):
        np.testing.assert_array_equal(tile, expected)
    for change in (
        {"captions": ["a"]},
        {"captions": ["a", "\ud800"]},
        {"tiles": []},
        {"columns": 0},
        {"tiles": [{"shape": [7], "bytes": "AAAA"}] * 2},
        {"tiles": [{"shape": [1, 1, 2], "bytes": "AAA="}] * 2},
    ):
        with pytest.raises(ValueError):
            results.from_json(stored | {"measures": {"fields": stored["measures"]["fields"] | change}})


@pytest.mark.parametrize(("right", "low", "high"), [(0, 0.0, None), (N, None, 1.0)])
def test_the_interval_of_none_and_of_all_ends_at_0_and_1(right, low, high, data):
    """Not at 3.5e-18."""
    one = share(np.arange(N) < right, Measure())
    assert low is None or one.low == low
    assert high is None or one.high == high


def test_weights_that_are_not_finite(data, tmp_path):
    """An error, before anything is measured or written."""
    path, leaf = jax.tree_util.tree_leaves_with_path(VARIABLES)[0]
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    broken = jax.tree.map(lambda a: a.ravel().at[0].set(jnp.nan).reshape(a.shape) if a is leaf else a, VARIABLES)
    with pytest.raises(UserError, match=f"best: 1 of {leaf.size} values of {name} are not finite; evaluate an earlier"):
        run(data, {"accuracy()": accuracy()}, variables=broken, weights="best", workdir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_logits_that_are_not_finite_name_the_first_layer(data, tmp_path):
    """Finite weights whose activations overflow: no accuracy, no robustness, but an error that says where."""

    def overflowing(variables, images, **_):
        x = name(images * 1e30, "first")
        x = name(x * variables["params"] * 1e30, "second")
        return Output(name(x - x, "third").mean((1, 2))[:, :2], {}, {})

    for evaluator in (accuracy(), robust(pgd(linf(EPS), steps=2))):
        with pytest.raises(UserError) as raised:
            run(data, {"one": evaluator}, model=Model(None, overflowing), weights="best", workdir=tmp_path)
        text = "best: the logits of 8 of the first 8 images are not finite, from layer 'second' on; "
        assert str(raised.value).startswith(text)
    assert not list(tmp_path.iterdir())


def test_what_is_no_model_no_evaluator_and_no_class(data):
    """A user's own function, an attack alone, and pictures without a label, in a line each."""
    attacks, predict = robust(pgd(linf(EPS), steps=2)), lambda images: images.mean((1, 2))[:, :2]
    of = lambda predict: Model(None, lambda variables, images, **_: Output(predict(images), {}, {}))
    # Finite in the first batch, NaN in the others.
    first = jnp.asarray(ARRAYS["image"][:BATCH] / 255, jnp.float32)
    known = lambda images: (jnp.abs(images[:, None] - first).max((2, 3, 4)) < 1e-6).any(1, keepdims=True)
    late = lambda images: jnp.where(known(images), predict(images), jnp.nan)
    unlabelled = resident_split({**ARRAYS, "label": np.full(N, -1)}, classes=2, batch=BATCH)
    for call, text in {
        lambda: run(data, {"r": attacks}, model=predict): "give a Model, such as models.nnx(module) or models.linen(",
        lambda: attack_split(predict, VARIABLES, data, attacks): "give a Model, such as models.nnx(module) or ",
        lambda: run(data, {"r": attacks.runs[0]}): "'r': give an evaluator such as accuracy() or robust(pgd(linf(8/255",
        lambda: attack_split(MODEL, VARIABLES, data, attacks.runs): "attack_split: give robust(pgd(linf(8/255))) or a",
        lambda: run(
            data, {"r": attacks}, variables={}
        ): "variables must hold 'params', as Model.init returns them, got ",
        lambda: attack_split(MODEL, VARIABLES, unlabelled, attacks, text="r", progress=False): (
            "r: label -1 of image 0 is no class of a network with 2 logits"
        ),
        lambda: run(data, {"r": attacks}, model=of(lambda images: jax.nn.softmax(predict(images)))): (
            "test r: the network returns probabilities, attacks need logits: leave out the softmax"
        ),
        lambda: attack_split(of(lambda images: predict(images)[:, :1]), VARIABLES, data, attacks, text="r"): (
            "r: an attack makes another class win, and the network has 1 logit"
        ),
        lambda: run(data, {"r": attacks}, model=of(late)): f"test r: the logits of {N - 8} of {N} images, first of ",
    }.items():
        with pytest.raises(UserError) as raised:
            call()
        assert str(raised.value).startswith(text)


def test_numbers_that_json_has_not_are_null(data, tmp_path):
    summary = lambda rows: {"nan": Measure(np.float32("nan"), n=3, label="x"), "curve": Curve([1], [float("inf")])}
    run(data, {"odd": accuracy()._replace(summary=summary)}, workdir=tmp_path)
    (row,) = results.read(tmp_path / "evaluation.json").rows
    assert row.measures == {"nan": Measure(n=3, label="x"), "curve": Curve([1], [None])}


def test_averaged_parameters_are_evaluated_where_there_are_some():
    averaged = {"params": 2, "batch_stats": 3}
    assert evaluation_variables({"params": 0, "batch_stats": 1, "ema": averaged}) == averaged
    assert evaluation_variables({"params": 0, "batch_stats": 1}) == {"params": 0, "batch_stats": 1}


def test_a_second_evaluation_compiles_nothing(data, caplog):
    evaluator, attack = accuracy(), robust(fgsm(linf(EPS)))
    for repeat in range(2):
        caplog.clear()
        with jax.log_compiles():
            measure_split(MODEL, VARIABLES, data, evaluator, progress=False)
            attack_split(MODEL, VARIABLES, data, attack, progress=False)
        compiled = [record for record in caplog.records if "Finished XLA compilation" in record.getMessage()]
        assert bool(compiled) == (repeat == 0), compiled


# Robustness.


def test_robust_accuracy_of_a_linear_model(data):
    """linf distance to a plane is |f| / |w|_1: exactly the examples nearer than eps fall, in one step."""
    found, cost, seconds, *_ = attack_split(MODEL, VARIABLES, data, robust(fgsm(linf(EPS))), progress=False)
    interval, found = found["robust_accuracy"], values(found)
    attacked = RIGHT.sum()
    assert found["clean_accuracy"] == pytest.approx(RIGHT.mean()) and found["robust_accuracy"] == pytest.approx(
        STAND.mean()
    )
    assert 0 < STAND.sum() < attacked == found["attacked"] and found["unconfirmed"] == 0 and found["fragile"] == 0
    assert interval.low < interval.value < interval.high and interval.n == N
    # 1 forward for all; the attacked: 1 step, and 1 forward for the verdict on the last iterate.
    step = fgsm(linf(EPS)).cost(None, None)
    assert cost == Cost(
        pytest.approx(1 + attacked / N * (step.forwards + 1)), pytest.approx(attacked / N * step.gradients)
    )
    assert found["mean_steps"] == 1 and seconds > 0


def test_robust_accuracy_of_the_worst_group(data):
    """At every radius that of the group of which the fewest stand; of data without groups nothing is said of them."""
    radii = (EPS / 2, EPS)
    once, *_ = attack_split(MODEL, VARIABLES, data, robust(fgsm(linf(EPS))), progress=False)
    over, *_ = attack_split(MODEL, VARIABLES, data, curve(fgsm(linf(EPS)), eps=radii), progress=False)
    stand = {f"accuracy_at_{i}": RIGHT & (DISTANCE > eps) for i, eps in enumerate(radii, 1)}
    stand["robust_accuracy"] = STAND
    for key, stands in stand.items():
        by_group = [stands[ARRAYS["group"] == group].mean() for group in (0, 1)]
        found = once if key == "robust_accuracy" else over
        assert [found[f"group_{group}_{key}"].value for group in (0, 1)] == pytest.approx(by_group)
        worst = found[f"worst_group_{key}"]
        assert worst.value == pytest.approx(min(by_group)) and worst.n == (ARRAYS["group"] == np.argmin(by_group)).sum()
        assert worst.low < worst.value < worst.high and worst.main
    without = resident_split({k: v for k, v in ARRAYS.items() if k != "group"}, classes=2, batch=BATCH)
    found, *_ = attack_split(MODEL, VARIABLES, without, robust(fgsm(linf(EPS))), progress=False)
    assert "robust_accuracy" in found and not any("group" in key for key in found)


def test_images_whose_logits_are_not_finite_count_as_broken_and_are_listed(data):
    """Finite on bytes, NaN in between, where every attack goes."""
    whole = lambda images: (jnp.abs(255 * images - jnp.round(255 * images)).max((1, 2, 3)) < 1e-2)[:, None]
    predict = lambda images: jnp.where(whole(images), MODEL.apply(VARIABLES, images).logits, jnp.nan)
    model = Model(None, lambda variables, images, **_: Output(predict(images), {}, {}))
    found, *_ = attack_split(model, VARIABLES, data, robust(fgsm(linf(0.3 / 255))), progress=False)
    assert found["robust_accuracy"].value == 0 and found["not_finite"].value == RIGHT.sum()


def test_draws_do_not_depend_on_the_kind_of_keys_that_the_user_prefers(data):
    """Keys of "rbg" would make what an example draws depend on its neighbours."""
    attack = robust(pgd(linf(EPS), steps=1, step_size=0.0))
    plain = attack_split(MODEL, VARIABLES, data, attack, progress=False).examples
    with jax.default_prng_impl("rbg"):
        other = attack_split(MODEL, VARIABLES, data, attack, progress=False).examples
    np.testing.assert_array_equal(plain.margin, other.margin)


def test_runs_take_what_is_unbroken(data):
    weak, strong = fgsm(linf(EPS / 1000)), fgsm(linf(EPS))
    found, cost, *_ = attack_split(MODEL, VARIABLES, data, robust(weak, strong), progress=False)
    between = (RIGHT & (DISTANCE > EPS / 1000)).mean()
    curve = found["after_runs"]
    assert (curve.x, curve.y) == ([0, 1, 2], pytest.approx([RIGHT.mean(), between, STAND.mean()]))
    assert cost.gradients == pytest.approx(RIGHT.mean() + between)


def test_nothing_is_attacked_once_all_are_broken(data):
    flipped = {"params": -WEIGHTS, "batch_stats": {}}
    wrong = resident_split({**ARRAYS, "label": (~RIGHT ^ ARRAYS["label"]).astype(np.int32)}, classes=2, batch=BATCH)
    found, *_ = attack_split(MODEL, VARIABLES, data, robust(fgsm(linf(0.9)), pgd(linf(0.9))), progress=False)
    none = found["robust_accuracy"]
    assert (none.value, none.low) == (0, 0) and 0 < none.high < 0.2
    found, cost, *_ = attack_split(MODEL, flipped, wrong, robust(pgd(linf(EPS))), progress=False)
    found = values(found)
    assert found["clean_accuracy"] == found["robust_accuracy"] == found["attacked"] == 0 and cost == Cost(1, 0)


def test_a_batch_is_left_when_all_its_examples_are_broken(data):
    """A huge radius breaks everything with the first steps: the rest of the 50 is never made."""
    found, cost, *_ = attack_split(
        MODEL, VARIABLES, data, robust(pgd(linf(0.9), steps=50, step_size=0.9)), progress=False
    )
    assert found["robust_accuracy"].value == 0 and cost.gradients < 4


def test_what_the_last_forward_pass_does_not_confirm_stands(data):
    """An attack that books a break that is none: the verdict is the forward pass on its images."""
    honest = fgsm(linf(EPS / 1000))
    lying = honest._replace(step=lambda predict, state: state._replace(status=jnp.ones_like(state.status)))
    found, *_ = attack_split(MODEL, VARIABLES, data, robust(lying), progress=False)
    found = values(found)
    assert found["robust_accuracy"] == found["clean_accuracy"] and found["unconfirmed"] == found["attacked"]


def test_verdicts_depend_neither_on_order_nor_on_width(data):
    attack = robust(pgd(linf(EPS), steps=2))

    def shuffled(ids, width=None):
        rows = np.arange(N, dtype=np.int32) if ids is None else ids
        yield from data.batches(np.random.default_rng(3).permutation(rows), width)

    plain, *_ = attack_split(MODEL, VARIABLES, data, attack, seed=4, progress=False)
    for other in (Split(N, shuffled, BATCH), resident_split(ARRAYS, classes=2, batch=3)):
        again, *_ = attack_split(MODEL, VARIABLES, other, attack, seed=4, progress=False)
        # Early leaving depends on who is in a batch, the verdicts do not.
        assert {k: again[k] for k in ("robust_accuracy", "after_runs", "attacked")} == {
            k: plain[k] for k in ("robust_accuracy", "after_runs", "attacked")
        }


def test_a_log_under_another_flag_of_threefry_is_another_log(tmp_path):
    """The same keys would draw other numbers."""
    names = []
    for flag in (True, False):
        with jax.threefry_partitionable(flag):
            names.append(evaluate_module._log(tmp_path, lambda: "1", None, evaluator="robust").path.name)
    assert len(set(names)) == 2


def test_a_stopped_attack_goes_on(tmp_path):
    """Killed after some batches, with half a line written: the rest is attacked, and the row is the same."""
    data, attack = resident_split(ARRAYS, classes=2, batch=4), robust(pgd(linf(EPS), steps=2), pgd(linf(EPS), steps=3))
    go = lambda data, folder: run(data, {"robust": attack}, workdir=folder, seed=4)
    asked = []

    def watched(stop):
        taken = itertools.count(1)

        def batches(ids, width=None):
            asked.append(ids)
            for pair in data.batches(ids, width):
                if ids is not None and next(taken) == stop:
                    raise KeyboardInterrupt
                yield pair

        return Split(N, batches, 4)

    (whole,) = go(data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(watched(6), tmp_path / "cut")  # of the 11 images three batches for pictures, then two to be attacked
    (log,) = (tmp_path / "cut").glob("unfinished-*.jsonl")
    with log.open("a") as file:
        file.write('{"phase": 0, "ids": [')
    (resumed,) = go(watched(None), tmp_path / "cut")
    for row in (whole, resumed):
        row.cost.pop("seconds")
        row.measures.pop("utilisation")  # what the killed process had in flight is done again
    assert resumed == whole
    # Each time after a few for pictures; the second time no clean image is left, and one says what shape they have.
    _, attacked, clean, one, _, left, *_ = [len(ids) for ids in asked if ids is not None]
    assert attacked == RIGHT.sum() == 11 and 0 < left <= 11 - 4 and (clean, one) == (0, 1)
    assert not list((tmp_path / "cut").glob("unfinished-*"))


@pytest.mark.parametrize("stop", range(3))
def test_a_killed_evaluator_goes_on(stop, data, tmp_path):
    """Also one that prepares, and one with rows that the host makes: what is kept is not measured again, and the row is
    the same, bit for bit."""
    evaluators = {"accuracy()": accuracy(), "localisation(cam())": localisation(cam())}
    options = {"training": lambda: ARRAYS, "seed": 4}

    class Killed(BaseException):
        pass

    def watched(stop):
        calls = itertools.count()

        def batches(ids, width=None):
            measured = next(calls) > 0  # the first look is at the logits of one batch
            for number, (some, batch) in enumerate(data.batches(ids, width)):
                if measured and number == stop:
                    raise Killed
                asked.extend(some.tolist() if measured else [])
                yield some, batch

        return Split(N, batches, BATCH)

    for text, evaluator in evaluators.items():
        asked, folder = [], tmp_path / text
        (whole,) = run(data, {text: evaluator}, workdir=tmp_path / "whole", **options)
        with pytest.raises(Killed):
            run(watched(stop), {text: evaluator}, workdir=folder, **options)
        assert asked == list(range(stop * BATCH))
        (resumed,) = run(watched(None), {text: evaluator}, workdir=folder, **options)
        assert asked == list(range(N))
        assert resumed._replace(cost={}) == whole._replace(cost={})
        assert [path.name for path in folder.iterdir()] == ["evaluation.json"]


def test_what_stands_in_a_log_is_every_bit_and_what_is_damaged_is_left_out(tmp_path):
    generator = np.random.default_rng(0)
    rows = {
        "a": generator.normal(size=(3, 2)).astype(np.float32),
        "b": np.array([True, False, True]),
        "c": np.float32([np.nan, np.inf, -0.0]),
        "d": jnp.bfloat16([1, 2, 3]),
        "e": np.zeros((3, 0), np.int64),
    }
    path = tmp_path / "log.jsonl"
    log = Log(path, {"of": "this"})
    for number in range(3):
        log.append({"rows": packed(rows), "number": number})
    (first, *_) = Log(path, {"of": "this"}).entries
    for key, values in unpacked(first["rows"]).items():
        assert values.dtype == rows[key].dtype and values.shape == rows[key].shape
        assert values.tobytes() == np.asarray(rows[key]).tobytes()
    good = path.read_bytes()
    starts = np.cumsum([0, *map(len, good.splitlines(keepends=True))])
    for place in generator.integers(starts[1], len(good), 40):
        data = bytearray(good)
        data[place] ^= 1 << generator.integers(8)
        path.write_bytes(data)
        left = np.searchsorted(starts, place, side="right") - 2
        assert [entry["number"] for entry in Log(path, {"of": "this"}).entries] == list(range(left))
        assert path.read_bytes() == good[: starts[left + 1]], "what follows is cut off, and can be appended anew"


def test_a_log_of_other_weights_is_not_used(tmp_path):
    path = tmp_path / "log.jsonl"
    Log(path, {"weights": fingerprint(VARIABLES)}).append({"run": 0})
    assert Log(path, {"weights": fingerprint(VARIABLES)}).entries == [{"run": 0}]
    assert Log(path, {"weights": fingerprint({"params": WEIGHTS + 1e-6})}).entries == []


def test_eight_devices_agree_with_one(data):
    mesh = data_mesh()
    many = resident_split(ARRAYS, classes=2, batch=BATCH, mesh=mesh)
    evaluators = {
        "accuracy()": accuracy(),
        "localisation(cam())": localisation(cam()),
        "measures": measures(cam(), gini(), deletion(steps=3)),
        "attributional": attributional_robustness(cam(), topk_attack(cam(), linf(EPS), steps=2, restarts=2, beta=None)),
        "coverage": coverage("maps"),
        "robust": robust(pgd(linf(EPS), steps=2)),
    }
    for row, other in zip(run(data, evaluators), run(many, evaluators, mesh=mesh)):
        assert other.cost["device"] == "8 x cpu"
        for key, one in row.numbers.items():
            expected = one.value if one.value is None else pytest.approx(one.value, rel=1e-5)
            # Slots are a multiple of the devices.
            assert key == "utilisation" or other.measures[key].value == expected
