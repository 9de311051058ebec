"""Weights from elsewhere: what `config.init` and `--weights` mean, and what they say of themselves."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from topgap_jax import pretrained
from topgap_jax.build import did_you_mean
from topgap_jax.errors import UserError
from topgap_jax.keys import root
from topgap_jax.measure.evaluate import evaluation_variables
from topgap_jax.progress import say
from topgap_jax.run import checkpoint
from topgap_jax.run.workdir import learnt, read_config
from topgap_jax.types import Model, Variables

FOLLOWED = ("model", "mean", "std", "image_size")
"""Keys of a config that follow what weights say of themselves, where the network is evaluated as it is."""
NEAR = 0.006  # a mean or std that is rounded is the same


class Weights(NamedTuple):
    """Weights by the text that names them.

    settings: keys of the config that they decide; labels: the names of their classes, where they say so; load(model,
    image_shape=(h, w, c), head=, key=) -> variables, as `pretrained.load`.
    """

    name: str
    settings: Mapping[str, Any]
    labels: tuple[str, ...] | None
    load: Callable[..., Variables]


def weights(text: str) -> Weights:
    """The weights that a text names: a published network's ("efficientnet_lite0"), a file's, the folder of a run (its
    best checkpoint) or of one of its checkpoints, a folder that Orbax wrote a tree of the module itself in.

    What was taken off the names of a file is printed. UserError where the text names none of these.
    """
    path = Path(text).expanduser()
    if text in pretrained.NETWORKS:
        return _file(
            text, pretrained.weights_of(text), {**pretrained.NETWORKS[text].settings}, pretrained.imagenet_classes()
        )
    if (path / "variables").is_dir():  # of a checkpoint
        return _tree(path, evaluation_variables(checkpoint.read(path, "variables")))
    if path.is_dir():
        return _run(path) if (path / "config.json").is_file() else _tree(path, checkpoint.tree(path))
    if path.is_file() or path.suffix:
        return _file(path.name, path, {}, None)
    raise UserError(
        f"'{text}' is no file of weights, no folder of a run and no published network; "
        f"{did_you_mean(text, pretrained.NETWORKS, n=1)}the networks are {', '.join(pretrained.NETWORKS)}"
    )


def initial(
    text: str,
    model: Model,
    image_shape: tuple[int, int, int],
    seed: int,
    normalised: Mapping[str, tuple[float, ...]] | None = None,
    classes: tuple[str, ...] | None = None,
) -> Variables | None:
    """The variables that a training begins with, on the host; None where they are drawn, as the model's own `init`
    does.

    Where the head of the weights is not the model's (another number of classes, another kind), it is drawn from the
    seed, and that is printed; so too where both say what their classes are called, and `classes`, the model's, are
    others or in another order. normalised: mean and std of the model's input; where those that the weights learnt with
    are others, that is printed too.
    """
    if not text:
        return None
    source, key = weights(text), root(seed)
    for name, values in (normalised or {}).items():
        learnt_with = source.settings.get(name, values)
        if len(learnt_with) != len(values) or max(abs(x - y) for x, y in zip(learnt_with, values)) > NEAR:
            rounded = lambda each: tuple(round(x, 4) for x in each)
            say(f"{source.name}: learnt with {name} = {rounded(learnt_with)}, and config.{name} is {rounded(values)}")
    load = lambda head: source.load(model, image_shape=image_shape, head=head, key=key)
    try:
        variables = load("file")
    except UserError:
        variables = load(None)
        say(f"the head is drawn anew: that of {source.name} is another")
    else:
        others = bool(classes and source.labels) and tuple(source.labels) != tuple(classes)
        if others and "head" in variables["params"]:
            variables = load(None)
            say(f"the head is drawn anew: {source.name} has learnt other classes")
        elif others:  # whatever layer it is, in a module of somebody else
            say(f"{source.name} has learnt other classes, and no layer is called head: all of its weights are taken")
    return jax.device_get(variables)


def _file(name: str, path: Path, settings: dict[str, Any], labels: tuple[str, ...] | None) -> Weights:
    for note in pretrained.read(path).notes:
        say(f"{name}: {note}")
    described = {**pretrained.describe(path), **settings}
    said = [f"{key} {described[key]}" for key in ("interpolation", "crop_pct") if key in described]
    if said:
        say(f"{name}: tested with {', '.join(said)}")
    if "alike" in described and "model" not in settings:
        say(f"{name}: it may be {described['alike']} as well; architecture, in a config.json beside it, would say")
    followed = {key: described[key] for key in FOLLOWED if described.get(key) is not None}
    load = lambda model, **options: pretrained.load(path, model, **options)
    return Weights(name, followed, labels or described.get("labels"), load)


def _run(path: Path) -> Weights:
    which = "best" if checkpoint.latest_step(path, "best") is not None else "last"
    data = learnt(path)
    variables = evaluation_variables(checkpoint.stored(path, which, "variables"))
    config = read_config(path / "config.json")["config"]
    normalised = {key: tuple(config[key]) for key in ("mean", "std") if isinstance(config.get(key), list)}
    return _tree(path, variables)._replace(settings=normalised, labels=data.classes if data else None)


def _tree(path: Path, tree: Mapping[str, Any]) -> Weights:
    load = lambda model, **options: pretrained.load_tree(path, tree, model, **options)
    return Weights(str(path), {}, None, load)
