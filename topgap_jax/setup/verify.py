"""A model's file in RobustBench's form: written from an evaluation, and measured again on some of its images."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from topgap_jax import pretrained
from topgap_jax.build import calls
from topgap_jax.errors import UserError
from topgap_jax.measure import model_info, results
from topgap_jax.measure.evaluate import evaluate as run_evaluators
from topgap_jax.measure.evaluate import evaluation_variables
from topgap_jax.measure.model_info import CHECKED, Comparison, Info
from topgap_jax.measure.results import Row
from topgap_jax.measure.splits import rows_of
from topgap_jax.measure.verdicts import fingerprint
from topgap_jax.mesh import data_mesh
from topgap_jax.progress import write_text
from topgap_jax.run import checkpoint
from topgap_jax.run.provenance import provenance
from topgap_jax.run.workdir import Data, learnt
from topgap_jax.setup import checks, expressions
from topgap_jax.setup import config as configs
from topgap_jax.setup.assembly import Experiment, assemble, context, init, open_split, sample
from topgap_jax.setup.networks import with_networks
from topgap_jax.setup.weights import weights
from topgap_jax.types import Robustness, Variables

if TYPE_CHECKING:
    from topgap_jax.setup.commands import Loaded


def check(path: Path, loaded: "Loaded", splits: list[str], built: Mapping[str, Any]) -> None:
    """Raise a UserError where no file of a model can be made of an evaluation, before anything is measured."""
    model_info.by_hand(path)
    robust = _robust(built)
    if len(splits) != 1 or not robust:
        raise UserError(
            f"--model-info {path}: a model's file is about one split and at least one robust(...), such as --split "
            f"'test[:1000]' --evaluators 'robust(autoattack(linf(8/255)))'; got {len(splits)} and {len(robust)}"
        )
    try:
        model_info.ball_of(robust)
    except UserError as error:
        raise UserError(f"--model-info {path}: {error}") from None
    if loaded.workdir and loaded.weights.startswith("checkpoint last") and _has_best(loaded.workdir):
        raise UserError(f"--model-info {path}: a run's folder stands for its best checkpoint; leave --checkpoint out")
    if not path.parent.is_dir():
        raise UserError(f"--model-info {path}: there is no folder '{path.parent}'")


def write(
    path: Path,
    loaded: "Loaded",
    split: str,
    batch: int,
    built: Mapping[str, Any],
    rows: list[Row],
    columns: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
    """Write the file; what a person filled in stays. columns: of each evaluator, as `measure.evaluate` gives them."""
    chosen: Experiment = loaded.experiment
    config, robust = chosen.config, _robust(built)
    images = {text: model_info.contributions(each) for text, each in columns.items()}
    images = {text: each for text, each in images.items() if each and (text in robust or "background_gap" in each)}
    keys = {
        "dataset": _dataset(chosen, split),
        **{key: value for key, value in model_info.by_hand(path).items() if value is not None},
        **model_info.measured(robust, {row.evaluator: row for row in rows}, images, split),
        "config": {**config.to_dict(), "init": ""},
        "file": _file(chosen, path.parent),
        "data": Data(chosen.classes, _examples(loaded))._asdict(),
        "weights": _weights_text(loaded, path.parent),
        "fingerprint": fingerprint(evaluation_variables(loaded.variables)),
        "split": split,
        "batch": batch,
        "rows": [results.to_json(row._replace(measures=row.numbers)) for row in rows],
        **provenance(),
    }
    if jax.process_index() != 0:
        return
    try:
        write_text(path, model_info.text(keys, images))
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}") from None


def verify(
    path: str | Path, *, weights_text: str | None = None, data: str | None = None, file: str | Path | None = None
) -> tuple[list[Comparison], list[str]]:
    """(what a model's file says beside what is measured now, faults of the file itself in words).

    CHECKED images of its split, evenly spaced, each with the random draws that it had; on all images where there are
    fewer. weights_text: the weights, where they are not where the file says; data: a data set in place of the config's;
    file: the Python file whose methods the config names, which is run only if it is given here.
    """
    path = Path(path)
    info = model_info.read(path)
    chosen = _experiment(path, info, data, file)
    variables = _variables(path, info, chosen, weights_text)
    texts, split, batch = ", ".join(info.images), info.keys["split"], info.keys["batch"]
    built = expressions.choices(chosen.config, "evaluators", chosen.methods, texts, f"{path}: rows", **context(chosen))
    built = with_networks(chosen, built, f"{path}: rows")
    checks.evaluators(chosen, [chosen.source(split)], built, f"{path}: rows")
    mesh = data_mesh()
    width = mesh.size * -(-batch // mesh.size)  # the file's own where that can be divided over the devices here
    mesh = mesh if mesh.size > 1 else None
    whole, again = open_split(chosen, split, width, mesh), {}
    n = {len(values) for each in info.images.values() for values in each.values()}
    if n != {whole.examples}:
        raise UserError(
            f"{path} is about {max(n)} images of {split}, and {chosen.config.source} has {whole.examples} there"
        )
    ids = np.unique(np.linspace(0, whole.examples - 1, min(CHECKED, whole.examples)).round().astype(np.int32))
    run_evaluators(
        chosen.model,
        variables,
        rows_of(whole, ids),
        built,
        split=split,
        classes=len(chosen.classes),
        training=lambda: sample(chosen),
        examples=lambda text, columns: again.update({text: model_info.contributions(columns)}),
        weights=str(path),
        seed=chosen.config.seed,
        mesh=mesh,
    )
    for evaluator, each in info.images.items():
        for measure in set(each) - set(again[evaluator]):
            raise UserError(f"{path}: {evaluator} gives no {measure} here; the training split may lack what it needs")
    expected = model_info.measured(_robust(built), {row.evaluator: row for row in info.rows}, info.images, split)
    faults = [
        f"{key} is {info.keys.get(key)!r}, and its images give {expected.get(key)!r}"
        for key in ("number_forward_passes", "eps", "clean_acc", "autoattack_acc", "external", "background_gap")
        if info.keys.get(key) != expected.get(key)
    ]
    return model_info.compare(info, ids, again), faults


def _experiment(path: Path, info: Info, data: str | None, file: str | Path | None) -> Experiment:
    loaded = configs.load(path, [("source", data)] if data else [], file=file)
    try:
        learnt_from = Data(tuple(map(str, info.keys["data"]["classes"])), int(info.keys["data"]["examples"]))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is no model's file that can be verified: data holds no classes") from None
    chosen = assemble(loaded, learnt_from)
    checks.model(chosen)
    return chosen


def _variables(path: Path, info: Info, chosen: Experiment, text: str | None) -> Variables:
    """The weights that the file names, or those given in their place; UserError where they are others."""
    named = info.keys["weights"]
    if named is None and text is None:
        variables = init(chosen)
    else:
        variables = weights(text or _where(path, info)).load(chosen.model, image_shape=(*chosen.config.image_size, 3))
    variables, expected = evaluation_variables(variables), info.keys["fingerprint"]
    if fingerprint(variables) != expected:
        raise UserError(
            f"{path} is about other weights than {text or named or 'those of the model'}: their fingerprint is "
            f"{expected}, not {fingerprint(variables)}"
        )
    return variables


def _weights_text(loaded: "Loaded", folder: Path) -> str | None:
    """The weights as the file names them: a published network, or a path from TOPGAP_DATA, else from the file's folder;
    None: the model is born with them."""
    text = str(loaded.workdir or loaded.experiment.config.init)
    if not text or text in pretrained.NETWORKS:
        return text or None
    path, data = Path(text).resolve(), _data_folder()
    if data is not None and path.is_relative_to(data):
        return path.relative_to(data).as_posix()
    return Path(os.path.relpath(path, folder.resolve())).as_posix()


def _where(path: Path, info: Info) -> str:
    """Where the weights are that the file names; UserError, with where they are to be had, if nowhere."""
    named = info.keys["weights"]
    if named in pretrained.NETWORKS:
        return named
    places = [place / named for place in (path.parent, _data_folder()) if place is not None]
    there = next((place for place in places if os.path.exists(place)), None)  # False of a name that none can have
    if there is None:
        source = info.keys.get("weights_from")
        raise UserError(
            f"{path}: its weights '{named}' lie neither beside it nor in TOPGAP_DATA; give --weights FILE"
            + (f"; they are to be had from {source}" if source else "")
        )
    return str(there)


def _data_folder() -> Path | None:
    return Path(os.environ["TOPGAP_DATA"]).resolve() if os.environ.get("TOPGAP_DATA") else None


def _file(chosen: Experiment, folder: Path) -> str | None:
    """The Python file of the config, where its texts call what is defined there and nowhere else."""
    config = chosen.config
    called = {name for key in config if configs.is_expression(config, key) for name in calls(config[key])}
    return Path(os.path.relpath(chosen.file, folder)).as_posix() if called & set(chosen.methods) else None


def _examples(loaded: "Loaded") -> int:
    """Training examples: a schedule in the model's text may name total_steps."""
    data, train = learnt(loaded.workdir) if loaded.workdir else None, loaded.experiment.config.train
    return data.examples if data else len(loaded.experiment.source(train)) if train else 0


def _robust(built: Mapping[str, Any]) -> dict[str, Robustness]:
    return {text: each for text, each in built.items() if isinstance(each, Robustness) and not each.eps}


def _has_best(workdir: Path) -> bool:
    return checkpoint.latest_step(workdir, "best") is not None


def _dataset(chosen: Experiment, split: str) -> str:
    """RobustBench's name of the data set where it is one of TFDS, else ours: cifar10 of "tfds('cifar10')"."""
    name = chosen.source(split).name
    return name.split("'")[1] if name.startswith("tfds('") else name
