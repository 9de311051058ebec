"""The report, the tables and the verdict in the terminal, and the page in a real browser."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from topgap_jax.errors import UserError
from topgap_jax.measure.results import Row, to_json
from topgap_jax.report import compare, index, read_runs, report, sheet, table, verdict
from topgap_jax.report import page as page_module
from topgap_jax.report.figures import Series, line_chart, thin
from topgap_jax.report.galleries import picture
from topgap_jax.report.lines import comparison
from topgap_jax.report.read import beside, labels, with_gaps
from topgap_jax.types import Curve, Gallery, Measure

EVIL = "<script>alert(1)</script>"
ROBUST = "robust(pgd(linf(eps), steps=20))"
EXAMPLES = "test_robust_both_with_eps_4_255.npz"
COST = {"forward_passes": 1.0, "gradient_evaluations": 0.0, "seconds": 3.21, "device": "cpu"}


def near(value, label, *, half=0.02, n=1000, **fields):
    return Measure(value, value - half, value + half, n=n, label=label, **fields)


def row(split, evaluator, measures, *, audit=None, overrides=None, examples=1000, **cost):
    return Row(split, evaluator, overrides or {}, examples, measures, COST | cost, audit)


def rows_of(seed, *, regions=True, splits=(("test", 0.91), ("test_shifted", 0.52))):
    """Rows as `measure.evaluate` makes them, of splits with about these accuracies."""
    random = np.random.default_rng(seed)
    rows = []
    for split, level in splits:
        level = level + random.normal() * 0.03
        x = np.linspace(0.2, 1, 9)
        calibration = Curve(
            x.tolist(), (x - 0.1 * random.random(9)).tolist(), ("confidence", "accuracy"), "calibration"
        )
        rows += [
            row(split, "accuracy()", {
                "accuracy": near(level, "accuracy", better="higher"),
                "nll": Measure(0.3 / level, n=1000, better="lower", label="NLL", unit="nats"),
                "worst_group_accuracy": near(level - 0.3, "worst-group accuracy", n=104, better="higher"),
                "group_0_accuracy": near(level - 0.3, "accuracy of group 0", n=104, main=False),
                "calibration": calibration,
            }),
            row(split, ROBUST, {
                "robust_accuracy": near(level / 2, "accuracy under pgd-20, linf(0.007843)", half=0.03, better="higher"),
                "clean_accuracy": near(level, "clean accuracy", main=False),
                "after_runs": Curve([0, 1], [level, level / 2], ("runs done", "accuracy"), "accuracy by run"),
            }, audit="not audited", gradient_evaluations=20.0, seconds=81.7),
            row(split, "localisation(cam())", {
                "iou": near(0.41 + seed / 50, "IoU of the map", better="higher"),
                "centre_iou": near(0.3, "IoU of the centred box"),
                "lift": Measure(n=0, label="lift of the map", unit="times chance", reason="no map is positive"),
                "iou_curve": Curve(x.tolist(), (0.5 - (x - 0.4) ** 2).tolist(), ("threshold", "IoU"), "IoU curve"),
            }),
        ]  # fmt: skip
        if regions:
            rows.append(row(split, "regions()", {
                "foreground_sensitivity": Measure(0.12 + seed / 100, n=990, better="higher", label="sensitivity"),
                "foreground_accuracy": near(0.6, "accuracy, object alone", half=0.03, better="higher"),
                "background_gap": Measure(0.22, n=1000, better="lower", label="background gap"),
                "sensitivity_curve": Curve([0.1, 0.2, 0.4], [0.1, 0.12, 0.2], ("noise", "sensitivity"), "by noise"),
            }, forward_passes=10.0))  # fmt: skip
    return rows


def store(folder, rows, weights="checkpoint best, step 320", data="shapes()"):
    rows = [each if isinstance(each, dict) else to_json(each) for each in rows]
    (folder / "evaluation.json").write_text(json.dumps({"rows": rows, "weights": weights, "data": data}))


def make_run(
    folder: Path, *, pool="gap()", seed=0, evaluated=True, trained=True, sheets=True, regions=True, **config
) -> Path:
    """A run folder as train, evaluate and explain leave it."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    model = "classifier(small_resnet(), pyramid_head(pool, width=32), classes=classes, mean=mean, std=std)"
    config = {"seed": 0, "source": "shapes()", "train": "train", "image_size": [64, 64], "pool": pool, "model": model,
              "batch": 100, "epochs": 8, "objective": "standard()", "eps": 2 / 255, **config}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"config": config, "file": "/home/me/configs/shapes.py"}))
    versions = {"command": f"topgap train --config.pool='{pool}'", "commit": "0a1b2c3d4e5f", "device": "cpu",
                "versions": {"python": "3.11.2", "jax": "0.10.2"}}  # fmt: skip
    (folder / "versions.json").write_text(json.dumps(versions))
    if trained:
        lines = []
        for step in range(10, 321, 10):
            loss = 1.8 * np.exp(-step / 120) + 0.1 * random.random()
            lines.append({"step": step, "epoch": step / 40, "kind": "train", "loss": loss, "accuracy": 1 - loss / 2})
            if step % 40 == 0:
                lines.append(
                    {"step": step, "epoch": step / 40, "kind": "validation", "accuracy": 0.95 - loss / 2, "nll": loss}
                )
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluated:
        store(folder, rows_of(seed, regions=regions))
    if sheets:
        y, x = np.mgrid[:64, :64] / 64
        for name in ("test", "test_shifted"):
            images = np.clip(random.random((3, 64, 64, 3)) * 0.2 + np.stack([x, y, 1 - x], -1)[None] * 0.8, 0, 1)
            maps = np.exp(-30 * ((y - 0.5) ** 2 + (x - random.random((3, 1, 1))) ** 2))
            inside = (y - 0.5) ** 2 + (x - 0.5) ** 2 < 0.05
            sheet(
                folder / "sheets" / f"{name}.png",
                images,
                names=[("disc", "disc"), ("star", "ring"), ("cross", "cross")],
                maps={"cam()": maps[:, ::4, ::4], "grad_cam()": maps},
                boxes=np.array([[0.2, 0.3, 0.7, 0.8]] * 3),
                regions=inside[None].repeat(3, 0),
                title=f"{name}: {pool}",
            )
    return folder


