"""From a config to what runs: each split read once, small sets like large ones, weights of a run or file, pictures."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from topgap_jax import data, pretrained, rewrite, setup
from topgap_jax.errors import UserError
from topgap_jax.measure import results
from topgap_jax.mesh import data_mesh
from topgap_jax.models import bind
from topgap_jax.report.read import read_runs
from topgap_jax.run import fit as fit_module
from topgap_jax.run import workdir as workdir_module
from topgap_jax.run.fit import fit
from topgap_jax.run.plan import plan
from topgap_jax.setup import assembly, expressions, networks
from topgap_jax.setup import weights as weights_module
from topgap_jax.types import Cost, Evaluator, Explain, Model

TINY = Path(__file__).parent / "tiny_config.py"
CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Of the eight that tests have: 20 examples cannot be split over eight."""
    for module in (fit_module, assembly, setup.commands):
        monkeypatch.setattr(module, "data_mesh", lambda: data_mesh(jax.devices()[:1]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained run with averaged weights and without a validation split."""
    workdir = tmp_path_factory.mktemp("run") / "first"
    chosen = setup.experiment(TINY, [("ema", ".5"), ("validation", ""), ("epochs", "1"), ("seed", "1")])
    variables = fit(
        chosen.config, workdir, parts=setup.parts(chosen), file=chosen.file, mesh=data_mesh(jax.devices()[:1])
    )
    return workdir, variables


@pytest.fixture
def run(trained, tmp_path_factory):
    """A copy of it for each test, which may write there."""
    workdir, variables = trained
    return shutil.copytree(workdir, tmp_path_factory.mktemp("run") / "first"), variables


@pytest.fixture
def reads(monkeypatch):
    """The splits that were decoded whole, in order."""
    done, decode = [], data.resident

    def resident(source, *args, **kwargs):
        done.append(source.split)
        return decode(source, *args, **kwargs)

    monkeypatch.setattr(data, "resident", resident)
    return done


def error(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_experiment_knows_its_classes_and_steps():
    chosen = setup.experiment(TINY, [("train", "train[:50]"), ("pool", "top_gap(k=linear(64, 8, total_steps))")])
    assert chosen.classes == ("disc", "square", "triangle", "cross", "ring", "star")
    assert chosen.total_steps == 2 * 2
    few = setup.experiment(TINY, [("train", "train[:5]"), ("epochs", "7")])
    assert few.total_steps == 7, "one batch that repeats its rows"


def test_a_command_reads_each_split_once(reads):
    chosen = setup.experiment(TINY)
    parts = setup.parts(chosen)
    assert set(parts.train) == set(parts.validation) == {"image", "label"}
    assert set(assembly.sample(chosen)) == {"image", "label", "box", "region", "group"}
    assembly.open_split(chosen, "train", 20)
    assert reads == ["train", "validation"]
    arrays = setup.read(chosen, "train")
    assert arrays["image"].shape == (60, 32, 32, 3) and set(arrays) == {"image", "label", "box", "region", "group"}


def test_a_large_set_streams_the_same(monkeypatch, reads):
    small = setup.experiment(TINY)
    expected = next(iter(assembly.open_split(small, "test", 20).batches(None)))
    monkeypatch.setattr(assembly, "RESIDENT_BYTES", 60_000)
    large = setup.experiment(TINY)
    reads.clear()
    with setup.parts(large).train as stream:
        assert next(stream)["image"].shape == (20, 32, 32, 3)
    split = setup.parts(large).validation
    found = next(iter(assembly.open_split(large, "test", 20).batches(None)))
    jax.tree.map(np.testing.assert_array_equal, dict(found[1]), dict(expected[1]))
    assert split.examples == 20 and reads == []
    arrays = assembly.sample(large)
    n = len(arrays["label"])
    assert 5 < n < 20 and arrays["image"].nbytes < 60_000
    np.testing.assert_array_equal(arrays["image"][-1], setup.read(small, "train")["image"][-1])


def test_the_best_and_the_last_checkpoint(run):
    workdir, variables = run
    loaded = setup.from_workdir(workdir)
    assert loaded.weights == "checkpoint last, step 3", "without a validation split there is no best one"
    jax.tree.map(np.testing.assert_array_equal, dict(loaded.variables), dict(variables["ema"]))
    assert loaded.workdir == workdir and loaded.changes == ()


def test_evaluation_of_a_run(run, reads):
    workdir, _ = run
    loaded = setup.from_workdir(workdir)
    assert setup.stored(loaded) is None
    rows = setup.evaluate(loaded)
    assert [row.evaluator for row in rows] == ["accuracy()", "regions(fill=mean)"]
    assert reads == ["test", "train"], "the training split for the backgrounds, once"
    assert setup.stored(loaded) == rows == results.read(workdir / "evaluation.json").rows
    assert "background_gap" in rows[1].measures
    arrays = setup.read(loaded.experiment, "test")
    logits = bind(loaded.experiment.model, loaded.variables)(jnp.asarray(arrays["image"] / np.float32(255)))
    assert rows[0].measures["accuracy"].value == pytest.approx(np.mean(np.argmax(logits, -1) == arrays["label"]))
    other = setup.from_workdir(workdir, [("test", "test, validation")])
    assert setup.stored(other) is None, "the other split is not there"
    assert setup.stored(loaded._replace(weights="checkpoint last, step 9")) is None


def test_what_the_command_line_changed_stands_in_the_row(run):
    """Else a robust accuracy at another epsilon would pass for the one of the config."""
    loaded = setup.from_workdir(run[0], [("eps", "4/255"), ("evaluators", "accuracy()")])
    assert setup.commands._overrides(loaded, "robust(pgd(linf(eps)))") == {"eps": "4/255"}
    assert setup.commands._overrides(loaded, "robust(pgd(linf(8/255), steps=3))") == {}
    loaded = setup.from_workdir(run[0], [("eps", "4/255"), ("pool", "top_gap(fraction=eps)")])
    changes = {"eps": "4/255", "pool": "top_gap(fraction=eps)"}
    assert setup.commands._overrides(loaded, "accuracy()") == changes
    (row,) = setup.evaluate(loaded, evaluators="accuracy()", splits="test[:5]")
    assert (row.evaluator, row.overrides, row.examples) == ("accuracy()", changes, 5)


def test_a_split_of_few_images_is_not_measured_in_a_wide_batch():
    """An attack on 4 images in 20 slots would cost what one on 20 does."""
    chosen, mesh = setup.experiment(TINY, [("batch", "20")]), data_mesh(jax.devices())
    assert setup.commands._width(chosen, ["test[:4]", "test[:3]"], None, None) == 4
    assert setup.commands._width(chosen, ["test[:9]"], None, mesh) == 16 and mesh.size == 8
    assert setup.commands._width(chosen, ["test[:4]", "train"], None, None) == 20
    assert setup.commands._width(chosen, ["test[:4]"], 10, None) == 10


def test_weights_from_a_file(tmp_path, capsys, reads, monkeypatch):
    """A file in PyTorch naming; what it says of its normalisation goes before the config, the command line goes
    first."""
    chosen = setup.experiment(TINY)
    variables = assembly.init(chosen)
    path = tmp_path / "net.safetensors"
    store(path, variables, {"mean": "0.4,0.4,0.4"})
    loaded = setup.from_config(TINY, [("init", str(path))])
    jax.tree.map(np.testing.assert_array_equal, dict(loaded.variables), dict(variables))
    assert loaded.experiment.config.mean == (0.4, 0.4, 0.4) and loaded.weights == "net.safetensors"
    assert capsys.readouterr().err == "topgap: net.safetensors: config.mean = (0.4, 0.4, 0.4)\n"
    given = setup.from_config(TINY, [("mean", "(.3, .3, .3)"), ("init", str(path))])
    assert given.experiment.config.mean == (0.3, 0.3, 0.3) and capsys.readouterr().err == ""
    # So does a part of the network, before the network that the file says it is of.
    settings = {"model": "resnet4b(classes=classes, mean=mean, std=std)"}
    described = weights_module.Weights("net", settings, None, lambda model, image_shape: model)
    monkeypatch.setattr(setup.commands, "weights", lambda text: described)
    given = setup.from_config(TINY, [("head", "conv_head(pool)"), ("init", "net")])
    assert given.experiment.config.model == "network" and capsys.readouterr().err == ""
    given = setup.from_config(TINY, [("dtype", "bfloat16"), ("init", "net")])
    assert capsys.readouterr().err.splitlines() == [
        f"topgap: net: config.model = '{settings['model']}'",
        f"topgap: config.dtype has no effect: nothing in config.model = '{settings['model']}' reads it",
    ]
    assert reads == []
    text = error(setup.from_config, TINY, [("source", "folder('nowhere')"), ("init", str(path))])
    assert text == f"config.source: folder('nowhere'): there is no such folder in {Path.cwd()}"


def store(path, variables, metadata):
    """The variables in PyTorch's naming and layout."""
    leaves = jax.tree.flatten_with_path(variables)[0]
    names = pretrained.torch_names({tuple(key.key for key in keys): leaf.shape for keys, leaf in leaves}, {}).values()
    turn = lambda x: x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
    arrays = {name: np.ascontiguousarray(turn(np.asarray(leaf))) for name, (_, leaf) in zip(names, leaves)}
    save_file(arrays, path, metadata)


def test_rows_of_the_same_weights_are_kept(run, capsys, monkeypatch):
    """And said; --again, another split, other weights under the same name and other data are measured."""
    workdir, _ = run
    measured = []

    def spy(*arguments, **options):
        measured.append((options["split"], *arguments[3]))
        return run_evaluators(*arguments, **options)

    run_evaluators = setup.commands.run_evaluators
    monkeypatch.setattr(setup.commands, "run_evaluators", spy)
    loaded = setup.from_workdir(workdir)
    options = {"splits": "test[:4]", "evaluators": "accuracy(), measures(cam(), gini())"}
    first = setup.evaluate(loaded, **options)
    before = json.loads((workdir / "evaluation.json").read_text())
    assert len(before["digest"]) == 8 and measured == [("test[:4]", "accuracy()", "measures(cam(), gini())")]
    capsys.readouterr()
    measured.clear()
    assert setup.evaluate(loaded, **options) == first and measured == []
    kept = (
        "topgap: test[:4]: kept from evaluation.json, --again measures once more: accuracy(), measures(cam(), gini())\n"
    )
    assert capsys.readouterr().err == kept
    text = "accuracy(), measures(cam(), extent())"
    rows = setup.evaluate(loaded, splits="test[:4]", evaluators=text)
    assert [row.evaluator for row in rows] == ["accuracy()", "measures(cam(), extent())"] and rows[0] == first[0]
    assert measured == [("test[:4]", "measures(cam(), extent())")]
    setup.evaluate(loaded, **options, again=True)
    assert measured[1:] == [("test[:4]", "accuracy()", "measures(cam(), gini())")]
    (run_read,) = read_runs([workdir])
    assert run_read.stale == ""
    # The same name of a checkpoint, other weights.
    (manifest_file,) = workdir.glob("checkpoints/last/*/manifest.json")
    manifest_file.write_text(manifest_file.read_text() + " ")
    (run_read,) = read_runs([workdir])
    assert (
        run_read.stale == "no longer the weights in the folder, which now has checkpoint last, step 3: evaluate again"
    )
    measured.clear()
    setup.evaluate(loaded, **options)
    assert measured == [("test[:4]", "accuracy()", "measures(cam(), gini())")]
    # Other data are an override: the rows of the run's own stay beside them.
    capsys.readouterr()
    other = setup.from_workdir(workdir, [("source", "shapes(5, train=60, validation=20, test=20)")])
    setup.evaluate(other, splits="test[:4]", evaluators="accuracy()")
    stored = results.read(workdir / "evaluation.json")
    assert [bool(row.overrides) for row in stored.rows] == [False, False, True]
    assert "are now in" not in capsys.readouterr().err
    assert stored.data == loaded.experiment.config.source


def test_pictures_of_a_split(run):
    loaded = setup.from_workdir(run[0])
    explained = setup.explain(loaded, split="test[:10]", count=3)
    assert explained.title == "test_10" and explained.heading == "test[:10]: checkpoint last, step 3"
    assert (explained.count, explained.total, explained.signed) == (3, 10, ("cam()",))
    (shown,) = explained.pages
    assert list(shown.maps) == ["cam()", "grad_cam('stage1')"]
    assert shown.images.shape == (3, 32, 32, 3) and shown.regions.shape == (3, 32, 32) and shown.boxes.shape == (3, 4)
    arrays = setup.read(loaded.experiment, "test")
    predict = bind(loaded.experiment.model, loaded.variables)
    for row, index in enumerate((0, 4, 9)):
        image = jnp.asarray(arrays["image"][index][None] / np.float32(255))
        label = int(predict(image).argmax())
        classes = loaded.experiment.classes
        assert shown.names[row] == (classes[arrays["label"][index]], classes[label])
        np.testing.assert_array_equal(shown.regions[row], arrays["region"][index])
        kernel, bias = (loaded.variables["params"]["head"]["dense"][name] for name in ("kernel", "bias"))
        features = rewrite.read(predict, "stage1")(image)[1]
        np.testing.assert_allclose(
            shown.maps["cam()"][row], (features @ kernel + bias)[0, ..., label], rtol=1e-4, atol=1e-5
        )


def test_a_text_may_name_images_of_the_training_split(run):
    """64 of them, evenly spaced; without a training split the text that names them is an error."""
    loaded = setup.from_workdir(run[0])
    (page,) = setup.explain(loaded, split="test[:2]", methods="expected_gradients(references, samples=2)").pages
    (maps,) = page.maps.values()
    assert maps.shape == (2, 32, 32) and np.abs(maps).max() > 0
    images = assembly.context(loaded.experiment)["references"]()
    train = setup.read(loaded.experiment, loaded.experiment.config.train)["image"]
    due = train[np.linspace(0, len(train) - 1, min(64, len(train))).round().astype(int)]
    np.testing.assert_array_equal(images, due.astype(np.float32) / 255)
    empty = setup.from_workdir(run[0], [("train", "")])
    text = error(setup.explain, empty, methods="expected_gradients(references)")
    assert text == "references are images of the training split, and config.train names none"


def test_mistakes(run, tmp_path):
    workdir, _ = run
    loaded = setup.from_workdir(workdir)
    assert (
        error(setup.from_workdir, tmp_path / "x")
        == f"'{tmp_path / 'x'}' is not the folder of a run: there is no such folder"
    )
    assert error(setup.from_workdir, tmp_path) == f"'{tmp_path}' is not the folder of a run: it has no config.json"
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    assert error(setup.from_workdir, tmp_path).startswith(
        f"there is no checkpoint in {tmp_path}/checkpoints/last; train first"
    )
    text = error(setup.from_workdir, workdir, [("model", "resnet4b(classes=classes, mean=mean, std=std)")])
    assert text.startswith(f"the checkpoint {workdir}/checkpoints/last/3 is of another model: ")
    assert (
        error(setup.evaluate, loaded, splits=",")
        == "nothing to evaluate: neither config.test nor --split names a split"
    )
    assert error(setup.evaluate, loaded, evaluators="").startswith("nothing to evaluate: neither config.evaluators nor")
    attacks = "robust(fgsm(linf(eps))), robust(r_fgsm(linf(eps)))"
    assert (
        error(setup.evaluate, loaded, evaluators=attacks, save="all.npz")
        == "--save all.npz: there are 2 attacks to save; name a folder"
    )
    one, file = "robust(fgsm(linf(eps)))", workdir / "config.json"
    assert error(setup.evaluate, loaded, evaluators=one, save=file).startswith(f"--save {file}: the folder '{file}' ca")
    (tmp_path / "folder.npz").mkdir()
    assert error(setup.evaluate, loaded, evaluators=one, save=tmp_path / "folder.npz").endswith("; name another place")
    assert error(setup.evaluate, loaded, evaluators="accuracy()", save="x").startswith("--save: no evaluator attacks; ")
    assert error(setup.explain, loaded, methods="").startswith("nothing to explain with: neither config.explain nor")
    assert error(setup.explain, loaded, count=0) == "--count must be a whole number of at least 1, got 0"
    empty = setup.from_workdir(workdir, [("train", ""), ("pool", "gap()")])
    (row,) = setup.evaluate(empty, evaluators="regions()", splits="test[:5]")
    assert "background_gap" not in row.numbers or row.measures["background_gap"].value is None
    assert error(setup.parts, empty.experiment) == "config.train names no split to train on"
    assert error(setup.experiment, TINY, [("train", ""), ("test", "")]).startswith(
        "shapes() has no split ''; choose from"
    )


def test_a_mistake_in_the_evaluators_is_told_before_the_training(reads):
    for key, text, words in (
        ("evaluators", "accuracy(), regions(bnk)", "unknown name 'bnk'; "),
        (
            "evaluators",
            "robust(pgd(linf(eps), score=targeted_margin))",
            "robust(pgd(linf(eps), score=targeted_margin)): a targeted score needs target classes: ",
        ),
        ("evaluators", "receptive_field('nope')", "receptive_field('nope'): no layer 'nope'; layers: "),
        ("explain", "cam(), grad_cam(3, 4)", "grad_cam: too many positional arguments; "),
        ("explain", "cam(), grad_cam('nope')", "grad_cam('nope'): no layer 'nope'; layers: "),
        ("model", "with_drop(network, 'nope', dropout(.1))", "no layer 'nope'; layers: "),
        ("augment", "cutmicks()", "'cutmicks' is not an augmentation; did you mean 'cutmix'?"),
        (
            "optimizer",
            "sgd(cosine(.1, 0, total_steps, warmup=100))",
            "cosine: warmup=100 leaves nothing of a schedule of 6",
        ),
    ):
        chosen = setup.experiment(TINY, [(key, text)])
        assert error(setup.parts, chosen).startswith(f"config.{key}: {words}")
    for key, text in (("validation", "vali"), ("test", "test, tset"), ("train", "train[:0]")):
        assert "shapes() " in error(lambda key=key, text=text: setup.parts(setup.experiment(TINY, [(key, text)])))
    assert reads == []


def test_what_a_users_own_methods_raise_or_return_is_one_line():
    """Of a data set, an evaluator and an explanation of a config's own methods(); before anything is read."""

    def broken(*arguments):
        raise KeyError("mine")

    chosen = setup.experiment(TINY)
    model = setup.checks.evaluators, chosen, [chosen.source("test")]
    cost = lambda predict, images: Cost()
    for rows, words in (
        (broken, "KeyError: 'mine'"),
        (lambda *arguments: None, "its rows are {name: (b, ...)}, one of each example, got None"),
        (lambda keys, model, variables, batch, prepared: {"x": batch["image"].mean()}, "its rows are {name: (b, ...)}"),
    ):
        function, *arguments = model
        text = error(function, *arguments, {"own()": Evaluator(rows, lambda rows: {}, cost)}, "--evaluators")
        assert text.startswith(f"--evaluators: own(): {words}")
    for maps, words in (
        (broken, "KeyError: 'mine'"),
        (lambda keys, predict, images, labels: images, "of 2 images its maps are (2, h, w), got (2, 32, 32, 3)"),
    ):
        text = error(setup.checks.explanations, chosen, {"own()": Explain(maps, cost)}, "--methods")
        assert text.startswith(f"--methods: own(): {words}")
    for splits, words in (
        (broken, "KeyError: 'mine'"),
        (lambda split: None, "must be a data.Source, it is NoneType"),
    ):
        text = error(assembly._opened, splits, "test")
        assert text.startswith("config.source: split 'test'") and text.endswith(words)


def test_a_model_with_another_number_of_logits():
    chosen = setup.experiment(TINY, [("network", "classifier(backbone, head, classes=2, mean=mean, std=std)")])
    assert error(setup.parts, chosen) == (
        "config.model: 'network' returns 2 logits an image, and shapes(train=60, validation=20, test=20) has 6 "
        "classes; name `classes` in its text"
    )


def test_a_model_that_cannot_be_applied():
    """What a user's own module raises is one line, which names it."""

    def broken():
        return Model(lambda key, images: {"params": {}, "batch_stats": {}}, lambda *_, **options: [] @ 3)

    chosen = setup.assembly.assemble(
        setup.config.load(TINY, [("model", "broken()")])._replace(methods={"broken": broken})
    )
    assert error(setup.parts, chosen).startswith(
        "config.model: 'broken()' cannot be applied to images of 32 x 32 pixels: TypeError: unsupported operand"
    )


def test_a_batch_above_the_split_is_said(capsys):
    assert setup.parts(setup.experiment(TINY, [("batch", "64")]), reads=False).batch == 64
    text = "topgap: config.batch = 64 of only 60 examples of 'train': each step repeats some\n"
    assert capsys.readouterr().err == text


def test_what_is_set_and_not_read_is_said(capsys, monkeypatch):
    monkeypatch.setattr(setup.commands, "training", lambda chosen: None)
    monkeypatch.setattr(setup.commands, "validation", lambda chosen: None)
    model = ("model", "resnet4b(classes=classes, mean=(.5, .5, .5), std=(.2, .2, .2))")
    quiet = ("evaluators", "accuracy()"), ("explain", "gradient()"), ("backbone", "resnet20()")
    words = "topgap: config.{} no effect: nothing in config.model = '" + model[1] + "' reads it"
    for stated, keys in (
        (("mean", "(.4, .4, .4)"), "mean and config.backbone have"),
        (("std", "(.2, .2, .2)"), "std and config.backbone have"),
    ):
        setup.parts(setup.experiment(TINY, [model, *quiet, stated]))
        assert capsys.readouterr().err.splitlines() == [words.format(keys)]
    setup.parts(setup.experiment(TINY, [("mean", "(.4, .4, .4)"), ("explain", "gradient()")]))
    assert capsys.readouterr().err == "", "the network reads it"
    mistake = setup.experiment(TINY, [model, *quiet, ("pool", "gap(3)")])
    assert error(setup.parts, mistake).startswith("config.pool: gap: too many positional arguments")


OLD = {
    "seed": 1, "source": "shapes(train=60, validation=20, test=20)", "train": "train", "validation": "", "test": "test",
    "image_size": [32, 32], "resize": "stretch", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "pool": "gap()",
    "model": "classifier(small_resnet(widths=(4,), stem=4, stem_kernel=3, stem_stride=4), map_head(pool), "
             "classes=classes, mean=mean, std=std)",
    "batch": 20, "epochs": 1, "augment": "", "objective": "standard()",
    "optimizer": "sgd(warmup(cosine(0.01, 0, total_steps - 1), 1))", "ema": 0.5, "eps": 2 / 255,
    "evaluators": "accuracy(), localisation(cam(), centre=centre, boxes=False), regions(bank, fill=mean)",
    "explain": "cam(), grad_cam('stage1')", "log_every": 1, "checkpoint_every": 1,
}  # fmt: skip
"""config.json of a run of version 0.1.0: every key, none of those that came after it."""


def test_a_run_of_version_0_1_0(run, tmp_path):
    """It loads, is evaluated, explained and trained further; its evaluators are read as they are written today."""
    workdir = shutil.copytree(run[0], tmp_path / "old")
    (workdir / "config.json").write_text(json.dumps({"config": OLD, "file": None}))
    (workdir / "evaluation.json").unlink(missing_ok=True)
    loaded = setup.from_workdir(workdir)
    jax.tree.map(np.testing.assert_array_equal, dict(loaded.variables), dict(run[1]["ema"]))
    rows = setup.evaluate(loaded)
    assert [row.evaluator for row in rows] == ["accuracy()", "localisation(cam(), boxes=False)", "regions(fill=mean)"]
    assert setup.stored(loaded) == rows and "background_gap" in rows[2].measures and "centre_iou" in rows[1].measures
    assert list(next(setup.explain(loaded, count=2).pages).maps) == ["cam()", "grad_cam('stage1')"]
    chosen = setup.experiment(workdir / "config.json")
    fit(chosen.config, workdir, parts=setup.parts(chosen), file=None, mesh=data_mesh(jax.devices()[:1]))
    assert set(json.loads((workdir / "config.json").read_text())["config"]) == {*setup.config.KEYS, "eps"}


def pictures_only(folder):
    for split, label in (("train", "cat"), ("train", "dog"), ("test", "cat"), ("test", "dog")):
        (folder / split / label).mkdir(parents=True)
        Image.new("RGB", (40, 30), (90, 120, 30)).save(folder / split / label / "a.png")


def test_evaluators_that_need_what_a_set_does_not_offer(tmp_path):
    pictures_only(tmp_path)
    overrides = [("source", f"folder('{tmp_path}')"), ("validation", ""), ("batch", "2")]
    chosen = setup.experiment(TINY, overrides)
    loaded = setup.Loaded(chosen, assembly.init(chosen), "random", None)
    needs = "regions needs a data set with 'region' (a mask of the object); this one offers none"
    for text, words in {"regions()": needs, "localisation(cam())": "localis"}.items():
        assert error(setup.evaluate, loaded, evaluators=text).startswith(f"--evaluators: {text}: {words}")
        other = setup.experiment(TINY, [*overrides, ("evaluators", text)])
        assert error(setup.parts, other).startswith(f"config.evaluators: {text}: {words}")


def test_layers_are_found_without_compiling_anything(caplog):
    chosen = setup.experiment(TINY, [("image_size", "(64, 48)")])
    with jax.log_compiles():
        found, default = setup.layers(chosen)
    assert "ompiling" not in caplog.text
    shapes = {layer.name: layer.shape for layer in found}
    assert shapes["backbone/stem/conv"] == shapes["backbone/stage1"] == (1, 16, 12, 4)
    assert shapes["maps"] == (1, 16, 12, 6) and shapes["head"] == (1, 6)
    assert default == "backbone/stage1", "not the class maps"


# Of each kind one: a drawn set, a small real one, a fine-tuned network. The others take their seconds in `make test-all`.
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=() if path.stem in ("shapes", "cifar10", "pets3") else pytest.mark.slow)
        for path in sorted(CONFIGS.glob("*.py"))
    ],
    ids=lambda path: path.stem,
)
def test_the_configs_of_the_repository_are_whole(path, request, monkeypatch):
    if path.stem != "shapes":
        request.getfixturevalue("topgap_data")
    monkeypatch.setattr(setup.commands, "training", lambda chosen: None)
    monkeypatch.setattr(setup.commands, "validation", lambda chosen: None)
    arm = "dry_run" if path.stem == "imagenet_resnet50" else ""  # the set itself is not at hand
    trained = [("train", "test")] if path.stem == "imagenet" else []  # it trains nothing
    chosen = setup.experiment(path, [("pool", "top_gap(fraction=.25)"), *trained], arm)
    parts = setup.parts(chosen)
    shapes = jax.eval_shape(parts.model.init, jax.random.key(0), jnp.zeros((1, *parts.image_shape)))
    assert shapes["params"] and parts.examples >= parts.batch and parts.classes == len(chosen.classes)
    for split in expressions.split_list(chosen.config.test):
        assert len(chosen.source(split)) > 0
    layers, default = setup.layers(chosen)
    assert default in {layer.name for layer in layers} - {"maps", "head"}


