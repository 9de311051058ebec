"""The top-k attack on explanations: its laws, the quadratic whose first step is known, and what it needs to work at
all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from topgap_jax import attacks, balls, explain, pool, rules
from topgap_jax.attacks.maps import _mass
from topgap_jax.build import build
from topgap_jax.errors import UserError
from topgap_jax.metrics.ranks import topk_intersection
from topgap_jax.rewrite import name
from topgap_jax.rules import guided_backprop, softplus
from topgap_jax.types import Cost, Explain

B, CLASSES, EPS, K = 6, 3, 0.05, 6
random = np.random.default_rng(0)
IMAGES = jnp.asarray(random.uniform(size=(B, 8, 8, 3)), jnp.float32)
KEYS = jax.random.split(jax.random.key(0), B)
draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
FIRST, SECOND, LAST = draw(3, 3, 3, 6) / 3, draw(3, 3, 6, 8) / 5, draw(8, CLASSES)


def predict(images, keys=None):
    """Two convolutions with ReLU, class maps of 4x4, their mean."""
    convolve = lambda x, kernel, stride: lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    features = jax.nn.relu(convolve(jax.nn.relu(convolve(images - 0.5, FIRST, 1)), SECOND, 2))
    return pool.gap()(name(name(features, "features") @ LAST, "maps"))


# The last image is misclassified from the start.
LABELS = jnp.argmax(predict(IMAGES), -1).at[-1].add(1) % CLASSES


def make(row, eps=EPS, **options):
    options = {"k": K, "steps": 4, "step_size": eps / 3, "restarts": 2} | options
    return attacks.topk_attack(build(row, {**explain.TABLE, **rules.TABLE}), balls.linf(eps), **options)


def run(attack):
    return attacks.attack(attack, KEYS, predict, IMAGES, LABELS)


def overlap(state):
    """How many of the k highest positions are left (b,)."""
    return np.asarray(state.search.overlap)


def test_it_keeps_the_label_and_what_it_measured():
    """The verdicts are of the network itself: label, overlap of the k highest, and the misclassified image
    untouched."""
    state = jax.jit(lambda: run(make("grad_cam()")))()
    np.testing.assert_array_equal(jnp.argmax(predict(state.best), -1)[:-1], LABELS[:-1])
    np.testing.assert_array_equal(state.best[-1], IMAGES[-1])
    clean, changed = (explain.grad_cam()(KEYS, predict, x, LABELS) for x in (IMAGES, state.best))
    np.testing.assert_allclose(topk_intersection(clean, changed, K), overlap(state) / K, atol=1e-6)
    np.testing.assert_array_equal(overlap(state) < K, np.asarray(state.best != IMAGES).any((1, 2, 3)))
    assert (overlap(state)[:-1] < K).any()


def test_it_beats_random_points_and_more_restarts_are_no_worse():
    """With step_size=0 it is the control. The first restart does not depend on how many follow."""
    one, two = (jax.jit(lambda n=n: run(make("gradient()", steps=8, restarts=n)))() for n in (1, 2))
    control = jax.jit(lambda: run(make("gradient()", steps=1, restarts=16, step_size=0.0)))()
    assert (overlap(two) <= overlap(one)).all()
    assert overlap(two)[:-1].mean() < overlap(control)[:-1].mean() < K
    # On average the mass on the top positions falls with every step of the twin's gradient.
    assert (np.asarray(two.search.mass[:-1]) < np.asarray(control.search.mass[:-1])).mean() > 0.5


def test_a_relu_network_gives_a_gradient_map_no_direction():
    """Without the softplus twin the map is constant in pieces: nothing moves away from the random starts."""
    attack = make("gradient()", steps=3, restarts=1, beta=None)
    state = jax.jit(lambda: run(attack))()
    still = jax.jit(lambda: run(make("gradient()", steps=3, restarts=1, step_size=0.0)))()
    np.testing.assert_array_equal(state.delta, still.delta)
    twin = jax.jit(lambda: run(make("gradient()", steps=3, restarts=1)))()
    assert (np.asarray(twin.delta) != np.asarray(still.delta)).any((1, 2, 3))[:-1].all()


def test_an_explanation_that_is_a_twin_itself():
    """gradient(rules=softplus(50)) needs no twin, and is attacked as gradient() is up to the map that is booked."""
    still, moved = (
        jax.jit(lambda row=row, size=size: run(make(row, steps=1, restarts=1, step_size=size, beta=None)))()
        for row, size in (("gradient(rules=softplus(50))", 0.0), ("gradient(rules=softplus(50))", EPS / 3))
    )
    assert (np.asarray(moved.delta) != np.asarray(still.delta)).any((1, 2, 3))[:-1].all()
    twin = jax.jit(lambda: run(make("gradient()", steps=1, restarts=1)))()
    inside = np.asarray(moved.search.top == twin.search.top).all((1, 2))[:-1]
    assert inside.any()
    np.testing.assert_allclose(moved.delta[:-1][inside], twin.delta[:-1][inside], atol=1e-6)


def test_worked_step():
    """art 15, T11: f = x Q x / 2, k = 1; one step of .02 from the clean point."""
    q = jnp.array([[2.0, 0, 1], [0, 1, 0], [1, 0, 3]])

    def quadratic(images, keys=None):
        x = images.reshape(-1, 3)
        f = 0.5 * jnp.einsum("bi,ij,bj->b", x, q, x)
        return jnp.stack([f, f - 1], -1)

    images, labels = jnp.array([0.5, 0.3, 0.2]).reshape(1, 1, 3, 1), jnp.zeros(1, jnp.int32)
    ball = balls.linf(0.1)._replace(start=lambda keys, images, eps: jnp.zeros_like(images))
    map_of = explain.gradient(reduce="abs_sum")
    normalised = lambda maps: 3 * maps / maps.sum()
    np.testing.assert_allclose(
        normalised(map_of(KEYS[:1], quadratic, images, labels)).ravel(), [1.38461538, 0.34615385, 1.26923077], rtol=1e-6
    )
    top = jnp.array([[[True, False, False]]])
    slope = jax.grad(lambda x: _mass(map_of(KEYS[:1], quadratic, x, labels), top).sum())(images)
    np.testing.assert_allclose(slope.ravel(), [0.71005917, -0.53254438, -0.97633136], rtol=1e-5)
    attack = attacks.topk_attack(map_of, ball, k=1, steps=1, step_size=0.02, restarts=1, beta=None)
    after = jax.jit(lambda attack: attacks.attack(attack, KEYS[:1], quadratic, images, labels), static_argnums=0)
    state = after(attack)
    np.testing.assert_array_equal(state.search.top, top)
    np.testing.assert_allclose((state.images + state.delta).ravel(), [0.48, 0.32, 0.22], atol=1e-6)
    changed = normalised(map_of(KEYS[:1], quadratic, state.images + state.delta, labels)).ravel()
    np.testing.assert_allclose(changed, [1.34090909, 0.36363636, 1.29545455], rtol=1e-6)
    # The first is still the highest, so the clean image is kept; after the second step it is the third.
    assert int(state.search.overlap[0]) == 1 and (state.best == images).all()
    further = attacks.topk_attack(map_of, ball, k=1, steps=4, step_size=0.02, restarts=1, beta=None)
    assert int(after(further).search.overlap[0]) == 0


def test_normalisation_has_the_worked_value():
    """art 15, T10: sum over colours of |gradient| = [[4, 2], [2, 4]] becomes [[4/3, 2/3], [2/3, 4/3]], sum 4."""
    maps = jnp.array([[[4.0, 2], [2, 4]]])
    places = [jnp.zeros((1, 2, 2), bool).at[0, i, j].set(True) for i in (0, 1) for j in (0, 1)]
    np.testing.assert_allclose([float(_mass(maps, top)[0]) for top in places], [4 / 3, 2 / 3, 2 / 3, 4 / 3], rtol=1e-6)


def test_an_iterate_that_changes_the_label_is_not_kept():
    """A model that calls every image with any change another class: nothing is admissible."""
    fragile = lambda images, keys=None: (
        predict(images) - 1e4 * jax.nn.one_hot(LABELS, CLASSES) * (images != IMAGES).any((1, 2, 3))[:, None]
    )
    attack = make("cam()", steps=2, restarts=1)
    state = jax.jit(lambda: attacks.attack(attack, KEYS, fragile, IMAGES, LABELS))()
    np.testing.assert_array_equal(state.best, IMAGES)
    assert (overlap(state) == K).all() and np.asarray(state.delta)[:-1].any((1, 2, 3)).all()


def test_the_default_k():
    """100 positions, above 64x64 1000, and at most a tenth."""
    for shape, k in {(32, 32): 100, (64, 64): 100, (227, 227): 1000, (8, 8): 7, (1, 1): 1}.items():
        stand_in = Explain(lambda keys, predict, images, labels: images[..., 0], lambda *_: Cost(1, 0))
        attack = attacks.topk_attack(stand_in, balls.linf(0.1))
        images = jnp.zeros((1, *shape, 3))
        state = jax.jit(lambda: attack.init(KEYS[:1], predict, images, LABELS[:1], jnp.zeros((1, 2))))()
        assert state.search.top.shape == (1, *shape) and int(state.search.top.sum()) == k
    assert attack.steps == 150 and attack.cost(predict, images) == Cost(2, 1)
    assert attacks.topk_attack(explain.gradient(), balls.linf(0.1)).cost(predict, images) == Cost(1, 3)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: attacks.topk_attack(3, balls.linf(0.1)), "topk_attack: give an explanation such as gradient(), got 3"),
        (
            lambda: attacks.topk_attack(explain.gradient(), 3),
            "give a ball such as linf(8/255), got 3",
        ),
        (
            lambda: attacks.topk_attack(explain.smooth(explain.gradient(rules=guided_backprop)), balls.linf(0.1)),
            "topk_attack: a map under backward rules is the gradient of no function and has no derivative",
        ),
        (
            lambda: attacks.topk_attack(explain.integrated(rules=softplus(20)), balls.linf(0.1)),
            "topk_attack: the explanation has a rule for relu of its own, such as softplus(50); give beta=None",
        ),
        (lambda: make("cam()", k=0), "k must be a whole number of at least 1, got 0"),
        (lambda: make("cam()", restarts=0), "restarts must be a whole number of at least 1, got 0"),
        (lambda: make("cam()", beta=0), "beta must be a number of at least 1e-06, got 0"),
        (
            lambda: attacks.attack(make("cam()", k=17), KEYS, predict, IMAGES, LABELS),
            "k=17 is more than the 16 positions of the map; give k <= 16",
        ),
    ],
)
def test_mistakes(make, text):
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == text
