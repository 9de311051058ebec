"""What the commands do with an experiment: parts for `fit`, a model with its weights, evaluation, pictures, layers."""

import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from topgap_jax import rewrite
from topgap_jax.errors import UserError
from topgap_jax.measure import results
from topgap_jax.measure.adversarial import file_name
from topgap_jax.measure.evaluate import evaluate as run_evaluators
from topgap_jax.measure.results import Row
from topgap_jax.measure.splits import check_width
from topgap_jax.mesh import data_mesh
from topgap_jax.models import bind
from topgap_jax.progress import say
from topgap_jax.run import checkpoint, locks, manifest
from topgap_jax.run.fit import Parts
from topgap_jax.run.workdir import Data, learnt, read_config
from topgap_jax.setup import checks, expressions, verify
from topgap_jax.setup import config as configs
from topgap_jax.setup.assembly import (
    Experiment,
    assemble,
    context,
    init,
    open_split,
    sample,
    training,
    validation,
)
from topgap_jax.setup.networks import of_run, with_networks
from topgap_jax.setup.weights import initial, weights
from topgap_jax.types import Robustness, Variables

DECISIVE = ("seed", "source", "train", "image_size", "resize", "mean", "std", "pool", "model")
"""Keys on which every result of an evaluation depends, beside those that the texts of `source` and `model` read."""


class Loaded(NamedTuple):
    """A model with its variables; `weights` says where they are from, `workdir` is None outside a run.

    changes: the keys, with their texts, in which the command line departs from the run's own config.
    """

    experiment: Experiment
    variables: Variables
    weights: str
    workdir: Path | None
    changes: tuple[tuple[str, str], ...] = ()


def parts(chosen: Experiment, workdir: str | Path | None = None, *, reads: bool = True) -> Parts:
    """What `fit` needs: data read (small sets) or opened (large ones), objective, augmentation and optimiser built.

    reads: False leaves data and first weights out, as `run.plan` does. workdir: a run that goes on there has its
    variables, and config.init is not looked for again. Everything that the config says is checked first, evaluators and
    explanations too, so that a mistake is told before anything is read, and not after the training.
    """
    config, methods = chosen.config, chosen.methods
    if not config.train:
        raise UserError("config.train names no split to train on")
    build = {
        "objective": expressions.choice(config, "objective", methods, **context(chosen)),
        "augments": tuple(expressions.choices(config, "augment", methods, **context(chosen)).values()),
        "optimizer": expressions.choice(config, "optimizer", methods, **context(chosen)),
    }
    checks.unread(chosen, chosen.stated)
    for split in filter(None, (config.train, config.validation)):
        chosen.source(split)
    checks.model(chosen)
    checks.optimizer(chosen, build["optimizer"])
    _checked_evaluators(chosen, expressions.split_list(config.test), None)
    checked_explanations(chosen, None)
    examples = len(chosen.source(config.train))
    if config.batch > examples:
        say(f"config.batch = {config.batch} of only {examples} examples of '{config.train}': each step repeats some")
    goes_on = workdir is not None and checkpoint.latest_step(Path(workdir)) is not None
    image_shape = (*config.image_size, 3)
    normalised = {key: config[key] for key in ("mean", "std") if key in expressions.reads(config, config.model)}
    begin = lambda: initial(config.init, chosen.model, image_shape, config.seed, normalised, chosen.classes)
    return Parts(
        model=chosen.model,
        **build,
        initial=begin() if reads and not goes_on else None,
        train=training(chosen) if reads else {},
        validation=validation(chosen) if reads else None,
        examples=examples,
        batch=config.batch,
        epochs=config.epochs,
        seed=config.seed,
        ema=config.ema,
        image_shape=image_shape,
        classes=len(chosen.classes),
        class_names=chosen.classes,
    )