def colours(root, **classes):
    """Pictures of one colour a class, three a class and split."""
    for split in ("train", "val"):
        for name, colour in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (20, 20), colour).save(root / split / name / f"{i}.png")


@pytest.fixture(scope="module")
def colours_run(tmp_path_factory):
    """A run on three classes of a folder: (folder of the run, folder of the pictures)."""
    folder = tmp_path_factory.mktemp("colours")
    colours(folder / "data", blue=(20, 30, 220), green=(20, 200, 30), red=(220, 30, 20))
    chosen = setup.experiment(
        TINY,
        [("source", f"folder('{folder / 'data'}')"), ("validation", ""), ("test", "val"), ("batch", "9"), ("epochs", "30"),
         ("image_size", "(16, 16)"), ("optimizer", "sgd(.1)"), ("evaluators", "accuracy()")],
    )  # fmt: skip
    mesh = data_mesh(jax.devices()[:1])
    fit(chosen.config, folder / "run", parts=setup.parts(chosen), file=chosen.file, mesh=mesh)
    return folder / "run", folder / "data"


def accuracy_of(loaded):
    return setup.evaluate(loaded)[0].measures["accuracy"].value


def test_classes_are_stored_and_matched_by_name(colours_run, tmp_path):
    workdir, folder = colours_run
    assert json.loads((workdir / "config.json").read_text())["data"] == {
        "classes": ["blue", "green", "red"],
        "examples": 9,
    }
    right = accuracy_of(setup.from_workdir(workdir))
    assert right == 1.0
    renamed = shutil.copytree(folder, tmp_path / "renamed")
    for split in ("train", "val"):
        (renamed / split / "blue").rename(renamed / split / "ultramarine")
    loaded = setup.from_workdir(workdir, [("source", f"folder('{renamed}')")])
    assert error(setup.evaluate, loaded) == (
        f"folder('{renamed}') has other classes than the network: ultramarine is not among the network's, and blue is not "
        "in the data; the network's are blue, green, red; the data's are green, red, ultramarine; rename them, or train on "
        "these data"
    )
    more = shutil.copytree(folder, tmp_path / "more")
    for split in ("train", "val"):
        shutil.copytree(more / split / "red", more / split / "reed")
    said = error(setup.evaluate, setup.from_workdir(workdir, [("source", f"folder('{more}')")]))
    assert "reed is not among the network's; the network's are" in said
    for split in ("train", "val"):
        shutil.rmtree(more / split / "reed")
        shutil.rmtree(more / split / "green")
    said = error(setup.evaluate, setup.from_workdir(workdir, [("source", f"folder('{more}')")]))
    assert "than the network: green is not in the data; the network's are" in said
    chosen = setup.experiment(workdir / "config.json", [("source", f"folder('{renamed}')")])
    assert chosen.classes == ("green", "red", "ultramarine"), "a new run learns its own"
    stored = dict(setup.experiment(workdir / "config.json").config)
    with pytest.raises(
        UserError, match="holds a run with other classes: blue, green, red there and green, red, ultramarine here"
    ):
        workdir_module.check(workdir, stored, chosen.classes)


