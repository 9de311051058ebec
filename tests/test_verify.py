"""A model's JSON in the form of RobustBench: what `topgap evaluate --model-info` writes, and `topgap verify` confirms."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.test_cli import TINY, patch, topgap
from topgap_jax import pretrained, setup
from topgap_jax.attacks import apgd, autoattack, pgd, square
from topgap_jax.balls import l2, linf
from topgap_jax.build import build
from topgap_jax.errors import UserError
from topgap_jax.evaluators import robust
from topgap_jax.measure import model_info
from topgap_jax.measure.results import NOT_AUDITED, Row
from topgap_jax.mesh import data_mesh
from topgap_jax.scores import dlr
from topgap_jax.setup.assembly import init

WEIGHTS, ROBUST = "weights.safetensors", "robust(fgsm(linf(eps)))"
EVALUATORS = f"{ROBUST}, regions(fill=mean)"


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    patch(monkeypatch)
    monkeypatch.setattr(setup.verify, "data_mesh", lambda: data_mesh(jax.devices()[:1]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with weights, and the file that an evaluation of them wrote."""
    folder = tmp_path_factory.mktemp("verify")
    variables = init(setup.experiment(TINY))
    pretrained.save(folder / WEIGHTS, variables)
    (folder / "model.json").write_text('{"name": "A tiny one", "venue": "N/A", "clean_acc": "99.99"}')
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch(monkeypatch)
        words = ("--weights", folder / WEIGHTS, "--evaluators", EVALUATORS, "--config.eps=.02", "--batch", 10)
        code, _, err = topgap("evaluate", "--config", TINY, *words, "--model-info", folder / "model.json")
    assert code == 0, err
    return folder


