"""`work`: the runs of one attack over many examples, by continuous batching.

A batch of live examples stays on the device. It takes a few steps at a time in one program, then the examples that are
broken or finished leave it, and the queue fills their slots; only their status comes to the host. Nothing compiles
twice, and the results of an example depend neither on its slot nor on its neighbours (`papers`: attacks 11).
"""

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from topgap_jax.attacks import bound
from topgap_jax.attacks.state import BROKEN, FINISHED, RUNNING, State, norms, select
from topgap_jax.keys import example_keys, fold_in, split
from topgap_jax.measure.splits import Split
from topgap_jax.measure.verdicts import Over, judge
from topgap_jax.mesh import replicated
from topgap_jax.mesh import split as rows_of
from topgap_jax.models import bind
from topgap_jax.rewrite import fused, speed
from topgap_jax.types import Array, Attack, Model, Variables

LONGEST = 8  # steps in one dispatch
SHARE = 8  # of the slots one in so many may stand empty before a batch is started that is not full
PATIENCE = 32  # dispatches after which runs that are over have their verdict, also where their batch is not full
EMPTY = -1
VERDICT = 2**30  # what the keys of the verdict on a model that draws at random are made with: no step has them


class Functions(NamedTuple):
    """The jitted parts of one attack on one model; b slots."""

    logits: Any  # variables, points -> (b, k), readable by every process
    mean_logits: Any  # key, variables, points, ids (b,) -> the same of a model that draws at random
    start: Any  # key, variables, source, batch, clean logits, run (b,), eps (b,) or None -> state before the first step
    steps: Any  # variables, source, state (donated), n -> state, ((b, 3) status, count, broken_at, and radius (b,))
    fill: Any  # state (donated), other state, index (b,), taken (b,) bool -> state with the other's rows where taken
    retire: Any  # points, state, index, taken -> points with the state's adversarial images where taken
    whole: Any  # points -> the same, readable by every process


