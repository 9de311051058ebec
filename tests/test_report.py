"""The report, the tables in the terminal, and the page in a real browser."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from topgap_jax.errors import UserError
from topgap_jax.report import compare, demo_table, report, sheet, table
from topgap_jax.report import page as page_module
from topgap_jax.report.figures import Series, line_chart, thin
from topgap_jax.report.read import Measure, beside, comparison, headline, labels, measures, number, read_runs, with_gaps

EVIL = "<script>alert(1)</script>"
ROBUST = "robust(pgd(linf(eps), steps=20))"


def rows_of(seed, *, regions=True):
    """Rows as run/evaluate.py writes them."""
    random = np.random.default_rng(seed)
    cost = {"forward_passes": 1.0, "gradient_evaluations": 0.0, "seconds": 3.21, "device": "cpu"}
    rows = []
    for split, level in (("test", 0.91), ("test_shifted", 0.52)):
        level = level + random.normal() * 0.03
        near = lambda value, half=0.02: {"": value, "_low": value - half, "_high": value + half}
        interval = lambda name, value: {name + end: number for end, number in near(value).items()}
        x = np.linspace(0.2, 1, 9)

        def row(evaluator, values, curves=None, split=split, **more):
            rows.append({"split": split, "evaluator": evaluator, "examples": 1000, "complete": True, "values": values,
                         "curves": curves or {}, "cost": {**cost, **more}, "audit": None})  # fmt: skip

        calibration = {"x": x.tolist(), "y": (x - 0.1 * random.random(9)).tolist()}
        row("accuracy()", interval("accuracy", level) | {"nll": 0.3 / level, "calibration_error": 0.04,
            "worst_group_accuracy": level - 0.3, "group_0_accuracy": level - 0.3, "group_0_examples": 104},
            {"calibration": calibration})  # fmt: skip
        robust = {"clean_accuracy": level, "robust_accuracy": level / 2, "robust_low": level / 2 - 0.03,
                  "robust_high": level / 2 + 0.03, "attacked": 910, "mean_steps": 12.4, "unconfirmed": 0, "fragile": 2}  # fmt: skip
        row(
            ROBUST,
            robust,
            {"after_runs": {"x": [0, 1], "y": [level, level / 2]}},
            gradient_evaluations=20.0,
            seconds=81.7,
        )
        row("localisation(cam())", interval("iou", 0.41 + seed / 50) | {"best_iou": 0.47, "best_iou_tau": 0.35,
            "max_box_accuracy": 0.55, "centre_iou": 0.3, "full_iou": 0.14, "in_region": 0.6, "lift": None},
            {"iou_curve": {"x": x.tolist(), "y": (0.5 - (x - 0.4) ** 2).tolist()}})  # fmt: skip
        if regions:
            row("regions(bank)", {"foreground_sensitivity": 0.12 + seed / 100, "foreground_accuracy": 0.6, "foreground_low": 0.57,
                "foreground_high": 0.63, "background_accuracy": 0.3, "background_gap": 0.22, "left_out": 0},
                {"sensitivity_curve": {"x": [0.1, 0.2, 0.4], "y": [0.1, 0.12, 0.2]}}, forward_passes=10.0)  # fmt: skip
    return rows


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
        stored = {"rows": rows_of(seed, regions=regions), "weights": "checkpoint best, step 320", "data": "shapes()"}
        (folder / "evaluation.json").write_text(json.dumps(stored))
    if sheets:
        y, x = np.mgrid[:64, :64] / 64
        for name in ("test", "test_shifted"):
            images = np.clip(random.random((3, 64, 64, 3)) * 0.2 + np.stack([x, y, 1 - x], -1)[None] * 0.8, 0, 1)
            maps = np.exp(-30 * ((y - 0.5) ** 2 + (x - random.random((3, 1, 1))) ** 2))
            sheet(folder / "sheets" / f"{name}.png", images, names=[("disc", "disc"), ("star", "ring"), ("cross", "cross")],
                  maps={"cam()": maps[:, ::4, ::4], "grad_cam()": maps}, boxes=np.array([[0.2, 0.3, 0.7, 0.8]] * 3),
                  regions=((y - 0.5) ** 2 + (x - 0.5) ** 2 < 0.05)[None].repeat(3, 0), title=f"{name}: {pool}")  # fmt: skip
    return folder


def test_the_generalisation_gap_stands_beside_accuracy_on_other_images(tmp_path):
    """Accuracy on a part of the training split minus that of the row; nothing where no such part was evaluated."""
    row = lambda split, accuracy, name="accuracy()": {
        "split": split,
        "evaluator": name,
        "values": {"accuracy": accuracy},
    }
    rows = [row("test", 0.75), row("train[:100]", 1.0), row("train[900:]", 0.5), row("test", 0.1, "other()")]
    gaps = lambda rows, train: [found["values"].get("generalisation_gap") for found in with_gaps(rows, train)]
    assert gaps(rows, "train[:900]") == [0.25, None, 0.5, None]
    assert gaps(rows, "train") == [0.25, None, None, None]
    assert gaps(rows, "other") == gaps(rows, "") == [None] * 4 and gaps(rows[:1], "train") == [None]
    folder = make_run(tmp_path / "run", evaluated=False, sheets=False)
    (folder / "evaluation.json").write_text(json.dumps({"rows": rows, "weights": "", "data": ""}))
    assert "generalisation_gap" in compare([folder])


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


def test_regions_worst_group_and_audit_stand_beside_every_robust_number(page, two_runs, tmp_path):
    run = read_runs(two_runs)[0]
    assert beside(run.rows, "test")["foreground_sensitivity"].value == pytest.approx(0.12)
    assert Reader(page.read_text()).words.count("not audited") == 2 + 4 + 4
    bare = Reader(report([make_run(tmp_path / "bare", regions=False)], tmp_path / "bare.html").read_text()).words
    assert bare.count("foreground sensitivity not measured") == 2
    rows = rows_of(0)
    rows[1]["audit"] = "passed 7 of 7"
    stored = {"rows": rows[:4], "weights": "", "data": ""}
    (tmp_path / "bare" / "evaluation.json").write_text(json.dumps(stored))
    audited = Reader(report([tmp_path / "bare"], tmp_path / "bare.html").read_text()).words
    assert audited.count("passed 7 of 7") == 3 and "not audited" not in audited


def test_everything_a_user_supplies_is_escaped(tmp_path):
    evil = make_run(
        tmp_path / "</script><img src=x onerror=alert(1)>", pool=EVIL, sheets=False, note={EVIL: "</script><b>"}
    )
    (evil / "sheets").mkdir()
    Image.new("RGB", (8, 8)).save(evil / "sheets" / "a<b>'\".png")
    stored = json.loads((evil / "evaluation.json").read_text())
    stored["rows"][0] |= {"split": EVIL, "evaluator": EVIL + "</script>", "audit": EVIL}
    stored["rows"][0]["values"][EVIL] = 0.5
    stored["rows"][0]["curves"] = {EVIL: {"x": [0, 1, 2], "y": [0, 1, 2]}}
    stored["rows"][0]["cost"]["device"] = EVIL
    stored["rows"][1]["audit"] = {EVIL: "</script>"}
    stored |= {"weights": EVIL, "data": EVIL}
    (evil / "evaluation.json").write_text(json.dumps(stored))
    with (evil / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "kind": "train", EVIL: 1.0}) + "\n")
    text = report([evil], tmp_path / "evil.html", title=EVIL).read_text()
    read = Reader(text)
    assert EVIL not in text and "alert(1)" in read.words
    assert sum(tag == "script" for tag, _ in read.tags) == text.count("</script") == 2
    assert not any("onerror" in attrs for _, attrs in read.tags)
    embedded = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(embedded)[0]["rows"][0]["split"] == EVIL


def test_what_is_missing_is_said(tmp_path):
    run = make_run(tmp_path / "young", evaluated=False, trained=False, sheets=False)
    (run / "versions.json").unlink()
    words = Reader(report([run], tmp_path / "young.html").read_text()).words
    for text in ("has not been evaluated yet", "There are no results yet", "no training metrics", "There are no contact sheets",
                 "No versions are recorded", "Robustness has not been measured", "No evaluation has stored a curve"):  # fmt: skip
        assert text in words
    assert "young: no evaluation yet; topgap evaluate --workdir" in compare([run])


def test_numbers_that_are_not_finite_are_shown_and_kept_out_of_the_json(tmp_path):
    run = make_run(tmp_path / "odd", sheets=False)
    rows = rows_of(0)
    rows[0]["values"] |= {"nll": float("nan"), "accuracy": None}
    (run / "evaluation.json").write_text(json.dumps({"rows": rows}))
    (run / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": NaN}\n{"step": 2, "kind": "train", "lo')
    text = report([run], tmp_path / "odd.html").read_text()
    assert json.loads(re.search(r'id="numbers">(.*?)</script>', text, re.DOTALL)[1], parse_constant=pytest.fail)
    assert ">nan<" in text


def test_sheets_that_do_not_fit_are_named(tmp_path, monkeypatch):
    run = make_run(tmp_path / "big")
    noise = np.random.default_rng(0).integers(0, 255, (400, 1800, 3), np.uint8)
    Image.fromarray(noise).save(run / "sheets" / "a_large.png")
    (run / "sheets" / "broken.png").write_bytes(b"not a picture")
    room = len(page_module.embedded(run / "sheets" / "a_large.png")["source"]) + 10_000
    monkeypatch.setattr(page_module, "PICTURE_BYTES", room)
    read = Reader(report([run], tmp_path / "big.html").read_text())
    sources = {attrs["alt"].split()[2]: attrs for tag, attrs in read.tags if tag == "img" and attrs.get("src")}
    assert sources["a_large.png"]["src"].startswith("data:image/jpeg") and sources["a_large.png"]["width"] == "1600"
    assert "big/sheets/broken.png: cannot be read as a picture" in read.words
    assert re.search(r"big/sheets/test\.png: no room, the page holds \d MB of pictures", read.words)
    assert sum(len(attrs["src"]) for attrs in sources.values()) <= room


def test_mistakes_are_told_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    run = make_run(tmp_path / "run", sheets=False)
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
    (run / "evaluation.json").write_text("[]")
    with pytest.raises(
        UserError, match=r"evaluation.json' is not what a run writes: it should be an object with 'rows'"
    ):
        report([run], tmp_path / "r.html")
    (run / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation.json' cannot be read as JSON: Expecting"):
        report([run], tmp_path / "r.html")


def test_measures_find_their_intervals():
    row = {"values": {"accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 0.95, "foreground_accuracy": 0.5, "foreground_low": 0.4,
                      "foreground_high": 0.6, "slow": 3, "lone_low": 1}}  # fmt: skip
    assert measures(row) == [Measure("accuracy", 0.9, 0.8, 0.95), Measure("foreground_accuracy", 0.5, 0.4, 0.6),
                             Measure("slow", 3), Measure("lone_low", 1)]  # fmt: skip
    assert headline(rows_of(0)[1]).name == "robust_accuracy" and headline({}).value is None


def test_comparison_marks_the_better_and_subtracts():
    one = {"split": "test", "evaluator": "accuracy()", "values": {"accuracy": 0.5, "nll": 2.0, "rms_radius": 3}}
    two = {**one, "values": {"accuracy": 0.75, "nll": 2.5, "rms_radius": 4, "extra": 1}}
    lines = {line.name: line for line in comparison([[one], [two]])}
    assert (lines["accuracy"].best, lines["nll"].best, lines["rms_radius"].best) == (1, 0, None)
    assert (
        lines["accuracy"].difference == 0.25 and lines["extra"].difference is None and lines["extra"].cells[0] is None
    )
    assert labels([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"] and number(float("inf")) == "inf"


def test_runs_of_other_numbers_do_not_share_a_line(tmp_path):
    """`robust(pgd(linf(eps)))` of eps 2/255 and of 8/255 are two measures; accuracy() is one."""
    runs = [make_run(tmp_path / str(eps), eps=eps / 255, sheets=False, regions=False) for eps in (2, 8)]
    read = read_runs(runs)
    assert [[row["evaluator"] for row in run.rows][1] for run in read] == [f"{ROBUST} with eps={n}/255" for n in (2, 8)]
    robust = [line for line in comparison([run.rows for run in read]) if line.name == "robust_accuracy"]
    assert [[cell is None for cell in line.cells] for line in robust] == [[False, True], [True, False]] * 2
    assert all(line.difference is None and line.best is None for line in robust)
    assert {line.evaluator for line in comparison([run.rows for run in read]) if line.name == "accuracy"} == {
        "accuracy()"
    }
    assert f"{ROBUST} with eps=8/255" in compare(runs)
    # One run alone, and what the command line has said already, stay as they are.
    assert read_runs(runs[:1])[0].rows[1]["evaluator"] == ROBUST
    stored = json.loads((runs[0] / "evaluation.json").read_text())
    for said, shown in (("eps=4/255", "eps=4/255"), ("train_eps=1/255", "train_eps=1/255, eps=2/255")):
        stored["rows"][1]["evaluator"] = f"{ROBUST} with {said}"
        (runs[0] / "evaluation.json").write_text(json.dumps(stored))
        assert read_runs(runs)[0].rows[1]["evaluator"] == f"{ROBUST} with {shown}"


def test_compare_is_aligned_and_says_where_configs_differ(two_runs):
    text = compare(two_runs)
    lines = text.splitlines()
    accuracy = next(line for line in lines if line.startswith("  accuracy"))
    assert re.fullmatch(
        r"  accuracy +accuracy\(\) +0\.9138 \[0\.8938, 0\.9338\] +0\.9204 \[0\.9004, 0\.9404\] \* +\+0\.0066", accuracy
    )
    assert lines[0].endswith("top_gap - gap") and len(lines[0]) == len(accuracy)
    assert f"gap, top_gap: {ROBUST} on test: not audited" in lines
    assert re.search(r"^pool +gap\(\) +top_gap\(fraction=\.14\)$", text, re.MULTILINE)
    assert "top_gap - gap" not in compare([*two_runs[:1], two_runs[0]])


def test_table_shows_costs_and_what_is_not_measured():
    text = table(rows_of(0, regions=False))
    assert re.search(
        r"^test +robust\(.*\) +robust_accuracy +0\.4569 \[0\.4269, 0\.4869\] +1,000 +1 +20 +81\.7$", text, re.MULTILINE
    )
    assert "on test: not audited; not measured beside it: foreground_sensitivity, background_gap" in text


def test_demo_table_puts_the_stored_seeds_beside_this_one():
    runs = {"gap": rows_of(0), "top_gap": rows_of(1)}
    change = {"mean": -0.02, "low": -0.05, "high": 0.01, "verdict": "undecided"}
    line = {"gap": {"mean": 0.92}, "top_gap .14": {"mean": 0.9}, "top_gap .14 - gap": change}
    stored = {"comparison": {"test": {"accuracy.accuracy": line}}, "runs": {"gap": {"0": {}, "1": {}}}}
    text = demo_table(runs, stored)
    words = (
        r"^  accuracy +0\.9138 +0\.9204 +\+0\.0066 +\| +0\.9200 +0\.9000 +-0\.0200 \[-0\.0500, \+0\.0100\] +undecided$"
    )
    assert (
        re.search(words, text, re.MULTILINE)
        and "right of |: 2 seeds" in text
        and "one seed, which decides nothing" in text
    )
    assert "no stored seeds to compare with" in demo_table(runs, None)


def test_charts_drop_what_is_not_finite_and_thin_long_curves():
    x, y = thin(range(1000), [float(i) for i in range(999)] + [float("nan")])
    assert len(x) == 300 and np.isclose(y[0], np.mean(range(4))) and np.isfinite(y).all()
    assert thin([1, 2, 3], [None, 1.0, float("inf")])[1].tolist() == [1.0]
    assert "var(--series-1)" in line_chart([Series([0, 1], [1, None], 1), Series([0], [2], 9)], own="a-", x_name="step")


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
    run = make_run(tmp_path / "<img src=x onerror=alert(1)>", pool=EVIL, sheets=False)
    tab, said, requests = opened(browser, report([run], tmp_path / "evil.html", title=EVIL))
    assert tab.title() == EVIL and EVIL in tab.locator("#config").inner_text()
    assert said == [] and len([url for url in requests if not url.startswith("data:")]) == 1
