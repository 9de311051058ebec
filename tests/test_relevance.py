"""Relevance against worked cases (guided non-linearity 11, breadth 2), plain NumPy, and what each rule conserves."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from tests.laws import message
from topgap_jax import explain, models, rules
from topgap_jax.rewrite import name, with_rules
from topgap_jax.rules import by_layer, epsilon, gamma
from topgap_jax.scores import logit
from topgap_jax.types import Rule

random = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
INPUT, WEIGHTS = jnp.array([[1.0, 2]]), jnp.array([[2.0, -0.5], [-1, 3]])
IMAGES = jnp.asarray(random.uniform(size=(4, 8, 8, 3)), jnp.float32)
LABELS = jnp.arange(4) % 3
KEYS = jax.random.split(jax.random.key(0), 4)
CONVOLVE = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def relevance(f, x, upper, **rules):
    """R of the input, where `upper` is that of the result."""
    result, back = jax.vjp(with_rules(f, **rules), x)
    return np.asarray(x * back(upper / result)[0])


@pytest.mark.parametrize(
    ("rule", "due"),
    [
        (epsilon(0), (3.8, -0.8)),
        (epsilon(0.1), (3.440285, -0.641711)),
        (epsilon(1), (1.833333, 0)),
        (gamma(0.25), (3.179487, -0.179487)),
        (gamma(1e6), (2, 1)),
        (rules.z_plus, (2, 1)),
        (rules.alpha_beta(1, 0), (2, 1)),
        (rules.alpha_beta(2, 1), (3, 0)),
        (rules.w_square, (1.982353, 1.017647)),
        (rules.flat, (1.5, 1.5)),
    ],
)
def test_one_dense_layer(rule, due):
    """T10; each way a layer may be written."""
    upper = jnp.array([[2.0, 1]])
    kernel = WEIGHTS.T[None, None]
    for f in (
        lambda x: x @ WEIGHTS.T,
        jax.jit(lambda x: (WEIGHTS @ x.T).T),
        lambda x: lax.conv_general_dilated(x[:, None, None], kernel, **CONVOLVE)[:, 0, 0],
    ):
        np.testing.assert_allclose(relevance(f, INPUT, upper, **rule)[0], due, atol=2e-5)


def test_a_box():
    """T10, zB; relevance goes to an input of 0 too, with `TINY` in its place."""
    x, upper = jnp.array([[0.25, 0.5]]), jnp.array([[2.0, 1]])
    f = lambda x: x @ WEIGHTS.T
    np.testing.assert_allclose(relevance(f, x, upper, **rules.box(0, 1))[0], (1.666667, 1.333333), atol=1e-5)
    black = jnp.array([[0.0, 0.5]])
    result, back = jax.vjp(with_rules(f, **rules.box(0, 1)), black)
    shares = rules.relevance.nonzero(black) * back(upper / result)[0]
    numerators = black[0] * WEIGHTS - np.minimum(WEIGHTS, 0)
    due = ((numerators / numerators.sum(1, keepdims=True)) * upper[0][:, None]).sum(0)
    assert due[0] > 0.05
    np.testing.assert_allclose(shares[0], due, atol=1e-5)


def naive(a, w, b, upper, rule):
    """alpha-beta or gamma with inputs and weights of both signs, a loop over results and inputs."""
    shares, plus, minus = np.zeros(len(a)), lambda z: max(z, 0), lambda z: min(z, 0)
    for j in range(len(b)):
        z = [a[i] * w[i, j] for i in range(len(a))]
        total = sum(z) + b[j]
        if rule[0] == "gamma":
            count = plus if total > 0 else minus
            parts = [each + rule[1] * count(each) for each in z]
            whole = sum(parts) + b[j] + rule[1] * count(b[j])
            shares += [part / whole * upper[j] for part in parts]
        else:
            for factor, sign in zip(rule[1:], (plus, minus)):
                whole = sum(map(sign, z)) + sign(b[j])
                shares += [(factor if sign is plus else -factor) * sign(each) / whole * upper[j] for each in z]
    return shares


@pytest.mark.parametrize("rule", [("alpha_beta", 2, 1), ("alpha_beta", 1, 0), ("gamma", 0.25), ("gamma", 2)])
def test_inputs_of_both_signs_and_a_bias(rule):
    a, w, b, upper = (np.random.default_rng(3).normal(size=s) for s in (6, (6, 4), 4, 4))
    f = lambda x: x @ jnp.float32(w) + jnp.float32(b)
    found = relevance(f, jnp.float32(a)[None], jnp.float32(upper)[None], **getattr(rules, rule[0])(*rule[1:]))
    np.testing.assert_allclose(found[0], naive(a, w, b, upper, rule), rtol=2e-4, atol=1e-5)


@pytest.mark.slow
def test_batch_norm_is_part_of_its_convolution():
    """The rules see the kernel and bias that batch norm leaves: the same relevance as of a network folded by hand."""
    kernel, bias, scale, shift, mean, var = draw(3, 3, 3, 5), draw(5), draw(5), draw(5), draw(5), draw(5) ** 2 + 0.5
    convolve = lambda x, kernel: lax.conv_general_dilated(x, kernel, **CONVOLVE)
    head = draw(5, 3)
    normalise = lambda z: (z - mean) / jnp.sqrt(var + 1e-5) * scale + shift
    factor = scale / jnp.sqrt(var + 1e-5)
    two = lambda x, keys=None: jax.nn.relu(normalise(name(convolve(x, kernel) + bias, "conv"))).mean((1, 2)) @ head
    folded = lambda x, keys=None: (
        jax.nn.relu(convolve(x, kernel * factor) + (bias - mean) * factor + shift).mean((1, 2)) @ head
    )
    method = explain.lrp(rules.epsilon_gamma_box)
    maps = [jax.jit(lambda x, f=f: method(KEYS, f, x, LABELS))(IMAGES) for f in (two, folded)]
    np.testing.assert_allclose(*maps, atol=1e-5 * np.abs(maps[1]).max())
    # The gate of one image alone is spread over its channels like a bias, and is none.
    gated = lambda x: convolve(x, kernel) * jax.nn.sigmoid(x.mean((1, 2), keepdims=True) @ head[:3, :1])
    backs = [
        jax.vjp(with_rules(gated, **rules.z_plus), x)[1](jnp.ones((len(x), 8, 8, 5)))[0] for x in (IMAGES, IMAGES[:1])
    ]
    np.testing.assert_array_equal(backs[0][0], backs[1][0])


def residual(params, bias=0.0):
    """A normalisation, two convolutions around a sum, max pooling, a mean and a dense layer."""
    first, second, head = params

    def predict(images, keys=None):
        x = (images - jnp.array([0.5, 0.4, 0.3])) / jnp.array([0.2, 0.3, 0.4])
        h = jax.nn.relu(lax.conv_general_dilated(x, first, **CONVOLVE) + bias)
        h = jax.nn.relu(h + lax.conv_general_dilated(h, second, **CONVOLVE) + bias)
        return nn.max_pool(name(h, "features"), (2, 2), (2, 2)).mean((1, 2)) @ head + bias

    return predict


PARAMS = (draw(3, 3, 3, 6) / 3, draw(3, 3, 6, 6) / 4, draw(6, 3))
label_logits = lambda f: np.asarray(logit(f(IMAGES), LABELS))


@pytest.mark.parametrize(
    "composite",
    [
        "epsilon_gamma_box",
        "epsilon_plus_flat",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("epsilon_plus", "epsilon_alpha2_beta1")),
    ],
)
def test_a_composite_conserves_the_logit(composite):
    """Without biases the pixels' relevance adds up to the label's logit; a bias takes its part."""
    method = explain.lrp(rules.VALUES[composite])
    f = residual(PARAMS)
    maps = jax.jit(lambda images: method(KEYS, f, images, LABELS))(IMAGES)
    np.testing.assert_allclose(maps.sum((1, 2)), label_logits(f), rtol=2e-3, atol=1e-4)
    biased = residual(PARAMS, 0.3)
    parts = jax.jit(lambda images: method(KEYS, biased, images, LABELS))(IMAGES).sum((1, 2)) - label_logits(biased)
    assert (np.abs(parts) > 0.01).all()


def test_epsilon_zero_is_gradient_times_input():
    f = residual(PARAMS, 0.1)
    normal = (IMAGES - jnp.array([0.5, 0.4, 0.3])) / jnp.array([0.2, 0.3, 0.4])
    due = normal * jnp.array([0.2, 0.3, 0.4]) * jax.grad(lambda x: logit(f(x), LABELS).sum())(IMAGES)
    maps = explain.lrp(epsilon(0))(KEYS, f, IMAGES, LABELS)
    np.testing.assert_allclose(maps, due.sum(-1), atol=1e-5)


def test_backward_rules_of_relu():
    """T1 and T2."""
    back = lambda z, g, rule: jax.vjp(with_rules(jax.nn.relu, **rule), jnp.array([z]))[1](jnp.array([g]))[0][0].tolist()
    assert back([1.0, -2, 3, 0, 2], [2.0, 1, -1, 4, 0], rules.deconvnet) == [2, 1, 0, 4, 0]
    assert back([1.0, 2, 3, 4, -1], [5.0, -1, 1, 2, 3], rules.rect_grad(50)) == [5, 0, 0, 2, 0]


def test_excitation_of_one_layer():
    """T8, and T9's first line: probabilities that add up to what came."""
    excite = rules.excitation
    f = lambda x: x @ jnp.array([[2.0, 1], [-1, 3]]).T
    np.testing.assert_allclose(relevance(f, INPUT, jnp.array([[2.0, 1]]), **excite)[0], (1, 2), atol=1e-6)
    g = lambda x: x @ jnp.array([[1.0], [-1], [2]]) + 5
    np.testing.assert_allclose(
        relevance(g, jnp.array([[1.0, 2, 1]]), jnp.ones((1, 1)), **excite)[0], (1 / 3, 0, 2 / 3), atol=1e-6
    )
    back = jax.vjp(with_rules(lambda u, v: u + v, add=excite["add"]), jnp.array([3.0, 1]), jnp.array([1.0, -0.5]))[1]
    u, v = back(jnp.array([2.0, 4]) / jnp.array([4.0, 0.5]))
    np.testing.assert_allclose((u * jnp.array([3.0, 1]), v), ((1.5, 4), (0.5, 0)), atol=1e-6)
    maps = jnp.array([[[3.0, -1], [-1, -3]]])[..., None]  # class maps of two images, by rows
    for rows, due in ((maps[:, :1], (1, 0)), (maps[:, 1:], (0.25, 0.75))):
        value, back = jax.vjp(with_rules(lambda x: x.mean((1, 2)), mean=excite["mean"]), rows)
        np.testing.assert_allclose((rows * back(1 / value)[0]).ravel(), due, atol=1e-6)
    # Of the dual class, whose weights are turned, the other positions are excitatory: else both passes are one.
    for rows, due in ((maps[:, :1], (0, -1)), (maps[:, 1:], (-0.25, -0.75))):
        value, back = jax.vjp(with_rules(lambda x: x.mean((1, 2)), mean=rules.composites.contrast["mean"]), rows)
        np.testing.assert_allclose((rows * back(-1 / value)[0]).ravel(), due, atol=1e-6)


