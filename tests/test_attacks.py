"""Laws of every attack, the linear model whose answers are known, and what training and evaluation each take from the state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from topgap_jax import attacks, balls, scores
from topgap_jax.build import build
from topgap_jax.errors import UserError
from topgap_jax.mesh import data_mesh, split

# One instance of every row of the table in every ball, and one with another score.
ROWS = [
    "fgsm(linf({}))",
    "fgsm(l2({}))",
    "r_fgsm(linf({}))",
    "r_fgsm(l2({}))",
    "pgd(linf({}), steps=4)",
    "pgd(l2({}), steps=4)",
    "pgd(linf({}), score=dlr, steps=4)",
]
EPS = {"linf": 0.06, "l2": 0.3}
B, SHAPE, CLASSES = 8, (4, 4, 3), 5
random = np.random.default_rng(0)
IMAGES = jnp.asarray(random.uniform(size=(B, *SHAPE)), jnp.float32)
FIRST = jnp.asarray(random.normal(size=(48, 16)) / 4, jnp.float32)
LAST = jnp.asarray(random.normal(size=(16, CLASSES)), jnp.float32)
KEYS = jax.random.split(jax.random.key(0), B)


def predict(images, keys=None):
    """A small smooth network."""
    return jnp.tanh((images.reshape(images.shape[0], -1) - 0.5) @ FIRST) @ LAST


# The last two are misclassified from the start.
LABELS = jnp.argmax(predict(IMAGES), -1).at[-2:].add(1) % CLASSES


def make(row, eps=None):
    ball = "linf" if "linf" in row else "l2"
    return build(row.format(EPS[ball] if eps is None else eps), {**attacks.TABLE, **balls.TABLE}, scores.TABLE)


@pytest.fixture(scope="module", params=ROWS)
def run(request):
    """(attack, its result on the batch, the compiled function)."""
    attack = make(request.param)
    compiled = jax.jit(lambda keys, images, labels: attacks.attack(attack, keys, predict, images, labels))
    return attack, compiled(KEYS, IMAGES, LABELS), compiled


def sizes(ball, delta):
    delta = np.float64(delta).reshape(B, -1)
    return np.abs(delta).max(1) if ball == "linf" else np.sqrt((delta**2).sum(1))


def test_every_row_and_ball_is_here():
    """What changes the map and keeps the label has laws of its own: test_attack_on_explanations.py."""
    assert {row.split("(")[0] for row in ROWS} == set(attacks.TABLE) - {"topk_attack"}
    assert {row.split("(")[1] for row in ROWS} == set(balls.TABLE)


def test_inside_ball_and_box(run):
    attack, state, _ = run
    ball = "linf" if "linf" in attack.name else "l2"
    for delta in (state.delta, state.best - IMAGES):
        assert (sizes(ball, delta) <= EPS[ball] + 1e-6).all()
    for points in (state.images + state.delta, state.best):
        assert float(points.min()) >= 0 and float(points.max()) <= 1
    assert sizes(ball, state.delta).max() > EPS[ball] / 2


def test_the_verdict_is_true(run):
    """Broken: the best point is misclassified. Not broken: the best point is the clean image. Misclassified images stay."""
    _, state, _ = run
    broken = np.asarray(state.status) == 1
    assert broken[-2:].all() and 2 < broken.sum()
    np.testing.assert_array_equal(attacks.misclassified(predict(state.best), LABELS), broken)
    np.testing.assert_array_equal(state.best[~broken], IMAGES[~broken])
    np.testing.assert_array_equal(state.best[-2:], IMAGES[-2:])
    np.testing.assert_array_equal(state.images, IMAGES)
    assert (np.asarray(state.steps)[-2:] == 0).all()


def test_the_best_score_never_falls(run):
    attack, final, _ = run
    state = attack.init(KEYS, predict, IMAGES, LABELS, predict(IMAGES))
    assert all(leaf.shape[0] == B for leaf in jax.tree.leaves(state))
    step = jax.jit(lambda state: attack.step(predict, state))
    for _ in range(attack.steps):
        after = step(state)
        assert (after.score >= state.score).all() and (after.status >= state.status).all()
        np.testing.assert_array_equal(after.best[state.status == 1], state.best[state.status == 1])
        # Nothing changes its type, or a loop could not carry the state.
        assert list(map(jax.typeof, jax.tree.leaves(after))) == list(map(jax.typeof, jax.tree.leaves(state)))
        state = after
    np.testing.assert_allclose(attacks.finish(predict, state).score, final.score, atol=1e-5)


def test_eps_zero_changes_nothing(run):
    row = next(row for row in ROWS if make(row).name == run[0].name and ("dlr" not in row))
    state = attacks.attack(make(row, 0), KEYS, predict, IMAGES, LABELS)
    np.testing.assert_array_equal(state.best, IMAGES)
    assert not np.asarray(state.delta).any()
    np.testing.assert_array_equal(state.status, [0] * (B - 2) + [1, 1])


def test_neighbours_and_keys(run):
    """Example 0 is the same, bit for bit, with any neighbours and at any place of a batch of this width; the key decides the rest."""
    attack, state, compiled = run
    again = compiled(KEYS, IMAGES, LABELS)
    noise = compiled(
        KEYS[::-1].at[0].set(KEYS[0]),
        jnp.asarray(random.uniform(size=IMAGES.shape), jnp.float32).at[0].set(IMAGES[0]),
        LABELS,
    )
    for name in ("delta", "best", "score", "status", "steps"):
        np.testing.assert_array_equal(getattr(again, name), getattr(state, name))
        np.testing.assert_array_equal(getattr(noise, name)[0], getattr(state, name)[0])
    other = compiled(jax.random.split(jax.random.key(9), B), IMAGES, LABELS)
    assert np.array_equal(other.delta, state.delta) == attack.name.startswith("fgsm")


def test_jit_equals_eager(run):
    attack, state, _ = run
    eager = attacks.attack(attack, KEYS, predict, IMAGES, LABELS)
    np.testing.assert_allclose(eager.delta, state.delta, atol=1e-5)
    np.testing.assert_allclose(eager.score, state.score, atol=1e-5)
    np.testing.assert_array_equal(eager.status, state.status)


def test_pgd_equals_numpy():
    """The update written out, for a score whose gradient is known: the logit margin of a linear model."""
    weights = random.normal(size=(48, 2)).astype(np.float32)
    linear = lambda images, keys=None: images.reshape(images.shape[0], -1) @ weights
    labels = jnp.zeros(B, jnp.int32)
    attack = attacks.pgd(balls.l2(0.5), score=scores.margin, steps=3, step_size=0.2)
    state = attack.init(KEYS, linear, IMAGES, labels, linear(IMAGES))
    points = np.asarray(IMAGES + state.delta)
    direction = (weights[:, 1] - weights[:, 0]).reshape(SHAPE)
    for _ in range(3):
        state = attack.step(linear, state)
        delta = points + 0.2 * direction / np.linalg.norm(direction) - IMAGES
        delta = delta * np.minimum(1, 0.5 / np.sqrt((delta**2).sum((1, 2, 3))))[:, None, None, None]
        points = np.clip(IMAGES + delta, 0, 1)
        np.testing.assert_allclose(state.images + state.delta, points, atol=1e-6)


@pytest.mark.parametrize("row", ["r_fgsm(linf({}))", "r_fgsm(l2({}))"])
def test_r_fgsm_is_two_half_steps(row):
    """A random one that keys decide, and one along the gradient there."""
    attack, eps = make(row), EPS["linf" if "linf" in row else "l2"]
    state = attack.init(KEYS, predict, IMAGES, LABELS, predict(IMAGES))
    points = state.images + state.delta
    inside = (np.asarray(IMAGES) > eps) & (np.asarray(IMAGES) < 1 - eps)  # elsewhere the box may cut
    if "linf" in row:
        np.testing.assert_allclose(np.abs(state.delta)[inside], eps / 2, atol=1e-6)
        assert 0.3 < (np.asarray(state.delta)[inside] > 0).mean() < 0.7
    gradient = jax.grad(lambda points: scores.cross_entropy(predict(points), LABELS).sum())(points)
    if "linf" in row:
        way = np.sign(gradient)
    else:
        way = gradient / np.sqrt((np.square(gradient)).sum((1, 2, 3), keepdims=True))
    after = attack.step(predict, state)
    expected = np.clip(points + eps / 2 * way, 0, 1) - IMAGES
    np.testing.assert_allclose(after.delta, expected, atol=1e-6)


def linear_model(images, keys=None):
    """attacks 15: z = (0, w . x + b), w = (3, -4, 12), b = -1; the label is 1."""
    score = images.reshape(images.shape[0], 3) @ jnp.array([3.0, -4, 12]) - 1
    return jnp.stack([jnp.zeros_like(score), score], -1)


CORNER, MIDDLE = (0.9, 0.05, 0.2), (0.5, 0.5, 0.5)


def whole(attack, keys, predict, images, labels):
    """The attack as a loop, which compiles one step."""
    state = attack.init(keys, predict, images, labels, predict(images))
    return attacks.finish(predict, lax.fori_loop(0, attack.steps, lambda _, state: attack.step(predict, state), state))


def on_linear(attack, image):
    images = jnp.array(image).reshape(1, 1, 1, 3)
    return jax.jit(lambda keys, images: whole(attack, keys, linear_model, images, jnp.array([1])))(KEYS[:1], images)


def test_worked_fgsm():
    """attacks 15.9."""
    state = on_linear(attacks.fgsm(balls.linf(0.1)), CORNER)
    np.testing.assert_allclose((state.images + state.delta).ravel(), [0.8, 0.15, 0.1], atol=1e-6)
    assert float(linear_model(state.images + state.delta)[0, 1]) == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize(
    "row, image, survives, breaks, worst",
    [
        (
            "linf",
            CORNER,
            0.2142,
            0.2144,
            {0.1: 2.0, 0.2: 0.1, 0.2142: 0.0006, 0.2144: -0.0008},
        ),  # 15.2: the box bends the ball
        ("linf", MIDDLE, 0.2368, 0.2369, {0.1: 2.6}),  # 15.1: 9/38
        ("l2", MIDDLE, 0.346, 0.35, {0.1: 3.2}),  # 15.1: 4.5/13 = .34615; a random start converges to the direction
    ],
)
@pytest.mark.parametrize("name", ["fgsm", "pgd"])  # half of r_fgsm's way is random
def test_a_linear_model_is_robust_up_to_where_it_is(name, row, image, survives, breaks, worst):
    make = lambda eps: attacks.TABLE[name](balls.TABLE[row](eps))
    assert int(on_linear(make(survives), image).status[0]) == 0
    assert int(on_linear(make(breaks), image).status[0]) == 1
    for eps, value in worst.items():
        state = on_linear(make(eps), image)
        assert float(linear_model(state.images + state.delta)[0, 1]) == pytest.approx(
            value, abs=2e-5 if row == "linf" else 5e-3
        )


def test_evaluation_takes_the_first_break_and_training_the_last_iterate():
    attack = attacks.pgd(balls.linf(0.2), steps=6, step_size=0.05)
    state, seen = attack.init(KEYS, predict, IMAGES, LABELS, predict(IMAGES)), []
    for _ in range(attack.steps):
        seen.append(state.images + state.delta)
        state = attack.step(predict, state)
    seen.append(state.images + state.delta)
    state = attacks.finish(predict, state)
    broken = np.stack([attacks.misclassified(predict(points), LABELS) for points in seen])
    assert broken[:, :-2].any(0).sum() >= 3
    for i in range(B - 2):
        first = int(broken[:, i].argmax())
        np.testing.assert_array_equal(state.best[i], seen[first][i] if broken[first, i] else IMAGES[i])
        assert int(state.steps[i]) == (first if broken[first, i] else attack.steps)
    # Broken examples have moved on.
    assert (np.asarray(seen[-1]) != np.asarray(state.best)).any((1, 2, 3)).all()


def test_nan_logits_count_as_broken():
    np.testing.assert_array_equal(
        attacks.misclassified(jnp.array([[0.0, jnp.nan], [1, 0], [1, 1], [0, 1]]), jnp.zeros(4, int)), [1, 0, 0, 1]
    )


def test_transformations():
    """A loop over steps, one example at a time under vmap, pmap, shard_map and a split batch give the same attack."""
    attack = make("pgd(linf({}), steps=4)")
    loop = lambda keys, images, labels: whole(attack, keys, predict, images, labels)
    expected = attacks.attack(attack, KEYS, predict, IMAGES, LABELS)
    mesh, spec = data_mesh(), PartitionSpec("data")
    one = lambda key, image, label: jax.tree.map(lambda x: x[0], loop(key[None], image[None], label[None]))
    for transformed in (
        jax.jit(jax.shard_map(loop, mesh=mesh, in_specs=spec, out_specs=spec)),
        jax.jit(loop, in_shardings=split(mesh)),
        jax.jit(jax.vmap(one)),
        jax.pmap(one),
    ):
        state = transformed(KEYS, IMAGES, LABELS)
        np.testing.assert_allclose(state.delta, expected.delta, atol=1e-5)
        np.testing.assert_array_equal(state.status, expected.status)


def test_runs():
    first, second = attacks.fgsm(balls.linf(0.1)), attacks.pgd(balls.linf(0.1))
    assert attacks.as_runs(first) == (first,)
    assert attacks.as_runs((first, (second, (first,)))) == (first, second, first)


def test_errors():
    for call, text in {
        lambda: attacks.pgd(balls.linf(0.1), steps=0): "steps must be a whole number of at least 1, got 0",
        lambda: attacks.pgd(balls.linf(0.1), step_size=-1): "step_size must be a number of at least 0, got -1",
        lambda: attacks.as_runs(3): "expected attacks like pgd(linf(8/255)), got 3",
        lambda: attacks.attack(
            attacks.pgd(balls.linf(0.1), score=scores.targeted_dlr), KEYS, predict, IMAGES, LABELS
        ): "targeted_dlr: targets (b,) are needed, e.g. the second most likely class of the clean image",
    }.items():
        with pytest.raises(UserError) as raised:
            call()
        assert str(raised.value) == text
