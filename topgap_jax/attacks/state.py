"""The one state of every attack, and what every attack does with it: start, evaluate, book, move, finish.

Everything is per example: no number of one depends on its neighbours, which is what lets a queue refill, restarts and
targets share a program (`run`), and a curve over radii compile once (`eps`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from topgap_jax.balls import LARGEST
from topgap_jax.build import check_number
from topgap_jax.edges import check_examples, check_logits, check_outputs, check_predict, check_radii
from topgap_jax.errors import UserError
from topgap_jax.keys import fold_in, split
from topgap_jax.rewrite import fused, speed
from topgap_jax.scores import EXPLAINED, TARGETED, VALUES, class_of_rank, kl
from topgap_jax.types import Array, Attack, Ball, Keys, Predict, Score

RUNNING, BROKEN, FINISHED = 0, 1, 2
NEVER = -1
SAMPLES = 100  # what the keys of a random model's passes are made with; an attack's own draws of a step use less


class State(NamedTuple):
    """What is known of each example. `search` belongs to the attack: a NamedTuple of arrays (b, ...), () where it has
    none."""

    images: Array  # (b, h, w, c), clean
    labels: Array  # (b,)
    clean: Array  # (b, k): the logits of the clean images
    delta: Array  # (b, h, w, c): the iterate is images + delta
    best: Array  # (b, h, w, c): the first iterate that breaks (of an attack on maps the best one), else the clean image
    score: Array  # (b,): highest score that a step has met before the break, the breaking one included
    status: Array  # (b,) int32: RUNNING, BROKEN (misclassified), or FINISHED (without a break, before its steps are)
    broken_at: Array  # (b,) int32: steps taken when it broke, NEVER if it has not
    count: Array  # (b,) int32: steps taken; it runs on after the break
    run: Array  # (b,) int32: which restart and target this is
    target: Array  # (b,) int32: the class that a targeted attack aims at, NEVER if it has none
    eps: Array  # (b,): the radius
    keys: Keys  # (b,)
    search: Any


def start(
    keys: Keys,
    images: Array,
    labels: Array,
    logits: Array,
    *,
    eps: float | Array,
    run: Array | None = None,
) -> State:
    """The state before the first step, at the clean images; what is misclassified there is broken with the clean
    image."""
    # Made like the logits, so that it is split over devices as they are.
    number = jnp.zeros_like(logits[:, 0], jnp.int32)
    wrong = misclassified(logits, labels)
    return State(
        images=images,
        labels=labels,
        clean=logits,
        delta=jnp.zeros_like(images),
        best=images,
        score=jnp.full_like(number, -jnp.inf, jnp.float32),
        status=jnp.where(wrong, BROKEN, RUNNING).astype(jnp.int32),
        broken_at=jnp.where(wrong, 0, NEVER).astype(jnp.int32),
        count=number,
        run=number if run is None else number + run,
        target=number + NEVER,
        eps=number + jnp.asarray(eps, jnp.float32),
        keys=keys,
        search=(),
    )


def aim(state: State, rank: Array, classes: Array | None = None) -> State:
    """The state of a targeted run: at the class with the rank-th largest clean logit among the others, 0 the best.

    classes (b, t): in this order instead. A run whose rank there is no class for is FINISHED.
    """
    if classes is None:
        target, left = class_of_rank(state.clean, state.labels, rank), rank < state.clean.shape[-1] - 1
    else:
        last = classes.shape[1] - 1
        target = jnp.take_along_axis(classes, jnp.minimum(rank, last)[:, None], 1)[:, 0].astype(jnp.int32)
        left = rank <= last
    return state._replace(target=target, status=jnp.where((state.status == RUNNING) & ~left, FINISHED, state.status))


def run_keys(state: State) -> Keys:
    """The keys (b,) of each example's run."""
    return jnp.where(state.run == 0, state.keys, fold_in(state.keys, state.run))


def step_keys(state: State) -> Keys:
    """The keys (b,) that the coming step draws from."""
    return fold_in(run_keys(state), 1 + state.count)


def evaluate(
    predict: Predict, score: Score, state: State, *, targeted: bool = False, samples: int | None = None
) -> tuple[State, Array]:
    """Evaluate the iterate and book it: the state, and the gradient (b, h, w, c) of the score there."""
    values, logits, gradient = score_and_gradient(predict, score, state, targeted=targeted, samples=samples)
    return book(state, values, logits), gradient