def test_the_classes_of_weights_are_matched_by_name(colours_run, tmp_path, capsys):
    """As those of a run are: of a run that is given as weights, of a file whose config.json names its classes."""
    workdir, folder = colours_run
    keys = [("validation", ""), ("test", "val"), ("image_size", "(16, 16)"), ("evaluators", "accuracy()")]
    of = lambda folder, init: setup.from_config(TINY, [*keys, ("source", f"folder('{folder}')"), ("init", str(init))])
    renamed = shutil.copytree(folder, tmp_path / "renamed")
    for split in ("train", "val"):  # now the last by name
        (renamed / split / "blue").rename(renamed / split / "the blue")
    assert accuracy_of(of(folder, workdir)) == 1.0
    assert "the blue is not among the network's, and blue is not in the data" in error(of, renamed, workdir)
    loaded = setup.from_workdir(workdir)
    pretrained.save(tmp_path / "w.safetensors", loaded.variables)
    named = lambda *names: (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "of mine", "label_names": names, "mean": [0.5] * 3, "std": [0.25] * 3})
    )
    named("the blue", "green", "red")
    loaded = of(renamed, tmp_path / "w.safetensors")
    assert loaded.experiment.classes == ("the blue", "green", "red") and accuracy_of(loaded) == 1.0
    named("azure", "lime", "rose")
    assert accuracy_of(of(folder, tmp_path / "w.safetensors")) == 1.0, "taken in the order of the data"
    said = "no class of the data has the name of one of the weights: blue, green, red are taken for azure, lime, rose"
    assert said in capsys.readouterr().err
    chosen = setup.experiment(TINY, [*keys, ("source", f"folder('{renamed}')"), ("init", str(workdir))])
    setup.parts(chosen)
    assert f"the head is drawn anew: {workdir} has learnt other classes" in capsys.readouterr().err


