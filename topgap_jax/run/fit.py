"""Training: one loop that knows no method. Methods enter through the model, the objective, the augmentations, the
optimiser.

A step is a pure function of the state and of the step's number, and so is the order of the data: a run that was killed
and started again ends with the same parameters, bit for bit.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from topgap_jax.data import Stream, as_batch, epoch_ids, gather
from topgap_jax.edges import check_split
from topgap_jax.errors import UserError, raised
from topgap_jax.evaluators import accuracy
from topgap_jax.keys import example_keys, fold_in, root
from topgap_jax.measure.evaluate import evaluation_variables
from topgap_jax.measure.rows import measure_split
from topgap_jax.measure.splits import Split, resident_split
from topgap_jax.mesh import check_batch, data_mesh, replicated, split
from topgap_jax.models import bind
from topgap_jax.progress import Metrics, bar, say
from topgap_jax.run import checkpoint, locks
from topgap_jax.run.divergence import advice
from topgap_jax.run.stopping import stop_requests
from topgap_jax.run.workdir import Data, claim, record_versions
from topgap_jax.types import Array, Augment, Model, Objective, Variables

# Steps that may be under way before the host waits for the metrics of an earlier one: the device never idles, and a
# loss that is not finite is seen two steps later.
LAG = 2
MISTAKES = (TypeError, ValueError, AttributeError, ArithmeticError, LookupError, AssertionError, NameError)
"""What a user's own objective, augmentation or optimiser raises while the first step is traced."""


class Parts(NamedTuple):
    """What is trained, with what, on what.

    train: a split as `data.resident` decodes it, held on the device, or a `data.Stream` that gives this process's rows
    of each batch without end. validation: likewise arrays, or a `Split`, or None. ema: 0, or the decay of averaged
    parameters. class_names: stored in the folder of the run, which is refused to data of other classes. initial:
    variables on the host that training begins with; None: as the model draws them.
    """

    model: Model
    objective: Objective
    augments: tuple[Augment, ...]
    optimizer: optax.GradientTransformation
    train: Mapping[str, np.ndarray] | Stream
    validation: Mapping[str, np.ndarray] | Split | None
    examples: int
    batch: int
    epochs: int
    seed: int
    ema: float
    image_shape: tuple[int, int, int]
    classes: int
    class_names: tuple[str, ...] = ()
    initial: Variables | None = None