@pytest.mark.slow
def test_contrastive_excitation():
    """T9: hidden units 1, 2, 1 of the classifier (1, -1, 2), and one layer further down."""
    lower = jnp.array([[1.0, 0], [1, 1], [-1, 2]])

    def predict(images, keys=None):
        hidden = name(name(images, "inputs") @ lower.T, "hidden")
        return (hidden @ jnp.array([[1.0, 0], [-1, 0], [2, 0]])).sum((1, 2))

    wide = lambda x: jnp.concatenate([x, jnp.zeros_like(x)], 2)  # a second position, of nothing
    of = lambda layer, **options: explain.excitation_backprop(layer, **options).maps(
        None, predict, wide(jnp.ones((1, 1, 1, 2))), jnp.array([0])
    )
    np.testing.assert_allclose(of("inputs")[0], [[1, 0]], atol=1e-6)
    # All three hidden units stand in one position: each map is 1 there, and the difference 0.
    np.testing.assert_allclose(of("hidden", contrastive=True)[0], [[0, 0]], atol=1e-6)
    shares = {}
    for sign, each in ((1, rules.excitation), (-1, rules.composites.contrast)):
        layer = with_rules(lambda x: x @ jnp.array([[1.0], [-1], [2]]), **each)
        hidden = jnp.array([[1.0, 2, 1]])
        result, back = jax.vjp(layer, hidden)
        shares[sign] = hidden * back(jnp.full((1, 1), sign) / result)[0]
    difference = shares[1] - shares[-1]
    np.testing.assert_allclose(difference[0], (1 / 3, -1, 2 / 3), atol=1e-6)
    back = jax.vjp(with_rules(lambda x: x @ lower.T, **rules.excitation), jnp.ones((1, 2)))[1]
    down = [back(shares[sign] / hidden)[0] for sign in (1, -1)]
    np.testing.assert_allclose((down[0] - down[1])[0], (-1 / 6, 1 / 6), atol=1e-6)