def test_the_generalisation_gap_stands_beside_accuracy_on_other_images(tmp_path):
    """Accuracy on a part of the training split minus that of the row; nothing where no such part was evaluated."""
    accuracy = lambda split, value, name="accuracy()", **overrides: row(
        split, name, {"accuracy": Measure(value, n=1000, label="accuracy")}, overrides=overrides
    )
    rows = [
        accuracy("test", 0.75),
        accuracy("train[:100]", 1.0),
        accuracy("train[900:]", 0.5),
        accuracy("test", 0.1, "other()"),
    ]
    values = lambda row: row.measures["generalisation_gap"].value if "generalisation_gap" in row.measures else None
    gaps = lambda rows, train: [values(each) for each in with_gaps(rows, train)]
    assert gaps(rows, "train[:900]") == [0.25, None, 0.5, None]
    assert gaps(rows, "train") == [0.25, None, None, None]
    assert gaps(rows, "other") == gaps(rows, "") == [None] * 4 and gaps(rows[:1], "train") == [None]
    assert gaps([accuracy("test", 0.75, pool="gmp()"), rows[1]], "train") == [None, None]  # of another network
    folder = make_run(tmp_path / "run", evaluated=False, sheets=False)
    store(folder, rows)
    assert re.search(r"^  accuracy +0\.7500\n  generalisation gap +0\.2500$", compare([folder]), re.MULTILINE)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / "gap"), make_run(folder / "top_gap", pool="top_gap(fraction=.14)", seed=1)]


@pytest.fixture(scope="module")
def page(two_runs, tmp_path_factory):
    return report(two_runs, tmp_path_factory.mktemp("page") / "new" / "report.html", title="Two pools")


