"""The report: one HTML page about one or several runs that needs nothing but itself.

Everything a user supplies (names, paths, config values, numbers) goes through Jinja's autoescape; charts hold no such
text. A content security policy allows the page's own script only and no request at all.
"""

import base64
import hashlib
import io
import json
import shlex
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import count, takewhile, zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from topgap_jax.data.formats import open_picture
from topgap_jax.errors import UserError
from topgap_jax.measure.results import to_json
from topgap_jax.progress import say, write_text
from topgap_jax.report import attacked, galleries
from topgap_jax.report.audits import checked
from topgap_jax.report.figures import SERIES, Series, line_chart
from topgap_jax.report.lines import amount, comparison, fewer, has_interval, number, reason
from topgap_jax.report.read import Run, beside, differing, finite, read_runs
from topgap_jax.report.verdict import verdict
from topgap_jax.types import Curve, Gallery

HERE = Path(__file__).parent
PICTURE_BYTES = 10_000_000  # of all contact sheets on a page, as they stand in it
ADVERSARIAL_BYTES = 4_000_000  # of all pictures of adversarial examples
GALLERY_BYTES = 6_000_000  # of all pictures of results
LARGE_BYTES = 1_000_000  # a larger sheet is stored as JPEG
WIDEST = 1600
PNG = b"\x89PNG\r\n\x1a\n"


def report(workdirs: Sequence[Path | str], out: Path, *, title: str = "Top-GAP report") -> Path:
    """Write the page about the runs in `workdirs` to `out` and return it.

    What a run does not have yet (an evaluation, metrics, sheets) is said on the page. UserError: a folder is no run.
    """
    runs, out = read_runs(workdirs), Path(out)
    if out.is_dir():
        raise UserError(f"'{out}' is a folder; name the HTML file to write, such as '{out / 'report.html'}'")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    ids = (f"chart{i}-" for i in count())
    pictures, left_out = sheets(runs)
    left_out += [f"{run.label}/{words}" for run in runs for words in run.faults]
    for line in left_out:
        say(line)
    page = (
        environment()
        .get_template("page.html")
        .render(
            title=title,
            runs=runs,
            written=datetime.now().strftime("%Y-%m-%d %H:%M"),
            style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            verdict=verdict(runs),
            facts=[facts(run) for run in runs],
            lines=comparison([run.rows for run in runs]),
            robust=robust_rows(runs),
            audits=checked(runs, attacks=True),
            trusts=checked(runs, attacks=False),
            cascades=cascades(runs),
            adversarial=adversarial(runs),
            training=training(runs, ids),
            curves=curves(runs, ids),
            sheets=pictures,
            galleries=drawn_galleries(runs),
            left_out=left_out,
            configs=differing([run.config for run in runs]),
            versions=differing([run.versions for run in runs]),
            again=[
                f"topgap train --config {shlex.quote(str(run.folder / 'config.json'))} --workdir NEW" for run in runs
            ],
            data=[numbers(run) for run in runs],
        )
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page)
    except OSError as error:
        raise UserError(f"cannot write the report '{out}': {error.strerror}") from None
    return out


def environment() -> Environment:
    """Jinja with autoescape, and the few words the template needs."""
    jinja = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    typeset = lambda value, sign=False: number(value, sign=sign).replace("-", "−")
    sortable = lambda value: repr(float(value)) if finite(value) else ""
    jinja.filters |= {"number": typeset, "sortable": sortable, "amount": lambda value: amount(value) or "–"}
    jinja.filters["shell"] = lambda path: shlex.quote(str(path))
    jinja.globals |= {
        "fewer": fewer,
        "finite": finite,
        "has_interval": has_interval,
        "reason": reason,
        "colours": SERIES,
    }
    return jinja


