"""An experiment: a config with its data set and its model, and the splits of that data set as arrays or streams."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from topgap_jax import data
from topgap_jax.errors import UserError, raised
from topgap_jax.keys import root
from topgap_jax.measure.splits import Split, resident_split, streamed_split
from topgap_jax.mesh import data_mesh
from topgap_jax.models import fast
from topgap_jax.progress import bar, say
from topgap_jax.run.workdir import Data
from topgap_jax.setup import config as configs
from topgap_jax.setup import expressions
from topgap_jax.types import Model, Table, Variables

REFERENCES = 64  # training images that stand for "nothing in particular", `expected_gradients(references)`
RESIDENT_BYTES = 2 * 2**30  # decoded splits up to this size live on the device, larger ones stream


class Experiment(NamedTuple):
    """A config with its data set and its model: the names of the classes, `source(split)`, and the model itself.

    file: the Python file that config and methods are from; stated: the keys that are not left at their default; arrays:
    the splits that `read` has decoded, by name; plain: the model as its text says it, `model` made fast for this
    machine (`models.fast`): what is only traced, for shapes and names, takes the plain one.
    """

    config: ConfigDict
    methods: Table
    file: str | None
    stated: frozenset[str]
    source: data.Splits
    classes: tuple[str, ...]
    model: Model
    arrays: dict[str, dict[str, np.ndarray]]
    total_steps: int
    plain: Model


def experiment(
    path: str | Path, overrides: Sequence[tuple[str, str]] = (), arm: str = "", file: str | Path | None = None
) -> Experiment:
    """The experiment of a config file (or of a run's config.json), of one of its arms, with `(key, text)` overrides.

    file: the Python file whose methods a config.json names.
    """
    return assemble(configs.load(path, overrides, arm, file))


def assemble(loaded: configs.Loaded, learnt: Data | None = None, labels: Sequence[str] | None = None) -> Experiment:
    """The experiment of a config: its classes are those of the first split of the data that it names.

    learnt: what a run learnt from. Then its classes are the experiment's, every split is matched to them by name, and
    nothing is asked of the data before a split is needed. labels: what weights say that their classes are called; they
    are the experiment's, as a run's, where the data have one of these names.
    """
    config, methods = loaded.config, loaded.methods
    splits = functools.cache(lambda: expressions.choice(config, "source", methods))
    opened = lambda split: _opened(splits(), split)
    classes = learnt.classes if learnt else opened(first(config.train) or first(config.test)).classes
    if labels and classes != tuple(labels):
        if set(labels) & set(classes):
            classes = tuple(labels)
        else:
            say(f"no class of the data has the name of one of the weights: {few(classes)} are taken for {few(labels)}")
    if len(classes) < 2:
        raise UserError(f"{config.source} has the one class {', '.join(classes)}: there is nothing to tell apart")
    source = functools.cache(lambda split: data.with_classes(opened(split), classes))
    examples = learnt.examples if learnt else len(source(config.train)) if config.train else 0
    steps = total_steps(config, examples)
    plain = expressions.choice(config, "model", methods, classes=len(classes), total_steps=steps)
    return Experiment(config, methods, loaded.file, loaded.stated, source, classes, fast(plain), {}, steps, plain)


def _opened(splits: data.Splits, split: str) -> data.Source:
    """A split of the data set. UserError too for whatever a user's own data set raises or returns."""
    try:
        source = splits(split)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"config.source: split '{split}': {raised(error)}") from error
    if not isinstance(source, data.Source):
        raise UserError(f"config.source: split '{split}' must be a data.Source, it is {type(source).__name__}")
    return source


def context(chosen: Experiment) -> dict[str, Any]:
    """What the texts of a config may name beside its keys: the number of classes, the training steps in all, and
    `references`, 64 training images."""
    references = functools.partial(_references, chosen)
    return {"classes": len(chosen.classes), "total_steps": chosen.total_steps, "references": references}


