"""What is checked of an experiment before anything is read or trained: shapes are traced, nothing is compiled."""

import contextlib
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from topgap_jax.attacks import bound, square
from topgap_jax.data import Source
from topgap_jax.errors import UserError, raised
from topgap_jax.keys import root
from topgap_jax.measure.evaluate import evaluation_variables
from topgap_jax.models import bind
from topgap_jax.progress import say
from topgap_jax.setup import config as configs
from topgap_jax.setup import expressions
from topgap_jax.setup.assembly import Experiment, context, template
from topgap_jax.types import Attack, Audit, Batch, Evaluator, Explain, Robustness

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
EXAMPLES = 2  # in the batch that is traced
OF_THE_MODEL = ("mean", "std", "dtype", "pool", "backbone", "head", "network")
"""Keys that say something only where the text of another key names them."""


def unread(chosen: Experiment, stated: Collection[str]) -> None:
    """Build what is stated of the model and no text names, and say in one line that it has no effect. stated: keys of
    the config."""
    config = chosen.config
    readers = [key for key in configs.KEYS if key not in OF_THE_MODEL and configs.is_expression(config, key)]
    read = set().union(*(expressions.reads(config, config[key]) for key in readers))
    keys = [key for key in OF_THE_MODEL if key in stated and key not in read]
    for key in keys:
        if configs.is_expression(config, key):
            expressions.choice(config, key, chosen.methods, **context(chosen))
    if keys:
        listed, verb = " and ".join(f"config.{key}" for key in keys), "has" if len(keys) == 1 else "have"
        say(f"{listed} {verb} no effect: nothing in config.model = '{config.model}' reads it")


def model(chosen: Experiment) -> None:
    """The model can be evaluated and trained, and returns one logit a class; every layer it names is there. A batch of
    images fits in this machine's memory."""
    config, classes = chosen.config, len(chosen.classes)
    memory(config.batch, config.image_size)
    images = jax.ShapeDtypeStruct((EXAMPLES, *config.image_size, 3), jnp.float32)
    targets = jax.ShapeDtypeStruct((EXAMPLES, classes), jnp.float32)

    def train(variables, images, targets):
        return chosen.plain.apply(
            variables, images, train=True, keys=_keys(), targets=targets, step=jnp.int32(0)
        ).logits

    try:
        variables = template(chosen)
        logits = jax.eval_shape(lambda v, x: bind(chosen.plain, v)(x), evaluation_variables(variables), images)
        if logits.shape == targets.shape:
            jax.eval_shape(train, variables, images, targets)
    except UserError as error:
        raise UserError(f"config.model: {error}") from error
    except Exception as error:  # a user's own module may raise anything
        size = " x ".join(map(str, config.image_size))
        raise UserError(
            f"config.model: '{config.model}' cannot be applied to images of {size} pixels: {raised(error)}"
        ) from error
    if logits.shape != targets.shape:
        raise UserError(
            f"config.model: '{config.model}' returns {logits.shape[1]} logits an image, and {config.source} has "
            f"{classes} classes; name `classes` in its text"
        )


def memory(batch: int, image_size: Iterable[int], key: str = "config.batch") -> None:
    """A batch of float32 images fits in this machine's memory, or this process's share of it does. key: where the batch
    is from."""
    height, width = image_size
    needed, here = batch / jax.process_count() * height * width * 3 * 4, physical_memory()
    if here and needed > here:
        raise UserError(
            f"a batch of {batch} images of {height} x {width} pixels needs {needed / 1e9:,.0f} GB, and this machine"
            f" has {here / 1e9:,.0f} GB: make {key} or config.image_size smaller"
        )


def physical_memory() -> int:
    """Bytes of this machine's memory, or of the share that a container has of it; 0 where the system does not say."""
    try:
        here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
    for limit in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" where there is none
            here = min(here, int(Path(limit).read_text()))
    return here


