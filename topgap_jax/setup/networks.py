"""Networks beside the one that is measured, which an evaluator names by a text: the source of a transfer, the twin
of an audit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from topgap_jax.errors import UserError
from topgap_jax.measure.evaluate import check_finite, evaluation_variables
from topgap_jax.run import checkpoint, manifest
from topgap_jax.run.workdir import Data, learnt
from topgap_jax.setup import config as configs
from topgap_jax.setup.assembly import Experiment, assemble, few, template
from topgap_jax.setup.weights import Weights, weights
from topgap_jax.types import Audit, Network, Robustness, Variables


def with_networks(chosen: Experiment, built: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The evaluators {text: value} with the networks that they name loaded, each once. where: what an error begins
    with."""
    networks: dict[str, Network] = {}

    def loaded(source, text):
        if isinstance(source, str) and source not in networks:
            try:
                networks[source] = network(chosen, source)
            except UserError as error:
                raise UserError(f"{where}: {text}: {error}") from error
        return networks.get(source) if isinstance(source, str) else source

    def complete(evaluator, text):
        if isinstance(evaluator, Audit):
            return evaluator._replace(twin=loaded(evaluator.twin, text))
        if not isinstance(evaluator, Robustness):
            return evaluator
        runs = (attack._replace(source=loaded(attack.source, text)) for attack in evaluator.runs)
        return evaluator._replace(runs=tuple(runs))

    return {text: complete(evaluator, text) for text, evaluator in built.items()}


def network(chosen: Experiment, text: str) -> Network:
    """The network that a text names: of a run's folder with its best checkpoint, of a file of weights, or published.

    A file that does not say what network it is of has weights of the experiment's own. A run with methods of its own is
    read with those of the experiment. UserError where the text names none of these, and for a network that takes images
    of another size or tells other classes apart.
    """
    path = Path(text).expanduser()
    if (path / "config.json").is_file():
        file = chosen.file if chosen.methods else None
        other = assemble(configs.load(path / "config.json", file=file), learnt(path))
        _check(chosen, other, text)
        variables, _ = of_run(other, path)
    else:
        source = weights(text)
        other = _described(chosen, source)
        _check(chosen, other, text)
        variables = source.load(other.model, image_shape=(*other.config.image_size, 3))
    check_finite(variables, text)
    return Network(other.model, variables, text)


def of_run(chosen: Experiment, workdir: Path, which: str = "best") -> tuple[Variables, str]:
    """What is evaluated of the experiment's run in a folder, and which checkpoint that is: without a validation split
    there is only "last"."""
    which = which if checkpoint.latest_step(workdir, which) is not None else "last"
    trees, meta = checkpoint.restore(workdir, which, {"variables": template(chosen)})
    return evaluation_variables(trees["variables"]), manifest.label(which, meta["step"])


def _described(chosen: Experiment, source: Weights) -> Experiment:
    """The experiment with the network that the weights say they are of."""
    config = chosen.config.copy_and_resolve_references()
    for key, value in source.settings.items():
        config[key] = value
    if "model" in source.settings:
        config.pool = "gap()"  # whatever this experiment's is: that of published weights
    shared = set(source.labels or ()) & set(chosen.classes)  # none: they are called otherwise, and may be the same
    return assemble(
        configs.Loaded(config, chosen.methods, chosen.file), Data(source.labels if shared else chosen.classes, 0)
    )


def _check(chosen: Experiment, other: Experiment, text: str) -> None:
    sizes = [" x ".join(map(str, each.config.image_size)) for each in (other, chosen)]
    if sizes[0] != sizes[1]:
        raise UserError(f"'{text}' takes images of {sizes[0]} pixels, this network of {sizes[1]}; both must be alike")
    if set(other.classes) == set(chosen.classes) and other.classes != chosen.classes:
        raise UserError(f"'{text}' has its {len(other.classes)} classes in another order than this network")
    if other.classes != chosen.classes:
        lists = few(other.classes), few(chosen.classes)
        numbers = len(other.classes), len(chosen.classes)
        raise UserError(
            f"'{text}' tells {numbers[0]} classes apart, {lists[0]}, and this network {numbers[1]}, {lists[1]}; both "
            "must be alike"
        )