class Reader(HTMLParser):
    """Tags with attributes, and the text outside style and script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.inside = [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in ("style", "script"):
            self.text += f" {data}"

    @property
    def words(self):
        return " ".join(self.text.split())


def test_the_page_holds_results_pictures_config_and_commands(page, two_runs):
    read = Reader(page.read_text())
    assert "Two pools" in read.words and "2 runs" in read.words
    places = [read.words.index(text) for text in ("Accuracy on test does", "Where the networks look", "Difference is")]
    assert places == sorted(places)
    pictures = [attrs for tag, attrs in read.tags if tag == "img" and attrs.get("src")]
    assert len(pictures) == 4 and all(attrs["src"].startswith("data:image/png") and attrs["alt"] for attrs in pictures)
    assert sum(tag == "svg" for tag, _ in read.tags) == 3 + 6
    assert "1 of 10 keys differ" in read.words
    assert f"topgap train --config {two_runs[1]}/config.json --workdir NEW" in read.words
    assert "0.9138 [0.8938, 0.9338]" in read.words and "0.6000 [0.5700, 0.6300]" in read.words


def test_the_page_refers_to_nothing_outside_itself(page):
    read = Reader(page.read_text())
    links = [attrs[key] for _, attrs in read.tags for key in ("src", "href", "xlink:href") if attrs.get(key)]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert "@import" not in page.read_text() and not re.search(r"url\((?!#)", page.read_text())


def test_ids_are_unique_and_headers_have_a_scope(page):
    read = Reader(page.read_text())
    ids = [attrs["id"] for _, attrs in read.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in read.tags if tag == "th")


def test_accuracy_regions_and_audit_stand_beside_every_robust_number(page, two_runs, tmp_path):
    rows = read_runs(two_runs)[0].rows
    names = [
        "accuracy",
        "nll",
        "worst_group_accuracy",
        "foreground_sensitivity",
        "foreground_accuracy",
        "background_gap",
    ]
    measures, missing = beside(rows, rows[1])
    assert (list(measures), missing) == (names, []) and measures["foreground_sensitivity"].value == pytest.approx(0.12)
    # In the verdict, in the results of both splits, and in the table of what is robust.
    assert Reader(page.read_text()).words.count("not audited") == 1 + 2 + 4
    bare = Reader(
        report(
            [make_run(tmp_path / "bare", regions=False, trained=False, sheets=False)], tmp_path / "bare.html"
        ).read_text()
    ).words
    assert bare.count("regions() not measured") == 2 and "accuracy() not measured" not in bare
    rows = rows_of(0)[1:4]
    store(tmp_path / "bare", [rows[0]._replace(audit="passed 7 of 7"), *rows[1:]])
    audited = Reader(report([tmp_path / "bare"], tmp_path / "bare.html").read_text()).words
    assert audited.count("passed 7 of 7") == 3 and "not audited" not in audited
    assert "clean accuracy 0.9138" in audited and "accuracy() not measured" in audited


def attacked_run(folder):
    """A run with a cascade of two attacks, and images that they ended with, of these weights and of others."""
    run = make_run(folder, trained=False, evaluated=False, sheets=False)
    after = {
        f"after_{i}": Measure(value, n=1000, better="higher", label=f"accuracy after {name}", main=False)
        for i, (name, value) in enumerate((("pgd-20, linf(8/255)", 0.5), ("apgd-100, linf(8/255)", 0.375)), 1)
    }
    measures = {"robust_accuracy": near(0.375, "accuracy under both"), "clean_accuracy": near(0.875, "clean accuracy")}
    after["attacked"] = Measure(875, n=1000, label="images attacked", main=False)
    store(run, [row(split, "robust(both)", measures | after, audit="not audited", overrides={"eps": "4/255"})
                for split in ("test", "other", "odd")])  # fmt: skip
    config = json.loads((run / "config.json").read_text()) | {"data": {"classes": ["disc", "star"], "examples": 9}}
    (run / "config.json").write_text(json.dumps(config))
    clean = np.random.default_rng(0).random((8, 8, 8, 3)).astype(np.float32)
    examples = {
        "clean": clean, "adversarial": np.clip(clean + 4 / 255, 0, 1), "label": np.zeros(8, int),
        "predicted": np.ones(8, int), "step": np.arange(8), "attack": np.array([0, 1, -1, 0, 0, 1, 0, 1]),
        "split": "test", "evaluator": "robust(both) with eps=4/255",
    }  # fmt: skip
    (run / "adversarial").mkdir()
    of = lambda split: run / "adversarial" / f"{split}_robust_both_with_eps_4_255.npz"
    np.savez(of("test"), **examples, weights="checkpoint best, step 320")
    np.savez(of("other"), **examples | {"split": "other"}, weights="checkpoint best, step 100")
    of("odd").write_bytes(b"no archive")
    return run


def test_what_each_attack_leaves_and_what_it_did(tmp_path, monkeypatch):
    """The cascade as a table, adversarial examples as a picture, each with its audit; pictures of other weights are
    not shown, those of images that stand neither."""
    names = []
    drawn = page_module.attacked.picture
    picture = lambda examples, classes: names.append((examples, classes)) or drawn(examples, classes)
    monkeypatch.setattr(page_module.attacked, "picture", picture)
    read = Reader(report([attacked_run(tmp_path / "run")], tmp_path / "page.html").read_text())
    words = re.sub(r"\s+", " ", read.words)
    assert "What each attack leaves: run robust(both) with eps=4/255 , test not audited" in words
    assert "clean accuracy 0.8750 accuracy after pgd-20, linf(8/255) 0.5000 0.3750" in words
    assert "accuracy after apgd-100, linf(8/255) 0.3750 0.1250" in words
    assert "Adversarial examples: run, test, robust(both) with eps=4/255 not audited" in words
    pictures = [attrs for tag, attrs in read.tags if tag == "img" and "adversarial" in attrs.get("alt", "")]
    assert len(pictures) == len(names) == 1 and pictures[0]["src"].startswith("data:image/png;base64,")
    examples, classes = names[0]
    assert len(examples.label) == 7 and classes == ("disc", "star")


def test_adversarial_examples_beside_a_run_of_another_radius(tmp_path):
    """What differs between the runs' configs becomes a part of a row's text; its pictures are still its own."""
    bare = {"sheets": False, "trained": False, "evaluated": False}
    runs = [make_run(tmp_path / f"run{eps}", eps=eps / 255, **bare) for eps in (2, 8)]
    examples = attacked_run(tmp_path / "other") / "adversarial" / EXAMPLES
    for run in runs:
        store(run, [row("test", ROBUST, {"robust_accuracy": near(0.5, "accuracy")}, audit="not audited")])
        (run / "adversarial").mkdir()
        with np.load(examples) as arrays:
            np.savez(run / "adversarial" / "test_robust_pgd_linf_eps_steps_20.npz", **{**arrays, "evaluator": ROBUST})
    read = Reader(report(runs, tmp_path / "page.html").read_text())
    assert len([attrs for tag, attrs in read.tags if tag == "img" and "clean, the" in attrs.get("alt", "")]) == 2


def test_files_that_commands_made_and_that_are_gone_are_missed(tmp_path, capsys):
    run = attacked_run(tmp_path / "run")
    (run / "sheets").mkdir()
    for name in ("test.png", "test-2.png"):
        Image.new("RGB", (8, 8)).save(run / "sheets" / name)
        index.note(run / "sheets" / name)
    report([run], tmp_path / "page.html")
    assert "is gone" not in capsys.readouterr().err
    (run / "sheets" / "test-2.png").unlink()
    (run / "adversarial" / EXAMPLES).unlink()
    Image.new("RGB", (8, 8), "red").save(run / "sheets" / "test.png")
    read, err = Reader(report([run], tmp_path / "page.html").read_text()), capsys.readouterr().err
    of = "the images of robust(both) with eps=4/255"
    lines = (
        "run/sheets/test.png is damaged, or was changed: topgap explain draws another",
        "run/sheets/test-2.png is gone: topgap explain draws it again",
        f"run/adversarial/{EXAMPLES} is gone: topgap evaluate --again makes {of} again",
    )
    assert all(line in " ".join(read.words.split()) and f"topgap: {line}\n" in err for line in lines)
    (run / "sheets" / "sheets.json").write_text(json.dumps({"sheets": {"../\x1b[2J": 1, "../config.json": 1}}))
    report([run], tmp_path / "page.html")
    err = capsys.readouterr().err  # a stranger's: no file outside is looked at, and nothing moves the cursor
    assert "sheets/../\\x1b[2J is gone" in err and "sheets/../config.json is gone" in err
    (run / "sheets" / "sheets.json").write_text("[")
    report([run], tmp_path / "page.html")
    err = capsys.readouterr().err
    assert re.search(r"sheets.json is not a list of sheets: .*; sheets that are gone or damaged are not missed\n", err)


def test_the_picture_of_adversarial_examples(tmp_path):
    """Clean, grey + 10 x perturbation, adversarial, pixel by pixel."""
    examples = page_module.attacked.read(attacked_run(tmp_path / "run") / "adversarial" / EXAMPLES)
    picture = np.asarray(page_module.attacked.picture(examples, ("disc", "star")))
    size = 208  # 8 pixels of 26
    at = lambda column, row: picture[14 + 20 + 24 + row * (size + 32) + 13, 14 + column * (size + 6) + 13]
    for row in range(6):
        first = examples.clean[row, 0, 0], examples.adversarial[row, 0, 0]
        grey = 0.5 + 10 * (first[1] - first[0])
        for column, expected in enumerate((first[0], grey, first[1])):
            np.testing.assert_allclose(at(column, row), np.clip(expected, 0, 1) * 255, atol=1)


def test_what_stands_beside_is_of_the_same_network():
    """An override of the attack's own number concerns the attack alone; one of the pool makes another network."""
    accuracy = row("test", "accuracy()", {"accuracy": Measure(0.9, label="accuracy")})
    other = accuracy._replace(overrides={"pool": "gmp()"}, measures={"accuracy": Measure(0.1, label="accuracy")})
    of = lambda **overrides: row("test", ROBUST, {}, audit="not audited", overrides=overrides)
    value = lambda robust: beside([accuracy, other], robust)[0]["accuracy"].value
    assert [value(of(eps="1/255")), value(of(pool="gmp()")), value(of(pool="gmp()", eps="1/255"))] == [0.9, 0.1, 0.1]
    assert beside([accuracy, other], of(pool="gap()")) == ({}, ["accuracy()", "regions()"])


