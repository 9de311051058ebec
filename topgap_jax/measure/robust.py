"""`attack_split`: the runs of a `Robustness` over a split, each on the examples that are still unbroken.

One jitted attack step at a time is called from here, and a batch is left as soon as all its examples are broken. The
verdict is a forward pass on the adversarial images, made after the attack. Verdicts of a split do not depend on its
order.
"""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from topgap_jax.attacks import finish, misclassified
from topgap_jax.attacks.state import RUNNING
from topgap_jax.keys import example_keys
from topgap_jax.measure.costs import cost_of
from topgap_jax.measure.splits import Split
from topgap_jax.measure.verdicts import Log
from topgap_jax.mesh import replicated, split
from topgap_jax.metrics.summaries import share
from topgap_jax.models import bind
from topgap_jax.progress import bar
from topgap_jax.rewrite import fused
from topgap_jax.types import Attack, Cost, Curve, Measure, Model, Robustness, Variables

FRAGILE = 1e-4  # of the logits' range: a margin below this may change its sign with the batch width or the device


class Functions(NamedTuple):
    """The jitted parts of one attack on one model."""

    logits: Any  # variables, images -> (b, k), readable by every process
    start: Any  # key, variables, batch, clean logits -> state
    step: Any  # variables, state, mask -> state, whether any example is unbroken
    book: Any  # variables, state -> state with the last iterate booked
    facts: Any  # state -> status, steps (b,), readable by every process


def attack_split(
    model: Model,
    variables: Variables,
    data: Split,
    robustness: Robustness,
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
    text: str = "robust",
    progress: bool | None = None,
    log: Log | None = None,
) -> tuple[dict[str, Measure | Curve], Cost, float]:
    """(summary, cost per image of the split, seconds without compilation).

    Examples that are misclassified when clean are broken and never attacked. `robust_accuracy` is the share that no run
    breaks, with Wilson's 95 % interval; `unconfirmed` counts attacks that met a misclassified iterate which the forward
    pass afterwards does not confirm: those stand as unbroken. `fragile` counts verdicts that floating point might
    change. What a `log` holds is not attacked again.
    """
    logits, labels, seconds = _clean(model, variables, data, mesh, f"{text}: clean", progress)
    n = len(labels)
    broken, fragile = _verdicts(logits, labels)
    right, attacked, shares, entries = ~broken, int((~broken).sum()), [1 - broken.mean()], []
    log = log or Log(None, {})
    for number, attack in enumerate(robustness.runs):
        alive = np.flatnonzero(~broken).astype(np.int32)
        if not len(alive):
            break
        done = [entry for entry in log.entries if entry["run"] == number]
        left = np.setdiff1d(alive, [index for entry in done for index in entry["ids"]])
        parts, key = _functions(attack, model, mesh), jax.random.fold_in(jax.random.key(seed), number)
        with bar(len(alive), f"{text}: {attack.name}", enabled=progress, done=len(alive) - len(left)) as shown:
            for entry in _run(parts, attack, model, key, variables, data.batches(left), logits, labels, mesh):
                done.append({"run": number, **entry})
                log.append(done[-1])
                shown.update(len(entry["ids"]))
        for entry in done:
            broken[entry["broken"]] = True
            fragile[entry["ids"]] = np.isin(entry["ids"], entry["fragile"])
        entries += done
        shares.append(1 - broken.mean())
    total = lambda name: sum(entry[name] for entry in entries)
    names = ", ".join(attack.name for attack in robustness.runs)
    detail = lambda value, label, unit="": Measure(value, n=n, label=label, unit=unit, main=False)
    measures = {
        "robust_accuracy": share(~broken, Measure(better="higher", label=f"accuracy under {names}")),
        "clean_accuracy": share(right, Measure(better="higher", label="clean accuracy", main=False)),
        "attacked": detail(attacked, "images attacked"),
        "mean_steps": detail(total("steps") / max(attacked, 1), "steps until the break", "steps"),
        "unconfirmed": detail(total("unconfirmed"), "breaks that a forward pass did not confirm"),
        "fragile": detail(int(fragile.sum()), "verdicts that floating point might change"),
        "after_runs": Curve(
            list(range(len(shares))), [float(y) for y in shares], ("runs done", "accuracy"), "accuracy by run"
        ),
    }
    log.remove()
    return measures, Cost(1 + total("forwards") / n, total("gradients") / n), seconds + total("seconds")