def test_excitation_backprop_adds_up_to_one():
    params = (*PARAMS[:2], jnp.abs(PARAMS[2]) * jnp.array([1.0, 1, -1]))
    f = residual(params, 0.1)
    maps = explain.excitation_backprop()(KEYS, f, IMAGES, jnp.array([0, 1, 2, 0]))
    assert maps.shape == (4, 8, 8) and (maps >= 0).all()
    np.testing.assert_allclose(maps.sum((1, 2)), (1, 1, 0, 1), atol=1e-5)  # to class 2 leads no positive weight
    assert "nothing stands" not in message(explain.excitation_backprop("stage9"), KEYS, f, IMAGES, LABELS)


def test_attention_in_numbers():
    """Breadth 2: two tokens of one channel; AttnLRP halves each product, CP-LRP gives the values all."""
    q, k, v, seed = jnp.array([1.0, 0.5]), jnp.array([2.0, -1]), jnp.array([1.0, 3]), jnp.array([1.0, 0])

    def parts(**rules):
        def attend(q, k, v):
            q, k, v = (x.reshape(1, 2, 1) * jnp.ones((1, 1, 1)) for x in (q, k, v))
            q, k, v = (jnp.einsum("bnd,de->bne", x, jnp.ones((1, 1))) for x in (q, k, v))
            weights = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k))
            return jnp.einsum("bqk,bkd->bqd", weights, v).reshape(2)

        out, back = jax.vjp(with_rules(attend, **rules), q, k, v)
        np.testing.assert_allclose(out, (1.094852, 1.364851), atol=1e-5)
        return [x * g for x, g in zip((q, k, v), back(seed))]

    r_q, r_k, r_v = parts(**rules.attn_lrp)
    np.testing.assert_allclose(r_v, (0.476287, 0.071139), atol=1e-5)
    np.testing.assert_allclose(r_q, (-0.067765, 0), atol=1e-5)
    np.testing.assert_allclose(r_k, (-0.045177, -0.022588), atol=1e-5)
    r_q, r_k, r_v = parts(**rules.cp_lrp)
    np.testing.assert_allclose(r_v.sum(), 1.094852, atol=1e-5)
    assert not np.any(r_q) and not np.any(r_k)


