"""Laws of every attack, the linear model whose answers are known, and what training and evaluation each take from the
state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from tests.laws import (
    CLASSES,
    IMAGES,
    KEYS,
    LABELS,
    OTHERS,
    PARAMS,
    PREDICT,
    SIZE,
    B,
    assert_transformed,
    make,
    message,
    network,
    parameters,
)
from topgap_jax import attacks, balls, evaluators, scores
from topgap_jax.attacks.state import BROKEN, NEVER, RUNNING, State
from topgap_jax.errors import UserError
from topgap_jax.types import Cost

EPS = {"linf": 0.06, "l2": 0.3, "l1": 1.5}
# One instance of every row of the table in every ball it has, and options that change the program.
ROWS = [
    "fgsm(linf({}))",
    "fgsm(l2({}))",
    "fgsm(l1({}))",
    "r_fgsm(linf({}))",
    "r_fgsm(l2({}))",
    "r_fgsm(l1({}))",
    "pgd(linf({}), steps=4)",
    "pgd(l2({}), steps=4)",
    "pgd(linf({}), score=dlr, steps=3, start=None)",
    "pgd(linf({}), score=targeted_dlr, targets=2, steps=3, step_size=.02)",
    "pgd(l1({}), steps=6, step_size=.5)",
    "pgd(linf({}), score=margin, optimizer=adamw(.02, weight_decay=0), steps=3)",
    "mim(linf({}), steps=3)",
    "mim(l2({}), steps=3)",
    "mim(l1({}), steps=3)",
    "apgd(linf({}), steps=6)",
    "apgd(l2({}), score=dlr, steps=5, history='paper', samples=2)",
    "apgd(l1({}), steps=6)",
    "apgd(l1({}), steps=7, larger_radii=True)",
    "apgd_t(linf({}), targets=3, steps=4)",
    "apgd_t(l2({}), targets=3, steps=4, order='malt')",
    "apgd_t(l1({}), targets=3, steps=4)",
    "noise(linf({}), draws=2)",
    "noise(l2({}), draws=2)",
    "noise(l1({}), draws=2)",
    "restarts(pgd(l2({}), steps=2), 2)",
    "bpda(pgd(linf({}), steps=3), guided_backprop)",
    "fab(linf({}), steps=4)",
    "fab(l2({}), steps=4, restarts=2)",
    "fab(l1({}), steps=4)",
    "fab_t(linf({}), steps=4)",
    "fab_t(l2({}), steps=4, order='malt')",
    "fab_t(l1({}), steps=4)",
    "square(linf({}), queries=12)",
    "square(l2({}), queries=60)",
    "square(l1({}), queries=60)",
    "fmn(linf({}), steps=6)",
    "fmn(l2({}), steps=6)",
    "fmn(l1({}), steps=6)",
    "transfer(linf({}), pgd(linf({}), steps=4), 'runs/other')",
    "transfer(l2({}), apgd(l2({}), steps=4), 'runs/other')",
    "transfer(l1({}), apgd(l1({}), steps=4), 'runs/other')",
    "topk_attack(gradient(), linf({}), steps=3, restarts=2, k=6)",
    "topk_attack(cam(), l2({}), steps=3, restarts=1, k=3, start=None)",
    "alignment(linf({}), mean=(.5, .5, .5), std=(.25, .25, .25), steps=3, step_size=.02)",
]
rows = pytest.mark.parametrize("row", ROWS)
ball_of = lambda row: next(ball for ball in EPS if f"{ball}(" in row)
# A few windows drawn at random break nothing where the gradient does.
radius_of = lambda row: EPS[ball_of(row)] * (3 if row.startswith(("square(l2", "square(l1")) else 1)
# Another network, near enough that much of what breaks it breaks the one under attack.
OTHER = network(jax.tree.map(lambda a, b: a + b / 10, PARAMS, parameters(7)))


@functools.cache
def attack_of(row):
    attack = make(row.replace("{}", str(radius_of(row))))
    return attacks.bound(attack, OTHER if attack.source else None)


# All but an attack on the norm, which goes wherever the nearest adversarial example is.
bounded = pytest.mark.parametrize("row", [row for row in ROWS if attack_of(row).aim != "norm"])
random = ("pgd", "apgd", "transfer", "square", "noise", "restarts", "r_fgsm", "topk", "alignment", "bpda")


def steps_of(attack, keys, predict, images, labels, **options):
    """(the states before each step, the last one booked): the attack as a loop that keeps them all."""
    state = attack.init(keys, predict, images, labels, predict(images), **options)
    last, states = lax.scan(lambda state, _: (attack.step(predict, state), state), state, None, length=attack.steps)
    return states, attacks.finish(predict, last) if attack.aim == "label" else last


@functools.cache
def compiled(row):
    """The one program of a row: (params, keys, images, labels, eps (b,)) -> states."""
    run = lambda params, keys, images, labels, eps: steps_of(
        attack_of(row), keys, network(params), images, labels, eps=eps
    )
    return jax.jit(run)


def run(row, keys=KEYS, images=IMAGES, labels=LABELS, eps=None):
    eps = jnp.full(B, radius_of(row), jnp.float32) if eps is None else eps
    return compiled(row)(PARAMS, keys, images, labels, eps)


def numbers(tree):
    """The leaves, keys as the numbers they are."""
    plain = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return [plain(leaf) for leaf in jax.tree.leaves(tree)]


def sizes(ball, delta):
    delta = np.float64(delta).reshape(B, -1)
    return np.linalg.norm(delta, {"linf": np.inf, "l2": 2, "l1": 1}[ball], axis=1)


def test_every_row_and_ball_is_here():
    others = {"worst_of", "autoattack"}  # several attacks
    assert {row.split("(")[0] for row in ROWS} == set(attacks.TABLE) - others
    assert {ball_of(row) for row in ROWS} == set(balls.TABLE)


@rows
def test_inside_the_box(row):
    _, state = run(row)
    for points in (state.images + state.delta, state.best):
        assert float(points.min()) >= 0 and float(points.max()) <= 1


@bounded
def test_inside_the_ball(row):
    _, state = run(row)
    ball = ball_of(row)
    for delta in (state.delta, state.best - IMAGES):
        assert (sizes(ball, delta) <= radius_of(row) + 1e-6).all()
    assert sizes(ball, state.delta).max() > radius_of(row) / 4


@rows
def test_the_state_says_what_happened(row):
    """Every leaf is per example and keeps its type, counts count, nothing that never changes is changed."""
    attack = attack_of(row)
    states, state = run(row)
    assert isinstance(state, State) and all(leaf.shape[0] == B for leaf in jax.tree.leaves(state))
    first = jax.eval_shape(lambda: attack.init(KEYS, PREDICT, IMAGES, LABELS, PREDICT(IMAGES)))
    types = lambda state: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]
    assert types(first) == types(state)
    np.testing.assert_array_equal(state.images, IMAGES)
    np.testing.assert_array_equal(state.labels, LABELS)
    np.testing.assert_allclose(state.clean, PREDICT(IMAGES), atol=1e-5)
    np.testing.assert_array_equal(state.count, attack.steps)
    np.testing.assert_array_equal(state.run, [0] * B)
    assert ((np.asarray(state.target) == NEVER) == ("target" not in row and "_t(" not in row)).all()
    broken = np.asarray(state.status) == BROKEN
    np.testing.assert_array_equal(np.asarray(state.broken_at) == NEVER, ~broken)
    assert (np.asarray(states.score)[1:] >= np.asarray(states.score)[:-1]).all(), "the best score never falls"
    assert (np.asarray(state.score) >= np.asarray(states.score)[-1]).all()
    assert isinstance(attack.cost(PREDICT, IMAGES), Cost) and sum(attack.cost(PREDICT, IMAGES)) >= 1


@pytest.mark.parametrize("row", [row for row in ROWS if attack_of(row).aim == "label"])
def test_the_verdict_is_true(row):
    """Broken: the best point is misclassified. Not broken: the best point is the clean image. Misclassified images
    stay."""
    states, state = run(row)
    broken = np.asarray(state.status) == BROKEN
    assert broken[-2:].all() and (2 < broken.sum() or row.startswith("noise"))
    np.testing.assert_array_equal(attacks.misclassified(PREDICT(state.best), LABELS), broken)
    np.testing.assert_array_equal(state.best[~broken], IMAGES[~broken])
    np.testing.assert_array_equal(state.best[-2:], IMAGES[-2:])
    assert (np.asarray(state.broken_at)[-2:] == 0).all()
    # `best` is the first iterate that breaks, and no later step touches it.
    points = np.concatenate([states.images + states.delta, (state.images + state.delta)[None]])
    for i in np.flatnonzero(broken)[:-2]:
        np.testing.assert_array_equal(state.best[i], points[int(state.broken_at[i]), i])
    # Iterates of an attack on the norm leave the ball; there they break nothing.
    inside = np.stack([sizes(ball_of(row), p - IMAGES) <= radius_of(row) + 1e-6 for p in points])
    wrong = np.stack([attacks.misclassified(PREDICT(p), LABELS) for p in points]) & inside
    if "larger_radii" in row:  # nothing of the first two stages, of 3 + 1 evaluations each, is admissible
        wrong[:8] = False
    first = np.where(wrong.any(0), wrong.argmax(0), NEVER)
    np.testing.assert_array_equal(state.broken_at[:-2], first[:-2])


@bounded
def test_eps_zero_changes_nothing(row):
    _, state = run(row, eps=jnp.zeros(B))
    np.testing.assert_array_equal(state.best, IMAGES)
    assert not np.asarray(state.delta).any()


@rows
def test_each_example_by_itself(row):
    """Example 0 is the same, bit for bit, with any neighbours, their labels and radii; the key decides the rest."""
    _, state = run(row)
    _, again = run(row)
    eps = jnp.full(B, radius_of(row), jnp.float32)
    _, among_others = run(
        row,
        keys=KEYS[::-1].at[0].set(KEYS[0]),
        images=OTHERS.at[0].set(IMAGES[0]),
        labels=LABELS[::-1].at[0].set(LABELS[0]),
        eps=(eps / 3).at[0].set(eps[0]),
    )
    for field in ("delta", "best", "score", "status", "broken_at", "search"):
        for a, b, c in zip(*(numbers(getattr(s, field)) for s in (state, again, among_others))):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(a[0], c[0])
    _, other = run(row, keys=jax.random.split(jax.random.key(9), B))
    moves = row.startswith(random) and "start=None" not in row
    assert np.array_equal(other.delta, state.delta) == (not moves)


TOPK = "topk_attack(cam(), linf(.06), steps=2, restarts=1, k=3)"


@pytest.mark.parametrize("row", ["pgd(linf(.06), steps=2)", pytest.param(TOPK, marks=pytest.mark.slow)])
def test_runs_and_radii_are_arguments(row):
    """`run` numbers restarts, each from keys of its own, the first from the example's; `eps` is per example: one
    program."""
    attack = make(row)
    call = jax.jit(lambda run, eps: steps_of(attack, KEYS, PREDICT, IMAGES, LABELS, run=run, eps=eps)[1])
    number, eps = jnp.arange(B, dtype=jnp.int32) % 2, jnp.linspace(0.01, 0.08, B)
    both, first, second = call(number, eps), call(0 * number, eps), call(0 * number + 1, eps)
    for i in range(B):
        same, other = (first, second) if i % 2 == 0 else (second, first)
        np.testing.assert_array_equal(both.delta[i], same.delta[i])
        assert (both.delta[i] != other.delta[i]).any() or (attack.aim == "map" and i >= B - 2)
    assert (sizes("linf", both.delta) <= np.asarray(eps) + 1e-6).all()
    plain = steps_of(attack, KEYS, PREDICT, IMAGES, LABELS)[1]
    np.testing.assert_allclose(plain.delta, call(0 * number, jnp.full(B, 0.06, jnp.float32)).delta, atol=1e-6)


def test_the_driver_is_the_loop():
    """attacks.attack: of an attack on the label and of one on maps."""
    for row in ("pgd(linf({}), steps=4)", "topk_attack(gradient(), linf({}), steps=3, restarts=2, k=6)"):
        driven = jax.jit(lambda row=row: attacks.attack(attack_of(row), KEYS, PREDICT, IMAGES, LABELS))()
        _, state = run(row)
        np.testing.assert_allclose(driven.delta, state.delta, atol=1e-5)
        np.testing.assert_array_equal(driven.broken_at, state.broken_at)


def test_the_driver_works_through_the_runs():
    """Each example keeps the first run that breaks it: the runs one by one, each from its own keys, give the same."""
    one = make("pgd(linf(.06), steps=2, step_size=.03)")
    several = one._replace(runs=3)
    driven = jax.jit(lambda: attacks.attack(several, KEYS, PREDICT, IMAGES, LABELS))()
    call = jax.jit(lambda run: steps_of(one, KEYS, PREDICT, IMAGES, LABELS, run=run)[1])
    states = [call(jnp.int32(run)) for run in range(3)]
    broken = np.stack([np.asarray(state.status) == BROKEN for state in states])
    first = np.where(broken.any(0), broken.argmax(0), 2)
    assert set(first) > {0}, "some example is broken by the second run or by none"
    np.testing.assert_array_equal(driven.run, first)
    for i in range(B):
        for field in ("status", "broken_at"):
            np.testing.assert_array_equal(getattr(driven, field)[i], getattr(states[first[i]], field)[i])
        for field in ("best", "delta"):
            np.testing.assert_allclose(getattr(driven, field)[i], getattr(states[first[i]], field)[i], atol=1e-6)


ONE = "pgd(linf({}), steps=2)"


@pytest.mark.parametrize("row", [ONE, *(pytest.param(row, marks=pytest.mark.slow) for row in ROWS)])
def test_transformations(row):
    attack = attack_of(row)

    def numbers(keys, images, labels):
        state = attacks.attack(attack, keys, PREDICT, images, labels)
        return state.delta, state.status, state.broken_at

    assert_transformed(numbers, KEYS, IMAGES, LABELS)


def test_pgd_equals_numpy():
    """The update written out, for a score whose gradient is known: the logit margin of a linear model."""
    weights = np.random.default_rng(0).normal(size=(SIZE * SIZE * 3, 2)).astype(np.float32)
    linear = lambda images, keys=None: images.reshape(images.shape[0], -1) @ weights
    labels = jnp.zeros(B, jnp.int32)
    attack = attacks.pgd(balls.l2(0.5), score=scores.margin, steps=3, step_size=0.2)
    state = attack.init(KEYS, linear, IMAGES, labels, linear(IMAGES))
    points = np.asarray(IMAGES + state.delta)
    direction = (weights[:, 1] - weights[:, 0]).reshape(SIZE, SIZE, 3)
    for _ in range(3):
        state = attack.step(linear, state)
        delta = points + 0.2 * direction / np.linalg.norm(direction) - IMAGES
        delta = delta * np.minimum(1, 0.5 / np.sqrt((delta**2).sum((1, 2, 3))))[:, None, None, None]
        points = np.clip(IMAGES + delta, 0, 1)
        np.testing.assert_allclose(state.images + state.delta, points, atol=1e-6)


@pytest.mark.parametrize("row", ["r_fgsm(linf({}))", "r_fgsm(l2({}))"])
def test_r_fgsm_is_two_half_steps(row):
    """A random one that keys decide, and one along the gradient there."""
    attack, eps = attack_of(row), EPS[ball_of(row)]
    state = attack.init(KEYS, PREDICT, IMAGES, LABELS, PREDICT(IMAGES))
    points = state.images + state.delta
    inside = (np.asarray(IMAGES) > eps) & (np.asarray(IMAGES) < 1 - eps)  # elsewhere the box may cut
    if "linf" in row:
        np.testing.assert_allclose(np.abs(state.delta)[inside], eps / 2, atol=1e-6)
        assert 0.3 < (np.asarray(state.delta)[inside] > 0).mean() < 0.7
    gradient = jax.grad(lambda points: scores.cross_entropy(PREDICT(points), LABELS).sum())(points)
    if "linf" in row:
        way = np.sign(gradient)
    else:
        way = gradient / np.sqrt((np.square(gradient)).sum((1, 2, 3), keepdims=True))
    after = attack.step(PREDICT, state)
    expected = np.clip(points + eps / 2 * way, 0, 1) - IMAGES
    np.testing.assert_allclose(after.delta, expected, atol=1e-5)


def test_a_start_at_the_clean_image():
    for row in ("pgd(linf(.06), start=None)", "topk_attack(cam(), linf(.06), start=None)"):
        state = make(row).init(KEYS, PREDICT, IMAGES, LABELS, PREDICT(IMAGES))
        assert not np.asarray(state.delta).any()


def linear_model(images, keys=None):
    """attacks 15: z = (0, w . x + b), w = (3, -4, 12), b = -1; the label is 1."""
    score = images.reshape(images.shape[0], 3) @ jnp.array([3.0, -4, 12]) - 1
    return jnp.stack([jnp.zeros_like(score), score], -1)


CORNER, MIDDLE = (0.9, 0.05, 0.2), (0.5, 0.5, 0.5)


@functools.cache
def on_linear(name, ball):
    """(image, eps) -> the final state on the linear model, one program for all radii."""
    attack = attacks.TABLE[name](balls.TABLE[ball](0.1))
    options = lambda image, eps: (KEYS[:1], linear_model, image.reshape(1, 1, 1, 3), jnp.array([1]))
    return jax.jit(lambda image, eps: steps_of(attack, *options(image, eps), eps=eps)[1])


def test_worked_fgsm():
    """attacks 15.9."""
    state = on_linear("fgsm", "linf")(jnp.array(CORNER), jnp.array([0.1]))
    np.testing.assert_allclose((state.images + state.delta).ravel(), [0.8, 0.15, 0.1], atol=1e-6)
    assert float(linear_model(state.images + state.delta)[0, 1]) == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize(
    "ball, image, survives, breaks, worst",
    [
        # 15.2: the box bends the ball
        ("linf", CORNER, 0.2142, 0.2144, {0.1: 2.0, 0.2: 0.1, 0.2142: 0.0006, 0.2144: -0.0008}),
        ("linf", MIDDLE, 0.2368, 0.2369, {0.1: 2.6}),  # 15.1: 9/38
        ("l2", MIDDLE, 0.346, 0.35, {0.1: 3.2}),  # 15.1: 4.5/13 = .34615; a random start converges to the direction
    ],
)
@pytest.mark.parametrize("name", ["fgsm", "pgd", "apgd"])  # half of r_fgsm's way is random
def test_a_linear_model_is_robust_up_to_where_it_is(name, ball, image, survives, breaks, worst):
    attacked = lambda eps: on_linear(name, ball)(jnp.array(image), jnp.array([eps]))
    assert int(attacked(survives).status[0]) != BROKEN
    assert int(attacked(breaks).status[0]) == BROKEN
    for eps, value in worst.items():
        state = attacked(eps)
        assert float(linear_model(state.images + state.delta)[0, 1]) == pytest.approx(
            value, abs=2e-5 if ball == "linf" else 5e-3
        )


def test_nan_logits_count_as_broken():
    logits = jnp.array([[0.0, jnp.nan], [1, 0], [1, 1], [0, 1]])
    np.testing.assert_array_equal(attacks.misclassified(logits, jnp.zeros(4, int)), [1, 0, 0, 1])


def test_an_iterate_that_is_not_admissible_is_not_booked():
    state = attacks.state.start(KEYS, IMAGES, LABELS, PREDICT(IMAGES), eps=0.1)
    wrong = jax.nn.one_hot((LABELS + 1) % CLASSES, CLASSES)
    inside = jnp.arange(B) % 2 == 0
    after = attacks.state.book(state, jnp.full(B, 3.0), wrong, inside)
    np.testing.assert_array_equal(after.status[:-2], jnp.where(inside, BROKEN, RUNNING)[:-2])
    np.testing.assert_array_equal(after.score[:-2], jnp.where(inside, 3.0, -jnp.inf)[:-2])


def test_runs():
    first, second = attacks.fgsm(balls.linf(0.1)), attacks.pgd(balls.linf(0.1))
    assert attacks.as_runs(first) == (first,)
    assert attacks.as_runs((first, (second, (first,)))) == (first, second, first)


def test_compositions():
    """worst_of is its attacks in turn; restarts are runs, each from a start of its own, of what has none yet."""
    first, second = attacks.fgsm(balls.linf(0.1)), attacks.pgd(balls.linf(0.1))
    assert attacks.worst_of(first, (second, attacks.worst_of(first))) == (first, second, first)
    assert attacks.restarts(second, 3) == second._replace(runs=3, name=f"{second.name}, 3 restarts")
    assert attacks.restarts(first, 1) == first
    once = make("restarts(pgd(linf(.06), score=targeted_margin, targets=1), 2)")
    states = [once.init(KEYS, PREDICT, IMAGES, LABELS, PREDICT(IMAGES), run=run) for run in (0, 1)]
    np.testing.assert_array_equal(states[0].target, states[1].target)
    assert (states[0].delta != states[1].delta).any((1, 2, 3)).all()


@pytest.mark.parametrize(
    "text, names, runs",
    [
        ("linf(.1)", "apgd-100 | apgd-t-100 x 9 | fab-t-100 x 9 | square-5000", [1, 9, 9, 1]),
        ("l2(.1)", "apgd-100 | apgd-t-100 x 9 | fab-t-100 x 9 | square-5000", [1, 9, 9, 1]),
        ("l1(.1)", "apgd-100 | apgd-t-100 x 5 | fab-t-100 x 9 | square-5000", [5, 5, 9, 1]),
        (
            "linf(.1), version='plus'",
            "apgd-100 | apgd-100 on dlr | fab-100 | square-5000 | apgd-t-100 x 9 | fab-t-100 x 9",
            [5, 5, 5, 1, 9, 9],
        ),
        ("linf(.1), version='rand'", "apgd-100 | apgd-100 on dlr", [1, 1]),
    ],
)
def test_autoattack_is_its_parts(text, names, runs):
    """attacks 8; in l1 the first two have larger radii, two more calls for 100 steps."""
    parts = make(f"autoattack({text})")
    assert " | ".join(part.name.split(", ")[0] for part in parts) == names
    assert [part.runs for part in parts] == runs
    assert [part.samples for part in parts] == [20 if "rand" in text else None] * len(parts)
    assert [part.steps for part in parts][:2] == [102 if "l1" in text else 100] * 2


def test_noise_tries_points_and_corners_in_turn():
    attack = make("noise(linf(.06), draws=3)")
    states, last = steps_of(attack, KEYS, PREDICT, jnp.full_like(IMAGES, 0.5), LABELS)
    deltas = np.concatenate([states.delta, last.delta[None]])
    assert deltas.shape[0] == 6 and len(np.unique(deltas[:, 0], axis=0)) == 6
    np.testing.assert_allclose(np.abs(deltas[1::2]), 0.06, atol=1e-6)
    assert 0.02 < np.abs(deltas[::2]).mean() < 0.04
    assert attack.cost(PREDICT, IMAGES) == Cost(1, 0)
    _, far = steps_of(attack, KEYS, PREDICT, IMAGES, LABELS, eps=jnp.full(B, 1.0))
    assert (np.asarray(far.status)[:-2] == BROKEN).any()


def test_transfer_follows_the_source_and_asks_the_target():
    """The iterates are those of the attack on the source, targets by its logits; the first that the other network
    misclassifies breaks, if it lies in the ball."""
    source, other = network(parameters(7)), LABELS.at[-2:].set(PREDICT(IMAGES)[-2:].argmax(-1))
    ball = balls.linf(0.2)
    attack = make("apgd_t(linf(.2), targets=2, steps=5)")
    both = attacks.transfer(ball, attack, source)
    assert (both.runs, both.steps) == (2, 5) and both.cost(PREDICT, IMAGES) == Cost(1, 1)
    states, last = jax.jit(lambda: steps_of(both, KEYS, PREDICT, IMAGES, other))()
    alone, end = jax.jit(lambda: steps_of(attack, KEYS, source, IMAGES, other))()
    points = np.concatenate([states.delta, last.delta[None]])
    np.testing.assert_allclose(points, np.concatenate([alone.delta, end.delta[None]]), atol=1e-6)
    np.testing.assert_array_equal(last.target, end.target)
    wrong = np.stack([attacks.misclassified(PREDICT(IMAGES + delta), other) for delta in points])
    np.testing.assert_array_equal(last.broken_at, np.where(wrong.any(0), wrong.argmax(0), NEVER))
    assert 0 < wrong.any(0).sum()
    small, _ = steps_of(both, KEYS, PREDICT, IMAGES, other, eps=jnp.zeros(B))
    assert not np.asarray(small.delta).any() and (np.asarray(small.status) == RUNNING).all()


def test_a_transfer_stays_in_its_ball():
    """At any radius, though images + delta are rounded; also what another attack makes of it outside; one norm."""
    # From the network itself the first iterate that breaks it breaks. Where it has half a chance: a last step decides.
    images, cube, ball = 0.1 + 0.8 * IMAGES, balls.linf(0.5 / 255), balls.l2(0.3)
    scaled = lambda images, keys=None: PREDICT(images) - 0.999 * PREDICT(IMAGES * 0.8 + 0.1)
    labels, attack = scaled(images).argmax(-1), attacks.pgd(cube, steps=3)
    far = attacks.transfer(ball, attacks.fab_t(ball, steps=4), PREDICT)

    @jax.jit
    def run_all():
        both = attacks.transfer(cube, attack, scaled)
        ends = [steps_of(one, KEYS, scaled, images, labels)[1].broken_at for one in (attack, both)]
        return ends, steps_of(far, KEYS, PREDICT, IMAGES, LABELS)

    (alone, same), (states, last) = run_all()
    np.testing.assert_array_equal(same, alone)
    assert (alone >= 0).any()
    assert max(sizes("l2", delta).max() for delta in (*states.delta, last.delta)) <= 0.3 + 1e-6
    assert attacks.transfer(ball, attacks.pgd(balls.l2(9), steps=2), PREDICT).name == "transfer of pgd-2, l2(0.3)"
    text = "transfer(l2(0.3), ...): 'pgd-20, linf(0.1)' moves in linf; give one in l2"
    assert message(lambda: attacks.transfer(ball, make("pgd(linf(.1))"), PREDICT)) == text


@pytest.mark.parametrize(
    "row", ["fgsm(linf({}))", "pgd(l2({}), steps=2)", "apgd(l1({}), steps=3)", "fab_t(l2({}), steps=2)"]
)
def test_a_gradient_that_is_nan_is_no_step(row):
    """A NaN of the gradient is no NaN of the image, which would be misclassified whatever the network is."""
    nowhere = lambda x: jnp.where(x > 5, jnp.sqrt(x - 5), x)  # finite where images are, its gradient is NaN
    predict = lambda images, keys=None: PREDICT(nowhere(images))
    assert jnp.isnan(jax.grad(lambda images: predict(images).sum())(IMAGES)).all()
    _, state = jax.jit(lambda: steps_of(make(row.replace("{}", "1e-6")), KEYS, predict, IMAGES, LABELS))()
    assert jnp.isfinite(state.delta).all() and jnp.isfinite(state.best).all()
    np.testing.assert_array_equal(np.asarray(state.status) == BROKEN, np.arange(B) >= B - 2)


def test_restarts_of_fab_start_elsewhere():
    for ball in ("linf", "l2", "l1"):
        attack = make(f"restarts(fab({ball}(.5)), 3)")
        starts = [attack.init(KEYS, PREDICT, IMAGES, LABELS, PREDICT(IMAGES), run=run).delta for run in range(3)]
        assert not starts[0].any() and (starts[1] != starts[2]).any((1, 2, 3)).all()
        assert (sizes(ball, starts[1]) <= 0.25 + 1e-6).all() and sizes(ball, starts[1]).max() > 0.1
    assert (starts[1] != 0).mean() > 0.9, "in l1 too each entry is drawn"


def test_an_update_that_is_too_large_to_square_moves():
    attack = attacks.pgd(balls.l2(0.3), optimizer=optax.sgd(1e22), steps=2)
    states, _ = steps_of(attack, KEYS, PREDICT, IMAGES, LABELS)
    assert sizes("l2", states.delta[1]).max() > 0.2


def test_a_network_in_float64_is_attacked_in_float32():
    double = lambda images, keys=None: PREDICT(images).astype(jnp.float64)
    own = lambda logits, labels, clean, target=None: -logits[:, 0]
    ball = balls.l2(0.5)
    with jax.enable_x64(True):
        for attack in (attacks.pgd(ball, steps=2, score=own), *attacks.autoattack(ball), attacks.fmn(balls.l1(1))):
            run = lambda images, attack=attack: attacks.attack(attack, KEYS, double, images, LABELS)
            assert jax.eval_shape(run, np.asarray(IMAGES, np.float64)).best.dtype == jnp.float32


NO_GRADIENT = "score=kl has no gradient at the clean image: give pgd(ball, score=kl), which starts at random"


@pytest.mark.parametrize(
    "text, name",
    [
        ("pgd(linf(8/255), steps=5)", "pgd-5, linf(8/255)"),
        ("pgd(linf(8/255), restarts=10)", "pgd-20, linf(8/255), 10 restarts"),
        ("restarts(pgd(linf(8/255)), 10)", "pgd-20, linf(8/255), 10 restarts"),
        ("pgd(linf(.1), samples=4, restarts=10)", "pgd-20, linf(0.1), samples=4, 10 restarts"),
        ("restarts(pgd(linf(.1), samples=4), 10)", "pgd-20, linf(0.1), samples=4, 10 restarts"),
        ("pgd(l2(1), score=margin, start=None, step_size=.1)", "pgd-20 on margin, l2(1), start=None, step_size=0.1"),
        ("pgd(linf(.1), score=targeted_margin, targets=3)", "pgd-20 on targeted_margin, linf(0.1), targets=3"),
        ("fgsm(linf(.1), score=margin, samples=4)", "fgsm on margin, linf(0.1), samples=4"),
        ("apgd(l1(12), larger_radii=True, rho=0.0)", "apgd-100, l1(12), larger_radii, rho=0"),
        ("apgd_t(linf(.1), order='malt', rho=.5)", "apgd-t-100 x 9 by malt, linf(0.1), rho=0.5"),
        ("square(linf(.1), queries=9, p_init=.3)", "square-9, linf(0.1), p_init=0.3"),
        ("fab(linf(.1), restarts=1)", "fab-100, linf(0.1)"),
    ],
)
def test_a_name_says_what_is_not_the_default(text, name):
    assert make(text).name == name


def test_a_name_of_an_attack_on_an_object_is_the_same_every_time():
    score = functools.partial(scores.margin)
    assert attacks.fgsm(balls.linf(0.1), score=score).name == "fgsm on partial, linf(0.1)"
    assert attacks.pgd(balls.linf(0.1), optimizer=optax.sgd(0.1)).name == "pgd-20, linf(0.1), optimizer"


def attacked(images=IMAGES, labels=LABELS, keys=KEYS, attack="fgsm(linf(.1))", predict=PREDICT):
    return attacks.attack(make(attack), keys, predict, images, labels)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: make("pgd(linf(.1), steps=0)"), "pgd: steps must be a whole number of at least 1, got 0"),
        (lambda: make("pgd(linf(.1), step_size=-1)"), "pgd: step_size must be a number in [0, 1e+06], got -1"),
        (lambda: make("pgd(linf(.1), start='x')"), "pgd: start must be 'random' or None (the clean image), got 'x'"),
        (
            lambda: make("restarts(apgd_t(linf(.1)), 5)"),
            "restarts: 'apgd-t-100 x 9, linf(0.1)' has 9 runs already; give it its own option restarts=5",
        ),
        (
            lambda: attacks.restarts(attacks.worst_of(), 5),
            "give one attack such as pgd(linf(8/255)), got ()",
        ),
        (
            lambda: attacks.restarts(attacks.worst_of(make("fgsm(l2(1))"), make("fgsm(linf(.1))")), 5),
            "give one attack such as pgd(linf(8/255)), got (Attack(fgsm, l2(1)), Attack(fgsm, linf(0.1)))",
        ),
        *(
            (lambda method=method: method(0.5), "give a ball such as linf(8/255), got 0.5")
            for method in (
                *(attacks.fgsm, attacks.r_fgsm, attacks.pgd, attacks.mim, attacks.apgd, attacks.apgd_t, attacks.fab),
                *(attacks.fab_t, attacks.square, attacks.fmn, attacks.noise, attacks.autoattack, evaluators.audit),
            )
        ),
        *(
            (
                lambda method=method: method(balls.linf(0.1), score="margin"),
                "score must be a function such as scores.margin, got 'margin'",
            )
            for method in (attacks.fgsm, attacks.r_fgsm, attacks.pgd, attacks.mim, attacks.apgd)
        ),
        (
            lambda: make("apgd(linf(.1), score=logit)"),
            "apgd: score=logit is high where the label is predicted, and an attack raises its score; give one such as"
            " cross_entropy, margin or dlr",
        ),
        *(
            (lambda row=row: make(row), f"{row.partition('(')[0]}: {NO_GRADIENT}")
            for row in ("fgsm(linf(.1), score=kl)", "mim(l2(.1), score=kl)", "pgd(l1(1), score=kl, start=None)")
        ),
        (
            lambda: attacks.pgd(balls.linf(0.1), targets=3),
            "targets=3 are for a score that aims at them, such as targeted_margin; cross_entropy does not",
        ),
        (
            lambda: make("autoattack(linf(.1), version='fast')"),
            "autoattack: version must be one of standard, plus, rand, got 'fast'",
        ),
        (lambda: make("apgd_t(linf(.1), order='x')"), "apgd_t: order must be 'logits' or 'malt', got 'x'"),
        (lambda: make("noise(linf(.1), draws=0)"), "noise: draws must be a whole number of at least 1, got 0"),
        (lambda: attacks.as_runs(3), "expected attacks like pgd(linf(8/255)), got 3"),
        (lambda: attacks.as_runs(balls.l2(1)), "expected attacks like pgd(linf(8/255)), got Ball(l2(1))"),
        (
            lambda: attacks.attack((), KEYS, PREDICT, IMAGES, LABELS),
            "attack: give one attack such as pgd(linf(8/255)), got ()",
        ),
        (
            lambda: attacked(attack="pgd(linf(.1), score=targeted_dlr)"),
            "a targeted score needs target classes: score(logits, labels, clean, target), or an attack's targets=9",
        ),
        (
            lambda: attacked(images=2 * IMAGES - 1),
            (
                "attack: images must be float in [0, 1], these are float32 from -0.9996 to 0.999; give (images + 1) /"
                " 2; normalisation belongs inside the model"
            ),
        ),
        (
            lambda: attacked(images=(255 * IMAGES).astype(jnp.uint8)),
            (
                "attack: images must be float in [0, 1], these are uint8 from 0 to 254; give images / 255; "
                "normalisation belongs inside the model"
            ),
        ),
        (
            lambda: attacked(images=IMAGES[0]),
            (
                "attack: images must be an array (b, h, w, c) of at least one image, got an array of shape (6, 6, 3)"
                " and type float32; images[None] is a batch of one"
            ),
        ),
        (lambda: attacked(labels=LABELS.at[3].set(99)), "attack: label 99 is no class of a network with 4 logits"),
        (lambda: attacked(labels=LABELS.at[3].set(-1)), "attack: label -1 is no class of a network with 4 logits"),
        *(
            (
                lambda of=of, attack=attack: attacked(attack=attack, predict=lambda images: of(PREDICT(images))),
                f"attack: {text}",
            )
            for attack in ("fgsm(linf(.1))", "fmn(linf(.1))")
            for of, text in (
                (jax.nn.softmax, "the network returns probabilities, attacks need logits: leave out the softmax"),
                (
                    lambda z: z.at[3, 1].set(jnp.nan),
                    "the logits of 1 of 8 images, first of image 3, are not finite: nothing that is measured of them means anything",
                ),
            )
        ),
        (
            lambda: attacked(labels=3),
            "attack: labels must be an int array (8,), one class for each image, got an int",
        ),
        (
            lambda: attacked(labels=LABELS.astype(jnp.float32)),
            (
                "attack: labels must be an int array (8,), one class for each image, got an array of shape (8,) and"
                " type float32"
            ),
        ),
        (
            lambda: attacked(keys=None),
            "attack: keys are needed, one for each image: jax.random.split(jax.random.key(0), len(images))",
        ),
        (
            lambda: attacked(keys=KEYS[0]),
            (
                "attack: keys must be 8 typed keys, one for each image, got an array of shape () and type key<fry>; "
                "jax.random.split(jax.random.key(0), 8) gives them"
            ),
        ),
    ],
)
def test_mistakes(call, text):
    with pytest.raises(UserError) as raised:
        call()
    assert str(raised.value) == text
