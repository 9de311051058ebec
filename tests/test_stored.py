"""Files of a run that a stranger may have written: read, or refused in a line; a text of any length ends in a line."""

import base64
import json
import random
import zipfile
import zlib

import numpy as np
import pytest

from topgap_jax import pretrained
from topgap_jax.build import build
from topgap_jax.cli import texts
from topgap_jax.errors import UserError
from topgap_jax.measure import adversarial, results
from topgap_jax.measure.log import Log
from topgap_jax.measure.robust import is_entry
from topgap_jax.report import attacked
from topgap_jax.rewrite.normalisation import channels
from topgap_jax.run import manifest, workdir
from topgap_jax.setup import config as configs
from topgap_jax.setup import expressions
from topgap_jax.stored import files_inside, mismatch, read_object, sealed

CONFIG = {"config": {"seed": 0, "image_size": [8, 8], "pool": "gap()"}, "file": None,
          "data": {"classes": ["a", "b"], "examples": 9}}  # fmt: skip
MEASURE = {"value": 0.5, "low": None, "high": 0.75, "n": 10, "better": "higher", "label": "accuracy", "main": True}
ROW = {"split": "test", "evaluator": "accuracy()", "overrides": {"eps": "2/255"}, "examples": 10, "audit": None,
       "measures": {"accuracy": MEASURE, "curve": {"x": [0, 1], "y": [0.5, None], "axes": ["a", "b"], "label": "c"}},
       "cost": {"seconds": 1.5, "device": "cpu"}, "norms": ["linf"],
       "checks": [{"id": "A1", "status": "pass", "statistic": 0, "threshold": None, "n": 8, "sentence": "well"}]}  # fmt: skip
ENTRY = {"phase": 0, "ids": [0, 2], "run": [0, 0], "broken": [True, False], "step": [1, 4], "steps": [2, 4],
         "radius": [0.01, float("inf")], "ended": [True, True], "margin": [0.5, -0.5], "predicted": [1, 0],
         "fragile": [False, False], "unconfirmed": 0, "not_finite": 0, "slot_steps": 8, "seconds": 0.5}  # fmt: skip
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
    for text in ("[" * 100_000, '{"files": {"a": [1e999, 1]}}', '{"files": {"a": [1]}}', "\\xff", '{"files": 1}'):
        (folder / "manifest.json").write_bytes(text.encode())
        assert manifest.damage(folder) == "manifest.json is not what was written"


def test_weights_that_unpack_to_gigabytes_are_refused(tmp_path):
    path = tmp_path / "w.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (2**27,)})
        for _ in range(2**9):
            member.write(bytes(2**20))
    with pytest.raises(UserError, match=r"bytes become 536,\d+,\d+: no weights are packed so densely"):
        pretrained.describe(path)


def test_a_deep_tree_is_looked_at_once():
    """Asked twice a level, its leaf would be looked at 2^200 times."""
    tree = "\ud800"
    for _ in range(100):
        tree = {"a": [tree]}
    assert "is '\\ud800', not a text" in mismatch(tree, "PLAIN")


