"""Configs: what a file, a run's config.json and the command line may say, and one line for every mistake in them."""

import json
from pathlib import Path

import optax
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from topgap_jax import pool
from topgap_jax.errors import UserError
from topgap_jax.setup import config as configs
from topgap_jax.setup import expressions, tables
from topgap_jax.training import optimizers
from topgap_jax.types import Evaluator

CONFIGS = Path(__file__).parent.parent / "configs"
TINY = Path(__file__).parent / "tiny_config.py"

POOLS = ", ".join(sorted(pool.TABLE))


def error(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_the_configs_of_the_repository(path):
    loaded = configs.load(path, [("epochs", "3"), ("eps", "4/255"), ("image_size", "(48, 64)")])
    config, methods, file = loaded.config, loaded.methods, loaded.file
    assert (config.epochs, config.eps, config.image_size) == (3, 4 / 255, (48, 64))
    assert set(methods) == ({"pooled_resnet"} if path.stem == "guided" else set()) and file == str(path)


def test_the_numbers_of_a_config_are_names_in_its_texts():
    config = configs.load(TINY)[0]
    config.explain = "twice(eps), twice(mean)"
    found = expressions.choices(config, "explain", {"twice": lambda value: lambda: (value, value)})
    assert list(found) == ["twice(eps)", "twice(mean)"]
    assert found["twice(eps)"]() == (2 / 255, 2 / 255) and found["twice(mean)"]() == ((0.5,) * 3,) * 2
    config.explain = (
        "integrated(steps=64, rules=guided, baseline=mean), smooth(gradient(rules=softplus(50)), samples=4)"
    )
    assert all(map(callable, expressions.choices(config, "explain", {}).values()))
    optimizer = expressions.choice(config, "optimizer", {}, total_steps=6)
    assert isinstance(optimizer, optax.GradientTransformation)
    (evaluator,) = expressions.choices(config, "evaluators", {}, "accuracy()", "--evaluators").values()
    assert isinstance(evaluator, Evaluator)
    assert expressions.choices(config, "augment", {}) == {}


def test_expressions_are_names_of_each_other():
    """Also under keys of one's own, through several steps; plain texts are given as they are; each is built once."""
    config, built = configs.load(TINY)[0], []

    def thing(*args):
        built.append(args)
        return lambda *_: args

    config.rate, config.drop, config.pool = 0.5, "thing(rate, dtype)", "thing(drop, drop, train)"
    value = expressions.choice(config, "pool", {"thing": thing})()
    assert value[0] is value[1] and value[0]() == (0.5, "float32") and value[2] == "train"
    assert len(built) == 2, "drop was built once"
    assert expressions.reads(config, "f(pool)") == {"pool", "drop", "rate", "dtype", "train"}
    assert expressions.reads(config, "f('pool', pool=3, pool())") == set()
    config.objective = "wrong("
    assert expressions.choice(config, "pool", {"thing": thing})(), "what is not named is not built"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head": "map_head(head)"}, "config.head needs its own value: head -> head; give one of these another text"),
        ({"model": "with_drop(network, 'stage1', drop)", "drop": "random_matched(other)", "other": "sgdrop(rate=drop)"},
         "config.drop needs its own value: drop -> other -> drop; give one of these another text"),
        ({"backbone": "map_head(mode)", "mode": "fast"}, "config.mode: unknown name 'fast'; "),
        ({"backbone": "smal_resnet()"}, "config.backbone: 'smal_resnet' is not a backbone; did you mean 'small_resnet'? choose from "),
        ({"pool": "gapp"}, "config.pool: unknown name 'gapp'; did you mean 'gap'? 'topgap help' lists the names"),
    ],
)  # fmt: skip
def test_a_mistake_behind_a_name(changes, words):
    config = ConfigDict({**configs.load(TINY)[0], **changes})
    assert error(expressions.choice, config, "model", {}, classes=3, total_steps=6).startswith(words)


