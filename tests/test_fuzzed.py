"""What `experiments/fuzz_readers.py` found, and small inputs of every outcome that it met: each reader gives a value or
one line."""

import base64
import json
from pathlib import Path

import pytest
from _fuzz_targets import TARGETS, fresh, outcome

FOUND = {path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "fuzzed").glob("*.json"))}


def test_every_reader_has_inputs():
    assert set(FOUND) == set(TARGETS)
    assert sum(path.stat().st_size for path in (Path(__file__).parent / "fuzzed").iterdir()) < 1_000_000


@pytest.mark.parametrize("name", FOUND)
def test_odd_inputs_end_in_a_value_or_a_line(name, tmp_path):
    target = TARGETS[name]
    lines = [outcome(target, fresh(target, tmp_path / "in"), base64.b64decode(text)) for text in FOUND[name].values()]
    assert any(lines) or name in (
        "manifest",
        "attack_log",
        "adversarial",
        "sheet",
        "sheets",
        "metrics",
    )  # which pass things over