def test_a_layer_norm_in_numbers():
    """Breadth 2: its deviation is a constant, its mean is not, however it is written."""
    x, seed = jnp.array([[1.0, 2, 4]]), jnp.array([[1.0, 0, -1]])
    by_hand = lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    for f in (by_hand, lambda x: nn.LayerNorm(use_bias=False, use_scale=False).apply({}, x)):
        y, back = jax.vjp(with_rules(f, **rules.attn_lrp), x)
        np.testing.assert_allclose(y[0], (-1.069045, -0.267261, 1.336306), atol=1e-5)
        found = (x * back(seed)[0])[0]
        np.testing.assert_allclose(found, (0.801783, 0, -3.207134), atol=1e-5)
        np.testing.assert_allclose(found.sum(), (y * seed).sum(), atol=1e-5)


@pytest.mark.slow
def test_an_activation_keeps_relevance():
    """GELU and SiLU, written in any way: g phi(x) / x, and phi'(0) at 0."""
    x, seed = jnp.array([[-2.0, -0.1, 0, 1.5]]), jnp.array([[1.0, 2, 3, 4]])
    for f in (
        jax.nn.silu,
        lambda x: jax.nn.gelu(x, approximate=False),
        lambda x: jax.nn.gelu(x, approximate=True),
        lambda x: x * jax.nn.sigmoid(x),
        lambda x: 0.5 * x * (1 + lax.erf(x / 2**0.5)),
        nn.hard_swish,
    ):
        y, back = jax.vjp(with_rules(f, activation=rules.attn_lrp["activation"]), x)
        np.testing.assert_allclose((x * back(seed)[0])[0], (y * seed)[0], atol=1e-5)
        assert abs(back(seed)[0][0, 2] - 3 * jax.grad(f)(0.0)) < 1e-5
    for f in (jax.nn.sigmoid, lambda x: x + jnp.sin(x), lambda x: x * x):
        assert "has no x times a function" in message(with_rules(f, activation=Rule()), x)