class State(NamedTuple):
    """All that a step changes. variables: "params", "batch_stats" and, with ema > 0, "ema" with the averages of the
    two."""

    step: Array  # () int32: steps done
    variables: Variables
    optimizer: Any


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, SIGHUP, Ctrl-C) and has saved; the text says how to go on, `code` is the exit
    code that a shell gives the signal."""

    def __init__(self, text: str, number: int):
        super().__init__(text)
        self.code = 128 + number


def fit(
    config: Mapping[str, Any],
    workdir: str | Path,
    parts: Parts,
    *,
    file: str | Path | None = None,
    mesh: Mesh | None = None,
) -> Variables:
    """Train, or go on training, in the folder `workdir`; returns the final variables.

    config: stored in the folder, which is refused to any other; `log_every` (steps) and `checkpoint_every` (epochs) are
    read from it. mesh: all devices by default; they must divide the batch. Writes metrics.jsonl, TensorBoard files, and
    checkpoints: last, and best by validation accuracy. Raises Stopped after SIGTERM, SIGHUP or Ctrl-C, UserError when
    the loss is not finite.
    """
    workdir = Path(workdir)
    start = time.perf_counter(), time.process_time()
    mesh = data_mesh() if mesh is None else mesh
    check_batch(parts.batch, mesh)
    if isinstance(parts.train, Mapping):
        check_split("train", parts.train, parts.classes)
    claim(workdir, config, file, Data(parts.class_names, parts.examples) if parts.class_names else None)
    record_versions(workdir, mesh)
    log_every, checkpoint_every = config.get("log_every", 50), config.get("checkpoint_every", 1)
    per_epoch = max(1, parts.examples // parts.batch)
    total = per_epoch * parts.epochs

    if checkpoint.set_aside(workdir) and checkpoint.latest_step(workdir) is None:
        raise UserError(f"no checkpoint of '{workdir}' is left to go on from; the same command again begins anew")
    state, meta = _start(workdir, parts, mesh)
    done, best = meta["step"], _best(workdir, meta["best"])
    spent = meta["seconds"] - start[0], meta["cpu_seconds"] - start[1]  # plus the clocks: what training took in all
    held, rows = _feed(parts, mesh, meta)
    train_step = make_step(parts, mesh)
    validate = _validation(parts, mesh)
    pending: deque = deque()  # (step, its metrics, what of it is finite; still on the device)
    window: list[dict[str, float]] = meta["window"]  # metrics of the steps since the last row

    with ExitStack() as stack:
        stack.callback(locks.release, workdir, locks.TRAINING)
        if isinstance(parts.train, Stream):
            stack.callback(parts.train.close)
        asked_to_stop = stack.enter_context(stop_requests())
        folders = stack.enter_context(checkpoint.opened(workdir))
        metrics = stack.enter_context(Metrics(workdir, done))
        shown = stack.enter_context(bar(total * parts.batch, "training", done=done * parts.batch))

        def book(keep: int) -> None:
            """Fetch the metrics of all but the `keep` newest steps."""
            while len(pending) > keep:
                step, numbers, finite = jax.device_get(pending.popleft())
                numbers = {name: float(value) for name, value in numbers.items()}
                if not finite.all():
                    losses = [row["loss"] for row in window]
                    raise advice(workdir, config, step, finite.tolist(), numbers["loss"], losses)
                window.append(numbers)
                if step % log_every == 0 or step == total:
                    means = {name: sum(row[name] for row in window) / len(window) for name in numbers}
                    metrics.write(step, "train", means, epoch=round(step / per_epoch, 4))
                    shown.note(f"epoch {-(-step // per_epoch)}/{parts.epochs}, loss {means['loss']:.4g}")
                    window.clear()

        def save(which: str, step: int) -> None:
            trees = {"variables": state.variables}
            trees |= {"optimizer": state.optimizer} if which == "last" else {}
            stream = parts.train.get_state() if isinstance(parts.train, Stream) else None
            meta = {"step": step, "epoch": step / per_epoch, "best": best, "stream": stream, "window": window}
            meta |= {"seconds": spent[0] + time.perf_counter(), "cpu_seconds": spent[1] + time.process_time()}
            meta |= {"rows": metrics.rows}  # by which a reader sees that some are lost
            checkpoint.save(getattr(folders, which), step, trees, meta)

        for step in range(done + 1, total + 1):
            batch = _placed(next(rows), split(mesh))
            try:
                state, numbers, finite = train_step(state, held, batch)
            except MISTAKES as error:
                if step > done + 1 or isinstance(error, UserError | FloatingPointError):  # the latter: jax_debug_nans
                    raise
                raise UserError(f"the step of objective, augment and optimizer: {raised(error)}") from error
            pending.append((step, numbers, finite))
            book(LAG)
            shown.update(parts.batch)
            epoch, rest = divmod(step, per_epoch)
            if rest == 0:
                book(0)  # before any save: a state that is not finite is never kept
                if validate is not None:
                    numbers = validate(state.variables)
                    metrics.write(step, "validation", numbers, epoch=epoch)
                    if best is None or numbers["accuracy"] > best:
                        best = numbers["accuracy"]
                        save("best", step)
                if epoch % checkpoint_every == 0 or step == total:
                    save("last", step)
            if (number := asked_to_stop(step)) and step < total:
                book(0)
                save("last", step)
                text = f"stopped and saved at step {step} of {total}; to go on, give the same command again"
                raise Stopped(text, number)
    return state.variables


def make_step(parts: Parts, mesh: Mesh) -> Callable[[State, Mapping[str, Array], Mapping[str, Array]], tuple]:
    """The jitted step: (state, held, rows) -> (state, {name: mean}, finite (3,)); the old state is donated.

    held: the resident arrays, {} where rows are a stream's; rows: `id` and `mask` (b,), of a stream also `image`,
    `label`. Example i of step s draws from fold_in(fold_in(key(seed), s), id). finite: whether the loss is, the
    gradient, and all variables that the step leaves (`divergence.CHECKED`).
    """

    def loss_of(params, variables, keys, batch, step):
        variables = {**variables, "params": params}
        losses, logs, batch_stats = parts.objective(keys, parts.model, variables, batch, step)
        means = {name: _mean(values, batch["mask"]) for name, values in {**logs, "loss": losses}.items()}
        return means["loss"], (means, batch_stats)

    def step(state, held, rows):
        variables = state.variables
        batch = gather(held, rows["id"], rows["mask"], parts.classes) if held else as_batch(rows, parts.classes)
        keys = example_keys(jax.random.fold_in(root(parts.seed), state.step), batch["id"])
        part_keys = lambda number: fold_in(keys, number)
        for number, augment in enumerate(parts.augments):
            batch = augment(part_keys(number), batch, bind(parts.model, variables))
        differentiate = jax.value_and_grad(loss_of, has_aux=True)
        (_, (means, batch_stats)), gradient = differentiate(
            variables["params"], variables, part_keys(len(parts.augments)), batch, state.step
        )
        updates, optimizer = parts.optimizer.update(gradient, state.optimizer, variables["params"])
        new = {**variables, "params": optax.apply_updates(variables["params"], updates), "batch_stats": batch_stats}
        if parts.ema:
            new["ema"] = _averaged(variables["ema"], new, parts.ema, state.step)
        finite = jnp.stack([_is_finite(tree) for tree in (means["loss"], gradient, new)])
        return State(state.step + 1, new, optimizer), means, finite

    whole = replicated(mesh)
    return jax.jit(step, in_shardings=(whole, whole, split(mesh)), out_shardings=whole, donate_argnums=0)


def fresh(parts: Parts, initial: Variables | None) -> State:
    """The state before the first step: of these variables, or of those that the model draws from the seed."""
    # Copies: a donated state must not hold one buffer twice.
    variables = dict(initial or parts.model.init(root(parts.seed), jnp.zeros((1, *parts.image_shape))))
    if parts.ema:
        variables["ema"] = jax.tree.map(jnp.copy, {key: variables[key] for key in ("params", "batch_stats")})
    return State(jnp.int32(0), variables, parts.optimizer.init(variables["params"]))


def _start(workdir: Path, parts: Parts, mesh: Mesh) -> tuple[State, dict[str, Any]]:
    """Fresh variables from the seed, or the last checkpoint."""
    if checkpoint.latest_step(workdir) is None:
        # Drawing every parameter is a large program that runs once: at LLVM's level 1 it has the same bits, and
        # does not take longer to compile than the training step.
        options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
        begin = jax.jit(partial(fresh, parts), out_shardings=replicated(mesh), compiler_options=options)
        return begin(parts.initial), {
            "step": 0,
            "best": None,
            "stream": None,
            "window": [],
            "seconds": 0.0,
            "cpu_seconds": 0.0,
        }
    described = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
        jax.eval_shape(partial(fresh, parts), None),
    )
    templates = {"variables": described.variables, "optimizer": described.optimizer}
    trees, meta = checkpoint.restore(workdir, "last", templates)
    step = jax.jit(lambda: jnp.int32(meta["step"]), out_shardings=replicated(mesh))()
    return State(step, trees["variables"], trees["optimizer"]), meta


def _best(workdir: Path, best: float | None) -> float | None:
    """The accuracy that the next best checkpoint must exceed: `best`, what the run had reached, or less where that
    checkpoint is lost."""
    if best is None:
        return None
    there = checkpoint.latest_step(workdir, "best") is not None
    here = checkpoint.restore(workdir, "best", {})[1]["best"] if there else None
    if here is not None and here >= best:  # a run that was killed after its best step comes by it again
        return best
    left = "no other one is there" if here is None else f"the one before it has {here:.4g}"
    say(f"the best checkpoint, of validation accuracy {best:.4g}, is lost; {left}: the next better one is kept")
    return here


def _feed(parts: Parts, mesh: Mesh, meta: Mapping[str, Any]) -> tuple[Mapping[str, Array], Iterator[Mapping]]:
    """The resident arrays on the device ({} for a stream), and this process's rows of every batch from the next step
    on."""
    if isinstance(parts.train, Stream):
        if meta["stream"] is not None:
            parts.train.set_state(meta["stream"])
        return {}, parts.train
    held = _placed(parts.train, replicated(mesh))
    share = parts.batch // jax.process_count()
    own = slice(jax.process_index() * share, (jax.process_index() + 1) * share)

    def rows():
        epoch, skip = divmod(meta["step"], max(1, parts.examples // parts.batch))
        for number in itertools.count(epoch):
            for ids in epoch_ids(parts.seed, number, parts.examples, parts.batch)[skip:]:
                yield {"id": ids[own], "mask": np.ones(share, bool)}
            skip = 0

    return held, rows()


def _placed(arrays: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, Array]:
    """This process's part of some arrays, on the devices."""
    if sharding.is_fully_addressable:
        return jax.device_put(dict(arrays), sharding)
    return {name: jax.make_array_from_process_local_data(sharding, values) for name, values in arrays.items()}