def facts(run: Run) -> list[tuple[str, str]]:
    """What the overview says about a run."""
    steps = [row["step"] for row in run.metrics]
    validations = [row.get("accuracy") for row in run.metrics if row.get("kind") == "validation"]
    accuracies = list(filter(finite, validations))
    about = [(key, run.config[key]) for key in ("source", "pool", "objective", "seed", "epochs") if key in run.config]
    about += [("steps", number(max(steps)))] if steps else []
    about += [("best validation", number(max(accuracies)))] if accuracies else []
    about += [("evaluated", ", ".join(filter(None, (run.weights, run.stale))))] if run.weights else []
    about += [(key, run.versions[key]) for key in ("device", "commit") if run.versions.get(key, "null") != "null"]
    return about


def robust_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every robust number with its audit and what belongs beside it, at least the accuracy before the attack."""
    rows = []
    for i, run in enumerate(runs):
        for row in run.rows:
            if row.audit is not None and not row.checks:
                main = next(iter(row.numbers.values()), None)
                measures, missing = beside(run.rows, row)
                if "accuracy" not in measures and "clean_accuracy" in row.numbers:
                    measures = {"clean_accuracy": row.numbers["clean_accuracy"], **measures}
                rows.append({"run": i, "row": row, "main": main, "beside": measures, "missing": missing})
    return rows


def cascades(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of every row with several attacks, what each of them leaves: the measures `after_1`, `after_2`, ..."""
    tables = []
    for i, run in enumerate(runs):
        for row in run.rows:
            numbers = row.numbers
            names = takewhile(numbers.__contains__, (f"after_{k}" for k in count(1)))
            left = [numbers[name] for name in names]
            if row.audit is not None and left and "clean_accuracy" in numbers:
                tables.append({"run": i, "row": row, "left": [numbers["clean_accuracy"], *left]})
    return tables


