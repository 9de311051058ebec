"""`with_pool` on classifiers written as Flax's own examples write them, unlike ours: a Linen and an NNX one, and the
ways to spell their ends."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from topgap_jax import explain, models, pool
from topgap_jax.errors import UserError
from topgap_jax.rewrite import layers, read, tap, with_pool

IMAGES = jax.random.uniform(jax.random.key(0), (4, 8, 8, 3))
LABELS = jnp.array([3, 1, 4, 1])
KEYS = jax.random.split(jax.random.key(1), 4)


class LinenCNN(nn.Module):
    """After flax/examples: everything inline and compact, batch norm told by `train`, ReLU as a function, dropout
    before the last layer."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(features=8, kernel_size=(3, 3), use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.relu(x)
        x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = nn.Conv(features=6, kernel_size=(3, 3))(x)
        x = nn.relu(x)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dropout(rate=0.5, deterministic=not train)(x)
        return nn.Dense(features=5)(x)


class NNXCNN(nnx.Module):
    """After the tutorial of NNX: layers made in __init__, a full-window average pool and a flattening, `rngs` at the
    call, dropout twice."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(3, 8, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm1 = nnx.BatchNorm(8, rngs=rngs)
        self.dropout1 = nnx.Dropout(rate=0.1)
        self.conv2 = nnx.Conv(8, 6, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm2 = nnx.BatchNorm(6, rngs=rngs)
        self.linear1 = nnx.Linear(6, 5, rngs=rngs)
        self.dropout2 = nnx.Dropout(rate=0.5)

    def __call__(self, x, rngs: nnx.Rngs | None = None):
        x = nnx.relu(self.batch_norm1(self.dropout1(self.conv1(x), rngs=rngs)))
        x = nnx.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = nnx.relu(self.batch_norm2(self.conv2(x)))
        x = nnx.avg_pool(x, window_shape=(4, 4))
        x = x.reshape(x.shape[0], -1)
        return self.linear1(self.dropout2(x, rngs=rngs))


def drawn(model):
    """Variables of the right shapes from NumPy, positive where they are variances: nothing is compiled."""
    random = np.random.default_rng(0)
    fill = lambda path, x: jnp.asarray(random.normal(size=x.shape) * 0.3 + (path[-1].key in ("var", "scale")), x.dtype)
    positive = lambda path, x: jnp.abs(x) if path[-1].key == "var" else x
    variables = jax.tree_util.tree_map_with_path(fill, jax.eval_shape(model.init, jax.random.key(0), IMAGES))
    return jax.tree_util.tree_map_with_path(positive, variables)


@pytest.fixture(scope="module", params=["linen", "nnx"])
def foreign(request):
    """(model, name of its dense layer, variables)."""
    if request.param == "linen":
        model, dense = models.linen(LinenCNN()), "Dense_0"
    else:
        model, dense = models.nnx(nnx.jit(lambda: NNXCNN(rngs=nnx.Rngs(0)))()), "linear1"
    return model, dense, drawn(model)


def features_of(model, variables, train=False, keys=None):
    """What the network pools: the last named map, then the inline ReLU that no name stands for."""
    predict = lambda images: model.apply(variables, images, train=train, keys=keys).logits
    return jax.nn.relu(jax.jit(read(predict))(IMAGES)[1])


def dense_of(variables, dense):
    return np.asarray(variables["params"][dense]["kernel"]), np.asarray(variables["params"][dense]["bias"])


def top_k_mean(maps, k):
    return np.sort(np.asarray(maps).reshape(maps.shape[0], -1, maps.shape[-1]), 1)[:, -k:].mean(1)


def test_layers_have_the_names_of_their_attributes(foreign):
    model, dense, variables = foreign
    names = [x.name for x in layers(models.bind(model, variables), IMAGES)]
    assert (
        names
        == {
            "Dense_0": ["Conv_0", "BatchNorm_0", "Conv_1", "Dropout_0", "Dense_0"],
            "linear1": ["conv1", "dropout1", "batch_norm1", "conv2", "batch_norm2", "dropout2", "linear1"],
        }[dense]
    )


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_gap_gives_the_logits_and_gradients_again(foreign, train):
    """Also the batch statistics, and with the same dropout."""
    model, dense, variables = foreign
    again = with_pool(model, dense=dense, pool=pool.gap())

    def run(model):
        def loss(params):
            out = model.apply({**variables, "params": params}, IMAGES, train=train, keys=KEYS)
            return (out.logits * jnp.arange(20.0).reshape(4, 5)).sum(), out

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    ((_, expected), gradient), ((_, out), gradient_again) = run(model), run(again)
    np.testing.assert_allclose(out.logits, expected.logits, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), out.batch_stats, expected.batch_stats)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), gradient_again, gradient)


@pytest.mark.parametrize("jitted", [False, True], ids=["plain", "jitted"])
def test_top_gap_equals_numpy(foreign, jitted):
    model, dense, variables = foreign
    inner = model._replace(apply=jax.jit(model.apply, static_argnames="train")) if jitted else model
    pooled = with_pool(inner, dense=dense, pool=pool.top_gap(k=3))
    features = features_of(model, variables)
    kernel, bias = dense_of(variables, dense)
    maps = np.asarray(features) @ kernel + bias
    logits = pooled.apply(variables, IMAGES).logits
    np.testing.assert_allclose(logits, top_k_mean(maps, 3), atol=1e-5)
    assert np.abs(logits - model.apply(variables, IMAGES).logits).max() > 0.01
    # The class maps are there to read, to explain and to tap.
    predict = models.bind(pooled, variables)
    np.testing.assert_allclose(read(predict, "maps")(IMAGES)[1], maps, atol=1e-5)
    cam = explain.cam()(None, predict, IMAGES, LABELS)
    np.testing.assert_allclose(
        cam, np.take_along_axis(maps, np.asarray(LABELS)[:, None, None, None], -1)[..., 0], atol=1e-5
    )
    np.testing.assert_allclose(tap(predict, "maps", lambda z: z + 1)(IMAGES), logits + 1, atol=1e-5)
    assert all(x.calls == 1 for x in layers(predict, IMAGES))


def test_dropout_acts_on_every_position(foreign):
    """In training each feature is 0 at all positions, or twice as large at all (rate 1/2), as the pooled feature
    was."""
    model, dense, variables = foreign
    features = np.asarray(features_of(model, variables, train=True, keys=KEYS))
    kernel, bias = dense_of(variables, dense)
    predict = lambda images: model.apply(variables, images, train=True, keys=KEYS).logits
    dropped = np.asarray(jax.jit(read(predict, {"Dense_0": "Dropout_0", "linear1": "dropout2"}[dense]))(IMAGES)[1])
    mask = np.where(np.abs(features.mean((1, 2))) > 0, dropped / np.maximum(features.mean((1, 2)), 1e-12), 0)
    assert set(np.unique(mask.round(3))) == {0, 2}
    maps = (features * mask[:, None, None, :]) @ kernel + bias
    pooled = with_pool(model, dense=dense, pool=pool.top_gap(k=3))
    logits = jax.jit(lambda variables: pooled.apply(variables, IMAGES, train=True, keys=KEYS).logits)(variables)
    np.testing.assert_allclose(logits, top_k_mean(maps, 3), atol=1e-5)


def test_the_pools_schedule_sees_the_step(foreign):
    model, dense, variables = foreign
    annealed = with_pool(model, dense=dense, pool=pool.top_gap(k=lambda step: jnp.where(step < 5, 16, 2)))
    maps = np.asarray(features_of(model, variables)) @ dense_of(variables, dense)[0] + dense_of(variables, dense)[1]
    for step, k in {0: 16, 5: 2, None: 2}.items():
        np.testing.assert_allclose(annealed.apply(variables, IMAGES, step=step).logits, top_k_mean(maps, k), atol=1e-5)


class End(nn.Module):
    """A convolution, an inline ReLU, and then the end that a test gives."""

    end: object

    @nn.compact
    def __call__(self, x, train: bool = False):
        return self.end(nn.relu(nn.Conv(6, (3, 3), strides=2)(x)), train)


class Head(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="last")(x)


class Own(nn.Module):
    """A dense layer of one's own, its kernel stored transposed, without a bias but with a constant."""

    @nn.compact
    def __call__(self, x):
        return jnp.einsum("bc,kc->bk", x, self.param("kernel", nn.initializers.normal(), (5, x.shape[-1]))) + 0.5