def _validation(parts: Parts, mesh: Mesh) -> Callable[[Variables], dict[str, float]] | None:
    """variables -> accuracy and loss on the validation split, of the averaged parameters where there are any."""
    if parts.validation is None:
        return None
    data, evaluator = parts.validation, accuracy()
    if isinstance(data, Mapping):
        data = resident_split(data, classes=parts.classes, batch=parts.batch, mesh=mesh)

    def validate(variables):
        chosen = evaluation_variables(variables)
        measures, _, _ = measure_split(
            parts.model, chosen, data, evaluator, seed=parts.seed, mesh=mesh, text="validation", progress=False
        )
        return {"accuracy": measures["accuracy"].value, "loss": measures["nll"].value}

    return validate


def _mean(values: Array, mask: Array) -> Array:
    """The mean of values (b,) where mask (b,) is True."""
    return jnp.where(mask, values, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def _averaged(old: Variables, new: Variables, decay: float, step: Array) -> dict[str, Any]:
    """old + (1 - d)(new - old) with d = min(decay, (1 + step) / (10 + step)): early on, the random start must not
    linger."""
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    mix = lambda a, b: (a + (1 - d) * (b - a)).astype(a.dtype) if _real(a) else b
    return {key: jax.tree.map(mix, old[key], new[key]) for key in old}


def _real(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _is_finite(tree: Any) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree) if _real(leaf)]).all()
