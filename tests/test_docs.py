"""The documents: the list of methods is that of the tables, and the examples of how to add one run as they stand
there."""

import re
import tomllib
from pathlib import Path

import methods
import pytest

from topgap_jax import setup

DOCS = Path(__file__).parent.parent / "docs"
SECTIONS = re.split(r"^## ", (DOCS / "how_to_add.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
EXAMPLES = {part.split("\n")[0]: "\n".join(re.findall(r"```python\n(.*?)```", part, re.DOTALL)) for part in SECTIONS}
CONFIG = "A method of your own"


def test_the_list_of_methods_is_that_of_the_tables():
    assert methods.DOCS.read_text(encoding="utf-8") == methods.text(), "docs/methods.md is stale: make docs"


@pytest.mark.parametrize("section", [section for section in EXAMPLES if section != CONFIG])
def test_what_how_to_add_shows_runs(section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "assert" in EXAMPLES[section]
    exec(compile(EXAMPLES[section], section, "exec"), {"__name__": section})


def test_a_config_with_methods_of_its_own_is_assembled(tmp_path):
    file = tmp_path / "my_config.py"
    file.write_text(EXAMPLES[CONFIG], encoding="utf-8")
    layers, _ = setup.layers(setup.experiment(file))
    assert "maps" in {layer.name for layer in layers}


PAGES = {page.name: page for page in (*DOCS.glob("*.md"), DOCS.parent / "README.md")}


def words(page):
    """A page without its code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name):
    """Files, and headings as GitHub makes anchors of them."""
    page = PAGES[name]
    for link in re.findall(r"\]\((?!http)([^)]+)\)", words(page)):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert anchor in {"", *(re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings)}, link


@pytest.mark.parametrize("name", ["README.md", "speed.md"])
def test_every_number_stands_in_the_results(name):
    """Numbers with a decimal point are measured, and docs/results.md is written from results/*.json."""
    numbers = set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", words(PAGES[name]).replace("Python 3.", "Python ")))
    missing = numbers - set(re.findall(r"\d+\.\d+", PAGES["results.md"].read_text(encoding="utf-8")))
    assert numbers and not missing, missing


def test_the_picture_of_the_house_is_the_contract_of_imports():
    """The rooms of README, from the top, in the order of import-linter's layers."""
    contracts = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    picture = re.findall(r"^\d  (.*?)(?:   |$)", PAGES["README.md"].read_text(encoding="utf-8"), re.MULTILINE)
    rooms = [room for floor in picture for room in floor.split(" | ")]
    assert ["__main__", *rooms] == contracts["contracts"][0]["layers"]