def test_defaults_fill_what_a_file_leaves_out(tmp_path):
    text = """\
import ml_collections
def get_config():
    return ml_collections.ConfigDict({"source": "shapes()", "image_size": (64, 64), "epochs": 1, "optimizer": "sgd(.1)"})
"""
    loaded = configs.load(write(tmp_path / "mine.py", text), [("batch", "20")])
    assert set(loaded.config) == set(configs.KEYS) and loaded.config.batch == 20
    assert loaded.stated == {"source", "image_size", "epochs", "optimizer", "batch"}
    defaults = {key: value.default for key, value in configs.KEYS.items() if key not in loaded.stated}
    assert {key: loaded.config[key] for key in defaults} == defaults and None not in defaults.values()
    for key in ("source", "optimizer", "model", "objective"):
        assert expressions.choice(loaded.config, key, {}, classes=6, total_steps=200)
    for key in ("augment", "evaluators", "explain"):
        assert len(expressions.choices(loaded.config, key, {}, classes=6, total_steps=200)) == (key != "augment")


def test_arms():
    loaded = configs.load(TINY, [("batch", "10"), ("seed", "5")], "dropped")
    assert loaded.config.model == "with_drop(network, 'stage1', dropout(.1))"
    assert (loaded.config.batch, loaded.config.seed) == (10, 5), "the command line goes before the arm"
    assert configs.load(TINY, arm="dropped").config.seed == 1 and {"seed", "model"} <= loaded.stated
    assert configs.load(TINY, arm="plain").config == configs.load(TINY).config
    words = f"{TINY} has no arm 'droped'; did you mean 'dropped'? its arms are plain, dropped"
    assert error(configs.load, TINY, (), "droped") == words


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ("{'a': {'pol': 'gap()'}, 'b': {}}", "arm 'a': pol: there is no such key; did you mean 'pool'?"),
        ("{'a': {'epochs': 'many'}, 'b': {}}", "arm 'a': epochs: expected a whole number like 2, got 'many'"),
        ("{'a': {'epochs': 3}}", "arms() must return {name: {key: text}}, as --config.key=text gives them"),
        ("[('a', 'b')]", "arms() must return {name: {key: text}}, as --config.key=text gives them"),
    ],
)
def test_mistakes_in_arms(tmp_path, arms, words):
    path = write(tmp_path / "mine.py", f"from tests.tiny_config import get_config\ndef arms():\n    return {arms}\n")
    for arm in ("", "b"):
        assert error(configs.load, path, (), arm).startswith(f"{path}: {words}")


def test_every_name_stands_in_one_table():
    assert len(tables.TABLE) == sum(map(len, tables.ROOMS.values()))
    assert not set(tables.TABLE) & set(tables.VALUES)
    for table in tables.PYTHON.values():
        assert not set(table) & set(tables.TABLE)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("pool", "top_gap(k=4)", "top_gap(k=4)"),
        ("pool", "", ""),
        ("epochs", "2 * 3", 6),
        ("ema", "1", 1.0),
        ("eps", " 4/255", 4 / 255),
        ("image_size", "[64, 48]", (64, 48)),
        ("flag", "True", True),
    ],
)
def test_override_keeps_the_type(key, text, value):
    config = ConfigDict({**configs.load(TINY)[0], "flag": False})
    configs.override(config, key, text)
    assert config[key] == value and type(config[key]) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        (
            "epoch",
            "3",
            (
                "--config.epoch: there is no such key; did you mean 'epochs'? 'topgap help config' lists the keys; the"
                " config's own are eps"
            ),
        ),
        ("", "3", "--config.: there is no such key; 'topgap help config' lists the keys; the config's own are eps"),
        ("epochs", "1.5", "--config.epochs: expected a whole number like 2, got '1.5'"),
        ("epochs", "True", "--config.epochs: expected a whole number like 2, got 'True'"),
        ("epochs", "three", "--config.epochs: expected a whole number like 2, got 'three'"),
        ("epochs", "9" * 30, f"--config.epochs: expected a whole number like 2, got '{'9' * 30}'"),
        ("ema", "1/0", "--config.ema: expected a number like 0.0, got '1/0'"),
        ("ema", "9" * 400, f"--config.ema: expected a number like 0.0, got '{'9' * 400}'"),
        ("image_size", "64", "--config.image_size: expected a tuple like (32, 32), got '64'"),
    ],
)
def test_override_says_what_it_expects(key, text, words):
    assert error(configs.override, configs.load(TINY)[0], key, text).startswith(words)