def test_a_config_whose_evaluators_are_no_text_is_a_line(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": {**CONFIG["config"], "evaluators": 20}}))
    with pytest.raises(UserError, match="the config lacks"):
        configs.load(path)


def test_what_a_log_says_of_examples_is_checked():
    assert is_entry(ENTRY, 3)
    changed = [{"ids": [-1, 2]}, {"ids": [0, 3]}, {"run": [0]}, {"run": [0, -1]}, {"steps": None}, {"seconds": "1"}]
    for changes in changed:
        assert not is_entry(ENTRY | changes, 3)
    assert not is_entry({"phase": 0}, 3) and not is_entry([], 3)


@pytest.mark.parametrize("line", [b"{", b"[" * 100_000, b"\xff", b"1" * 5000])
def test_a_log_is_read_up_to_the_first_line_that_is_none(line, tmp_path):
    path, whole = tmp_path / "log.jsonl", json.dumps(ENTRY).encode()
    noted = lambda text: b"%08x %s" % (zlib.crc32(text), text)
    for bad in (line, noted(line)):  # damaged, or a stranger's
        path.write_bytes(b"\n".join([noted(b"{}"), noted(whole), bad, noted(whole), b""]))
        assert Log(path, {}).entries == [ENTRY]


def test_what_is_drawn_of_adversarial_images_is_checked(tmp_path, capsys):
    """Damaged archives, other shapes and types, numbers that are no picture's: each is left out, with a line."""
    images = np.linspace(0, 1, 2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3)
    whole = {"attack": np.int32([0, -1]), "label": np.int32([0, 1]), "predicted": np.int32([-7, 1]), "clean": images,
             "step": np.int32([2, -1]), "adversarial": images, "split": "test", "evaluator": "r", "weights": "w"}  # fmt: skip
    path = tmp_path / "a.npz"

    def read(**changes):
        np.savez(path, **{name: value for name, value in (whole | changes).items() if value is not None})
        return attacked.read(path)

    examples = read()
    assert examples.predicted == [-7] and attacked.picture(examples, ("a", "b" * 10**6)).width > 600
    assert read(attack=np.int32([-1, -1])) is None and capsys.readouterr().err == ""
    for changes, said in [
        ({"step": None}, "it has no 'step'"), ({"label": np.int32([0])}, "'label' is int32 of shape (1,)"),
        ({"clean": images * 1e30}, "values outside [0, 1]"), ({"clean": images * np.nan}, "values outside [0, 1]"),
        ({"split": np.int32(3)}, "'split' is int32"), ({"adversarial": images[0], "clean": images[0]}, "of shape"),
    ]:  # fmt: skip
        assert read(**changes) is None
        line = capsys.readouterr().err
        assert said in line and line.count("\n") == 1 and "evaluate again" in line
    good = path.read_bytes()
    for place in range(0, len(good), 7):
        path.write_bytes(good[:place])
        assert attacked.read(path) is None
        assert capsys.readouterr().err.count("\n") == 1


def test_a_header_warns_of_nothing(tmp_path):
    """Python warns of the escape in it, on the terminal."""
    path, header = tmp_path / "w.npz", r"{'descr': '<f4', 'fortran_order': False, 'shape': (1,), '\e': 1}"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(4)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(UserError, match=r"is not a readable \.npz file"):
        pretrained.describe(path)


def test_a_gallery_that_would_fill_the_memory_is_refused(tmp_path):
    tile = {"shape": [1, 10**6], "bytes": base64.b64encode(bytes(10**6)).decode()}
    gallery = {"tiles": [tile], "captions": [""], "columns": 1, "label": ""}
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"rows": [{**ROW, "measures": {"g": gallery}}]}))
    with pytest.raises(UserError, match="1 pictures of up to 144 x 1000000 pixels"):
        results.read(path)


@pytest.mark.parametrize(
    ("curve", "said"),
    [
        ({"x": "[1]", "y": "2"}, r"x is '\[1\]', not a list"),
        ({"x": [1], "y": [0.5, 1]}, "a curve of 1 and 2 numbers"),
        ({"x": [1], "y": ["b"]}, r"y\[0\] is 'b', not a number"),
    ],
)
def test_what_is_no_curve_is_refused(curve, said, tmp_path):
    """Each fits a measure, of which no key must be there."""
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"rows": [{**ROW, "measures": {"curve": curve}}]}))
    with pytest.raises(UserError, match=f"is not an evaluation of this program .*{said}"):
        results.read(path)


def test_what_we_write_carries_a_checksum(tmp_path):
    """One flipped bit makes another number of a number; what is edited says how, and without a checksum it is read."""
    path, schema = tmp_path / "a.json", {"config": {str: "PLAIN"}}
    value = {"config": {"eps": 8 / 255, "mean": (0.5, float("inf")), "text": "\ud800"[:0]}}
    path.write_text(sealed(value))
    assert read_object(path, "a thing", schema) == {"config": {"eps": 8 / 255, "mean": [0.5, None], "text": ""}}
    changed = path.read_text().replace("0.5", "0.7")
    path.write_text(changed)
    with pytest.raises(UserError, match="it does not hold what was written; it is damaged, or edited"):
        read_object(path, "a thing", schema)
    path.write_text(json.dumps({key: each for key, each in json.loads(changed).items() if key != "crc32"}))
    assert read_object(path, "a thing", schema)["config"]["mean"][0] == 0.7


def test_images_of_an_attack_are_found_again_or_are_none(tmp_path):
    path, ids, clean = tmp_path / "a.npy", np.arange(2), np.zeros((2, 4, 4, 3), np.float32)
    kept = lambda clean=clean: adversarial.Kept(path, np.arange(len(clean)), ids, clean, resumes=True)
    assert not kept().complete
    kept().put(np.array([1]), clean[:1] + 0.5)
    assert kept().complete and kept().images[1].min() == 0.5
    assert not kept(clean[:1]).complete
    path.write_bytes(b"x")
    assert not kept().complete
