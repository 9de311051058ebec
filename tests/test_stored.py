"""Files of a run that a stranger may have written: read, or refused in a line; a text of any length ends in a line."""

import json
import random
import zipfile

import numpy as np
import pytest

from topgap_jax import pretrained
from topgap_jax.build import build
from topgap_jax.cli import texts
from topgap_jax.errors import UserError
from topgap_jax.measure import results
from topgap_jax.rewrite.normalisation import channels
from topgap_jax.run import manifest, workdir
from topgap_jax.setup import config as configs
from topgap_jax.setup import expressions
from topgap_jax.stored import files_inside, mismatch, read_object

CONFIG = {"config": {"seed": 0, "image_size": [8, 8], "pool": "gap()"}, "file": None,
          "data": {"classes": ["a", "b"], "examples": 9}}  # fmt: skip
MEASURE = {"value": 0.5, "low": None, "high": 0.75, "n": 10, "better": "higher", "label": "accuracy", "main": True}
ROW = {"split": "test", "evaluator": "accuracy()", "overrides": {"eps": "2/255"}, "examples": 10, "audit": None,
       "measures": {"accuracy": MEASURE, "curve": {"x": [0, 1], "y": [0.5, None], "axes": ["a", "b"], "label": "c"}},
       "cost": {"seconds": 1.5, "device": "cpu"}, "norms": ["linf"],
       "checks": [{"id": "A1", "status": "pass", "statistic": 0, "threshold": None, "n": 8, "sentence": "well"}]}  # fmt: skip
EVALUATION = {"rows": [ROW], "weights": "w", "data": "d"}
READERS = {
    "config.json": (CONFIG, [configs.load, workdir.read_config, lambda path: workdir.learnt(path.parent)]),
    "evaluation.json": (EVALUATION, [results.read]),
}
WORSE = (b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 20_000, b"1" * 5000, b"", b"\x00", b'"x"', b"null", b"[]", b"{}")
VALUES = (
    10**400,
    1e999,
    float("nan"),
    "\ud800",
    None,
    True,
    [],
    {},
    "x" * 5000,
    [[[]]],
    {"a": {"b": []}},
    -1,
    "\x1b[31m",
)


def places(value, at=()):
    """Every place in a tree, as its path."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from places(each, (*at, key))


def changed(tree, at, value):
    if not at:
        return value
    tree = dict(tree) if isinstance(tree, dict) else list(tree)
    tree[at[0]] = changed(tree[at[0]], at[1:], value)
    return tree


def refused_or_read(reader, path):
    try:
        reader(path)
    except UserError as error:
        line = texts.line(error)
        assert "\n" not in line and len(line) <= 500 and line.isprintable()
        return True
    return False


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_a_line(name, tmp_path):
    tree, readers = READERS[name]
    path, refused = tmp_path / name, 0
    for reader in readers:
        path.write_text(json.dumps(tree))
        if reader is not configs.load:  # it lacks keys
            assert not refused_or_read(reader, path)
        for data in WORSE:
            path.write_bytes(data)
            assert refused_or_read(reader, path)
        for at in places(tree):
            for value in VALUES:
                path.write_text(json.dumps(changed(tree, at, value)))
                refused += refused_or_read(reader, path)
    assert refused > 100
    draw = random.Random(0)
    good = json.dumps(tree).encode()
    for _ in range(300):
        data = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        for reader in readers:
            refused_or_read(reader, path)


def test_what_does_not_fit_is_said_with_its_place(tmp_path):
    schema = {"rows": [{"n": (int, float), "name?": str}]}
    for value, text in [
        ({"rows": [{"n": 1}, {"n": 2.5, "name": "x"}]}, ""),
        ({"rows": [{"n": True}]}, "rows[0].n is True, not a number"),
        ({"rows": {}}, "rows is {}, not a list"),
        ({"rows": [{}]}, "rows[0].n is missing"),
        ({"rows": [{"n": 1, "name": "\ud800"}]}, "rows[0].name is '\\ud800', not a text"),
        ({"rows": [{"n": float("inf")}]}, "rows[0].n is inf, not a number"),
        ([], "the whole is [], not an object"),
    ]:
        assert mismatch(value, schema) == text
    path = tmp_path / "large.json"
    path.write_bytes(b" " * (2**26 + 1))
    with pytest.raises(UserError, match="is not a thing: it has more than 64 MB"):
        read_object(path, "a thing", {})
    with pytest.raises(UserError, match=r"is not a thing: .*No such file"):
        read_object(tmp_path / "none", "a thing", {})


def test_long_texts_and_infinite_numbers():
    with pytest.raises(UserError, match="it has 50,000,000 characters, and at most 100,000 are read"):
        build("1+" * 25_000_000, {})
    with pytest.raises(UserError, match="a list of 50,000,000 characters"):
        expressions.split_list("a," * 25_000_000)
    for mean, std in [((0, 0, 0), (float("inf"), 1, 1)), ((float("nan"), 0, 0), (1, 1, 1)), ((0, 0), (1, 0))]:
        with pytest.raises(UserError, match="one finite number per channel each, every std above 0"):
            channels(mean, std)


def test_a_link_out_of_the_run_is_refused(tmp_path):
    run, other = tmp_path / "run", tmp_path / "secret.png"
    (run / "sheets").mkdir(parents=True)
    other.write_text("x")
    (run / "sheets" / "a.png").write_text("x")
    (run / "sheets" / "b.png").symlink_to(run / "sheets" / "a.png")
    assert [path.name for path in files_inside(run, "sheets/*.png")] == ["a.png", "b.png"]
    (run / "sheets" / "c.png").symlink_to(other)
    with pytest.raises(UserError, match=r"c\.png is a link to .*secret\.png, outside the run"):
        files_inside(run, "sheets/*.png")


def test_a_checkpoints_file_is_no_link(tmp_path):
    folder = tmp_path / "3"
    folder.mkdir()
    (folder / "a").write_text("x")
    manifest.write(folder)
    assert manifest.damage(folder) == ""
    (folder / "a").rename(tmp_path / "b")
    (folder / "a").symlink_to(tmp_path / "b")
    assert manifest.damage(folder) == "a is a link"


def test_weights_that_unpack_to_gigabytes_are_refused(tmp_path):
    path = tmp_path / "w.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (2**27,)})
        for _ in range(2**9):
            member.write(bytes(2**20))
    with pytest.raises(UserError, match=r"bytes become 536,\d+,\d+: no weights are packed so densely"):
        pretrained.describe(path)
