"""Bring your own model: a Linen and an NNX network that nobody prepared, trained, evaluated and explained, in Python
and by `topgap`."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import own_models
from tests.test_cli import patch, topgap
from tests.tiny_fit import flat
from topgap_jax import data, explain, models, setup
from topgap_jax.evaluators import accuracy
from topgap_jax.measure.evaluate import evaluate
from topgap_jax.measure.splits import resident_split
from topgap_jax.mesh import data_mesh
from topgap_jax.models import bind
from topgap_jax.pool import top_gap
from topgap_jax.progress import read_metrics
from topgap_jax.rewrite import read, with_pool
from topgap_jax.run import checkpoint
from topgap_jax.run.fit import Parts, fit
from topgap_jax.training.objectives import standard
from topgap_jax.training.optimizers import adamw

FILE = str(Path(own_models.__file__))
MODELS = {
    "linen": ("with_pool(my_linen(classes), dense='Dense_0', pool=pool)", "Dense_0", "Conv_1"),
    "nnx": ("my_nnx(classes, pool)", "linear", "blocks/0"),
}


def losses_fall(workdir):
    losses = [row["loss"] for row in read_metrics(workdir) if row["kind"] == "train"]
    return np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])


@pytest.mark.parametrize("kind", MODELS)
def test_in_python(kind, tmp_path):
    source = data.shapes(train=60, test=20)
    train, test = (data.resident(source(split), (32, 32)) for split in ("train", "test"))
    pool = top_gap(k=4)
    if kind == "linen":
        model = with_pool(models.linen(own_models.CNN(num_classes=6)), dense="Dense_0", pool=pool)
    else:
        model = own_models.my_nnx(6, pool)
    parts = Parts(
        model, standard(), (), adamw(0.01), {"image": train["image"], "label": train["label"]}, None,
        examples=60, batch=20, epochs=5, seed=0, ema=0.0, image_shape=(32, 32, 3), classes=6,
    )  # fmt: skip
    one = data_mesh(jax.devices()[:1])
    variables = fit({"log_every": 1}, tmp_path, parts, mesh=one)
    assert losses_fall(tmp_path)
    assert any(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(variables["batch_stats"]))

    split = resident_split(test, classes=6, batch=20)
    (row,) = evaluate(model, variables, split, {"accuracy()": accuracy()}, split="test", classes=6)
    images = jnp.asarray(test["image"] / np.float32(255))
    logits = jax.jit(bind(model, variables))(images)
    assert row.measures["accuracy"].value == pytest.approx(np.mean(np.argmax(logits, -1) == test["label"]))

    # Class maps are there although the network has none, and their four largest positions are the logits.
    labels = jnp.asarray(test["label"])
    keys = jax.random.split(jax.random.key(0), 20)
    predict = bind(model, variables)
    maps = jax.jit(lambda images: explain.cam()(keys, predict, images, labels))(images)
    assert maps.shape == (20, 8, 8)
    top = np.sort(np.asarray(maps).reshape(20, -1), 1)[:, -4:].mean(1)
    np.testing.assert_allclose(top, logits[jnp.arange(20), labels], rtol=1e-4, atol=1e-5)
    # Grad-CAM of the features in front of the class maps is what NumPy makes of them.
    _, dense, layer = MODELS[kind]
    found = jax.jit(lambda images: explain.grad_cam(layer)(keys, predict, images, labels))(images)
    features = np.asarray(jax.jit(read(predict, layer))(images)[1])
    kernel = np.asarray(variables["params"][dense]["kernel"])
    largest = np.asarray(maps) >= np.sort(np.asarray(maps).reshape(20, -1), 1)[:, -4, None, None]
    slopes = largest[..., None] * (features > 0) / 4 * kernel[:, labels].T[:, None, None, :]
    expected = np.maximum((features * slopes.mean((1, 2), keepdims=True)).sum(-1), 0)
    assert expected.max() > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["linen", pytest.param("nnx", marks=pytest.mark.slow)])
def test_by_command(kind, tmp_path, monkeypatch):
    patch(monkeypatch)
    text, _, layer = MODELS[kind]
    workdir, file = tmp_path / "run", tmp_path / "mine.py"
    shutil.copy(FILE, file)
    code, out, err = topgap("train", "--config", file, "--workdir", workdir, "--config.model", text)
    assert code == 0 and losses_fall(workdir), err
    assert "\ntest: accuracy()" in out and "\ntest: localisation(cam(), boxes=False)" in out
    words = ("--workdir", workdir, "--config", file)
    code, out, _ = topgap("explain", *words, "--methods", f"cam(), grad_cam('{layer}')", "--count", 2)
    assert code == 0 and out.startswith(f"{workdir}/sheets/test.png: 2 of 20 pictures")
    assert f"\n{layer} " in topgap("layers", *words)[1]

    code, _, err = topgap("evaluate", "--workdir", workdir)
    name = "my_linen" if kind == "linen" else "my_nnx"
    assert (code, err) == (
        2,
        f"topgap: {workdir}/config.json: '{name}' is no name of the library; the Python file of a run is run only if the "
        f"command names it: add --config {file}\n",
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_a_killed_run_goes_on(kind, tmp_path, monkeypatch):
    patch(monkeypatch)
    workdir = tmp_path / "run"
    train = ("train", "--config", FILE, "--workdir", workdir, "--config.model", MODELS[kind][0])
    assert topgap(*train)[0] == 0
    final, losses = variables(workdir), [row["loss"] for row in read_metrics(workdir)]
    shutil.rmtree(workdir / "checkpoints" / "last" / "15")  # as if killed after the last epoch but one
    assert checkpoint.latest_step(workdir) == 12
    assert topgap(*train)[0] == 0
    np.testing.assert_array_equal(variables(workdir), final)
    assert [row["loss"] for row in read_metrics(workdir)] == losses


def variables(workdir):
    return flat(setup.from_workdir(workdir, checkpoint_name="last", file=FILE).variables)
