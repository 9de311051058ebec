"""From a config to what runs: the one place where a config, its data, its model and its weights come together."""

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from topgap_jax import data
from topgap_jax.errors import UserError
from topgap_jax.evaluators import background_bank
from topgap_jax.mesh import data_mesh
from topgap_jax.metrics.boxes import mean_box_sides, region_boxes
from topgap_jax.models import bind
from topgap_jax.run import checkpoint, pretrained
from topgap_jax.run import config as configs
from topgap_jax.run.evaluate import evaluate as run_evaluators
from topgap_jax.run.evaluate import evaluation_variables
from topgap_jax.run.fit import Parts
from topgap_jax.run.progress import bar
from topgap_jax.run.splits import Split, resident_split, streamed_split
from topgap_jax.types import Model, Table, Variables

RESIDENT_BYTES = 2 * 2**30  # decoded splits up to this size live on the device, larger ones stream


class Experiment(NamedTuple):
    """A config with its data set and its model: the names of the classes, `source(split)`, and the model itself."""

    config: ConfigDict
    methods: Table
    source: data.Splits
    classes: tuple[str, ...]
    model: Model


class Loaded(NamedTuple):
    """A model with its variables; `weights` says where they are from, `workdir` is None outside a run."""

    experiment: Experiment
    variables: Variables
    weights: str
    workdir: Path | None


class Pictures(NamedTuple):
    """What a contact sheet shows: images (n, h, w, 3) in [0, 1], (true, predicted) names, maps, boxes and regions or None."""

    title: str
    heading: str
    images: np.ndarray
    names: list[tuple[str, str]]
    maps: dict[str, np.ndarray]
    boxes: np.ndarray | None
    regions: np.ndarray | None


def experiment(path: str | Path, overrides=()) -> Experiment:
    """The experiment of a config file (or of a run's config.json)."""
    return assemble(*configs.load(path, overrides))


def assemble(config: ConfigDict, methods: Table) -> Experiment:
    """The experiment of a config: its classes are those of the first split of the data that it names."""
    source = configs.choice(config, "source", methods)
    classes = source(_first(config.train or config.test)).classes
    pool = configs.choice(config, "pool", methods, total_steps=total_steps(config, source))
    model = configs.choice(config, "model", methods, pool=pool, classes=len(classes))
    if not isinstance(model, Model):
        raise UserError(f"config.model: expected a model such as classifier(...), got {type(model).__name__}")
    return Experiment(config, methods, source, classes, model)