def score_and_gradient(
    predict: Predict, score: Score, state: State, *, targeted: bool = False, samples: int | None = None
) -> tuple[Array, Array, Array]:
    """Score (b,), logits (b, k) and the score's gradient (b, h, w, c) at the iterate, 0 where that is NaN: a step never
    leaves the numbers.

    targeted: whether the score is given the state's target classes.
    samples: of a model that draws at random, the means over that many passes, with fresh keys for each example, step
    and pass (expectation over transformations: Athalye et al. 2018, arXiv 1802.00420).
    """

    target = (state.target,) if targeted else ()

    def once(*keys):
        def summed(points):
            logits = predict(points, *keys)
            values = score(logits, state.labels, state.clean, *target)
            return values.sum(), (values, logits)

        (_, (values, logits)), gradient = jax.value_and_grad(summed, has_aux=True)(state.images + state.delta)
        return values.astype(jnp.float32), logits, no_nan(gradient)

    return once() if samples is None else _mean_over(once, state, samples)


def no_nan(gradient: Array) -> Array:
    """The gradient (b, h, w, c) with 0 for NaN."""
    return jnp.where(jnp.isnan(gradient), 0.0, gradient)


def _mean_over(f, state, samples):
    """The mean of f(keys (b,)) over `samples` draws of keys that belong to the state's step."""
    total = speed.sum_over(f, (split(fold_in(step_keys(state), SAMPLES), samples),), state.images)
    return jax.tree.map(lambda x: x / samples, total)


def book(state: State, values: Array, logits: Array, admissible: Array | bool = True) -> State:
    """Keep the first admissible iterate that breaks, and the highest score; outside the ball an iterate is not
    admissible."""
    newly = misclassified(logits, state.labels) & (state.status == RUNNING) & admissible
    return state._replace(
        best=where(newly, state.images + state.delta, state.best),
        score=jnp.where((state.status == RUNNING) & admissible, jnp.maximum(state.score, values), state.score),
        status=jnp.where(newly, BROKEN, state.status),
        broken_at=jnp.where(newly, state.count, state.broken_at),
    )


def move(state: State, delta: Array, search: Any = None) -> State:
    """The next iterate, with what the attack's search remembers where that changes. A broken example moves on too:
    training uses the last iterate, its verdict is already booked."""
    search = state.search if search is None else search
    return state._replace(delta=delta, count=state.count + 1, search=search)


def finish(predict: Predict, state: State, samples: int | None = None) -> State:
    """Evaluate the last iterate and book its verdict: every driver of an attack on the label ends with this forward
    pass, of a model that draws at random (`attack.samples`) with the mean of as many."""
    points = state.images + state.delta
    if samples is None:
        return book(state, state.score, predict(points))
    return book(state, state.score, _mean_over(lambda keys: predict(points, keys), state, samples))


def misclassified(logits: Array, labels: Array) -> Array:
    """Whether the first maximal logit is another class's; NaN logits count as broken. (b, k), (b,) -> (b,) bool."""
    return (jnp.argmax(logits, -1) != labels) | jnp.isnan(logits).any(-1)


def where(rows: Array, a: Array, b: Array) -> Array:
    """a (b, h, w, c) where rows (b,) is True, else b."""
    return jnp.where(rows[:, None, None, None], a, b)


def norms(state: State) -> Array:
    """The size (b,) of the smallest perturbation that an attack on the norm has met; infinity where none broke.

    Such an attack (`aim="norm"`) keeps it in `score`, negated: the smallest norm is the highest score.
    """
    return jnp.where(state.status == BROKEN, -state.score, jnp.inf)


def runs_of(targets: int, restarts: int, samples: int | None) -> int:
    """How many runs an attack has, once its options are checked: at each of its targets `restarts` of them."""
    check_number("targets", targets, 0, whole=True)
    check_number("restarts", restarts, 1, whole=True)
    if samples is not None:
        check_number("samples", samples, 1, whole=True)
    return max(targets, 1) * restarts


def check_ball(ball: Any) -> None:
    """Raise a UserError for what is no ball, such as a radius alone."""
    if not isinstance(ball, Ball):
        raise UserError(f"give a ball such as linf(8/255), got {ball!r}")


def check_step(step_size: Any) -> None:
    """Raise a UserError unless a step is a number at least 0, and not too large for a projection to square."""
    check_number("step_size", step_size, 0, LARGEST)