def adversarial(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A picture of examples that each robust row's attacks broke, as far as there is room for it."""
    drawn, used = [], 0
    for i, run in enumerate(runs):
        for place, path in run.adversarial.items():
            row, examples = run.rows[place], attacked.read(path)
            if examples is None or (examples.split, examples.weights) != (row.split, run.weights):
                continue
            if not examples.evaluator.startswith(row.evaluator):  # whose text may say more where runs are compared
                continue
            image = attacked.picture(examples, run.classes)
            stored = io.BytesIO()
            image.save(stored, "PNG", optimize=True)
            data = as_data(stored.getvalue(), image)
            if used + len(data["source"]) <= ADVERSARIAL_BYTES:
                used += len(data["source"])
                drawn.append({"run": i, "row": row, "picture": data})
    return drawn


def drawn_galleries(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The pictures that evaluators made of their results, as far as there is room for them."""
    drawn, used = [], 0
    for i, run in enumerate(runs):
        for row in run.rows:
            for name, gallery in row.measures.items():
                if not isinstance(gallery, Gallery):
                    continue
                stored = io.BytesIO()
                image = galleries.picture(gallery)
                image.save(stored, "PNG", optimize=True)
                data = as_data(stored.getvalue(), image)
                if used + len(data["source"]) <= GALLERY_BYTES:
                    used += len(data["source"])
                    drawn.append({"run": i, "row": row, "label": gallery.label or name, "picture": data})
    return drawn


def training(runs: Sequence[Run], ids: Iterator[str]) -> list[dict[str, Any]]:
    """A chart for every number in metrics.jsonl, loss and accuracy first: thin lines training, points validation."""
    names = dict.fromkeys(["loss", "accuracy"])
    names |= dict.fromkeys(
        name for run in runs for row in run.metrics for name in row if name not in ("step", "epoch", "kind")
    )
    charts = []
    for name in names:
        series = []
        for i, run in enumerate(runs):
            for kind in ("train", "validation"):
                rows = [row for row in run.metrics if row.get("kind") == kind and finite(row.get(name))]
                if rows:
                    steps, values = [row["step"] for row in rows], [row[name] for row in rows]
                    series.append(Series(steps, values, i, points=kind == "validation"))
        if series:
            charts.append({"name": name.replace("_", " "), "svg": Markup(line_chart(series, prefix=next(ids)))})
    return charts


def curves(runs: Sequence[Run], ids: Iterator[str]) -> list[dict[str, Any]]:
    """A chart for every curve of the evaluations, a line per run: robust ones (accuracy over epsilon) first."""
    charts: dict[tuple[str, str, str], tuple[Curve, bool, list[Series]]] = {}
    for i, run in enumerate(runs):
        for row in run.rows:
            for name, curve in row.measures.items():
                if isinstance(curve, Curve) and len(curve.x) > 2:  # two points are in the tables already
                    key = (name, row.text, row.split)
                    _, _, series = charts.setdefault(key, (curve, row.audit is not None, []))
                    series.append(Series(curve.x, curve.y, i, points=len(curve.x) <= 30))
    drawn = []
    for (name, evaluator, split), (curve, _, series) in sorted(charts.items(), key=lambda item: not item[1][1]):
        svg = Markup(line_chart(series, prefix=next(ids), diagonal=name == "calibration"))
        axes = (*curve.axes, "", "")[:2]
        about = {"label": curve.label or name, "axes": axes, "evaluator": evaluator, "split": split}
        drawn.append(about | {"svg": svg})
    return drawn


def sheets(runs: Sequence[Run]) -> tuple[dict[str, list[dict[str, Any] | None]], list[str]]:
    """Contact sheets by name, one place per run, and words about those left out for size or unreadable.

    The space goes round the runs, so that no run crowds out another.
    """
    names = sorted({path.name for run in runs for path in run.sheets})
    pictures: dict[str, list[dict[str, Any] | None]] = {name: [None] * len(runs) for name in names}
    left_out, used = [], 0
    for i, path in (
        pair
        for turn in zip_longest(*[[(i, p) for p in run.sheets] for i, run in enumerate(runs)])
        for pair in turn
        if pair
    ):
        picture = embedded(path)
        if picture is None:
            left_out.append(f"{runs[i].label}/sheets/{path.name}: cannot be read as a picture")
        elif used + len(picture["source"]) > PICTURE_BYTES:
            left_out.append(
                f"{runs[i].label}/sheets/{path.name}: no room, the page holds {PICTURE_BYTES / 1e6:.0f} MB of pictures"
            )
        else:
            used += len(picture["source"])
            pictures[path.name][i] = picture
    return {name.removesuffix(".png"): places for name, places in pictures.items() if any(places)}, left_out


def embedded(path: Path) -> dict[str, Any] | None:
    """A PNG file as data URI with its size; None if it cannot be read."""
    try:
        content, pixels = path.read_bytes(), open_picture(path)
    except (OSError, UserError):
        return None
    return as_data(content, Image.fromarray(pixels)) if content.startswith(PNG) else None


def as_data(content: bytes, image: Image.Image) -> dict[str, Any]:
    """A PNG, which holds the image, as data URI with its size; a large one made smaller and as JPEG."""
    (width, height), kind = image.size, "png"
    if len(content) > LARGE_BYTES or width > WIDEST:
        small = image.convert("RGB")
        small.thumbnail((WIDEST, 10 * WIDEST))
        stored = io.BytesIO()
        small.save(stored, "JPEG", quality=88)
        content, kind, (width, height) = stored.getvalue(), "jpeg", small.size
    return {
        "source": f"data:image/{kind};base64,{base64.b64encode(content).decode()}",
        "width": width,
        "height": height,
    }


def numbers(run: Run) -> dict[str, Any]:
    """What a run holds, for JSON: numbers that are not finite become null."""
    rows = [to_json(row) for row in run.rows]
    data = {"run": run.label, "weights": run.weights, "data": run.data, "config": run.config, "rows": rows}
    return json.loads(json.dumps(data), parse_constant=lambda _: None)