def work(
    parts: Functions,
    attack: Attack,
    variables: Variables,
    data: Split,
    key: Array,
    runs: np.ndarray,
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    source: Variables | tuple[()] = (),
    eps: float | None = None,
    points: bool = False,
    mesh: Mesh | None = None,
    watch: Callable[[int, int], None] = lambda done, left: None,
) -> Iterator[tuple[dict[str, Any], np.ndarray | None]]:
    """Yields (entry, their images (m, h, w, c) if `points`, else None) whenever m runs have their verdict.

    runs (n,): of each example of the split the first run to make, `attack.runs` for none. An example has one run at a
    time; the next follows if that did not break it, and runs are made in the order in which they become due. entry:
    what `verdicts.judge` says, with `slot_steps`, the steps of all slots since the last entry, and `seconds`. source:
    the variables of the network that a transfer is from. eps: a radius for all, the attack's own if not given.
    watch(done, left): called now and then with the steps that the batch has taken, and how many more it can.
    """
    runs, due, over = np.array(runs), deque(), []
    names = np.arange(len(labels), dtype=np.int32)  # by which the examples draw: of a part of a split, not their rows
    ready = data.batches(np.flatnonzero(runs < attack.runs).astype(np.int32))
    state = staged = buffer = slots = count = started = None
    ids, position, chunk, slot_steps, dispatches, taken = [], 0, 1, 0, 0, 0

    def next_batch(idle):
        """(ids, their states before the first step) of the runs that come next; None where too few are due."""
        nonlocal ready
        following = next(ready, None)
        if following is None and due and (idle or _many(due, slots)):
            ready = data.batches(np.array(due, np.int32))
            due.clear()
            following = next(ready)
        if following is None:
            return None
        ids, batch = following
        if attack.samples is not None:
            names[ids] = np.asarray(jax.device_get(parts.whole(batch["id"])))[: len(ids)]
        rows = lambda values: _placed(values[ids], batch, mesh)
        radius = None if eps is None else rows(np.full(len(labels), eps, np.float32))
        return ids, parts.start(key, variables, source, batch, rows(logits), rows(runs.astype(np.int32)), radius)

    def verdicts():
        """The entry of all runs that are over; the examples that still stand have their next run due."""
        nonlocal over, slot_steps, dispatches, started
        if attack.samples is None:
            values = parts.logits(variables, buffer)
        else:
            examples = np.pad(names[[run.index for run in over]], (0, len(slots) - len(over)))
            values = parts.mean_logits(key, variables, buffer, examples)
        entry = judge(attack, over, jax.device_get(values), labels)
        for index, broken in zip(entry["ids"], entry["broken"]):
            runs[index] = attack.runs if broken else runs[index] + 1
            if runs[index] < attack.runs:
                due.append(index)
        images = np.asarray(jax.device_get(parts.whole(buffer)))[: len(over)] if points else None
        now = time.perf_counter()
        entry |= {"slot_steps": slot_steps, "seconds": now - started}
        over, slot_steps, dispatches, started = [], 0, 0, now
        return entry, images

    try:
        while True:
            fresh = 0
            while slots is None or (slots == EMPTY).any():
                idle = slots is None or (slots == EMPTY).all()
                if position == len(ids):
                    following = next_batch(idle)
                    if following is None and over and attack.runs > 1 and (idle or _many(over, slots)):
                        yield verdicts()
                        following = next_batch(idle)
                    if following is None:
                        break
                    (ids, staged), position = following, 0
                if slots is None:
                    state, buffer, width = staged, jnp.copy(staged.images), len(staged.status)
                    slots, count = np.full(width, EMPTY), np.zeros(width, int)
                    slots[: len(ids)], position, fresh = ids, len(ids), len(ids)
                    _compile(parts, variables, source, state, buffer)
                    started = time.perf_counter()
                    continue
                free = np.flatnonzero(slots == EMPTY)[: len(ids) - position]
                rows = position + np.arange(len(free))
                state = parts.fill(state, staged, *_moves(width, free, rows))
                slots[free], count[free] = ids[rows], 0
                position, fresh = position + len(free), fresh + len(free)
            if slots is None or (slots == EMPTY).all():
                break
            # Most breaks come in the first steps: a batch with many new examples is looked at again soon.
            chunk = 1 if fresh > width // SHARE else min(2 * chunk, LONGEST)
            steps = max(1, min(chunk, attack.steps - int(count[slots != EMPTY].min())))
            state, facts = parts.steps(variables, source, state, steps)
            slot_steps, dispatches = slot_steps + width * steps, dispatches + 1
            facts, radii = jax.device_get(facts)
            status, count, broken_at = np.array(facts.T)
            done = np.flatnonzero((slots != EMPTY) & ~goes_on(attack, status, count))
            if len(over) + len(done) > width:
                yield verdicts()
            buffer = parts.retire(buffer, state, *_moves(width, len(over) + np.arange(len(done)), done))
            for row in done:
                index = int(slots[row])
                over.append(Over(index, int(runs[index]), *facts[row].tolist(), float(radii[row])))
            slots[done] = EMPTY
            taken += steps
            watch(taken, _at_most(attack, runs, over, slots, count))
            if len(over) == width or (over and dispatches >= PATIENCE):
                yield verdicts()
        if over:
            yield verdicts()
    finally:
        ready.close()


def placed(variables: Variables, mesh: Mesh | None) -> Variables:
    """The variables on every device of the mesh."""
    if mesh is not None and mesh.is_multi_process:  # each process has them on a device, from where none reaches another
        local = lambda leaf: leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf
        variables = jax.tree.map(lambda leaf: np.asarray(local(leaf)), variables)
    return variables if mesh is None else jax.device_put(variables, replicated(mesh))


def goes_on(attack: Attack, status: Any, count: Any) -> Any:
    """Whether a run (b,) takes another step: not once it is broken, save for the smallest norm, or finished, or has
    taken them all."""
    over = status == FINISHED if attack.aim == "norm" else status != RUNNING
    return ~over & (count < attack.steps)