def check_score(score: Any, targets: int = 0, *, moved: bool = True) -> None:
    """Raise a UserError for a score that is no function, and for one of ours with which the attack would find nothing.

    moved: False where the search begins at the clean image.
    """
    if not callable(score):
        raise UserError(f"score must be a function such as scores.margin, got {score!r}")
    if score in EXPLAINED:
        raise UserError(
            f"score={score.__name__} is high where the label is predicted, and an attack raises its score; give one "
            "such as cross_entropy, margin or dlr"
        )
    if score is kl and not moved:
        raise UserError("score=kl has no gradient at the clean image: give pgd(ball, score=kl), which starts at random")
    if targets and score in VALUES.values() and score not in TARGETED:
        raise UserError(
            f"targets={targets} are for a score that aims at them, such as targeted_margin; {score.__name__} does not"
        )


def single(attack: Any, where: str = "") -> Attack:
    """The attack, if it is one; else a UserError that begins with `where`."""
    if isinstance(attack, Attack):
        return attack
    raise UserError(f"{where}give one attack such as pgd(linf(8/255)), got {attack!r}")


def attack(
    attack: Attack, keys: Keys, predict: Predict, images: Array, labels: Array, *, eps: float | Array | None = None
) -> State:
    """The whole attack on a batch in one call, with a loop over its steps: the driver for notebooks, training and
    evaluators.

    keys (b,), images (b, h, w, c) in [0, 1], attacked in float32, labels (b,); eps: another radius than the attack's
    own, one for all or (b,). `best` holds the adversarial images where `status` is BROKEN; training takes the last
    iterate, images + delta. Of an attack with several runs (restarts, targets) each example keeps the first that breaks
    it, without one the last; of an attack on maps or norms the one with the highest score. Raises UserError for arrays
    that are none of these, and for outputs that are no logits, such as probabilities or NaN; inside `jit` nothing is
    checked. Eager calls compile the loop each time: use `jax.jit`.

    >>> # adversarial = attack(pgd(linf(8 / 255)), jax.random.split(key, b), predict, images, labels).best
    """
    attack = single(attack, "attack: ")
    if attack.source is not None:
        raise UserError(f"attack: give '{attack.name}' its source as a function images -> logits")
    if keys is None:
        raise UserError("attack: keys are needed, one for each image: jax.random.split(jax.random.key(0), len(images))")
    check_examples("attack", keys, predict, images, labels)
    if attack.samples is not None and not isinstance(images, jax.core.Tracer):
        check_logits("attack", check_predict("attack", predict, images, keys), len(images))
    if eps is not None:
        check_radii("attack", eps, len(images), LARGEST)
        eps = jnp.asarray(eps, jnp.float32)
    images = jnp.asarray(images, jnp.float32)  # steps of 1/255 are lost in fewer bits
    predict = speed.fast(predict)
    logits = predict(images)
    if attack.aim != "map":
        check_outputs("attack", logits, labels)
    step = fused(lambda state: attack.step(predict, state))

    def one_run(state):
        state = speed.loop(step, attack.steps, state)
        return finish(predict, state, attack.samples) if attack.aim == "label" else state

    state = attack.init(keys, predict, images, labels, logits, eps=eps)
    if attack.runs == 1:
        return one_run(state)

    def next_run(carry):
        number, best = carry
        state = one_run(attack.init(keys, predict, images, labels, logits, run=number, eps=eps))
        kept = best.status == BROKEN if attack.aim == "label" else best.score >= state.score
        return number + 1, select(kept & (number > 0), best, state)

    # The state before the first run is only one of the right shapes: every run, the first too, is a round of the loop.
    return speed.loop(next_run, attack.runs, (jnp.int32(0), state))[1]


def select(rows: Array, a: Any, b: Any) -> Any:
    """The states' leaves (b, ...) of a where rows (b,) is True, else of b."""
    one = lambda x, y: x if x is y else jnp.where(jnp.expand_dims(rows, range(1, x.ndim)), x, y)
    return jax.tree.map(one, a, b)


def as_runs(runs: Any) -> tuple[Attack, ...]:
    """An attack, or a tuple of attacks and tuples, as one flat tuple."""
    if isinstance(runs, Attack):
        return (runs,)
    if not isinstance(runs, tuple | list) or hasattr(runs, "_fields"):  # a ball is a tuple too
        raise UserError(f"expected attacks like pgd(linf(8/255)), got {runs!r}")
    return tuple(attack for item in runs for attack in as_runs(item))