class Gate(nn.Module):
    """Squeeze and excitation around a convolution with SiLU."""

    @nn.compact
    def __call__(self, x):
        x = nn.silu(nn.Conv(6, (3, 3), use_bias=False, name="expand")(x))
        gate = nn.sigmoid(nn.Conv(6, (1, 1), name="excite")(x.mean((1, 2), keepdims=True)))
        return nn.Dense(3, use_bias=False, name="head")((x * gate).mean((1, 2)))


@pytest.mark.slow
def test_a_gate_has_no_relevance():
    """With squeeze and excitation and SiLU, as EfficientNet has them, the logit is conserved."""
    model = models.linen(Gate())
    variables = model.init(jax.random.key(0), IMAGES)
    f = models.bind(model, variables)
    of = jax.jit(lambda keys, images, labels: explain.lrp(rules.epsilon_plus).maps(keys, f, images, labels))
    for images in (IMAGES, IMAGES[:1]):
        maps = of(KEYS[: len(images)], images, LABELS[: len(images)])
        np.testing.assert_allclose(maps.sum((1, 2)), label_logits(f)[: len(images)], rtol=1e-3, atol=1e-5)


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (4, 4), (4, 4), use_bias=False, name="patches")(x).reshape(len(x), -1, 8)
        y = nn.LayerNorm(use_bias=False, name="norm")(x)
        x = x + nn.MultiHeadDotProductAttention(2, use_bias=False, name="attention")(y)
        x = x + nn.Dense(8, use_bias=False, name="narrow")(nn.gelu(nn.Dense(16, use_bias=False, name="wide")(x)))
        return nn.Dense(3, use_bias=False, name="head")(x.mean(1))