def total_steps(config: ConfigDict, source: data.Splits) -> int:
    """Training steps in all: epochs x whole batches of the training split."""
    if not config.train:
        return 0
    return config.epochs * max(1, len(source(config.train)) // config.batch)


def parts(chosen: Experiment) -> Parts:
    """What `fit` needs: data read (small sets) or opened (large ones), objective, augmentation and optimiser built."""
    config, methods = chosen.config, chosen.methods
    known = {"total_steps": total_steps(config, chosen.source), "classes": len(chosen.classes)}
    train = chosen.source(config.train)
    small = data.memory(train, config.image_size, extras=False) <= RESIDENT_BYTES
    if small:
        training = read(chosen, config.train, extras=False)
    else:
        share = (jax.process_index(), jax.process_count())
        training = data.stream(
            train, config.image_size, config.resize, seed=config.seed, batch=config.batch, process=share
        )
    return Parts(
        model=chosen.model,
        objective=configs.choice(config, "objective", methods, **known),
        augments=tuple(configs.choices(config, config.augment, "config.augment", methods, **known).values()),
        optimizer=configs.choice(config, "optimizer", methods, **known),
        train=training,
        validation=read(chosen, config.validation, extras=False) if config.validation else None,
        examples=len(train),
        batch=config.batch,
        epochs=config.epochs,
        seed=config.seed,
        ema=config.ema,
        image_shape=(*config.image_size, 3),
        classes=len(chosen.classes),
    )


def read(chosen: Experiment, split: str, extras: bool = True) -> dict[str, np.ndarray]:
    """A split decoded into arrays, with a progress bar."""
    source = chosen.source(split)
    with bar(len(source), f"reading {source.name} {split}") as progress:
        before = 0

        def show(done, total):
            nonlocal before
            progress.update(done - before)
            before = done

        return data.resident(source, chosen.config.image_size, chosen.config.resize, extras=extras, progress=show)


def from_workdir(workdir: str | Path, overrides=(), checkpoint_name: str = "best") -> Loaded:
    """The model of a run, with its best (or last) checkpoint; EMA weights where the run kept them."""
    workdir = Path(workdir)
    if not (workdir / "config.json").is_file():
        raise UserError(f"'{workdir}' is not the folder of a run: it has no config.json")
    chosen = experiment(workdir / "config.json", overrides)
    which = checkpoint_name if checkpoint.latest_step(workdir, checkpoint_name) is not None else "last"
    trees, meta = checkpoint.restore(workdir, which, {"variables": template(chosen)})
    return Loaded(chosen, evaluation_variables(trees["variables"]), f"checkpoint {which}, step {meta['step']}", workdir)


def from_weights(path: str | Path, overrides, weights: str | None) -> Loaded:
    """The config's model with weights from a file in PyTorch naming; without a file, with random ones.

    Where the file says of itself which network it is and how its input is normalised, the config follows, unless the command
    line sets the key.
    """
    config, methods = configs.load(path, overrides)
    if weights is None:
        chosen = assemble(config, methods)
        return Loaded(chosen, init(chosen), "random weights", None)
    given = {key for key, _ in overrides}
    for key, value in pretrained.describe(weights).items():
        if key in config and key not in given and value is not None:
            config[key] = value
    chosen = assemble(config, methods)
    variables = pretrained.load(weights, chosen.model, image_shape=(*config.image_size, 3))
    return Loaded(chosen, variables, str(Path(weights).name), None)


def init(chosen: Experiment) -> Variables:
    """Fresh variables, from the config's seed."""
    images = jnp.zeros((1, *chosen.config.image_size, 3))
    return jax.jit(chosen.model.init)(jax.random.key(chosen.config.seed), images)


def template(chosen: Experiment) -> Any:
    """Shapes of the variables that a run of this experiment stores."""
    variables = dict(jax.eval_shape(lambda: init(chosen)))
    return {**variables, "ema": {key: variables[key] for key in variables}} if chosen.config.ema else variables


def evaluate(
    loaded: Loaded, *, splits: str | None = None, evaluators: str | None = None, batch: int | None = None
) -> list[dict]:
    """Run evaluators over splits (the config's, unless given) and write evaluation.json where there is a workdir."""
    chosen = loaded.experiment
    config = chosen.config
    text = config.evaluators if evaluators is None else evaluators
    where = "config.evaluators" if evaluators is None else "--evaluators"
    known: dict[str, Any] = {"classes": len(chosen.classes)}
    if _mentions(text, "bank"):
        known["bank"] = bank(chosen)
    if _mentions(text, "centre"):
        known["centre"] = centre(chosen)
    built = configs.choices(config, text, where, chosen.methods, **known)
    mesh = data_mesh() if jax.device_count() > 1 else None
    rows = []
    for split in configs.split_list(config.test if splits is None else splits):
        rows += run_evaluators(
            chosen.model,
            loaded.variables,
            open_split(chosen, split, batch or config.batch, mesh),
            built,
            split=split,
            workdir=loaded.workdir,
            weights=loaded.weights,
            source=config.source,
            seed=config.seed,
            mesh=mesh,
        )
    return rows


def open_split(chosen: Experiment, split: str, batch: int, mesh: Mesh | None = None) -> Split:
    """A split for evaluation: on the device where it is small, streamed where it is not."""
    source, size, classes = chosen.source(split), chosen.config.image_size, len(chosen.classes)
    if data.memory(source, size) <= RESIDENT_BYTES:
        return resident_split(read(chosen, split), classes=classes, batch=batch, mesh=mesh)
    return streamed_split(source, size, chosen.config.resize, classes=classes, batch=batch, mesh=mesh)


def bank(chosen: Experiment) -> np.ndarray:
    """Backgrounds of the training split for `regions(bank)`."""
    arrays = read(chosen, chosen.config.train)
    if "region" not in arrays:
        raise UserError(f"regions(bank): {chosen.config.source} offers no regions")
    return background_bank(arrays["image"], arrays["region"], arrays["label"], len(chosen.classes))


def centre(chosen: Experiment) -> tuple[float, float]:
    """(height, width) of the mean training box, as shares of the image, for `localisation(..., centre=centre)`."""
    arrays = read(chosen, chosen.config.train)
    if "box" not in arrays and "region" not in arrays:
        raise UserError(f"localisation(centre=centre): {chosen.config.source} offers neither boxes nor regions")
    return mean_box_sides(arrays["box"] if "box" in arrays else region_boxes(arrays["region"]))


def explain(
    loaded: Loaded, *, images: str | None = None, split: str | None = None, methods: str | None = None, count: int = 12
) -> Pictures:
    """Maps of the predicted class for `count` pictures: evenly spaced ones of a split, or all of a user's folder."""
    chosen, variables = loaded.experiment, loaded.variables
    config = chosen.config
    text = config.explain if methods is None else methods
    explanations = configs.choices(config, text, "--methods" if methods else "config.explain", chosen.methods)
    split = split or _first(config.test)
    source = data.pictures(images) if images else chosen.source(split)
    ids = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int))
    records = [data.decode(source, int(i), config.image_size, config.resize) for i in ids]
    pictures = np.stack([record["image"] for record in records]).astype(np.float32) / 255
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(config.seed)))(jnp.asarray(ids))

    @jax.jit
    def compute(variables, pictures, keys):
        predict = bind(chosen.model, variables)
        predicted = predict(pictures).argmax(-1).astype(jnp.int32)
        return predicted, {name: method(keys, predict, pictures, predicted) for name, method in explanations.items()}

    predicted, maps = compute(variables, pictures, keys)
    true = [record["name"] if record["label"] < 0 and "name" in record else record["label"] for record in records]
    true = [chosen.classes[label] if isinstance(label, int) and label >= 0 else "" for label in true]
    stacked = lambda key: np.stack([record[key] for record in records]) if key in records[0] else None
    title = Path(images).resolve().name if images else split.replace("[", "_").replace("]", "").replace(":", "-")
    return Pictures(
        title=title,
        heading=f"{title}: {loaded.weights}",
        images=pictures,
        names=[(name, chosen.classes[int(p)]) for name, p in zip(true, predicted)],
        maps={name: np.asarray(values) for name, values in maps.items()},
        boxes=stacked("box"),
        regions=stacked("region"),
    )


def _first(text: str) -> str:
    return configs.split_list(text)[0]


def _mentions(text: str, name: str) -> bool:
    return re.search(rf"\b{name}\b(?!\s*=)", text) is not None
