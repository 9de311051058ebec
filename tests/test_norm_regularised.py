"""`norm_regularised`: the worked one-step values, what flows where, the solvers, and how it meets the model."""

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

    (loss, metrics), gradient = jax.value_and_grad(summed, has_aux=True)(jnp.asarray(W, jnp.float32))
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


def test_nothing_flows_through_the_perturbation():
    """norm_regularised 11.3: to first order the outer gradient is that of loss + penalty, with an error in s^2."""

    def penalised(weights, s):
        def loss(points):
            z = weights @ points + BIAS
            return jax.nn.logsumexp(z) - z[Y]

        value, g = jax.value_and_grad(loss)(jnp.asarray(X))
        return value + s * jnp.abs(g).sum() + s / 2 * (g * g).sum()

    for s, error in ((0.2, 0.194126), (0.1, 0.048541), (0.05, 0.011895), (0.025, 0.002929)):
        _, _, ours = linear(norm_regularised(penalties.elastic(s, s / 2)))
        regularised = jax.grad(penalised)(jnp.asarray(W), s)
        assert np.linalg.norm(ours - regularised) == pytest.approx(error, abs=2e-5)


def test_exact_for_a_logistic_model():
    """norm_regularised 11.2: two classes with margin w.x + b; the adversary lowers it by exactly eps |w|_1, box or not."""
    w = np.array([2, -1, 0.5])
    weights = jnp.asarray(np.stack([0 * w, w]), jnp.float32)
    model = Model(
        None,
        lambda variables, images, **_: Output(
            images.reshape(len(images), 3) @ variables["params"].T + jnp.array([0, 0.25]), {}, {}
        ),
    )
    for x in ([0.3, 0.6, 0.2], [0.98, 0.01, 0.5]):
        batch = {
            **ONE,
            "image": jnp.array(x).reshape(1, 1, 1, 3),
            "label": jnp.array([1]),
            "targets": jnp.eye(2)[None, 1],
        }
        loss, metrics, _ = make("norm_regularised(l1_norm(.1))")(
            KEYS[:1], model, {"params": weights, "batch_stats": {}}, batch, 0
        )
        margin = w @ x + 0.25
        np.testing.assert_allclose(loss, [np.log1p(np.exp(-(margin - 0.35)))], atol=1e-6)
        np.testing.assert_allclose(metrics["penalty"], [0.35 / (1 + np.exp(margin))], atol=1e-6)


G = np.array([3, -1, 0.5, 0, -2, 0.25])


def solve(penalty, steps, images, gradient_at):
    return np.asarray(
        perturbation(penalty, "iterative", steps, images, gradient_at(images), gradient_at), np.float64
    ).ravel()


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
    gradient_at = lambda points: (jnp.float32(g) + (points - images).ravel() @ jnp.float32(hessian)).reshape(
        images.shape
    )
    objective = lambda delta: (
        delta @ g
        + delta @ hessian @ delta / 2
        - float(penalty.cost(jnp.asarray(delta, jnp.float32).reshape(images.shape))[0])
    )
    first = np.float64(perturbation(penalty, "fast", 7, images, gradient_at(images), None)).ravel()
    np.testing.assert_allclose(first, [0.2, -0.3, 0.15], atol=1e-6)
    assert objective(first) == pytest.approx(0.642750, abs=1e-6)
    for steps, value in {1: 0.648248, 3: 0.650257, 7: 0.650460, 30: 0.650463}.items():
        delta = solve(penalty, steps, images, gradient_at)
        assert objective(delta) == pytest.approx(value, abs=2e-6)
    np.testing.assert_allclose(delta, [0.230232, -0.316285, 0.127738], atol=1e-5)


@pytest.mark.parametrize("row", PENALTIES)
def test_the_iterative_solver(row):
    """On an affine loss it finds the maximiser; on a network it is no worse than the closed form; the box holds for constraints."""
    penalty = build(row, penalties.TABLE)
    random = np.random.default_rng(0)
    gradient = jnp.asarray(random.normal(size=(2, 6, 6, 3)), jnp.float32)
    images = jnp.full(gradient.shape, 0.5)
    delta = perturbation(penalty, "iterative", 7, images, gradient, lambda points: gradient)
    np.testing.assert_allclose(delta, penalty.maximiser(gradient), atol=1e-5)

    predict = bind(MODEL, VARIABLES)
    loss = lambda delta: cross_entropy(predict(BATCH["image"] + delta), BATCH["label"])
    gradient_at = jax.jit(jax.grad(lambda points: cross_entropy(predict(points), BATCH["label"]).sum()))
    start = gradient_at(BATCH["image"])
    value = {
        solver: loss(delta) - penalty.cost(delta)
        for solver in ("fast", "iterative")
        for delta in [perturbation(penalty, solver, 7, BATCH["image"], start, gradient_at)]
    }
    assert np.isfinite(value["iterative"]).all()
    assert value["iterative"].mean() > value["fast"].mean() - 1e-4
    delta = perturbation(penalty, "iterative", 7, BATCH["image"], start, gradient_at)
    points = np.asarray(BATCH["image"] + delta)
    if penalty.scale is None:
        assert points.min() >= 0 and points.max() <= 1


def test_the_box_cuts_only_what_stays_exact():
    """l1_norm is cut by the pixel box (row 15 of the table); the closed forms of the others are not, as the authors' are."""
    images = jnp.asarray(np.random.default_rng(0).integers(2, size=(2, 6, 6, 3)), jnp.float32)  # black and white
    gradient = jnp.asarray(np.random.default_rng(1).normal(size=images.shape), jnp.float32)
    for row in PENALTIES:
        penalty = build(row, penalties.TABLE)
        delta = perturbation(penalty, "fast", 7, images, gradient, None)
        outside = ((images + delta < 0) | (images + delta > 1)).any()
        assert bool(outside) == (not row.startswith("l1"))
    delta = np.asarray(perturbation(penalties.l1_norm(0.1), "fast", 7, images, gradient, None))
    low, high = -np.minimum(0.1, images), np.minimum(0.1, 1 - images)
    np.testing.assert_allclose(delta, np.where(gradient > 0, high, low), atol=1e-7)


@pytest.mark.parametrize("row", PENALTIES)
def test_it_is_standard_at_the_perturbed_images(row):
    """In value, statistics and gradient; the gradient that is followed is that of eval mode, and leaves no statistics."""
    penalty = build(row, penalties.TABLE)
    followed = jax.grad(lambda x: cross_entropy(bind(MODEL, VARIABLES)(x), BATCH["label"]).sum())(BATCH["image"])
    delta = perturbation(penalty, "fast", 7, BATCH["image"], followed, None)

    def run(objective, batch):
        def mean(params):
            loss, metrics, stats = objective(KEYS, MODEL, {**VARIABLES, "params": params}, batch, 0)
            return loss.mean(), (loss, metrics, stats)

        return jax.jit(jax.value_and_grad(mean, has_aux=True))(VARIABLES["params"])

    (value, (loss, metrics, stats)), gradient = run(norm_regularised(penalty), BATCH)
    expected = run(objectives.standard(), {**BATCH, "image": BATCH["image"] + delta})
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
        gradient = jax.grad(lambda x: cross_entropy(bind(MODEL, variables)(x), BATCH["label"]).sum())(BATCH["image"])
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
        lambda: make("norm_regularised(group_norm(.1, 4))")(
            KEYS, MODEL, VARIABLES, BATCH, 0
        ): "group_norm: patch=4 does not divide images of 6x6; take a divisor of both",
    }.items():
        with pytest.raises(UserError) as raised:
            call()
        assert str(raised.value).startswith(text)