def test_labels_follow_the_names_in_another_order():
    record = lambda i: {"image": np.zeros((2, 2, 3), np.uint8), "label": i}
    source = data.with_classes(data.Source("s()", "all", ("b", "a", "c"), 4, record), ("a", "b", "c"))
    assert source.classes == ("a", "b", "c") and [source[i]["label"] for i in range(3)] == [1, 0, 2]
    assert error(lambda: source[3]) == "s() split 'all' index 3: label 3 is not in 0..2"
    twice = data.Source("s()", "all", ("a", "a", "b"), 1, record)
    assert data.with_classes(twice, ("a", "a", "b")) is twice
    assert "the same name stands twice" in error(data.with_classes, twice, ("a", "b", "b"))


def test_pictures_are_explained_without_the_data(colours_run, tmp_path):
    workdir, folder = colours_run
    away = tmp_path / "away"
    shutil.move(folder, away)
    try:
        loaded = setup.from_workdir(workdir)
        (page,) = setup.explain(loaded, images=str(away / "val" / "red"), count=2).pages
        assert page.names == [("", "0.png: red"), ("", "2.png: red")]
        assert setup.layers(loaded.experiment)[1] == "backbone/stage1"
        assert error(setup.evaluate, loaded).endswith("there is no such folder")
    finally:
        shutil.move(away, folder)