@functools.lru_cache(maxsize=32)
def functions(attack: Attack, model: Model, mesh: Mesh | None) -> Functions:
    """The parts for an attack on a model; kept, so that a second evaluation compiles nothing.

    A transfer's source is without its variables here, which are an argument of the parts.
    """

    def with_source(variables):
        return bound(attack, None if attack.source is None else bind(attack.source.model, variables))

    @fused
    def start(key, variables, source, batch, logits, run, eps):
        keys = example_keys(key, batch["id"])
        predict = bind(model, variables)
        state = with_source(source).init(keys, predict, batch["image"], batch["label"], logits, run=run, eps=eps)
        state = state._replace(status=jnp.where(batch["mask"], state.status, FINISHED))
        # Copies: an input that is passed on, or twice the same array, could not be donated.
        return jax.tree.map(jnp.copy, state)

    @fused
    def steps(variables, source, state, n):
        predict, move = bind(model, variables), with_source(source).step
        step = lambda state: select(goes_on(attack, state.status, state.count), move(predict, state), state)
        state = speed.loop(step, jnp.asarray(n), state)
        radius = norms(state) if attack.aim == "norm" else state.eps
        return state, (jnp.stack([state.status, state.count, state.broken_at], 1), radius)

    def fill(state, other, index, taken):
        return select(taken, jax.tree.map(lambda x: x[index], other), state)

    def retire(points, state, index, taken):
        last = select(state.status == BROKEN, state.best, state.images + state.delta)
        return select(taken, last[index], points)

    @fused
    def mean_logits(key, variables, points, ids):
        predict = bind(model, variables)
        keys = split(fold_in(example_keys(key, ids), VERDICT), attack.samples)
        return speed.sum_over(lambda keys: predict(points, keys), (keys,), points) / attack.samples

    whole = lambda points: points
    if mesh is None:
        # The variables may be committed to a device, and the steps' state with them: the first one must be so too, also
        # where it does not depend on them, or the steps compile twice.
        first = jax.jit(start, keep_unused=True)
        jitted = (first, jax.jit(steps, donate_argnums=2), jax.jit(fill, donate_argnums=0), jax.jit(retire))
        return Functions(clean_logits(model, None), jax.jit(mean_logits), *jitted, jax.jit(whole))
    all_of_it, rows = replicated(mesh), rows_of(mesh)
    options = lambda ins, outs: {"in_shardings": ins, "out_shardings": outs}
    return Functions(
        clean_logits(model, mesh),
        jax.jit(mean_logits, **options((None, all_of_it, rows, all_of_it), all_of_it)),
        jax.jit(start, **options((None, all_of_it, all_of_it, rows, rows, rows, rows), rows)),
        jax.jit(steps, donate_argnums=2, **options((all_of_it, all_of_it, rows, None), (rows, all_of_it))),
        jax.jit(fill, donate_argnums=0, **options((rows, rows, all_of_it, all_of_it), rows)),
        jax.jit(retire, **options((rows, rows, all_of_it, all_of_it), rows)),
        jax.jit(whole, **options((rows,), all_of_it)),
    )


@functools.lru_cache(maxsize=32)
def clean_logits(model: Model, mesh: Mesh | None) -> Any:
    """The jitted (variables, images) -> logits (b, k) float32, readable by every process."""
    predict = fused(lambda variables, images: bind(model, variables)(images).astype(jnp.float32))
    if mesh is None:
        return jax.jit(predict)
    return jax.jit(predict, in_shardings=(replicated(mesh), rows_of(mesh)), out_shardings=replicated(mesh))


def _compile(parts: Functions, variables: Variables, source: Any, state: State, points: Array) -> None:
    moves = _moves(len(points), np.arange(0), np.arange(0))
    parts.logits.lower(variables, points).compile()
    parts.steps.lower(variables, source, state, 1).compile()
    parts.fill.lower(state, state, *moves).compile()
    parts.retire.lower(points, state, *moves).compile()


def _at_most(attack, runs, over, slots, count):
    """How many more steps the batch takes where nothing breaks: Graham's bound for chains of runs on as many slots."""
    chains = (attack.runs - runs) * attack.steps
    chains[slots[slots != EMPTY]] -= count[slots != EMPTY]
    chains[[run.index for run in over]] -= attack.steps
    longest = int(chains.max())
    return longest if (chains > 0).sum() <= len(slots) else longest - (longest - int(chains.sum())) // len(slots)


def _moves(width, places, rows):
    """(index (b,), taken (b,) bool): row `rows[i]` of another array goes to `places[i]`."""
    index, taken = np.zeros(width, np.int32), np.zeros(width, bool)
    index[places], taken[places] = rows, True
    return index, taken


def _many(waiting, slots):
    return len(waiting) >= -(-len(slots) // SHARE)


def _placed(values, batch, mesh):
    """Numbers (m, ...) of the examples of a batch on the devices, padding included."""
    padded = np.pad(values, ((0, len(batch["mask"]) - len(values)), *((0, 0),) * (values.ndim - 1)))
    if mesh is None:
        return padded
    return jax.make_array_from_callback(padded.shape, rows_of(mesh), lambda index: padded[index])