def ending(end):
    model = models.linen(End(end))
    return model, drawn(model)


def dropped(x, train, shape):
    return nn.Dropout(0.5, deterministic=not train, broadcast_dims=shape)(x)


def by_rows(x, train):
    """The kernel stored and multiplied from the left."""
    kernel = Kernel(name="own")
    return kernel(x.mean((1, 2)))


class Kernel(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (5, x.shape[-1]))
        return (kernel @ x.T).T


def channels_first(x, pooled):
    """The end of a network (b, c, h, w): its last convolution, and what a test does to the pooled features."""
    x = lax.conv_general_dilated(
        x.transpose(0, 3, 1, 2), jnp.ones((6, 6, 1, 1)) + jnp.eye(6)[..., None, None], (1, 1), "SAME"
    )
    return nn.Dense(5)(pooled(x))


def windowed(x, window):
    return lax.reduce_window(x, 0.0, lax.add, window, window, "VALID") / 16


conv1x1 = lambda x, **options: nn.Conv(5, (1, 1), name="Dense_0", **options)(x)
WAYS = {
    "mean with kept axes": lambda x, train: nn.Dense(5)(x.mean((1, 2), keepdims=True)[:, 0, 0]),
    "kept axes, then reshape": lambda x, train: nn.Dense(5)(x.mean((1, 2), keepdims=True).reshape(x.shape[0], -1)),
    "dense layer of kept axes": lambda x, train: nn.Dense(5)(x.mean((1, 2), keepdims=True))[:, 0, 0],
    "sum divided": lambda x, train: nn.Dense(5)(x.sum((1, 2)) / 16),
    "two means": lambda x, train: nn.Dense(5)(x.mean(1).mean(1)),
    "two means, columns first": lambda x, train: nn.Dense(5)(x.mean(2).mean(1)),
    "positions as one axis": lambda x, train: nn.Dense(5)(x.reshape(x.shape[0], -1, x.shape[-1]).mean(1)),
    "einops.reduce": lambda x, train: nn.Dense(5)(x.transpose(0, 3, 1, 2).mean((2, 3))),
    "einops.rearrange": lambda x, train: nn.Dense(5)(x.transpose(0, 3, 1, 2).reshape(len(x), 6, 16).mean(-1)),
    "average pool without padding counted": lambda x, train: nn.Dense(5)(
        nn.avg_pool(x, (4, 4), count_include_pad=False).squeeze((1, 2))
    ),
    "channels first": lambda x, train: channels_first(x, lambda x: x.mean((2, 3))),
    "channels first, average pool": lambda x, train: channels_first(x, lambda x: windowed(x, (1, 1, 4, 4))[:, :, 0, 0]),
    "1x1 convolution behind": lambda x, train: conv1x1(x.mean((1, 2), keepdims=True)).reshape(len(x), -1),
    "1x1 convolution before": lambda x, train: conv1x1(x).mean((1, 2)),
    "1x1 convolution before an average pool": lambda x, train: windowed(conv1x1(x), (1, 4, 4, 1)).reshape(len(x), 5),
    "1x1 convolution before, bias behind": lambda x, train: nn.log_softmax(
        conv1x1(x, use_bias=False).mean((1, 2)) + jnp.arange(5.0)
    ),
    "dense layer before": lambda x, train: nn.Dense(5)(x).transpose(0, 3, 1, 2).reshape(len(x), 5, -1).mean(-1),
    "dense layer of tokens": lambda x, train: nn.Dense(5)(x.reshape(len(x), -1, 6)).mean(1),
    "dropout with kept axes": lambda x, train: nn.Dense(5)(
        dropped(x.mean((1, 2), keepdims=True), train, ()).reshape(len(x), -1)
    ),
    "dropout of channels before the second mean": lambda x, train: nn.Dense(5)(dropped(x.mean(1), train, (1,)).mean(1)),
    "without bias": lambda x, train: nn.Dense(5, use_bias=False)(x.mean((1, 2))),
    "a factor": lambda x, train: nn.Dense(5)(0.25 * x.mean((1, 2))),
    "in a submodule": lambda x, train: Head(name="head")(x.mean((1, 2))),
    "by a part of its name": lambda x, train: nn.softplus(Head(name="head")(x.mean((1, 2)))),
    "a layer of one's own": lambda x, train: Own(name="own")(x.mean((1, 2))),
    "a kernel on the left": by_rows,
    "inside jit": lambda x, train: nn.Dense(5)(jax.jit(lambda x: x.mean((1, 2)))(x)),
}
LAYERS = {
    "in a submodule": "head/last",
    "by a part of its name": "last",
    "a layer of one's own": "own",
    "a kernel on the left": "own",
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_end(way):
    """gap() gives the logits again, with dropout too."""
    model, variables = ending(WAYS[way])
    pooled = with_pool(model, dense=LAYERS.get(way, "Dense_0"), pool=pool.gap())
    train = {"train": True, "keys": KEYS} if "dropout" in way else {}

    @jax.jit
    def both(variables):
        again, maps = read(lambda images: pooled.apply(variables, images, **train).logits, "maps")(IMAGES)
        return model.apply(variables, IMAGES, **train).logits, again, maps

    logits, again, maps = both(variables)
    np.testing.assert_allclose(again, logits, atol=2e-6)
    assert maps.shape == (4, 4, 4, 5) and np.ptp(maps, (1, 2)).min() > 0


def test_of_a_fast_model():
    """The engine's 1x1 convolution is a dense layer too."""
    model, variables = ending(WAYS["1x1 convolution behind"])
    pooled = with_pool(models.fast(model), dense="Dense_0", pool=pool.gmp())
    expected = with_pool(model, dense="Dense_0", pool=pool.gmp())
    run = lambda model: jax.jit(lambda variables: model.apply(variables, IMAGES).logits)(variables)
    np.testing.assert_allclose(run(pooled), run(expected), atol=1e-5)


def test_bf16():
    model, variables = ending(lambda x, train: nn.Dense(5, dtype=jnp.bfloat16)(x.astype(jnp.bfloat16).mean((1, 2))))
    run = lambda model: jax.jit(lambda variables: model.apply(variables, IMAGES).logits)(variables)
    pooled = lambda pool: run(with_pool(model, dense="Dense_0", pool=pool))
    logits = run(model)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(pooled(pool.gap()), logits, atol=0.02)
    assert np.abs(pooled(pool.gmp()) - logits).max() > 0.1


NOTHING_ELSE = (
    "it must be global average pooling (a mean over the spatial axes, or a full-window average pool) and this dense"
    " layer"
)
STOPS = {
    "layer norm": (
        lambda x, train: nn.Dense(5)(nn.LayerNorm()(x.mean((1, 2)))),
        "there is 'add', before the output of 'LayerNorm_0'; it",
    ),
    "batch norm": (
        lambda x, train: nn.Dense(5)(nn.BatchNorm(use_running_average=not train)(x.mean((1, 2)))),
        "there is 'add', before the output of 'BatchNorm_0'; it",
    ),
    "an activation": (lambda x, train: nn.Dense(5)(nn.relu(x.mean((1, 2)))), "(relu)"),
    "a gate": (
        lambda x, train: nn.Dense(5)(nn.silu(x.mean((1, 2)))),
        "there is 'mul' of values that both depend on the images",
    ),
    "another dense layer": (
        lambda x, train: nn.Dense(5, name="b")(nn.Dense(6, name="a")(x.mean((1, 2)))),
        "there is 'add', before the output of 'a'",
    ),
    "flattened": (
        lambda x, train: nn.Dense(5)(x.reshape(x.shape[0], -1)),
        "there is a change of shape from (4, 4, 4, 6) to (4, 96): features flattened, not pooled",
    ),
    "half flattened": (
        lambda x, train: nn.Dense(5)(x.mean(1).reshape(x.shape[0], -1)),
        "there is a change of shape from (4, 4, 6) to (4, 24)",
    ),
    "max pooling": (lambda x, train: nn.Dense(5)(x.max((1, 2))), "there is 'reduce_max'"),
    "channels": (
        lambda x, train: nn.Dense(5)(x.mean(3).mean(2)),
        "there is a mean over the channels of a value of shape (4, 4, 4, 6)",
    ),
    "part of the map": (
        lambda x, train: nn.Dense(5)(nn.avg_pool(x[:, :3], (2, 4), (2, 4))[:, 0, 0]),
        "there is an average pool with window (1, 2, 4, 1) over a value of shape (4, 3, 4, 6), not over all of it",
    ),
    "no dense layer": (
        lambda x, train: nn.relu(x.mean((1, 2))) * nn.Dense(1, name="Dense_0")(x.mean((1, 2, 3))[:, None]),
        "there is a change of shape from (4,) to (4, 1); it",
    ),
    "weights of positions": (
        lambda x, train: nn.Dense(5)((x.mean(1) * jnp.arange(4.0)[:, None]).mean(1)),
        "there is 'mul' by a value for each position",
    ),
    "a convolution of 3x3": (
        lambda x, train: nn.Conv(5, (3, 3), name="Dense_0")(x.mean((1, 2), keepdims=True))[:, 0, 0],
        "there is 'conv_general_dilated'",
    ),
    "class maps with another pooling": (
        lambda x, train: nn.Conv(5, (1, 1), name="Dense_0")(x).max((1, 2)),
        "behind 'Dense_0', a map of shape (4, 4, 4, 5), there is 'reduce_max', no mean over its positions",
    ),
    "in a loop": (
        lambda x, train: nn.remat(Head)(name="head")(x.mean((1, 2))),
        "'head/last' lies inside a function that cannot be entered (remat",
    ),
}


@pytest.mark.parametrize("case", STOPS)
def test_what_stands_on_the_way(case):
    end, text = STOPS[case]
    dense = {"another dense layer": "b", "in a loop": "last"}.get(case, "Dense_0")
    model, variables = ending(end)
    with pytest.raises(UserError) as raised:
        with_pool(model, dense=dense, pool=pool.gap()).apply(variables, IMAGES)
    message = str(raised.value)
    assert text in message and "\n" not in message
    if case != "in a loop":
        assert NOTHING_ELSE in message
        assert message.startswith(
            (f"with_pool: on the way back from '{dense}' there is ", f"with_pool: behind '{dense}', ")
        )


def test_a_wrong_name_lists_the_layers(foreign):
    model, dense, variables = foreign
    with pytest.raises(UserError) as raised:
        with_pool(model, dense="fc", pool=pool.gap()).apply(variables, IMAGES)
    assert str(raised.value).startswith("no layer 'fc'; layers: ") and dense in str(raised.value)
    convolution = {"Dense_0": "Conv_1", "linear1": "conv2"}[dense]
    with pytest.raises(UserError) as raised:
        with_pool(model, dense=convolution, pool=pool.gap()).apply(variables, IMAGES)
    follows = {"Dense_0": "'custom_jvp_call' (relu)", "linear1": "'sub'"}[dense]
    assert f"behind '{convolution}', a map of shape (4, 4, 4, 6), there is {follows}" in str(raised.value)