def test_everything_a_user_supplies_is_escaped(tmp_path):
    evil = make_run(
        tmp_path / "</script><img src=x onerror=alert(1)>", pool=EVIL, sheets=False, note={EVIL: "</script><b>"}
    )
    (evil / "sheets").mkdir()
    Image.new("RGB", (8, 8)).save(evil / "sheets" / "a<b>'\".png")
    rows = [to_json(each) for each in rows_of(0, splits=[("test", 0.9)])]
    rows[0] |= {"split": EVIL, "evaluator": EVIL + "</script>", "audit": EVIL, "overrides": {EVIL: EVIL}}
    rows[0]["measures"] = {
        EVIL: {"value": 0.5, "label": EVIL, "unit": EVIL},
        "b": {"n": 0, "reason": EVIL + '"', "label": "b"},
    }
    rows[0]["measures"]["c"] = {"x": [0, 1, 2], "y": [0, 1, 2], "axes": [EVIL, EVIL], "label": EVIL}
    rows[0]["measures"]["d"] = {"x": [0, 1, 2], "y": [0, None, 2], "axes": []}
    rows[0]["cost"]["device"] = EVIL
    store(evil, rows, weights=EVIL, data=EVIL)
    with (evil / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "kind": "train", EVIL: 1.0}) + "\n")
    text = report([evil], tmp_path / "evil.html", title=EVIL).read_text()
    read = Reader(text)
    assert EVIL not in text and "alert(1)" in read.words
    assert sum(tag == "script" for tag, _ in read.tags) == text.count("</script") == 2
    assert not any("onerror" in attrs for _, attrs in read.tags)
    embedded = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(embedded)[0]["rows"][0]["split"] == EVIL
    assert "\x1b" not in compare([make_run(tmp_path / "esc\x1b[2J", evaluated=False, trained=False, sheets=False)])


def test_what_is_missing_is_said(tmp_path):
    run = make_run(tmp_path / "young", evaluated=False, trained=False, sheets=False)
    (run / "versions.json").unlink()
    words = Reader(report([run], tmp_path / "young.html").read_text()).words
    for text in (
        "young has not been evaluated yet.",
        "There are no results yet",
        "no training metrics",
        "There are no contact sheets",
        "No versions are recorded",
        "Robustness has not been measured",
        "No evaluation has stored a curve",
    ):
        assert text in words
    assert "young: no evaluation yet; topgap evaluate --workdir" in compare([run])


