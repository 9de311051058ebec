"""The page of pictures of studies: the same images for every arm of seed 0, each arm's maps beside the control's.

python experiments/pictures.py [STUDY ...]    # runs/study/page.html, of runs that study.py has trained
"""

import base64
import html
import sys
from collections.abc import Sequence
from pathlib import Path

import study as driver
from _studies import STUDIES, SYSTEMS

from topgap_jax import setup
from topgap_jax.progress import write_text
from topgap_jax.report import sheets

STYLE = "body{font:16px/1.5 system-ui;margin:2rem auto;max-width:72rem;padding:0 1rem}img{max-width:100%}"


def page(names: Sequence[str], runs: Path, count: int = 6) -> Path:
    """Write runs/page.html and runs/pictures/<study>.png from trained runs; returns the page's path."""
    parts = [section(name, runs, count) for name in names]
    write_text(
        runs / "page.html",
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport"
        f" content='width=device-width'><title>Methods beside their controls</title><style>{STYLE}</style><h1>Methods"
        f" beside their controls</h1>{''.join(parts)}</html>\n",
    )
    return runs / "page.html"


def section(name: str, runs: Path, count: int) -> str:
    """A study's heading, what it claims, the accuracy of each arm, and the picture."""
    study, stored = STUDIES[name], driver.stored(name)["runs"]
    maps, accuracy, methods = {}, [], []
    for arm_name, arm in study.arms.items():
        method = study.pictures or arm.explain
        (shown,) = setup.explain(driver.load(name, arm_name, 0, runs), methods=method, count=count).pages
        maps[arm_name] = next(iter(shown.maps.values()))
        values = driver.numbers(study, arm_name, map(driver.results.from_json, stored[arm_name]["0"]["rows"]))
        accuracy.append(f"{arm_name} {values['test | accuracy() | accuracy']:.3f}")
        methods.append(f"{arm_name} {method}")
    # An arm's own verdict on an image would stand beside the maps of all: the true class alone is said.
    picture = sheets.sheet(
        runs / "pictures" / f"{name}.png",
        shown.images,
        names=[(true, "") for true, _ in shown.names],
        maps=maps,
        title=study.title,
    )
    return (
        f"<h2>{html.escape(study.title)}</h2><p>The paper claims {html.escape(study.claimed)}. Accuracy of each arm on"
        f" test, seed 0: {html.escape(', '.join(accuracy))}. Maps: {html.escape(', '.join(methods))}.</p><img"
        f" alt='{html.escape(study.title)}'"
        f" src='data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}'>"
    )


if __name__ == "__main__":
    print(page(sys.argv[1:] or ["shapes", *SYSTEMS], driver.ROOT / "runs" / "study"))