@pytest.mark.slow
def test_cp_lrp_conserves_the_logit_of_a_transformer():
    """Without biases; AttnLRP does not (breadth 2): its softmax keeps no sum."""
    model = models.linen(Transformer())
    f = models.bind(model, model.init(jax.random.key(0), IMAGES))
    of = lambda composite: explain.lrp(composite)(KEYS, f, IMAGES, LABELS)
    maps = jax.jit(lambda: [of(composite) for composite in (rules.cp_lrp, rules.attn_lrp)])()
    np.testing.assert_allclose(maps[0].sum((1, 2)), label_logits(f), rtol=1e-3, atol=1e-4)
    assert np.abs(maps[1].sum((1, 2)) - label_logits(f)).max() > 1e-3


def labelled(seen, label):
    """A rule for dense layers that notes its label."""
    return {"dense_layer": Rule(forward=lambda operation, *operands: (seen.append(label), operation(*operands))[1])}


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="second")(nn.relu(nn.Dense(4, name="first_layer")(x)))


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Two(name="block1")(x.mean((1, 2)))
        return nn.Dense(3, name="head")(nn.remat(Two)(name="block2")(x))


class NnxStack(nnx.Module):
    def __init__(self, rngs):
        self.block1, self.head = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.block1(x.mean((1, 2)))))


def test_rules_by_layer():
    """By Linen's and NNX's names, by the names and scopes of a plain function, through jit and remat."""
    seen = []
    model = models.linen(Stack())
    f = models.bind(model, model.init(jax.random.key(0), IMAGES))
    label = functools.partial(labelled, seen)
    composite = by_layer(("block2/second", label("b")), ("block1", label("a")), first=label("f"), otherwise=label("o"))
    for each in (f, jax.jit(f)):
        seen.clear()
        jax.eval_shape(with_rules(each, **composite), IMAGES)
        assert seen == ["a", "a", "o", "b", "o"]
    seen.clear()
    jax.eval_shape(with_rules(f, **by_layer(("head", label("h")), first=label("f"))), IMAGES)
    assert seen == ["f", "h"]
    model = models.nnx(NnxStack(nnx.Rngs(0)))
    seen.clear()
    bound = models.bind(model, model.init(jax.random.key(0), IMAGES))
    jax.eval_shape(with_rules(bound, **by_layer(("head", label("h")), otherwise=label("o"))), IMAGES)
    assert seen == ["o", "h"]

    def plain(x):
        x = name(jax.nn.relu(x.mean((1, 2)) @ PARAMS[2][:3]), "hidden")
        with jax.named_scope("head"):
            return x @ PARAMS[2][:3]

    seen.clear()
    composite = by_layer(("head", label("h")), ("hidden", label("n")))
    jax.eval_shape(with_rules(plain, **composite), IMAGES)
    assert seen == ["n", "h"] and hash(tuple(composite.items()))


def test_errors():
    f = residual(PARAMS)
    composite = by_layer(("stage9", epsilon()), otherwise=gamma())
    assert message(explain.lrp(composite), KEYS, f, IMAGES, LABELS).startswith(
        "by_layer: nothing stands in a layer 'stage9'; layers: "
    )
    assert message(by_layer, ("head", 5)) == "by_layer: rules must be like guided or epsilon(), got 5 for 'head'"
    assert (
        message(by_layer, "head") == "by_layer: give pairs of a layer's name and rules, ('head', epsilon()), got 'head'"
    )
    assert message(rules.alpha_beta, 2, 0.5) == "alpha_beta: alpha - beta must be 1, got 2 - 0.5"
    assert message(explain.lrp, epsilon) == (
        "lrp: 'epsilon' is no function of (low, high); give the rules it makes: epsilon()"
    )
    assert message(explain.lrp, 5).startswith("rules must be like guided or softplus(50), for relu,")
    assert "is (4, 4, 4, 3), the bounds are (4, 8, 8, 3)" in message(
        explain.lrp(rules.epsilon_gamma_box), KEYS, lambda x, keys=None: f(x[:, ::2, ::2]), IMAGES, LABELS
    )