@pytest.mark.parametrize(
    "stored", [3, {"classes": ["a", 2], "examples": 1}, {"classes": ["a", "b"], "examples": "9"}, {}]
)
def test_a_damaged_list_of_classes(stored, run, tmp_path):
    text = json.loads((run[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**text, "data": stored}))
    assert error(setup.from_workdir, tmp_path).startswith(
        f"{tmp_path}/config.json is not the config.json of a run: data"
    )


def test_one_class_is_nothing_to_learn(tmp_path):
    colours(tmp_path, red=(220, 30, 20))
    source = ("source", f"folder('{tmp_path}')")
    said = error(setup.experiment, TINY, [source, ("validation", ""), ("test", "val")])
    assert said == f"folder('{tmp_path}') has the one class red: there is nothing to tell apart"


def test_a_transfer_from_a_run_and_from_a_file(run, colours_run, tmp_path):
    """The network of the folder with its weights, EMA ones; of a file without a config, one like the run's own."""
    workdir, variables = run
    loaded = setup.from_workdir(workdir, [("eps", "64/255"), ("evaluators", "accuracy()")])
    path = tmp_path / "net.safetensors"
    store(path, assembly.init(loaded.experiment), {})
    text = "robust(transfer(linf(eps), pgd(linf(eps), steps=2), '{}'))"
    rows = {}
    for name in (workdir, path):
        (row,) = setup.evaluate(loaded, evaluators=text.format(name), splits="test")
        assert 0 <= row.measures["robust_accuracy"].value <= row.measures["clean_accuracy"].value
        rows[name] = row
    assert row.overrides == {"eps": "64/255"} and row.cost["gradient_evaluations"] > 0
    from_itself = networks.network(loaded.experiment, str(workdir))
    jax.tree.map(np.testing.assert_array_equal, dict(from_itself.variables), dict(variables["ema"]))
    assert from_itself.name == str(workdir) and networks.network(loaded.experiment, str(path)).name == str(path)
    mistake = lambda source: error(setup.evaluate, loaded, evaluators=text.format(source))
    begins = lambda source: f"--evaluators: {text.format(source)}: "
    assert mistake("runs/x").startswith(
        begins("runs/x") + "'runs/x' is no file of weights, no folder of a run and no published network; "
    )
    assert mistake(colours_run[0]) == begins(colours_run[0]) + (
        f"'{colours_run[0]}' takes images of 16 x 16 pixels, this network of 32 x 32; both must be alike"
    )
    small = setup.experiment(workdir / "config.json", [("image_size", "(16, 16)")])
    assert error(networks.network, small, str(colours_run[0])) == (
        f"'{colours_run[0]}' tells 3 classes apart, blue, green, red, and this network 6, disc, square, triangle, ...; "
        "both must be alike"
    )
    turned = small._replace(classes=("red", "green", "blue"))
    assert error(networks.network, turned, str(colours_run[0])) == (
        f"'{colours_run[0]}' has its 3 classes in another order than this network"
    )
    infinite = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.inf), assembly.init(loaded.experiment))
    store(tmp_path / "infinite.safetensors", infinite, {})
    assert mistake(tmp_path / "infinite.safetensors").startswith(
        begins(tmp_path / "infinite.safetensors") + f"{tmp_path / 'infinite.safetensors'}: "
    )
    assert error(networks.network, turned, str(path)).startswith(
        f"{path} does not fit the model; its head is another; "
    )