def from_workdir(
    workdir: str | Path, overrides=(), checkpoint_name: str = "best", file: str | Path | None = None
) -> Loaded:
    """The model of a run, with its best (or last) checkpoint; EMA weights where the run kept them.

    Its classes are those that it learnt; data are matched to them by name. file: the Python file whose methods the
    run's config names, which is run only if it is given here.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        folder = Path(workdir)
        why = "it is a file" if folder.exists() else "there is no such folder"
        why = "it has no config.json" if folder.is_dir() else why
        raise UserError(f"'{workdir}' is not the folder of a run: {why}")
    chosen = assemble(configs.load(path, overrides, file=file), learnt(Path(workdir)))
    checks.unread(chosen, {key for key, _ in overrides})
    return restored(chosen, workdir, checkpoint_name)._replace(changes=tuple(overrides))


def restored(chosen: Experiment, workdir: str | Path, checkpoint_name: str = "best") -> Loaded:
    """The experiment with the variables that a run of it stored; without a validation split there is only "last"."""
    workdir = Path(workdir)
    return Loaded(chosen, *of_run(chosen, workdir, checkpoint_name), workdir)


def from_config(path: str | Path, overrides, file: str | Path | None = None, pictures: bool = False) -> Loaded:
    """The config's model with the weights that config.init names, or those that the model is born with.

    Where the weights say of themselves which network they are and how its input is normalised, the config follows,
    unless the command line sets the key; where they say what their classes are called, the data are matched to them by
    name. pictures: no data are needed.
    """
    loaded = configs.load(path, overrides, file=file)
    config, given = loaded.config, {key for key, _ in overrides}
    if not config.init:
        chosen = assemble(loaded)
        if not chosen.model.has_weights:
            raise UserError(
                "--config needs --weights (or config.init): a config alone has no trained weights (of a run, give "
                "--workdir)"
            )
        return Loaded(chosen, init(chosen), "the model's own weights", None)
    source = weights(config.init)
    followed = set(source.settings) - given - ({"model"} if given & {"backbone", "head", "network"} else set())
    for key, value in source.settings.items():
        if key in followed and config[key] != value:
            say(f"{source.name}: config.{key} = {value!r}")
            config[key] = value
    learnt = Data(source.labels, 0) if pictures and source.labels else None
    chosen = assemble(loaded, learnt, source.labels)
    checks.unread(chosen, given)
    variables = source.load(chosen.model, image_shape=(*config.image_size, 3))
    return Loaded(chosen, variables, source.name, None)


def evaluate(
    loaded: Loaded,
    *,
    splits: str | None = None,
    evaluators: str | None = None,
    batch: int | None = None,
    save: str | Path | None = None,
    model_info: str | Path | None = None,
    again: bool = False,
) -> list[Row]:
    """Run evaluators over splits (the config's, unless given) and write evaluation.json where there is a workdir.

    Rows that are there for the same weights, by their digest, and the same data are kept, with a line; again: they are
    measured once more, as all are with `save` or `model_info`. What the command line changed in a run's config, and a
    result depends on, are the row's overrides. save: a folder for the adversarial images of every attack, or of a
    single one the .npz itself. model_info: the JSON of the model to write, which `verify` measures again. UserError
    where another process evaluates that workdir.
    """
    chosen = loaded.experiment
    config = chosen.config
    names = expressions.split_list(config.test if splits is None else splits)
    text = config.evaluators if evaluators is None else evaluators
    if not names:
        raise UserError("nothing to evaluate: neither config.test nor --split names a split")
    if not expressions.split_list(text):
        raise UserError("nothing to evaluate: neither config.evaluators nor --evaluators names an evaluator")
    checks.model(chosen)
    built = _checked_evaluators(chosen, names, evaluators)
    if model_info is not None:
        verify.check(Path(model_info), loaded, names, built)
    files = _files(save, names, [text for text, one in built.items() if isinstance(one, Robustness)])
    if loaded.workdir is not None:
        results.read(loaded.workdir / results.FILE)  # a damaged one is told before anything is read
    mesh = data_mesh()
    mesh = mesh if mesh.size > 1 else None
    width = _width(chosen, names, batch, mesh)
    check_width(width, mesh)
    checks.memory(width, config.image_size, "config.batch" if batch is None else "--batch")
    training = functools.cache(lambda: sample(chosen))
    rows, columns = [], {}
    identity = _identity(loaded)
    digest = identity[-1]
    keeps = digest and not again and save is None and model_info is None and jax.process_count() == 1
    kept = {split: _kept(loaded, split, built, identity) if keeps else {} for split in names}
    wanted = {split: {text: one for text, one in built.items() if text not in kept[split]} for split in names}
    writes = loaded.workdir is not None and results.read(loaded.workdir / results.FILE)[1:] != identity
    with locks.evaluating(loaded.workdir if writes or any(wanted.values()) else None):
        if writes and jax.process_index() == 0:
            results.turn_to(loaded.workdir / results.FILE, *identity)
        for split in names:
            if kept[split]:
                say(f"{split}: kept from {results.FILE}, --again measures once more: {', '.join(kept[split])}")
            measured = []
            if wanted[split]:
                measured = run_evaluators(
                    chosen.model,
                    loaded.variables,
                    open_split(chosen, split, width, mesh),
                    wanted[split],
                    split=split,
                    classes=len(chosen.classes),
                    training=training,
                    overrides=lambda text: _overrides(loaded, text),
                    workdir=loaded.workdir,
                    save=lambda text, split=split: files.get((split, text)),
                    examples=lambda text, each: columns.update({text: each}),
                    weights=loaded.weights,
                    digest=digest,
                    source=identity[1],
                    seed=config.seed,
                    mesh=mesh,
                )
            by_text = _kept(loaded, split, kept[split], identity) | {row.evaluator: row for row in measured}
            rows += [by_text[text] for text in built]
    if model_info is not None:
        verify.write(Path(model_info), loaded, names[0], width, built, rows, columns)
    return rows


def _width(chosen: Experiment, splits: Sequence[str], batch: int | None, mesh: Mesh | None) -> int:
    """Examples at a time: `batch`; by default config.batch, or all of the largest split where that has fewer."""
    if batch is not None:
        return batch
    devices = 1 if mesh is None else mesh.size
    largest = max(1, *(len(chosen.source(split)) for split in splits))
    return min(chosen.config.batch, -(-largest // devices) * devices)


def _identity(loaded: Loaded) -> tuple[str, str, str]:
    """What the rows of evaluation.json are of: the weights, the run's own data, the weights' digest. Data that the
    command line names in their place are an override of the row."""
    source = loaded.experiment.config.source
    if loaded.workdir is None:
        return loaded.weights, source, ""
    source = read_config(loaded.workdir / "config.json")["config"].get("source", source)
    return loaded.weights, source, manifest.digests(loaded.workdir).get(loaded.weights, "")


def _kept(loaded: Loaded, split: str, texts: Iterable[str], identity: tuple[str, str, str]) -> dict[str, Row]:
    """{text: row} of those evaluators whose rows are there for these very weights and data."""
    if loaded.workdir is None:
        return {}
    before = results.of(loaded.workdir / results.FILE, *identity)
    by_key = {row.key: row for row in before.rows}
    keys = {text: (split, text, tuple(sorted(_overrides(loaded, text).items()))) for text in texts}
    return {text: by_key[key] for text, key in keys.items() if key in by_key}


def _files(save: str | Path | None, splits: Sequence[str], attacks: Sequence[str]) -> dict[tuple[str, str], Path]:
    """The file for the adversarial images of each (split, evaluator)."""
    if save is None:
        return {}
    pairs, path = [(split, text) for split in splits for text in attacks], Path(save)
    if not pairs:
        raise UserError("--save: no evaluator attacks; give one such as robust(pgd(linf(8/255)))")
    if path.suffix == ".npy":
        raise UserError(f"--save {path}: images are kept in .npz files; name a folder, or {path.with_suffix('.npz')}")
    one = path.suffix == ".npz"
    if one and len(pairs) > 1:
        raise UserError(f"--save {path}: there are {len(pairs)} attacks to save; name a folder")
    folder = path.parent if one else path
    try:  # told now, not when all is measured
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--save {path}: the folder '{folder}' cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK) or (one and path.is_dir()):
        raise UserError(f"--save {path}: nothing can be written there; name another place")
    return {pairs[0]: path} if one else {pair: path / file_name(*pair) for pair in pairs}


def stored(loaded: Loaded) -> list[Row] | None:
    """The rows of evaluation.json that the config asks for; None unless all of them are there, for these weights."""
    config = loaded.experiment.config
    kept = results.of(loaded.workdir / results.FILE, *_identity(loaded))
    by_key = {row.key: row for row in kept.rows}
    keys = [(s, e, ()) for s in expressions.split_list(config.test) for e in expressions.split_list(config.evaluators)]
    return [by_key[key] for key in keys] if all(key in by_key for key in keys) else None


def layers(chosen: Experiment) -> tuple[list[rewrite.Layer], str | None]:
    """The layers of the model for an image of the config's size, and the name of Grad-CAM's default one or None."""
    found = []

    def look(variables, images):
        predict = bind(chosen.plain, variables)
        found.extend(rewrite.layers(predict, images))
        try:
            found.append(rewrite.default_layer(predict, images))
        except UserError:
            found.append(None)

    # Only traced: nothing is compiled or computed.
    images = jax.ShapeDtypeStruct((1, *chosen.config.image_size, 3), jnp.float32)
    jax.eval_shape(look, jax.eval_shape(lambda: init(chosen)), images)
    return found[:-1], found[-1]


def _checked_evaluators(chosen: Experiment, splits: Sequence[str], text: str | None) -> dict[str, Any]:
    """The evaluators of config.evaluators, or of `text`, once they are seen to fit the model and these splits."""
    sources = [chosen.source(split) for split in splits]
    built = expressions.choices(chosen.config, "evaluators", chosen.methods, text, "--evaluators", **context(chosen))
    where = "config.evaluators" if text is None else "--evaluators"
    built = with_networks(chosen, built, where)
    checks.evaluators(chosen, sources, built, where)
    return built


def checked_explanations(chosen: Experiment, text: str | None) -> dict[str, Any]:
    """The explanations of config.explain, or of `text`, once they are seen to fit the model."""
    built = expressions.choices(chosen.config, "explain", chosen.methods, text, "--methods", **context(chosen))
    checks.explanations(chosen, built, "config.explain" if text is None else "--methods")
    return built


def _overrides(loaded: Loaded, evaluator: str) -> dict[str, str]:
    """The keys, with their texts, that the command line changed in a run's config and on which a result depends."""
    config = loaded.experiment.config
    read = set().union(
        *(expressions.reads(config, text) for text in (evaluator, config.source, config.model)), DECISIVE
    )
    return {key: text for key, text in loaded.changes if key in read}