@given(
    st.sampled_from(["epochs", "ema", "image_size", "pool", "seeds", ""]),
    st.one_of(st.text(), st.text("0123456789.,()[]+-*/'\"e aTrue", max_size=20)),
)
@example("ema", "9" * 400)
@example("epochs", "-" + "9" * 4000 + "*" + "9" * 4000)
@example("epochs", "(" * 5000)
@example("image_size", "(\x00,)")
def test_override_never_does_anything_but_set_or_say(key, text):
    config = ConfigDict({"epochs": 2, "ema": 0.5, "image_size": (32, 32), "pool": "gap()"})
    before = config.to_dict()
    try:
        configs.override(config, key, text)
    except UserError:
        assert config.to_dict() == before
    else:
        assert type(config[key]) is type(before[key])


@given(st.text("ab ,()[]'\"=", max_size=30))
def test_split_list_loses_nothing_but_commas(text):
    parts = expressions.split_list(text)
    assert all(part == part.strip() != "" for part in parts)
    squeeze = lambda words: "".join(words).replace(",", "").replace(" ", "")
    assert squeeze(parts) == squeeze(text)


@given(
    st.lists(
        st.recursive(st.sampled_from(["a()", "b(x=1, y='p,q')", "train[:5]"]), lambda s: s.map("f({0}, 2)".format))
    )
)
def test_split_list_finds_the_parts(parts):
    assert expressions.split_list(", ".join(parts)) == parts


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch": "128"}, "config.batch must be a whole number of at least 1, got '128'"),
        ({"epochs": 0}, "config.epochs must be a whole number of at least 1, got 0"),
        ({"seed": -1}, "config.seed must be a whole number, got -1"),
        ({"ema": 1.0}, "config.ema must be a number in [0, 1), got 1.0"),
        ({"image_size": 32}, "config.image_size must be (height, width) in pixels, got 32"),
        ({"image_size": (32, 0)}, "config.image_size must be (height, width) in pixels, got (32, 0)"),
        ({"mean": (0.5, "a")}, "config.mean must be numbers, one per channel, got (0.5, 'a')"),
        ({"pool": None}, "config.pool must be an expression, got None"),
        ({"resize": "squash"}, "config.resize must be 'stretch', 'crop' or 'centre', got 'squash'"),
    ],
)
def test_a_value_of_the_wrong_kind(tmp_path, change, words):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": {**configs.load(TINY)[0], **change}, "file": None}))
    assert error(configs.load, path) == words


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config(:\n", "{} cannot be run: SyntaxError: invalid syntax (mine.py, line 1)"),
        ("import math\n\ndef get_config():\n    return math.tau2\n",
         "{} line 4 cannot be run: AttributeError: module 'math' has no attribute 'tau2'"),
        ("x = 1\n", "{} has no get_config() that returns an ml_collections.ConfigDict; configs/cifar10.py shows one"),
        ("get_config = dict\n", "{} has no get_config() that returns an ml_collections.ConfigDict; configs/cifar10.py"),
        ("import ml_collections\nget_config = ml_collections.ConfigDict\n", "{}: the config lacks source, image_size, epochs, optimizer; 'topgap help config' says what they are"),
        ("get_config = dict\ndef methods():\n    return {'gap': dict}\n",
         "{}: methods() must not take the names gap, which the library has already"),
        ("get_config = dict\ndef methods():\n    return {'mine': 3}\n", "{}: methods() must return {{name: function}}"),
        ("raise SystemExit(3)\n", "{} line 1 cannot be run: SystemExit: 3"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_config(tmp_path, text, words):
    path = write(tmp_path / "mine.py", text)
    assert error(configs.load, path).startswith(words.format(path))


def test_a_file_that_is_not_there(tmp_path):
    assert error(configs.load, tmp_path / "x.py") == f"there is no config file '{tmp_path / 'x.py'}'"
    assert error(configs.load, tmp_path) == f"there is no config file '{tmp_path}'"


OWN = """\
from beside_it import pool
from tests.tiny_config import get_config as tiny


def get_config():
    config = tiny()
    config.pool = "mine(3)"
    return config


def methods():
    return {"mine": pool}
"""


def test_methods_of_ones_own(tmp_path, monkeypatch):
    """Also from a module beside the file, and again with the config.json of a run, if the command names the file."""
    folder = tmp_path / "there"
    folder.mkdir()
    path = write(folder / "config.py", OWN)
    write(folder / "beside_it.py", "def pool(k):\n    return lambda maps, step=None: k\n")
    config, methods, file, *_ = configs.load(path)
    assert expressions.choice(config, "pool", methods)(None) == 3 and file == str(path)
    stored = write(tmp_path / "config.json", json.dumps({"config": config.to_dict(), "file": file}))
    config, methods, again, *_ = configs.load(stored, [("pool", "mine(4)")], file=path)
    assert expressions.choice(config, "pool", methods)(None) == 4 and again == file
    assert config.image_size == (32, 32), "a tuple again, not JSON's list"
    assert error(configs.load, stored) == (
        f"{stored}: 'mine' is no name of the library; the Python file of a run is run only if the command names it: add "
        f"--config {path}"
    )
    assert configs.load(stored, [("pool", "gap()")]).methods == {}, "nothing calls it"
    assert error(configs.load, stored, file=tmp_path / "gone.py") == f"there is no config file '{tmp_path}/gone.py'"
    for first, second in ((path, path), (stored, stored)):
        said = error(configs.load, first, file=second)
        assert said.startswith(
            "of two config files the first is the config.json of a run, the second a Python file; got "
        )


def test_a_file_that_a_file_names_is_never_run(tmp_path):
    """A run may come from anywhere."""
    trap = write(tmp_path / "notes.txt", f"open({str(tmp_path / 'ran')!r}, 'w')")
    for named in (str(trap), "notes.txt", str(tmp_path / "." / "notes.txt")):
        config = configs.load(TINY)[0].to_dict()
        path = write(tmp_path / "config.json", json.dumps({"config": config, "file": named}))
        assert configs.load(path).config.epochs == 2
        write(path, json.dumps({"config": {**config, "pool": "mine()"}, "file": named}))
        assert f"add --config {named}" in error(configs.load, path)
        assert not (tmp_path / "ran").exists()


def test_a_config_without_own_methods_does_not_need_its_file(tmp_path):
    config = {**configs.load(TINY)[0], "test": "folder('mine (2)')"}
    path = write(tmp_path / "config.json", json.dumps({"config": config, "file": str(tmp_path / "gone.py")}))
    assert configs.load(path).config.epochs == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"config": 3}', '{"config": {"seed": 0}, "file": 3}'])
def test_a_broken_config_json(tmp_path, text):
    path = write(tmp_path / "config.json", text)
    assert error(configs.load, path).startswith(f"{path} is not the config.json of a run: ")


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("pool", "topgap(k=3)", f"config.pool: 'topgap' is not a pool; did you mean 'top_gap'? choose from {POOLS}"),
        ("pool", "pgd(linf(eps))", f"config.pool: 'pgd' is not a pool; choose from {POOLS}"),
        ("pool", "gap", "config.pool: 'gap' must be called: gap()"),
        ("pool", "3", "config.pool: '3' is not a pool, it is of type int; 'topgap help' lists pools"),
        ("pool", "", "config.pool: '' is not an expression: invalid syntax"),
        ("pool", "top_gap(k=3", "config.pool: 'top_gap(k=3' is not an expression: '(' was never closed at column 8"),
        ("pool", "top_gap(kk=3)", "config.pool: top_gap: got an unexpected keyword argument 'kk'; did you mean 'k'?; usage: top_gap("),
        ("pool", "top_gap(k=many)", "config.pool: unknown name 'many'; did you mean 'mean' or 'margin'? 'topgap help' lists the names"),
        ("model", "map_head(gap())", "config.model: 'map_head(gap())' is not a model, it is of type MapHead; 'topgap help' lists models"),
        ("objective", "adversarial(linf(eps))", "config.objective: adversarial: attack must be a value of type Attack, got Ball("),
        ("optimizer", "cosine(.1, 0, 3)", f"config.optimizer: 'cosine' is not an optimizer; choose from {', '.join(sorted(optimizers.TABLE))}"),
    ],
)  # fmt: skip
def test_a_text_that_does_not_fit_its_key(key, text, words):
    config = configs.load(TINY)[0]
    config[key] = text
    assert error(expressions.choice, config, key, {}).startswith(words)


def test_a_list_from_the_command_line_names_its_argument():
    text = error(expressions.choices, configs.load(TINY)[0], "evaluators", {}, "accuracy(), cam()", "--evaluators")
    assert text.startswith("--evaluators: 'cam' is not an evaluator; choose from accuracy, ")
    assert ", attributional_robustness, audit, " in text and ", localisation, " in text