def optimizer(chosen: Experiment, built: optax.GradientTransformation) -> None:
    """The optimizer can begin with the model's parameters: every layer it names is there."""
    try:
        jax.eval_shape(built.init, template(chosen)["params"])
    except UserError as error:
        raise UserError(f"config.optimizer: {error}") from error


def evaluators(chosen: Experiment, sources: Iterable[Source], built: Mapping[str, Any], where: str) -> None:
    """Every split offers what the evaluators need, every layer they name is there, attacks fit the number of classes.
    where: what an error begins with."""
    variables = evaluation_variables(template(chosen))
    for batch in _batches(chosen, sources):
        for text, evaluator in built.items():
            if isinstance(evaluator, Robustness | Audit):
                of_audit = lambda audit: (*audit.white_box, square(audit.ball))
                runs = evaluator.runs if isinstance(evaluator, Robustness) else of_audit(evaluator)
                for attack in runs:
                    step = lambda variables, batch, attack=attack: _step(attack, chosen, variables, batch)
                    _trace(f"{where}: {text}", step, variables, batch)
                continue
            rows = lambda variables, batch, evaluator=evaluator: _rows(evaluator, chosen, variables, batch)
            shapes = _trace(f"{where}: {text}", rows, variables, batch)
            if not isinstance(shapes, dict) or any(leaf.shape[:1] != (EXAMPLES,) for leaf in jax.tree.leaves(shapes)):
                raise UserError(f"{where}: {text}: its rows are {{name: (b, ...)}}, one of each example, got {shapes}")


def explanations(chosen: Experiment, built: Mapping[str, Explain], where: str) -> None:
    """Every explanation can be made of the model: the layers it names are there. where: what an error begins with."""
    variables = evaluation_variables(template(chosen))
    images = jax.ShapeDtypeStruct((EXAMPLES, *chosen.config.image_size, 3), jnp.float32)
    for text, explain in built.items():
        maps = lambda variables, images, explain=explain: explain(
            _keys(), bind(chosen.plain, variables), images, jnp.zeros(EXAMPLES, jnp.int32)
        )
        shapes = jax.tree.leaves(_trace(f"{where}: {text}", maps, variables, images))
        if not shapes or any(leaf.ndim != 3 or len(leaf) != EXAMPLES for leaf in shapes):
            listed = ", ".join(str(leaf.shape) for leaf in shapes) or "nothing"
            raise UserError(f"{where}: {text}: of {EXAMPLES} images its maps are ({EXAMPLES}, h, w), got {listed}")


def _rows(evaluator: Evaluator, chosen: Experiment, variables, batch):
    prepared = evaluator.prepare(None, len(chosen.classes)) if evaluator.prepare else {}
    return evaluator.rows(_keys(), chosen.plain, variables, batch, prepared)


def _step(attack: Attack, chosen: Experiment, variables, batch):
    predict, images, labels = bind(chosen.plain, variables), batch["image"], batch["label"]
    if attack.source is not None:
        attack = bound(attack, bind(attack.source.model, attack.source.variables))
    return attack.step(predict, attack.init(_keys(), predict, images, labels, predict(images)))


def _trace(where, function, *arguments):
    try:
        return jax.eval_shape(function, *arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:  # a user's own method may raise anything
        raise UserError(f"{where}: {raised(error)}") from error


def _keys():
    return jax.random.split(root(0), EXAMPLES)


def _batches(chosen: Experiment, sources: Iterable[Source]) -> list[Batch]:
    """The shapes of a batch of each kind of split."""
    size, classes = tuple(chosen.config.image_size), len(chosen.classes)
    shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct((EXAMPLES, *sizes), dtype)
    always = {
        "image": shape(*size, 3),
        "targets": shape(classes),
        "label": shape(dtype=jnp.int32),
        "id": shape(dtype=jnp.int32),
        "mask": shape(dtype=jnp.bool_),
    }
    offered = {"box": shape(4), "region": shape(*size, dtype=jnp.uint8), "group": shape(dtype=jnp.int32)}
    kinds = dict.fromkeys(source.offers for source in sources)
    return [always | {field: offered[field] for field in offers if field in offered} for offers in kinds]
