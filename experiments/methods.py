"""docs/methods.md from the tables: every name that a config may use, with its signature, what it is, and its source.

python experiments/methods.py
"""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import topgap_jax
from topgap_jax.build import signature
from topgap_jax.rules import ABOUT as ABOUT_RULES
from topgap_jax.setup.tables import NAMED, PYTHON, ROOMS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs" / "methods.md"
INTRODUCTION = """\
# Methods

Written by `make docs` from the tables in `topgap_jax/setup/tables.py` and the docstrings; `topgap help NAME` prints
the whole docstring of one. In a config a method is text, `config.pool = "top_gap(k=4)"`; in Python it is the function
of that name, `tg.pool.top_gap(k=4)`. Whatever stands behind a `*` is given by name. b images of h x w x c pixels, k
classes."""
ABOUT = {
    "models": (
        "Networks, their parts, and what makes a `Model` (`init`, `apply`) of any Flax module. Keys `backbone`, `head`,"
        " `network`, `model`."
    ),
    "pools": "Class maps (b, h, w, k) -> logits (b, k), in float32. Key `pool`.",
    "drops": "What training hides of a layer's features. Key `drop`, through `with_drop`.",
    "data": "A data set: the text of a split -> its records. Key `source`.",
    "objectives": "What training lowers: loss (b,), metrics and batch statistics of a batch. Key `objective`.",
    "augmentation": "Random changes of a batch, on the device, one key per example. Key `augment`.",
    "optimizers": "Optax gradient transformations. Key `optimizer`.",
    "schedules": "Step -> number, of a learning rate, of a drop's `rate` or of a pool's `k`.",
    "balls": "The perturbations that an attack may use: a norm ball, cut by the pixel box [0, 1].",
    "penalties": "A cost R of a perturbation, and its dual R* on the gradient map, for `norm_regularised`.",
    "scores": "What an attack raises: logits (b, k), labels (b,), clean logits (b, k) -> (b,).",
    "attacks": "Searches for an adversarial example, as pairs (`init`, `step`); `attacks.attack` runs one on a batch.",
    "explanations": "Where the network looks: (keys (b,), predict, images, labels (b,)) -> maps (b, h', w').",
    "rules": (
        "Other forward or backward passes of a network's operations, for `rules=` of an explanation, `bpda`, and"
        " `rewrite.with_rules`."
    ),
    "metrics": (
        "Measures of maps: (keys, predict, maps (b, h', w'), batch) -> {name: (b, ...)}, for `measures(explanation,"
        " ...)`."
    ),
    "evaluators": "What is measured of a model over a split. Key `evaluators`, and `topgap evaluate --evaluators`.",
}
AUTHORS = r"[A-Z][\w-]+(?:, [A-Z][\w-]+)*(?: & [A-Z][\w-]+| et al\.)?"
SOURCE = re.compile(rf"{AUTHORS},?(?: [A-Z]{{3,}})? \d{{4}}(?:, arXiv \d{{4}}\.\d{{4,5}})?|arXiv \d{{4}}\.\d{{4,5}}")


def write() -> None:
    """Write docs/methods.md."""
    DOCS.write_text(text(), encoding="utf-8")
    print(f"written: {DOCS.relative_to(ROOT)}")


def text() -> str:
    """docs/methods.md."""
    parts = [INTRODUCTION, ", ".join(f"[{room}](#{room})" for room in ROOMS) + ", [in Python](#in-python)"]
    for room, table in ROOMS.items():
        parts += [f"## {room.capitalize()}\n\n{ABOUT[room]}", *(entry(name, one) for name, one in table.items())]
        parts += [entry(name, value, call=False) for name, value in NAMED.get(room, {}).items()]
    parts.append("## In Python\n\nWhat one calls in a program, beside the methods above.")
    for room, table in PYTHON.items():
        parts += [entry(f"{room}.{name.split('.')[-1]}", function) for name, function in table.items()]
    return "\n\n".join(parts) + "\n"


def entry(name: str, method: Any, call: bool = True) -> str:
    """Signature, file, the docstring's first paragraph, and the sources that the docstring names; `call`: whether it is
    called."""
    shown = signature(name, method) if call else name
    if isinstance(method, Mapping):
        rules = [function for rule in method.values() for function in rule if function]
        about = [ABOUT_RULES[name]]
    else:
        rules, about = [method], [inspect.getdoc(method) or ""]
    file = Path(inspect.getsourcefile(inspect.unwrap(rules[0]))).relative_to(Path(topgap_jax.__file__).parent.parent)
    first = " ".join(" ".join(each.split("\n\n")[0].split()) for each in about)
    sources = dict.fromkeys(source for each in about for source in SOURCE.findall(" ".join(each.split())))
    more = [source for source in sources if source not in first]
    paragraph = first + (f" Source: {'; '.join(more)}." if more else "")
    note = "" if call else " (without a call)"
    return f"**`{shown}`**{note} · [{file.name}](../{file.as_posix()})<br>\n{markdown(paragraph)}"


def markdown(prose: str) -> str:
    """A docstring's words as Markdown: its formulas are no emphasis, its arXiv numbers are links."""
    parts = prose.split("`")
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([\\*_<\[\]|])", r"\\\1", parts[i])
        parts[i] = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", parts[i])
    return "`".join(parts)


if __name__ == "__main__":
    write()