def test_rows_of_metrics_that_the_newest_checkpoint_knows_of_and_that_are_lost(tmp_path, capsys):
    """Cut off inside a row or between two, or with another byte for the end of one; rows of later steps are none of
    them."""
    run = make_run(tmp_path / "cut", sheets=False)
    path, lines = run / "metrics.jsonl", (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    for step, rows in ((280, 28 + 7), (316, 31 + 7)):  # the rows of step 320 came later
        meta = run / "checkpoints" / "last" / str(step) / "meta" / "metadata"
        meta.parent.mkdir(parents=True)
        meta.write_text(json.dumps({"step": step, "rows": rows}))
    said = f"topgap: {path} has 37 of the 38 rows that were written up to step 316\n"
    damaged = f"topgap: {path}: 1 of 39 lines are damaged and passed over\n"
    cases = ((lines, ""), (lines[:-2], ""), (lines[:-3], said), ([*lines[:-3], lines[-3][:-1]], said),
             ([*lines[:5], lines[5][:-1], *lines[6:]], damaged + said))  # fmt: skip
    for kept, expected in cases:
        path.write_bytes(b"".join(kept))
        compare([run])
        assert capsys.readouterr().err == expected
    meta.write_text("{")
    compare([run])
    assert capsys.readouterr().err == damaged


def test_a_measure_without_a_value_says_why(tmp_path):
    """An undefined one by its reason; a number that is not finite, such as version 0.1.0 wrote, is none either."""
    run = make_run(tmp_path / "odd", trained=False, sheets=False)
    rows = rows_of(0)
    rows[0] = rows[0]._replace(measures={"accuracy": Measure(n=0, label="accuracy", reason="no image"),
                                         "nll": Measure(float("nan"), n=3, label="NLL")})  # fmt: skip
    (run / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": NaN}\n{"step": 2, "kind": "train", "lo')
    old = {"split": "old", "evaluator": "accuracy()", "examples": 3, "values": {"accuracy": float("nan")}}
    store(run, [*rows, old])
    text = report([run], tmp_path / "odd.html").read_text()
    assert json.loads(re.search(r'id="numbers">(.*?)</script>', text, re.DOTALL)[1], parse_constant=pytest.fail)
    assert text.count('<abbr class="none" title="no image">–</abbr>') == 1 + 1  # results, and beside the robust number
    assert ">nan<" not in text and 'title="no map is positive"' in text
    said = compare([run]).splitlines()
    assert [line.split() for line in said].count(["accuracy", "undefined"]) == 2
    assert "undefined: accuracy: no image" in said and "undefined: NLL, accuracy: its value is no finite number" in said
    assert sum(line == "undefined: lift of the map: no map is positive" for line in said) == 1
    assert verdict(read_runs([run]))[0].startswith(
        "odd: accuracy on test is undefined (no image); accuracy on test_shifted is 0.5"
    )


def test_a_measure_over_fewer_images_says_of_how_many(page, two_runs):
    assert (
        Reader(page.read_text()).words.count("104 of 1,000 images") == 4 * 3
    )  # main, of a group, beside what is robust
    assert "  worst-group accuracy, 104 of 1,000 images " in compare(two_runs)
    assert re.search(
        r"^  worst-group accuracy +0\.6138 \[0\.5938, 0\.6338\]  104 of 1,000$", table(rows_of(0)), re.MULTILINE
    )


def test_sheets_that_do_not_fit_are_named(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "big", trained=False, evaluated=False)
    noise = np.random.default_rng(0).integers(0, 255, (400, 1800, 3), np.uint8)
    Image.fromarray(noise).save(run / "sheets" / "a_large.png")
    (run / "sheets" / "broken.png").write_bytes(b"not a picture")
    room = len(page_module.embedded(run / "sheets" / "a_large.png")["source"]) + 10_000
    monkeypatch.setattr(page_module, "PICTURE_BYTES", room)
    read = Reader(report([run], tmp_path / "big.html").read_text())
    assert "topgap: big/sheets/broken.png: cannot be read as a picture\n" in capsys.readouterr().err
    sources = {attrs["alt"].split()[2]: attrs for tag, attrs in read.tags if tag == "img" and attrs.get("src")}
    assert sources["a_large"]["src"].startswith("data:image/jpeg") and sources["a_large"]["width"] == "1600"
    assert "big/sheets/broken.png: cannot be read as a picture" in read.words
    assert re.search(r"big/sheets/test\.png: no room, the page holds \d MB of pictures", read.words)
    assert sum(len(attrs["src"]) for attrs in sources.values()) <= room


def test_mistakes_are_told_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    run = make_run(tmp_path / "run", trained=False, evaluated=False, sheets=False)
    cases = [
        (
            [tmp_path / "empty"],
            "empty' is not a run: it has no config.json; name a folder that `topgap train --workdir` wrote",
        ),
        ([tmp_path / "gone"], "gone' is not a run: there is no such folder; name"),
        ([], "no run folder given; name one or more"),
    ]
    for folders, text in cases:
        for call in (compare, lambda folders: report(folders, tmp_path / "r.html")):
            with pytest.raises(UserError, match=re.escape(text)) as caught:
                call(folders)
            assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is a folder; name the HTML file to write, such as"):
        report([run], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the report '.*r\.html'"):
        report([run], tmp_path / "file" / "r.html")
    for text in ("[]", "{", '{"rows": [{}]}', '{"rows": [{"values": {"accuracy": "high"}}]}'):
        (run / "evaluation.json").write_text(text)
        for call in (compare, lambda folders: report(folders, tmp_path / "r.html")):
            with pytest.raises(
                UserError, match=r"evaluation.json is not an evaluation of this program \(.+\); move it away"
            ):
                call([run])


def test_a_run_of_version_0_1_0_is_shown_beside_one_of_today(tmp_path):
    """Bare numbers with `name_low` and `name_high`, overrides in the evaluator's text, no audit and no words."""
    old = make_run(tmp_path / "old", evaluated=False, trained=False, sheets=False)
    new = make_run(tmp_path / "new", seed=1, trained=False, sheets=False)
    common = {"split": "test", "examples": 1000, "complete": True, "cost": COST, "audit": None}
    interval = {"accuracy": 0.5, "accuracy_low": 0.47, "accuracy_high": 0.53}
    robust = {"clean_accuracy": 0.5, "robust_accuracy": 0.2, "robust_low": 0.18, "robust_high": 0.23}
    curves = {"calibration": {"x": [0, 0.5, 1], "y": [0, 0.4, 0.9]}}
    store(old, [
        {**common, "evaluator": "accuracy()", "values": {**interval, "nll": 1.25, "worst_group_accuracy": 0.25}, "curves": curves},
        {**common, "evaluator": f"{ROBUST} with eps=4/255", "values": robust},
        {**common, "evaluator": "regions(bank)", "values": {"foreground_sensitivity": 0.1}},
    ])  # fmt: skip
    shown = comparison([run.rows for run in read_runs([old, new])])
    lines = {(line.label, line.evaluator): line for line in shown if line.split == "test"}
    accuracy = lines["accuracy", "accuracy()"]
    assert (
        accuracy.cells[0][:3] == (0.5, 0.47, 0.53) and accuracy.best == 1
    )  # the side is the one that today's row says
    assert lines["NLL (nats)", "accuracy()"].best == 1 and lines["sensitivity", "regions()"].difference > 0
    attacked = lines["robust accuracy", f"{ROBUST} with eps=4/255"]
    assert (
        attacked.rows[0].overrides == {"eps": "4/255"} and attacked.audits == ["not audited"] and not attacked.cells[1]
    )
    text = compare([old, new])
    assert re.search(
        r"^  accuracy +0\.5000 \[0\.4700, 0\.5300\] +0\.9204 \[0\.9004, 0\.9404\] \* +\+0\.4204$", text, re.MULTILINE
    )
    assert f"test: {ROBUST} with eps=4/255" in text.splitlines()
    assert f"old: {ROBUST} with eps=4/255 on test: not audited" in text.splitlines()
    assert (
        verdict(read_runs([old]))[0]
        == "old: accuracy on test is 0.500 [0.470, 0.530]; robust accuracy on test is 0.200 [0.180, 0.230], not"
        " audited."
    )
    # Which of today's images the worst group has is told, of the old row nothing is known.
    assert "  worst-group accuracy, 104 of 1,000 images for new  " in text
    words = Reader(report([old, new], tmp_path / "r.html").read_text()).words
    assert "0.5000 [0.4700, 0.5300]" in words and "Calibration, test" in words.replace("calibration", "Calibration")


def test_areas_of_different_networks_are_not_compared(tmp_path):
    """Neither marked nor subtracted, and said in one line; of one run nothing is to be said."""
    area = lambda value: Measure(value, n=10, better="lower", label="deletion (mean colour)", across=False)
    gini = Measure(0.5, n=10, label="Gini index of the map")
    runs = []
    for i, value in enumerate((0.25, 0.125)):
        runs.append(make_run(tmp_path / f"run{i}", seed=i, evaluated=False, trained=False, sheets=False))
        store(runs[-1], [row("test", "measures(cam(), deletion(), gini())", {"deletion": area(value), "gini": gini})])
    lines = comparison([run.rows for run in read_runs(runs)])
    assert (lines[0].best, lines[0].difference, lines[1].difference) == (None, None, 0)
    why = "areas of different networks differ in scale (arXiv 2408.08137); compare methods within a run"
    assert f"not compared between runs: deletion (mean colour): {why}" in compare(runs).splitlines()
    assert "not compared" not in compare(runs[:1])


def test_comparison_marks_the_better_and_subtracts():
    number = lambda value, **fields: Measure(value, label="x", **fields)
    one = {"accuracy": number(0.5, better="higher"), "nll": number(2.0, better="lower"), "rms_radius": number(3)}
    two = {"accuracy": number(0.75, better="higher"), "nll": number(2.5, better="lower"), "rms_radius": number(4),
           "extra": number(1, main=False)}  # fmt: skip
    accuracy, nll, radius, extra = comparison([[row("test", "accuracy()", one)], [row("test", "accuracy()", two)]])
    assert (accuracy.best, nll.best, radius.best, accuracy.difference) == (1, 0, None, 0.25)
    assert extra.difference is None and extra.cells[0] is None and not extra.about.main
    assert [line.headline for line in (accuracy, nll, radius, extra)] == [True, False, False, False]
    assert labels([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]


def test_runs_of_other_numbers_do_not_share_a_line(tmp_path):
    """`robust(pgd(linf(eps)))` of eps 2/255 and of 8/255 are two measures; accuracy() is one."""
    runs = [make_run(tmp_path / str(eps), eps=eps / 255, sheets=False, regions=False) for eps in (2, 8)]
    read = read_runs(runs)
    assert [run.rows[1].overrides for run in read] == [{"eps": "2/255"}, {"eps": "8/255"}]
    lines = comparison([run.rows for run in read])
    robust = [line for line in lines if line.audits]
    assert [[cell is None for cell in line.cells] for line in robust] == [[False, True], [True, False]] * 2
    assert all(line.difference is None and line.best is None for line in robust)
    assert {line.evaluator for line in lines if line.about.label == "accuracy"} == {"accuracy()"}
    assert f"test: {ROBUST} with eps=8/255" in compare(runs).splitlines()
    assert f" by {ROBUST} with eps=8/255: 8 0.457, 2 not measured, not audited." in verdict(read)[0]
    # One run alone stays as it is; what the command line changed counts before the run's own config.
    assert read_runs(runs[:1])[0].rows[1].overrides == {}
    for said, both in (({"eps": "4/255"}, {"eps": "4/255"}), ({"seed": "1"}, {"eps": "2/255", "seed": "1"})):
        store(runs[0], [each._replace(overrides=said) if each.audit else each for each in rows_of(0)])
        assert read_runs(runs)[0].rows[1].overrides == both


def test_numbers_of_other_data_in_one_line_are_said(tmp_path):
    """Both tests are called so; which is better says as much of the data as of the networks."""
    runs = [make_run(tmp_path / name, source=f"tfds('{name}')", sheets=False) for name in ("cars", "pets")]
    words = "data differ (tfds('cars') of cars, tfds('pets') of pets): a difference between these runs is one of the"
    assert f"the {words} data too" in compare(runs).splitlines()
    assert verdict(read_runs(runs))[-1] == f"The {words} data too."
    assert words not in compare(runs[:1])
    store(runs[1], [each._replace(split=f"val_{each.split}") for each in rows_of(0)])
    assert words not in compare(runs), "they share no line"


def test_the_verdict_claims_no_more_than_the_intervals(tmp_path):
    """Intervals that overlap: no measurable difference; apart: higher; without one the bare numbers."""
    accuracy = lambda value, half=0.02: row(
        "test", "accuracy()", {"accuracy": near(value, "accuracy", half=half, better="higher")}
    )
    sensitivity = lambda value: row(
        "test", "regions()", {"s": Measure(value, n=990, better="higher", label="sensitivity")}
    )
    values = iter(range(100))

    def of(*evaluations):
        folders = [
            make_run(tmp_path / str(next(values)) / name, evaluated=False, sheets=False)
            for name in "abc"[: len(evaluations)]
        ]
        for folder, rows in zip(folders, evaluations):
            store(folder, rows)
        return verdict(read_runs(folders))

    assert of([accuracy(0.5)], [accuracy(0.54)]) == [
        "Accuracy on test does not differ measurably (a 0.500, b 0.540, intervals overlap)."
    ]
    assert of([accuracy(0.5)], [accuracy(0.55)]) == [
        "Accuracy on test is measurably higher for b (0.550) than for a (0.500)."
    ]
    assert of([accuracy(0.5)], [accuracy(0.7)], [accuracy(0.6)]) == [
        "Accuracy on test is measurably higher for b (0.700) than for a (0.500) (c 0.600)."
    ]
    assert of([accuracy(0.5), sensitivity(0.1)], [accuracy(0.6)]) == [
        "Accuracy on test is measurably higher for b (0.600) than for a (0.500).",
        "Sensitivity on test by regions(): a 0.100, b not measured, over 990 of 1,000 images.",
    ]
    assert of([accuracy(0.5)], []) == ["Accuracy on test: a 0.500, b not measured.", "b has not been evaluated yet."]
    attack = lambda text: row("test", text, {"r": near(0.1, "robust accuracy")}, audit="not audited")
    assert of(
        [attack("robust(a)"), attack("robust(b)")]
    ) == [  # as in rows of version 0.1.0, whose label names no attack
        "a: robust accuracy on test by robust(a) is 0.100 [0.080, 0.120], not audited; "
        "robust accuracy on test by robust(b) is 0.100 [0.080, 0.120], not audited."
    ]
    other = accuracy(0.7)._replace(overrides={"pool": "gmp()"})
    assert of([accuracy(0.5), other]) == [
        "a: accuracy on test is 0.500 [0.480, 0.520]; accuracy on test by accuracy() with pool=gmp() is 0.700 [0.680, "
        "0.720]."
    ]
    assert of([accuracy(0.5)._replace(split="train[:100]")]) == []  # images it was trained on say nothing


def test_the_verdict_of_two_whole_runs(two_runs):
    assert verdict(read_runs(two_runs)) == [
        (
            "Accuracy on test does not differ measurably (gap 0.914, top_gap 0.920, intervals overlap); accuracy on"
            " test_shifted does not differ measurably (gap 0.501, top_gap 0.521, intervals overlap); accuracy under"
            " pgd-20, linf(0.007843) on test does not differ measurably (gap 0.457, top_gap 0.460, intervals overlap),"
            " not audited."
        ),
        (
            "IoU of the map on test by localisation(cam()) does not differ measurably (gap 0.410, top_gap 0.430,"
            " intervals overlap), IoU of the centred box 0.300; sensitivity on test by regions(): gap 0.120, top_gap"
            " 0.130, over 990 of 1,000 images."
        ),
    ]


def test_compare_is_aligned_and_says_where_configs_differ(two_runs, tmp_path):
    text = compare(two_runs)
    lines = text.splitlines()
    accuracy = next(line for line in lines if line.startswith("  accuracy  "))
    numbers = r"  accuracy +0\.9138 \[0\.8938, 0\.9338\] +0\.9204 \[0\.9004, 0\.9404\] \* +\+0\.0066"
    assert re.fullmatch(numbers, accuracy) and len(lines[0]) == len(accuracy) <= max(map(len, lines)) <= 120
    assert text.isascii() and "accuracy of group 0" not in text
    assert lines.count(f"test: {ROBUST}") == 1 and f"gap, top_gap: {ROBUST} on test: not audited" in lines
    assert "* best; difference: top_gap - gap; intervals are over images, not over seeds" in lines
    assert re.search(r"^pool +gap\(\) +top_gap\(fraction=\.14\)$", text, re.MULTILINE)
    assert "difference" not in compare([*two_runs[:1], two_runs[0]])
    third = make_run(tmp_path / "third", sheets=False, seed=2, pool=f"top_gap(fraction={'.1' * 60})")
    lines = compare([*two_runs, third]).splitlines()
    accuracy = next(line for line in lines if line.startswith("  accuracy  "))
    assert re.fullmatch(r"  accuracy +0\.9138 +0\.9204 +0\.9157 +\+0\.0019", accuracy.replace(" * ", "   "))
    assert "  gap      gap()" in lines and lines[lines.index("  gap      gap()") - 1] == "pool"


def test_table_shows_costs_and_what_is_not_measured():
    text = table(rows_of(0, regions=False))
    words = r"^  accuracy under pgd-20, linf\(0\.007843\) +0\.4569 \[0\.4269, 0\.4869\] +1,000 +1 +20 +81\.7$"
    assert re.search(rf"^test: {re.escape(ROBUST)}$", text, re.MULTILINE) and re.search(words, text, re.MULTILINE)
    assert f"{ROBUST} on test: not audited; not measured beside it: regions()" in text.splitlines()
    assert "undefined: lift of the map: no map is positive" in text.splitlines() and text.isascii()


def test_table_says_what_each_attack_left_and_which_verdicts_are_not_certain():
    about = lambda value, label: Measure(value, n=100, label=label, main=False)
    details = {
        "robust_accuracy": Measure(0.25, n=100, label="accuracy under both"), "clean_accuracy": about(0.9, "clean accuracy"),
        "after_1": about(0.5, "accuracy after apgd-100, linf(8/255)"), "after_2": about(0.25, "accuracy after square-5000, linf(8/255)"),
        "fragile": about(2, "verdicts that floating point might change"), "unconfirmed": about(0, "breaks without a confirmation"),
    }  # fmt: skip
    lines = table([row("test", "robust(both)", details, audit="not audited")]).splitlines()
    assert lines[-2:] == [
        "  clean accuracy 0.9000; accuracy after apgd-100, linf(8/255) 0.5000; accuracy after square-5000, linf(8/255) 0.2500;",
        "  verdicts that floating point might change 2",
    ]


def test_pictures_of_results_stand_in_the_page(tmp_path):
    tiles = [np.zeros((4, 6), np.uint8), np.full((4, 6, 3), 255, np.uint8), np.uint8(np.arange(24).reshape(4, 6))]
    gallery = Gallery(tiles, ["map", "image", EVIL], 2, f"mean fields {EVIL}")
    drawn = picture(gallery)
    assert drawn.size == (2 * 144 + 6 + 2 * 14, 2 * 14 + 2 * (96 + 26))
    assert drawn.getpixel((14 + 5, 14 + 25)) == (0, 0, 4)  # 0 in the colours of maps
    assert drawn.getpixel((14 + 150 + 5, 14 + 25)) == (255, 255, 255)
    run = make_run(tmp_path / "run")
    store(run, [row("test", "receptive_field()", {"rms_radius": near(3, "radius"), "fields": gallery})])
    text = report([run], tmp_path / "out.html").read_text()
    assert "mean fields &lt;script&gt;" in text and EVIL not in text
    start = text.index("mean fields")
    assert "data:image/png;base64," in text[start : text.index("</details>", start)]


def test_charts_drop_what_is_not_finite_and_thin_long_curves():
    x, y = thin(range(1000), [float(i) for i in range(999)] + [float("nan")])
    assert len(x) == 300 and np.isclose(y[0], np.mean(range(4))) and np.isfinite(y).all()
    assert thin([1, 2, 3], [None, 1.0, float("inf")])[1].tolist() == [1.0]
    assert line_chart([Series([1, 2, 3], [-9e299, 1e308, 9e299], 0)], prefix="a").count("<svg") == 1
    assert "var(--series-1)" in line_chart([Series([0, 1], [1, None], 1), Series([0], [2], 9)], prefix="a-")


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on this machine: the browser test is skipped")
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: the browser test is skipped"
    )
    options = "no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update disable-sync"
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=[f"--{option}" for option in options.split()])
        yield started
        started.close()


def opened(browser, path, **context):
    """The page at `path`, the messages and errors of its console, and its requests."""
    tab = browser.new_context(**context).new_page()
    said, requests = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: (said.append(f"dialog {dialog.message}"), dialog.dismiss()))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(path.as_uri())
    return tab, said, requests


def test_a_header_sorts_in_the_browser(page, browser, tmp_path):
    tab, said, requests = opened(browser, page)
    cells = lambda: tab.locator("#comparison > .wide tbody tr td:nth-child(3)").evaluate_all(
        "cells => cells.map(c => c.dataset.value)"
    )
    header = tab.locator("#comparison > .wide thead th").nth(2)
    before = cells()
    header.locator("button").click()
    rising = cells()
    assert rising != before and sorted(rising) == sorted(before) and header.get_attribute("aria-sort") == "ascending"
    numbers = [float(value) for value in rising if value]
    assert numbers == sorted(numbers) and rising[len(numbers) :] == [""] * (len(before) - len(numbers)) != []
    header.locator("button").focus()
    tab.keyboard.press("Enter")
    assert [float(value) for value in cells() if value] == numbers[::-1] and header.get_attribute(
        "aria-sort"
    ) == "descending"
    tab.locator("#comparison > .wide thead th button").nth(1).click()
    assert header.get_attribute("aria-sort") is None
    names = tab.locator("#comparison > .wide tbody tr th").evaluate_all("cells => cells.map(c => c.textContent.trim())")
    assert [name.lower() for name in names] == sorted(name.lower() for name in names)
    with tab.expect_download() as download:
        tab.locator("#save").click()
    assert json.loads(Path(download.value.path()).read_text())[1]["run"] == "top_gap"
    tab.locator(".enlarge").first.click()
    assert tab.locator("dialog img").is_visible()
    tab.keyboard.press("Escape")
    assert not tab.locator("dialog img").is_visible()
    assert said == [] and [url for url in requests if not url.startswith(("data:", "blob:"))] == [page.as_uri()]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_the_page_fits_its_window_in_both_schemes(page, browser, width, scheme):
    tab, said, _ = opened(browser, page, viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) < 200) == (scheme == "dark")
    assert said == []


def test_hostile_names_do_nothing_in_the_browser(browser, tmp_path):
    run = make_run(tmp_path / "<img src=x onerror=alert(1)>", pool=EVIL, sheets=False, evaluated=False)
    tab, said, requests = opened(browser, report([run], tmp_path / "evil.html", title=EVIL))
    assert tab.title() == EVIL and EVIL in tab.locator("#config").inner_text()
    assert said == [] and len([url for url in requests if not url.startswith("data:")]) == 1