@pytest.fixture
def copy(made, tmp_path):
    """(folder with a copy of both, change(**keys) of its file)."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.json"

    def change(**keys):
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
        return path

    return tmp_path, change


def test_the_file_has_the_keys_of_robustbench_and_keeps_what_was_filled_in(made):
    stored = json.loads((made / "model.json").read_text())
    assert list(stored)[:12] == [
        "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture",
        "eps", "clean_acc", "reported", "external",
    ]  # fmt: skip
    rows = {row["evaluator"]: row["measures"] for row in stored["rows"]}
    text = lambda evaluator, measure: f"{100 * rows[evaluator][measure]['value']:.2f}"
    assert (stored["name"], stored["venue"], stored["link"]) == ("A tiny one", "N/A", None)
    assert stored["clean_acc"] == text(ROBUST, "clean_accuracy") != "99.99"
    assert stored["external"] == text(ROBUST, "robust_accuracy"), "no AutoAttack was made"
    assert stored["background_gap"] == text("regions(fill=mean)", "background_gap")
    assert {"autoattack_acc", "unreliable"}.isdisjoint(stored), "theirs for: not measured, unknown"
    assert (stored["eps"], stored["threat_model"], stored["number_forward_passes"]) == ("0.02", "Linf", 1)
    low, high = (f"{100 * rows[ROBUST]['robust_accuracy'][bound]:.2f}" for bound in ("low", "high"))
    assert stored["footnote"] == (
        f"20 images of test, 95 % interval [{low}, {high}]. {stored['external']} % is under {ROBUST}. Not audited."
    )
    assert (stored["weights"], stored["config"]["init"], stored["config"]["eps"]) == (WEIGHTS, "", 0.02)
    check_kinds(stored)
    assert stored["file"] is None and str(made) not in json.dumps(stored)


KINDS = {  # of RobustBench's 236 files; null is what their own program writes before a person fills it in
    "link": str, "name": str, "authors": str, "additional_data": bool, "number_forward_passes": int, "dataset": str,
    "venue": str, "architecture": str, "eps": str, "clean_acc": str, "reported": str, "autoattack_acc": str,
    "external": str, "unreliable": bool, "footnote": str,
}  # fmt: skip


def check_kinds(stored):
    assert all(isinstance(stored[key], kind | None) for key, kind in KINDS.items() if key in stored)
    assert [key for key in stored if key in KINDS] == [key for key in KINDS if key in stored]
    best = stored["external"] if "external" in stored else stored["autoattack_acc"]  # as their tables take it
    assert 0 <= float(best) <= float(stored["clean_acc"]) <= 100


def test_verify_confirms_it(made):
    code, out, err = topgap("verify", made / "model.json")
    assert code == 0, err
    assert out.count("20       0  agrees") == 3, out
    measures = ("clean accuracy, robust", "robust accuracy, robust", "background gap, regions")
    assert all(f"\n{measure}(" in out for measure in measures)


def test_it_is_a_config_too(copy):
    folder, _ = copy
    words = ("--config", folder / "model.json", "--weights", folder / WEIGHTS)
    code, out, _ = topgap("layers", *words)
    assert code == 0 and "backbone/stage1" in out


def test_verify_does_not_confirm_another_number(copy):
    folder, change = copy
    images = json.loads((folder / "model.json").read_text())["images"]
    images[ROBUST]["robust_accuracy"] = "1" * 20
    code, out, err = topgap("verify", change(images=images, external="99.00"))
    assert code == 1 and out.count("does not agree (p = ") == 1 and out.count("  agrees") == 2
    assert err.splitlines()[-1].startswith(
        f"topgap: {folder / 'model.json'} is not confirmed: external is '99.00', and its images give '100.00'; "
        f"robust accuracy of {ROBUST} is "
    )


def test_verify_wants_the_weights_of_the_file(copy):
    folder, change = copy
    path = change(fingerprint="0" * 16)
    code, _, err = topgap("verify", path)
    assert code == 2 and f"{path} is about other weights than {WEIGHTS}: their fingerprint is 0000" in err
    path = change(weights="elsewhere.safetensors", weights_from="https://example.org/")
    code, _, err = topgap("verify", path)
    assert code == 2 and "give --weights FILE; they are to be had from https://example.org/" in err
    code, _, err = topgap("verify", path, "--weights", folder / WEIGHTS)
    assert code == 2 and "is about other weights than" in err


def test_nothing_that_a_file_names_is_run(copy):
    """Methods of a Python file: it is run when the command line names it."""
    folder, change = copy
    (folder / "mine.py").write_text(
        "open('was_run', 'w')\nfrom topgap_jax.models import small_resnet\n"
        "def methods(): return {'mine': small_resnet}\n"
    )
    config = json.loads((folder / "model.json").read_text())["config"]
    config["backbone"] = config["backbone"].replace("small_resnet", "mine")
    code, _, err = topgap("verify", change(config=config, file="mine.py"))
    assert code == 2 and not (folder / "was_run").exists()
    assert "'mine' is no name of the library" in err and "add --config mine.py" in err


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"rows": "x"}, "is no model's file that can be verified (TypeError: "),
        ({"images": {}}, "(ValueError: it has no images)"),
        ({"batch": "ten"}, "(ValueError: batch is of another kind)"),
        ({"split": "tset"}, "has no split 'tset'"),
        ({"data": {"classes": 3}}, "data.classes is 3, not a list"),
        ({"weights": "w" * 300}, "lie neither beside it nor in TOPGAP_DATA; give --weights FILE"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line(copy, keys, message):
    code, _, err = topgap("verify", copy[1](**keys))
    assert code == 2 and message in err, err


def test_an_unknown_evaluator_is_one_line(copy):
    folder, change = copy
    stored = json.loads((folder / "model.json").read_text())
    text = json.dumps(stored).replace("fgsm(", "fgms(")
    code, _, err = topgap("verify", change(**json.loads(text)))
    (line,) = [line for line in err.splitlines() if line.startswith("topgap: ")]
    assert code == 2 and "'fgms'" in line and "rows" in line


def test_other_files_are_one_line(tmp_path):
    path = tmp_path / "model.json"
    assert topgap("verify", path)[::2] == (2, f"topgap: there is no file '{path}'\n")
    for text, message in (("{", "is not the JSON of a model: "), ("[]", "the whole is []"), ("{}", "can be verified")):
        path.write_text(text)
        code, _, err = topgap("verify", path)
        assert code == 2 and message in err and err.count("\n") == 1
    path.write_text('{"clean_acc": "94.78", "autoattack_acc": "0.0", "eps": "8/255"}')
    code, _, err = topgap("verify", path)
    assert code == 2 and "has RobustBench's numbers alone" in err


@pytest.mark.parametrize(
    "evaluators, split, message",
    [
        ("accuracy()", "test", "got 1 and 0"),
        (ROBUST, "test[:5], test[5:]", "got 2 and 1"),
        ("robust(fgsm(linf(eps)), fgsm(l2(eps)))", "test", "is about one ball, linf, l2 or l1; the attacks are fgsm, linf("),
    ],
)  # fmt: skip
def test_what_no_file_can_be_made_of_is_said_before_anything_is_measured(made, tmp_path, evaluators, split, message):
    words = ("--weights", made / WEIGHTS, "--split", split, "--evaluators", evaluators)
    code, out, err = topgap("evaluate", "--config", TINY, *words, "--model-info", tmp_path / "model.json")
    assert code == 2 and message in err and "reading" not in err and not list(tmp_path.iterdir())


BALL = linf(8 / 255)
AUTOATTACK, PGD = robust(autoattack(BALL)), robust(pgd(BALL))


@pytest.mark.parametrize(
    "shares, audit, expected",
    [
        ({"aa": 0.5}, NOT_AUDITED, {"autoattack_acc": "50.00"}),
        ({"aa": 0.5, "pgd": 0.6}, NOT_AUDITED, {"autoattack_acc": "50.00"}),
        ({"aa": 0.5, "pgd": 0.4}, "audit at linf(8/255): UPPER BOUND ONLY: 1 of 9 checks failed", {"autoattack_acc": "50.00", "external": "40.00", "unreliable": True}),
        ({"aa": 0.5}, "audit at linf(1/255): no check failed (9 checks, 0 warnings)", {"autoattack_acc": "50.00"}),
        ({"aa": 0.5}, "audit at linf(8/255): no check failed (9 checks, 0 warnings)", {"autoattack_acc": "50.00", "unreliable": False}),
    ],
)  # fmt: skip
def test_what_robustbench_calls_autoattack_external_and_unreliable(shares, audit, expected):
    robustness = {text: {"aa": AUTOATTACK, "pgd": PGD}[text] for text in shares}
    images = {
        text: {"clean_accuracy": np.ones(10), "robust_accuracy": np.arange(10) < 10 * share}
        for text, share in shares.items()
    }
    rows = {text: Row("test", text, {}, 10, {}, {}, audit) for text in shares}
    found = model_info.measured(robustness, rows, images, "test")
    keys = ("autoattack_acc", "external", "unreliable")
    assert {key: found[key] for key in keys if key in found} == expected
    assert (found["eps"], found["threat_model"], found["clean_acc"]) == ("8/255", "Linf", "100.00")


@pytest.mark.parametrize(
    "attacks",
    [
        (apgd(BALL), apgd(BALL, score=dlr)),  # "rand" without its passes
        (apgd(BALL, rho=0), *autoattack(BALL)[1:]),
        (*autoattack(BALL)[:3], square(BALL, p_init=0.001)),
        autoattack(BALL)[1:],
    ],
)
def test_what_is_weaker_than_autoattack_is_not_called_so(attacks):
    images = {"weak": {"clean_accuracy": np.ones(2), "robust_accuracy": np.ones(2)}}
    found = model_info.measured(
        {"weak": robust(*attacks)}, {"weak": Row("test", "weak", {}, 2, {}, {}, None)}, images, "test"
    )
    assert "autoattack_acc" not in found and found["external"] == "100.00"


def test_passes_are_those_of_a_model_that_draws_at_random():
    robustness = {"rand": robust(autoattack(l2(0.5), version="rand"))}
    images = {"rand": {"clean_accuracy": np.ones(2), "robust_accuracy": np.ones(2)}}
    found = model_info.measured(robustness, {"rand": Row("test", "rand", {}, 2, {}, {}, None)}, images, "test")
    assert (found["number_forward_passes"], found["autoattack_acc"], found["eps"]) == (20, "100.00", "0.5")


def test_images_that_differ_on_one_side_alone_do_not_agree():
    """The sign test on images: five of one side may be chance (p = 1/16), six are not, nor are they with one back."""
    values = np.zeros(256)
    stored = {"robust": {"robust_accuracy": values}}
    info = model_info.Info({}, [], stored)
    for more, less, agrees in ((0, 0, True), (5, 0, True), (6, 0, False), (40, 40, True)):
        before, now = values.copy(), values.copy()
        now[:more], before[100 : 100 + less] = 1, 1
        info = model_info.Info({}, [], {"robust": {"robust_accuracy": before}})
        (one,) = model_info.compare(info, np.arange(256), {"robust": {"robust_accuracy": now}})
        assert one.agrees == agrees and one.differ == more + less


@pytest.mark.slow
def test_a_run_s_folder_is_named_from_the_file(tmp_path):
    """The best checkpoint stands for it; another is refused, since the file could not say so."""
    workdir, path = tmp_path / "runs" / "tiny", tmp_path / "models" / "tiny.json"
    path.parent.mkdir()
    assert topgap("train", "--config", TINY, "--workdir", workdir, "--no-evaluate")[0] == 0
    words = ("evaluate", "--workdir", workdir, "--evaluators", ROBUST, "--model-info", path)
    code, _, err = topgap(*words, "--checkpoint", "last")
    assert code == 2 and "a run's folder stands for its best checkpoint" in err
    assert topgap(*words)[0] == 0
    stored = json.loads(path.read_text())
    assert stored["weights"] == "../runs/tiny" and stored["data"]["examples"] == 60
    code, out, err = topgap("verify", path)
    assert code == 0 and out.count("  agrees") == 2, err


FILES = sorted((Path(__file__).parent.parent / "results" / "models").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_stored_file_says_what_its_images_say(path):
    info = model_info.read(path)
    built = {text: robust(autoattack(linf(build(info.keys["eps"], {})))) for text in info.images}
    said = model_info.measured(built, {row.evaluator: row for row in info.rows}, info.images, info.keys["split"])
    assert {key: info.keys[key] for key in said} == said
    assert all(info.keys[key] for key in ("link", "name", "authors", "venue", "architecture", "weights_from"))
    check_kinds(info.keys)
    assert info.keys["commit"] and not info.keys["commit"].endswith("+")
    assert not re.search(r'"(/|\.\.)', path.read_text(encoding="utf-8")), "no paths of the machine that made it"


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES[:1], ids=lambda path: path.stem)
def test_a_stored_file_is_confirmed(path, topgap_data):
    code, out, err = topgap("verify", path)
    assert code == 0 and out.count("agrees") == 2, (out, err)


def test_an_attack_without_a_ball_has_no_file():
    lone = apgd(BALL)._replace(name="mine")
    with pytest.raises(UserError, match="the attacks are mine"):
        model_info.ball_of({"mine": robust(lone)})