def _references(chosen: Experiment) -> np.ndarray:
    """64 evenly spaced images of the training split (n, h, w, c) in [0, 1]."""
    config = chosen.config
    if not config.train:
        raise UserError("references are images of the training split, and config.train names none")
    source = chosen.source(config.train)
    ids = np.unique(np.linspace(0, len(source) - 1, min(REFERENCES, len(source))).round().astype(int))
    images = [data.decode(source, int(index), config.image_size, config.resize)["image"] for index in ids]
    return np.stack(images).astype(np.float32) / 255


def total_steps(config: ConfigDict, examples: int) -> int:
    """Training steps in all: epochs x whole batches of the training split."""
    return config.epochs * max(1, examples // config.batch) if config.train else 0


def read(chosen: Experiment, split: str) -> dict[str, np.ndarray]:
    """A split decoded into arrays, with a progress bar; it is read once."""
    if split not in chosen.arrays:
        chosen.arrays[split] = _decoded(chosen, chosen.source(split))
    return chosen.arrays[split]


def training(chosen: Experiment) -> dict[str, np.ndarray] | data.Stream:
    """The training split as `fit` takes it: arrays where it is small, else this process's rows of every batch."""
    config, source = chosen.config, chosen.source(chosen.config.train)
    if _is_small(chosen, source):
        return {key: read(chosen, config.train)[key] for key in ("image", "label")}
    share = (jax.process_index(), jax.process_count())
    return data.stream(source, config.image_size, config.resize, seed=config.seed, batch=config.batch, process=share)


def validation(chosen: Experiment) -> dict[str, np.ndarray] | Split | None:
    """The validation split as `fit` takes it, None where the config names none."""
    split = chosen.config.validation
    if not split:
        return None
    if _is_small(chosen, chosen.source(split)):
        return {key: read(chosen, split)[key] for key in ("image", "label")}
    return open_split(chosen, split, chosen.config.batch, data_mesh())


def open_split(chosen: Experiment, split: str, batch: int, mesh: Mesh | None = None) -> Split:
    """A split for evaluation: on the device where it is small, streamed where it is not."""
    source, config, classes = chosen.source(split), chosen.config, len(chosen.classes)
    if _is_small(chosen, source):
        return resident_split(read(chosen, split), classes=classes, batch=batch, mesh=mesh)
    return streamed_split(source, config.image_size, config.resize, classes=classes, batch=batch, mesh=mesh)


def init(chosen: Experiment) -> Variables:
    """Fresh variables, from the config's seed."""
    images = jnp.zeros((1, *chosen.config.image_size, 3))
    return jax.jit(chosen.model.init)(root(chosen.config.seed), images)


def template(chosen: Experiment) -> Any:
    """Shapes of the variables that a run of this experiment stores."""
    variables = dict(jax.eval_shape(lambda: init(chosen)))
    return {**variables, "ema": variables} if chosen.config.ema else variables


def is_resident(chosen: Experiment) -> bool:
    """Whether the training split is small enough to be held on every device; a larger one streams."""
    return _is_small(chosen, chosen.source(chosen.config.train))


def _is_small(chosen: Experiment, source: data.Source) -> bool:
    return data.memory(source, chosen.config.image_size) <= RESIDENT_BYTES


def sample(chosen: Experiment) -> dict[str, np.ndarray] | None:
    """The training split decoded, None where there is none; of a large one as many evenly spaced examples as fit."""
    split = chosen.config.train
    if not split:
        return None
    source = chosen.source(split)
    if _is_small(chosen, source):
        return read(chosen, split)
    number = len(source) * RESIDENT_BYTES // data.memory(source, chosen.config.image_size)
    ids = np.linspace(0, len(source) - 1, number).astype(int)
    return _decoded(chosen, dataclasses.replace(source, length=number, read=lambda index: source.read(int(ids[index]))))


def _decoded(chosen: Experiment, source: data.Source) -> dict[str, np.ndarray]:
    before = 0

    def show(done, total):
        nonlocal before
        shown.update(done - before)
        before = done

    with bar(len(source), f"reading {source.name} {source.split}") as shown:
        return data.resident(source, chosen.config.image_size, chosen.config.resize, progress=show)


def few(names: Sequence[str]) -> str:
    """The first three of the names of classes."""
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def first(text: str) -> str:
    """The first of a list of splits, '' of an empty one."""
    return next(iter(expressions.split_list(text)), "")
