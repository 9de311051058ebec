"""`norm_regularised`: the worked one-step values, what flows where, the solvers, and how it meets the model."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_objectives import BATCH, KEYS, MODEL, TARGETS, VARIABLES, B, small
from topgap_jax import penalties, pool
from topgap_jax.build import build
from topgap_jax.errors import UserError
from topgap_jax.models import bind
from topgap_jax.scores import cross_entropy
from topgap_jax.training import objectives
from topgap_jax.training.norm_regularised import norm_regularised, perturbation
from topgap_jax.types import Model, Output

PENALTIES = ["l1_norm(.02)", "l2_norm(.3)", "elastic(.01, .05)", "group_norm(.1, 3)"]
# norm_regularised 11.2: a linear softmax of three numbers.
W = np.array([[1, 0, -1], [0.5, -1, 0], [-0.5, 0.5, 1]])
BIAS, X, Y = np.array([0.1, 0, -0.1]), np.array([0.2, 0.4, 0.6]), 2
LINEAR = Model(
    lambda key, images: {"params": jnp.asarray(W, jnp.float32), "batch_stats": {}},
    lambda variables, images, *, train=False, keys=None, targets=None, step=None: Output(
        images.reshape(len(images), 3) @ variables["params"].T + jnp.asarray(BIAS, jnp.float32), {}, {}
    ),
)
ONE = {
    "image": jnp.asarray(X, jnp.float32).reshape(1, 1, 1, 3),
    "label": jnp.array([Y]),
    "targets": jnp.eye(3)[None, Y],
    "id": jnp.arange(1),
    "mask": jnp.ones(1, bool),
}


def make(row):
    return build(row, {**objectives.TABLE, **penalties.TABLE})


def linear(objective):
    """(loss, metrics, outer gradient (3, 3)) of the worked case."""

    def summed(weights):
        variables = {"params": weights, "batch_stats": {}}
        loss, metrics, _ = objective(KEYS[:1], LINEAR, variables, ONE, 0)
        return loss.sum(), metrics

    (loss, metrics), gradient = jax.jit(jax.value_and_grad(summed, has_aux=True))(jnp.asarray(W, jnp.float32))
    return float(loss), {name: float(value[0]) for name, value in metrics.items()}, gradient


@pytest.mark.parametrize(
    ("row", "loss"), [("l1_norm(.1)", 0.780921), ("l2_norm(.1)", 0.699593), ("elastic(.1, .05)", 0.904201)]
)
def test_worked_loss(row, loss):
    """norm_regularised 11.2: CE at x + delta*, and the clean one. No entry of x meets the pixel box."""
    value, metrics, _ = linear(make(f"norm_regularised({row})"))
    assert value == pytest.approx(loss, abs=1e-6)
    assert metrics["clean_loss"] == pytest.approx(0.595060, abs=1e-6)


def test_worked_elastic():
    """norm_regularised 11.2: the penalty, the cost, and the outer gradient outer(p(x + delta) - onehot, x + delta)."""
    value, metrics, gradient = linear(make("norm_regularised(elastic(.1, .05))"))
    assert metrics["clean_loss"] + metrics["penalty"] == pytest.approx(0.811632, abs=1e-6)
    # <g, delta> = R* + R
    assert metrics["clean_loss"] + metrics["penalty"] + metrics["cost"] == pytest.approx(0.860028, abs=1e-6)
    expected = [
        [0.111269, 0.079735, 0.135228],
        [0.100634, 0.072115, 0.122304],
        [-0.211903, -0.151850, -0.257532],
    ]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("s", "error"),
    [
        (0.2, 0.194126),
        (0.05, 0.011895),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0.1, 0.048541), (0.025, 0.002929)]),
    ],
)
def test_nothing_flows_through_the_perturbation(s, error):
    """norm_regularised 11.3: to first order the outer gradient is that of loss + penalty, with an error in s^2."""

    def penalised(weights, s):
        def loss(points):
            z = weights @ points + BIAS
            return jax.nn.logsumexp(z) - z[Y]

        value, g = jax.value_and_grad(loss)(jnp.asarray(X))
        return value + s * jnp.abs(g).sum() + s / 2 * (g * g).sum()

    _, _, ours = linear(norm_regularised(penalties.elastic(s, s / 2)))
    regularised = jax.jit(jax.grad(penalised))(jnp.asarray(W), s)
    assert np.linalg.norm(ours - regularised) == pytest.approx(error, abs=2e-5)


def test_exact_for_a_logistic_model():
    """norm_regularised 11.2: two classes with margin w.x + b; the adversary lowers it by exactly eps |w|_1, box or
    not."""
    w = np.array([2, -1, 0.5])
    weights = jnp.asarray(np.stack([0 * w, w]), jnp.float32)
    model = Model(
        None,
        lambda variables, images, **_: Output(
            images.reshape(len(images), 3) @ variables["params"].T + jnp.array([0, 0.25]), {}, {}
        ),
    )
    objective = make("norm_regularised(l1_norm(.1))")
    step = jax.jit(lambda variables, batch: objective(KEYS[:1], model, variables, batch, 0))
    for x in ([0.3, 0.6, 0.2], [0.98, 0.01, 0.5]):
        batch = {
            **ONE,
            "image": jnp.array(x).reshape(1, 1, 1, 3),
            "label": jnp.array([1]),
            "targets": jnp.eye(2)[None, 1],
        }
        loss, metrics, _ = step({"params": weights, "batch_stats": {}}, batch)
        margin = w @ x + 0.25
        np.testing.assert_allclose(loss, [np.log1p(np.exp(-(margin - 0.35)))], atol=1e-6)
        np.testing.assert_allclose(metrics["penalty"], [0.35 / (1 + np.exp(margin))], atol=1e-6)


G = np.array([3, -1, 0.5, 0, -2, 0.25])


def solve(penalty, solver, steps, images, evaluate):
    return perturbation(penalty, solver, steps, images, *evaluate(images), evaluate)


def test_worked_prox_steps():
    """norm_regularised 11.5: prox on an affine loss from zero, and on a curved loss from the one-step maximiser."""
    penalty, g = penalties.elastic(0.1, 0.05), jnp.asarray(G, jnp.float32).reshape(1, 1, 2, 3)
    reached = {}
    delta = jnp.zeros_like(g)
    for step in range(1, 11):
        delta = penalty.prox(delta + 0.5 * g, 0.5)
        reached[step] = float((g * delta).sum() - penalty.cost(delta)[0])
    for step, value in {1: 1.345052, 2: 1.389359, 5: 1.390625, 10: 1.390625}.items():
        assert reached[step] == pytest.approx(value, abs=5e-6)

    hessian, g = np.array([[2, 0.5, 0], [0.5, 1, 0.3], [0, 0.3, -1]]), np.array([1, -2, 0.5])
    images = jnp.full((1, 1, 1, 3), 0.5)

    def evaluate(points):
        delta = (points - images).ravel()
        value = delta @ jnp.float32(g) + delta @ jnp.float32(hessian) @ delta / 2
        return value[None], (jnp.float32(g) + jnp.float32(hessian) @ delta).reshape(images.shape)

    def reach(solver, steps):
        delta = solve(penalty, solver, steps, images, evaluate)
        flat = np.float64(delta).ravel()
        return flat, flat @ g + flat @ hessian @ flat / 2 - float(penalty.cost(delta)[0])

    first, objective = reach("fast", 7)
    np.testing.assert_allclose(first, [0.2, -0.3, 0.15], atol=1e-6)
    assert objective == pytest.approx(0.642750, abs=1e-6)
    for steps, value in {1: 0.648248, 3: 0.650257, 7: 0.650460, 30: 0.650463}.items():
        delta, objective = reach("iterative", steps)
        assert objective == pytest.approx(value, abs=2e-6)
    # Within 1e-4 of the top the objective, of curvature 10, is the same number in float32.
    np.testing.assert_allclose(delta, [0.230232, -0.316285, 0.127738], atol=1e-4)


@pytest.mark.parametrize("row", PENALTIES)
def test_the_iterative_solver_finds_the_maximiser_of_an_affine_loss(row):
    penalty = build(row, penalties.TABLE)
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 3)), jnp.float32)
    images = jnp.full(gradient.shape, 0.5)
    evaluate = lambda points: ((gradient * points).sum((1, 2, 3)), gradient)
    delta = jax.jit(lambda images: solve(penalty, "iterative", 7, images, evaluate))(images)
    np.testing.assert_allclose(delta, penalty.maximiser(gradient), atol=1e-5)


class Bent(NamedTuple):
    """Cross-entropy of a network of 20 cosines of the pixels, so bent that a step of the first size often leads
    down."""

    inner: np.ndarray
    phase: np.ndarray
    outer: np.ndarray

    def losses(self, points, labels, xp=np):
        z = xp.cos(points.reshape(len(points), -1) @ self.inner + self.phase) @ self.outer
        top = z.max(1)
        return xp.log(xp.exp(z - top[:, None]).sum(1)) + top - z[xp.arange(len(z)), labels]

    def gradient(self, points, labels):
        hidden = points.reshape(len(points), -1) @ self.inner + self.phase
        z = np.cos(hidden) @ self.outer
        p = np.exp(z - z.max(1, keepdims=True))
        error = p / p.sum(1, keepdims=True) - np.eye(z.shape[1])[labels]
        return ((-np.sin(hidden) * (error @ self.outer.T)) @ self.inner.T).reshape(points.shape)


BENT = Bent(
    *(scale * np.random.default_rng(3).normal(size=size) for scale, size in ((1.5, (108, 20)), (3, 20), (2, (20, 3))))
)
POINTS, CLASS = np.random.default_rng(4).uniform(0.2, 0.8, size=(8, 6, 6, 3)), np.arange(8) % 3


def by_hand(penalty, steps, backtracks=True):
    """(delta, the objective after each trial) of the rule in NumPy, one image after the other, in float64."""
    row = lambda f, value: np.float64(f(np.float32(value)[None])[0])
    # Compiled, or each of their small steps would be; the arithmetic of the rule stays in NumPy.
    cost, maximiser, project = map(jax.jit, (penalty.cost, penalty.maximiser, penalty.project))
    prox = jax.jit(penalty.prox)
    deltas, values = [], []
    for x, label in zip(POINTS, CLASS):
        objective = lambda delta: BENT.losses((x + delta)[None], label)[0] - row(cost, delta)
        gradient = lambda delta: BENT.gradient((x + delta)[None], [label])[0]
        ascend = lambda delta, t: np.clip(x + row(project, delta + t * row(maximiser, gradient(delta))), 0, 1) - x
        delta, t, trials = np.zeros_like(x), 2.5 / steps, steps
        if penalty.scale is not None:
            ascend = lambda delta, t: row(lambda v: prox(v, t), delta + t * gradient(delta))
            t, trials = penalty.scale, steps + 1
        reached = [objective(delta)]
        for trial in range(trials):
            first = trial == 0 and penalty.scale is not None
            proposal = row(maximiser, gradient(delta)) if first else ascend(delta, t)
            if objective(proposal) >= reached[-1] or not backtracks:
                delta = proposal
            else:
                t = t / 4
            reached.append(objective(delta))
        deltas.append(delta)
        values.append(reached)
    return np.stack(deltas), np.array(values)


@pytest.fixture(scope="module")
def bent():
    """(points, labels) -> (losses, gradient) of `BENT`."""

    def evaluate(points, labels):
        losses, vjp = jax.vjp(lambda points: BENT.losses(points, labels, jnp), points)
        return losses, vjp(jnp.ones_like(losses))[0]

    return evaluate


@pytest.mark.parametrize("row", ["l1_norm(.15)", "l2_norm(1.)", "elastic(.01, .05)", "group_norm(.3, 3)"])
def test_no_step_of_the_iterative_solver_goes_down(row, bent):
    """The rule by hand, and its law where plain steps of the same size do go down; each image by itself."""
    penalty, images = build(row, penalties.TABLE), jnp.asarray(POINTS, jnp.float32)
    solver = jax.jit(
        lambda images, labels, steps: solve(penalty, "iterative", steps, images, lambda points: bent(points, labels)),
        static_argnums=2,
    )
    delta = np.asarray(solver(images, CLASS, 7))
    expected, values = by_hand(penalty, 7)
    np.testing.assert_allclose(delta, expected, atol=2e-4)
    assert (np.diff(values) >= 0).all()
    objective = BENT.losses(POINTS + delta, CLASS) - np.asarray(penalty.cost(jnp.asarray(delta)))
    np.testing.assert_allclose(objective, values[:, -1], atol=1e-3)
    _, plain = by_hand(penalty, 7, backtracks=False)
    assert (np.diff(plain) < -0.01).any() and objective.mean() > plain[:, -1].mean()
    # Another neighbour changes nothing; constraints keep to the box.
    other = solver(images.at[1:].set(0.5), CLASS, 7)
    np.testing.assert_array_equal(other[0], delta[0])
    if penalty.scale is None:
        assert (POINTS + delta).min() >= -1e-6 and (POINTS + delta).max() <= 1 + 1e-6


def test_the_box_cuts_only_what_stays_exact():
    """l1_norm is cut by the pixel box (row 15 of the table); the closed forms of the others are not, as the authors'
    are."""
    images = jnp.asarray(np.random.default_rng(0).integers(2, size=(2, 6, 6, 3)), jnp.float32)  # black and white
    gradient = jnp.asarray(np.random.default_rng(1).normal(size=images.shape), jnp.float32)
    for row in PENALTIES:
        penalty = build(row, penalties.TABLE)
        delta = perturbation(penalty, "fast", 7, images, None, gradient, None)
        outside = ((images + delta < 0) | (images + delta > 1)).any()
        assert bool(outside) == (not row.startswith("l1"))
    delta = np.asarray(perturbation(penalties.l1_norm(0.1), "fast", 7, images, None, gradient, None))
    low, high = -np.minimum(0.1, images), np.minimum(0.1, 1 - images)
    np.testing.assert_allclose(delta, np.where(gradient > 0, high, low), atol=1e-7)


def differentiated(objective):
    """images -> ((mean loss, (loss, metrics, statistics)), gradient of the parameters) at `BATCH` with these images."""

    def mean(params, images):
        batch = {**BATCH, "image": images}
        loss, metrics, stats = objective(KEYS, MODEL, {**VARIABLES, "params": params}, batch, 0)
        return loss.mean(), (loss, metrics, stats)

    step = jax.jit(jax.value_and_grad(mean, has_aux=True))
    return lambda images: step(VARIABLES["params"], images)


@pytest.fixture(scope="module")
def standard():
    return differentiated(objectives.standard())


@pytest.fixture(scope="module")
def followed():
    """The gradient of the network in eval mode."""
    loss = lambda x: cross_entropy(bind(MODEL, VARIABLES)(x), BATCH["label"]).sum()
    return jax.jit(jax.grad(loss))(BATCH["image"])


@pytest.mark.parametrize("row", PENALTIES)
def test_it_is_standard_at_the_perturbed_images(row, standard, followed):
    """In value, statistics and gradient; the gradient that is followed is that of eval mode, and leaves no
    statistics."""
    penalty = build(row, penalties.TABLE)
    delta = perturbation(penalty, "fast", 7, BATCH["image"], None, followed, None)
    (value, (loss, metrics, stats)), gradient = differentiated(norm_regularised(penalty))(BATCH["image"])
    expected = standard(BATCH["image"] + delta)
    np.testing.assert_allclose(loss, expected[0][1][0], atol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], expected[0][1][1]["accuracy"])
    np.testing.assert_allclose(metrics["penalty"], penalty.value(followed), rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), stats, expected[0][1][2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, expected[1])
    assert (metrics["penalty"] > 0).all() and loss.shape == metrics["clean_loss"].shape == metrics["cost"].shape == (B,)


def test_training_lowers_the_penalty_that_it_names():
    """30 steps on a fixed batch: |g|_1 ends lower with its penalty than without, at the same loss or a higher one."""

    def train(objective):
        variables = VARIABLES

        @jax.jit
        def step(variables):
            def mean(params):
                loss, _, stats = objective(KEYS, MODEL, {**variables, "params": params}, BATCH, 0)
                return loss.mean(), stats

            gradient, stats = jax.grad(mean, has_aux=True)(variables["params"])
            params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradient)
            return {"params": params, "batch_stats": stats}

        for _ in range(30):
            variables = step(variables)
        loss = lambda x: cross_entropy(bind(MODEL, variables)(x), BATCH["label"]).sum()
        gradient = jax.jit(jax.grad(loss))(BATCH["image"])
        return float(penalties.l1_norm(1.0).value(gradient).mean())

    assert train(make("norm_regularised(l1_norm(.05))")) < 0.9 * train(objectives.standard())


def test_the_gradient_is_right_on_confident_images():
    """Logits times 100: 1 - p_y is 0 in float32, and yet the gradient is that of float64."""
    model, variables = small(pool.gap())
    sharp = Model(
        model.init,
        lambda *args, **kwargs: (out := model.apply(*args, **kwargs))._replace(logits=100 * out.logits),
    )
    labels = bind(sharp, variables)(BATCH["image"]).argmax(-1)
    batch = {**BATCH, "label": labels, "targets": jax.nn.one_hot(labels, TARGETS.shape[1])}
    _, metrics, _ = jax.jit(lambda v: norm_regularised(penalties.l1_norm(1.0))(KEYS, sharp, v, batch, 0))(variables)
    z, vjp = jax.vjp(bind(sharp, variables), BATCH["image"])
    z = np.float64(z)
    others = z - z.max(1, keepdims=True)
    p = np.exp(others)
    p[np.arange(B), labels] = 0
    p /= 1 + p.sum(1, keepdims=True)
    p[np.arange(B), labels] = -p.sum(1)
    assert (-p.min(1) < 1e-8).all()
    scale = np.abs(p).max(1, keepdims=True)
    by_hand = np.abs(np.float64(vjp(jnp.asarray(p / scale, jnp.float32))[0])).sum((1, 2, 3)) * scale[:, 0]
    np.testing.assert_allclose(metrics["penalty"], by_hand, rtol=1e-3)


def test_errors():
    for call, text in {
        lambda: make(
            "norm_regularised(l1_norm(.1), solver='pgd')"
        ): "norm_regularised: solver must be 'fast' or 'iterative', got 'pgd'",
        lambda: make("norm_regularised(.1)"): "norm_regularised: penalty must be a value of type Penalty, got 0.1;",
        lambda: make(
            "norm_regularised(l1_norm(.1), steps=0)"
        ): "norm_regularised: steps must be a whole number of at least 1, got 0",
        lambda: jax.eval_shape(
            lambda: make("norm_regularised(group_norm(.1, 4))")(KEYS, MODEL, VARIABLES, BATCH, 0)
        ): "group_norm: patch=4 does not divide images of 6x6; take a divisor of both",
    }.items():
        with pytest.raises(UserError) as raised:
            call()
        assert str(raised.value).startswith(text)