def test_a_plan_is_what_the_training_then_has(trained):
    """Parameters and bytes of a run's own checkpoint, its steps; half of the images a device halve what is temporary."""
    chosen = setup.experiment(TINY, [("ema", ".5")])
    parts, model = setup.parts(chosen, reads=False), chosen.plain
    made = plan(parts, model, resident=True)
    variables = trained[1]
    assert made.parameters == sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert made.checkpoint["best"] == size(dict(variables)) < made.checkpoint["last"]
    assert made.steps == (parts.examples // parts.batch, parts.epochs * (parts.examples // parts.batch))
    assert made.records == parts.examples and made.flops > 0 and made.memory["temporary"] > 0
    halves = plan(parts, model, resident=False, hosts=2)
    assert halves.records == -(-parts.examples // 2) and halves.flops == pytest.approx(made.flops, rel=0.2)
    assert halves.memory_a_device < made.memory_a_device
    text = error(plan, parts, model, resident=True, devices=7)
    assert text == "a batch of 20 cannot be divided over 1 x 7 = 7 devices; make config.batch a multiple of 7"


def test_a_published_twin_has_its_own_pool(topgap_data):
    """And not that of the network that it stands beside."""
    file = str(topgap_data / "weights" / "resnet20_cifar10.safetensors")
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 32, 32, 3)), jnp.float32)
    logits = []
    for head in ("gap()", "top_gap(k=16)"):
        chosen = setup.experiment(Path(__file__).parent.parent / "configs" / "cifar10.py", [("pool", head)])
        twin = networks.network(chosen, file)
        logits.append(jax.jit(bind(twin.model, twin.variables))(images))
    np.testing.assert_array_equal(*logits)