def _run(parts, attack, model, key, variables, batches, logits, labels, mesh):
    """One entry per batch: what became of its examples, and what that cost."""
    start = None
    for ids, batch in batches:
        state = parts.start(key, variables, batch, _placed(logits, ids, batch, mesh))
        if start is None:
            cost = cost_of(attack.cost, model, variables, batch["image"])
            _compile(parts, variables, state, batch["mask"])
            start = time.perf_counter()
        state, count, booked = _attack(parts, attack, variables, state, batch["mask"])
        after = jax.device_get(parts.logits(variables, state.best))[: len(ids)]
        status, steps = (value[: len(ids)] for value in jax.device_get(parts.facts(state)))
        broken, fragile = _verdicts(after, labels[ids])
        now = time.perf_counter()
        yield {
            "ids": ids.tolist(),
            "broken": ids[broken].tolist(),
            "fragile": ids[fragile].tolist(),
            "unconfirmed": int(((status != RUNNING) & ~broken).sum()),
            "steps": int(steps.sum()),
            "forwards": len(ids) * (count * cost.forwards + booked + 1),
            "gradients": len(ids) * count * cost.gradients,
            "seconds": now - start,
        }
        start = now


def _clean(model, variables, data, mesh, text, progress):
    """Logits (n, k) and labels (n,) of the split, by row, and the seconds."""
    predict, start, parts = clean_logits(model, mesh), 0.0, []
    with bar(data.examples, text, enabled=progress) as shown:
        for ids, batch in data.batches(None):
            if not parts:
                predict.lower(variables, batch["image"]).compile()
                start = time.perf_counter()
            values = jax.device_get((predict(variables, batch["image"]), _whole(mesh)(batch["label"])))
            parts.append((ids, *(value[: len(ids)] for value in values)))
            shown.update(len(ids))
    ids, logits, labels = (np.concatenate(column) for column in zip(*parts))
    order = np.argsort(ids)
    return logits[order], labels[order], time.perf_counter() - start


def _attack(parts, attack, variables, state, mask):
    """(state, steps made, forward passes for booking) of one batch."""
    for count in range(1, attack.steps + 1):
        state, running = parts.step(variables, state, mask)
        if not running:
            return state, count, 0
    return parts.book(variables, state), attack.steps, 1


def _compile(parts, variables, state, mask):
    parts.logits.lower(variables, state.best).compile()
    parts.step.lower(variables, state, mask).compile()
    parts.book.lower(variables, state).compile()
    parts.facts(state)


@functools.lru_cache(maxsize=32)
def _functions(attack: Attack, model: Model, mesh: Mesh | None) -> Functions:
    @fused
    def start(key, variables, batch, logits):
        return attack.init(
            example_keys(key, batch["id"]), bind(model, variables), batch["image"], batch["label"], logits
        )

    @fused
    def step(variables, state, mask):
        state = attack.step(bind(model, variables), state)
        return state, ((state.status == RUNNING) & mask).any()

    @fused
    def book(variables, state):
        return finish(bind(model, variables), state)

    facts = lambda state: (state.status, jnp.where(state.status == RUNNING, state.count, state.broken_at))
    if mesh is None:
        return Functions(clean_logits(model, None), jax.jit(start), jax.jit(step), jax.jit(book), jax.jit(facts))
    whole, rows = replicated(mesh), split(mesh)
    return Functions(
        clean_logits(model, mesh),
        jax.jit(start, in_shardings=(None, whole, rows, rows), out_shardings=rows),
        jax.jit(step, in_shardings=(whole, rows, rows), out_shardings=(rows, whole)),
        jax.jit(book, in_shardings=(whole, rows), out_shardings=rows),
        jax.jit(facts, in_shardings=(rows,), out_shardings=whole),
    )


@functools.lru_cache(maxsize=32)
def clean_logits(model: Model, mesh: Mesh | None):
    """The jitted (variables, images) -> logits (b, k) float32, readable by every process."""
    predict = fused(lambda variables, images: bind(model, variables)(images).astype(jnp.float32))
    if mesh is None:
        return jax.jit(predict)
    return jax.jit(predict, in_shardings=(replicated(mesh), split(mesh)), out_shardings=replicated(mesh))


@functools.lru_cache(maxsize=32)
def _whole(mesh):
    """The identity, with a result that every process can read."""
    return jax.jit(lambda values: values, out_shardings=None if mesh is None else replicated(mesh))


def _verdicts(logits, labels):
    """(broken, fragile), bool (n,) each."""
    broken = np.array(misclassified(jnp.asarray(logits), jnp.asarray(labels)))
    own = np.take_along_axis(logits, labels[:, None], 1)[:, 0]
    others = np.where(np.arange(logits.shape[1]) == labels[:, None], -np.inf, logits).max(1)
    return broken, np.abs(others - own) < FRAGILE * (logits.max(1) - logits.min(1))


def _placed(logits, ids, batch, mesh):
    """The clean logits of a batch, padding included, on the devices."""
    padded = np.pad(logits[ids], ((0, len(batch["mask"]) - len(ids)), (0, 0)))
    if mesh is None:
        return padded
    return jax.make_array_from_callback(padded.shape, split(mesh), lambda index: padded[index])
