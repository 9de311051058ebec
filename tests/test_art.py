"""`art`: the worked cases, its parts put together by hand, and what it takes from and leaves to the model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.test_objectives import BATCH, CLASSES, KEYS, TARGETS, VARIABLES, B, Small
from topgap_jax import balls, models, pool
from topgap_jax.attacks.alignment import as_vectors, class_gradients, cosine, softened, triplet, triplet_of
from topgap_jax.build import build
from topgap_jax.errors import UserError
from topgap_jax.models import bind
from topgap_jax.training import objectives
from topgap_jax.training.art import art
from topgap_jax.types import Model, Output

MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.2, 0.3)
PLAIN = as_vectors((0.0,), (1.0,))
EPS = 8 / 255
float32 = lambda values: jnp.asarray(values, jnp.float32)
sm = lambda t: np.log1p(np.exp(-np.float64(t)))


def make(row):
    return build(row, objectives.TABLE, {"mean": MEAN, "std": STD})


def spied(model):
    """The model with the images of its training pass in the place of the statistics that this pass would leave."""

    def apply(variables, images, *, train=False, keys=None, targets=None, step=None):
        out = model.apply(variables, images, train=train, keys=keys, targets=targets, step=step)
        return out._replace(batch_stats=images)

    return Model(model.init, apply)


MODEL = models.linen(Small(pool.gap()))
SPY = spied(MODEL)


@pytest.fixture(scope="module")
def run():
    """(loss, metrics, attacked images), compiled."""
    step = jax.jit(lambda keys, variables, batch: art(mean=MEAN, std=STD)(keys, SPY, variables, batch, 0))
    return lambda keys=KEYS, batch=BATCH: step(keys, VARIABLES, batch)


def as_image(values):
    """(d,) or (b, d) as images of one channel."""
    return float32(values).reshape(-1, np.shape(values)[-1], 1, 1)


def test_worked_soft_margin():
    """art T2: cosine distances 0 and 2."""
    x, p, n = (float32(v).reshape(1, 1, 3) for v in ([1, 2, 2], [2, 4, 4], [-1, -2, -2]))
    np.testing.assert_allclose(triplet(x, p, n), [0.12692801], atol=1e-6)
    np.testing.assert_allclose(triplet(x, n, p), [2.12692801], atol=1e-6)
    np.testing.assert_allclose(triplet(x, n, n), [0.69314718], atol=1e-6)


W3 = np.array([[1, 2, -1], [0.5, -1, 1], [-1, 0, 2]])
LINEAR = Model(
    None,
    lambda variables, images, **_: Output(
        images.reshape(len(images), 3) @ variables["params"].T + float32([0.1, 0, -0.2]), images, {}
    ),
)
LINEAR_WEIGHTS = {"params": float32(W3), "batch_stats": {}}
ONE = {"label": jnp.array([0]), "targets": jnp.eye(3)[None, 0], "id": jnp.arange(1), "mask": jnp.ones(1, bool)}


def test_worked_linear_model(monkeypatch):
    """art T3: distances, loss, its derivative, and one step of the attack without a random start."""
    x, everything = as_image([0.5, 0.2, 0.9]), jnp.ones((1, 3))
    predict = bind(LINEAR, LINEAR_WEIGHTS)
    p, n = class_gradients(predict, x, ONE["label"], jnp.ones(1))
    np.testing.assert_allclose(p.ravel(), W3[0])
    np.testing.assert_allclose(n.ravel(), W3[2])
    a = x.reshape(1, 3)
    assert 1 - float(cosine(a, p.reshape(1, 3))[0]) == pytest.approx(1.0, abs=1e-6)
    assert 1 - float(cosine(a, n.reshape(1, 3))[0]) == pytest.approx(0.44567814, abs=1e-6)
    loss = lambda points: triplet_of(PLAIN, predict, points, ONE["label"], jnp.ones(1), everything).sum()
    value, rise = jax.jit(jax.value_and_grad(loss))(x)
    assert float(value) == pytest.approx(1.00823529, abs=1e-6)
    np.testing.assert_allclose(rise.ravel(), [-0.6780828, -0.5584669, 0.50081642], atol=1e-5)

    monkeypatch.setattr(
        "topgap_jax.training.art.linf", lambda eps: balls.linf(eps)._replace(start=lambda keys, images, eps: 0 * images)
    )
    objective = art(mean=(0.0,), std=(1.0,), beta=None, steps=1, k=3)
    step = jax.jit(lambda batch: objective(KEYS[:1], LINEAR, LINEAR_WEIGHTS, batch, 0)[2])
    attacked = step({**ONE, "image": x})
    np.testing.assert_allclose(attacked.ravel(), [0.48039216, 0.18039216, 0.91960784], atol=1e-6)
    assert float(loss(attacked)) == pytest.approx(1.04230744, abs=1e-6)


# Rows clean 1, clean 2, attacked 1, attacked 2.
A4 = np.array([[1, 0, 0], [0, 1, 1], [1, 0, 1], [0, 1, 0]])
P4 = np.array([[1, 1, 0], [0, 2, 1], [2, 0, 1], [1, 1, 1]])
N4 = np.array([[0, 1, 0], [1, 0, -1], [1, 0, -1], [0, -1, 2]])


def blocks(rows):
    """(2 b, d) clean rows, then attacked ones -> (b, 2, d)."""
    return float32(rows).reshape(2, -1, rows.shape[-1]).transpose(1, 0, 2)


def unmined(a, p, n):
    return np.mean([triplet(a[:, r, None], p[:, r, None], n[:, r, None]) for r in (0, 1)], 0)


def test_worked_mining():
    """art T4."""
    a, p, n = blocks(A4), blocks(P4), blocks(N4)
    np.testing.assert_allclose(
        triplet(a, p, n), [(0.69314718 + 0.47407698) / 2, (0.4739755 + 0.44557255) / 2], atol=1e-6
    )
    assert float(triplet(a, p, n).mean()) == pytest.approx(0.52169305, abs=1e-6)
    assert unmined(a, p, n).mean() == pytest.approx(0.31146128, abs=1e-6)


def test_mining_laws():
    """art T5 and T16: never below the unmined loss, equal to it where both images are one; equal to the masked 2b x 2b
    form of the authors' code; free of the vectors' scales.
    """
    random = np.random.default_rng(0)
    rows = random.normal(size=(3, 2 * B, 7))
    a, p, n = map(blocks, rows)
    mined = np.asarray(triplet(a, p, n))
    assert (mined >= unmined(a, p, n) - 1e-6).all() and (mined > unmined(a, p, n) + 0.01).any()
    same = [jnp.repeat(x[:, :1], 2, 1) for x in (a, p, n)]
    np.testing.assert_allclose(triplet(*same), unmined(*same), atol=1e-6)
    unit = rows / np.linalg.norm(rows, axis=2, keepdims=True)
    other = np.arange(2 * B)[:, None] % B != np.arange(2 * B) % B
    positive, negative = 1 - unit[0] @ unit[1].T, 1 - unit[0] @ unit[2].T
    whole = sm(np.where(other, np.inf, negative).min(1) - np.where(other, -np.inf, positive).max(1))
    np.testing.assert_allclose(mined, whole.reshape(2, B).mean(0), atol=1e-5)
    np.testing.assert_allclose(triplet(a, 7 * p, 0.01 * n), mined, atol=1e-5)


def test_worked_two_layers():
    """art T6: second derivatives through the softplus twin of a ReLU network, and none with the ReLU itself."""
    x, label, one = as_image([0.6, 0.2]), jnp.array([0]), jnp.ones(1)
    weights = {"w": float32([[1, -1], [0.5, 1]]), "v": float32([[1, -0.5], [-1, 1]])}
    network = lambda weights: (
        lambda images, keys=None: jax.nn.relu(images.reshape(-1, 2) @ weights["w"].T) @ weights["v"].T
    )
    twin = lambda weights: softened(network(weights), 2.0)
    np.testing.assert_allclose(twin(weights)(x)[0], [0.25723491, 0.07108051], atol=1e-6)
    gradients = lambda weights: [g.reshape(1, 1, 2) for g in class_gradients(twin(weights), x, label, jnp.ones(1))]
    p, n = gradients(weights)
    np.testing.assert_allclose(p.ravel(), [0.50720984, -1.05550377], atol=1e-6)
    np.testing.assert_allclose(n.ravel(), [-0.32444519, 1.42103306], atol=1e-6)
    loss = lambda weights: triplet(x.reshape(1, 1, 2), *gradients(weights)).sum()
    value, gradient = jax.jit(jax.value_and_grad(loss))(weights)
    assert float(value) == pytest.approx(0.67887867, abs=1e-6)
    np.testing.assert_allclose(gradient["v"], [[-0.1348695, -0.269739], [0.17467255, 0.17467255]], atol=1e-5)
    np.testing.assert_allclose(gradient["w"], [[-0.6011448, -0.21483], [0.4772754, 0.15415303]], atol=1e-5)

    raised = lambda predict: jax.grad(
        lambda points: triplet_of(PLAIN, predict, points, label, one, jnp.ones((1, 2))).sum()
    )(x).ravel()
    np.testing.assert_allclose(raised(twin(weights)), [-0.59837294, 1.82749849], atol=1e-5)
    relu = network(weights)
    p, n = (g.reshape(1, 2) for g in class_gradients(relu, x, label, one))
    by_anchor = jax.grad(lambda a: jax.nn.softplus(cosine(a, n) - cosine(a, p)).sum())(x.reshape(1, 2)).ravel()
    np.testing.assert_allclose(raised(relu), by_anchor, atol=1e-6)


@pytest.mark.slow
def test_remat_keeps_less():
    """Of what a second differentiation needs; that it changes no gradient is tested below."""

    def kept(remat):
        def gradients(params):
            predict = softened(bind(MODEL, {**VARIABLES, "params": params}, train=True), 50.0)
            return class_gradients(predict, BATCH["image"], BATCH["label"], jnp.ones(B), remat=remat)

        _, backward = jax.vjp(jax.jit(gradients), VARIABLES["params"])
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    assert kept(True) < 0.7 * kept(False)


def test_zero_gradients_are_finite():
    """A network that answers the same to every image: cosine 0, distance 1, loss log 2, and finite derivatives."""
    zero = jax.tree.map(jnp.zeros_like, VARIABLES["params"])

    def mean(params):
        loss, metrics, _ = art(mean=MEAN, std=STD, steps=1)(KEYS, MODEL, {**VARIABLES, "params": params}, BATCH, 0)
        return loss.mean(), metrics

    (_, metrics), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(zero)
    np.testing.assert_allclose(metrics["alignment"], np.log(2), atol=1e-6)
    np.testing.assert_array_equal(metrics["cosine_true"], 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    black = {**BATCH, "image": jnp.zeros_like(BATCH["image"])}  # with mean 0, anchors of zeros
    still = art(mean=(0, 0, 0), std=STD, steps=0, eps=0)
    assert np.isfinite(jax.jit(lambda v: still(KEYS, MODEL, v, black, 0)[0])(VARIABLES)).all()


def test_inside_ball_and_box_and_reproducible(run):
    loss, metrics, attacked = run()
    change = np.asarray(attacked - BATCH["image"])
    assert np.abs(change).max() <= EPS + 1e-6 and np.abs(change).max() > EPS / 2
    assert float(attacked.min()) >= 0 and float(attacked.max()) <= 1
    np.testing.assert_array_equal(run()[2], attacked)
    other = run(keys=jax.random.split(jax.random.key(5), B))
    assert (np.asarray(other[2]) != np.asarray(attacked)).any((1, 2, 3)).all()
    assert (
        loss.shape
        == metrics["alignment"].shape
        == metrics["cosine_true"].shape
        == metrics["cosine_wrong"].shape
        == (B,)
    )


def test_the_attack_raises_what_it_is_for(run):
    """The loss restricted to the entries that are largest at the start, written out here; from the start on, and above
    noise."""
    _, _, attacked = run()
    start = jnp.clip(BATCH["image"] + balls.linf(EPS).start(KEYS, BATCH["image"], jnp.full(B, EPS)), 0, 1)
    relu = bind(MODEL, VARIABLES, train=True)
    vectors = as_vectors(MEAN, STD)
    size = np.abs(vectors.gradients(relu, start, BATCH["label"], jnp.ones(B))[0])
    count = 35  # .3255 of 108
    chosen = float32(size >= np.sort(size)[:, -count][:, None])
    assert (chosen.sum(1) == count).all()
    restricted = jax.jit(
        lambda points: triplet_of(vectors, softened(relu, 50.0), points, BATCH["label"], jnp.ones(B), chosen)
    )
    before, after = restricted(start), restricted(attacked)
    assert after.mean() > before.mean() + 0.01
    assert (after > before).mean() > 0.8


def by_hand(attacked, params, weight=0.5, variant="signed"):
    """Loss and parts for given attacked images: clean and attacked as two halves of one batch."""
    variables = {**VARIABLES, "params": params}
    both = jnp.concatenate([BATCH["image"], attacked])
    labels = jnp.concatenate([BATCH["label"]] * 2)
    soft = softened(lambda images: MODEL.apply(variables, images, train=True).logits, 50.0)
    logits, vjp = jax.vjp(soft, both)
    wrong = jnp.where(jax.nn.one_hot(labels, CLASSES) > 0, -jnp.inf, logits).argmax(-1)
    p, n = (vjp(jax.nn.one_hot(index, CLASSES))[0] * jnp.array(STD) for index in (labels, wrong))
    a = (both - jnp.array(MEAN)) / jnp.array(STD)
    flat = lambda x: (x if variant == "signed" else jnp.abs(x).mean(-1)).reshape(2, B, -1).transpose(1, 0, 2)
    aligned = triplet(flat(a), flat(p), flat(n))
    out = MODEL.apply(variables, attacked, train=True)
    entropy = -(jax.nn.log_softmax(out.logits) * TARGETS).sum(1)
    return entropy + weight * aligned, entropy, aligned, out.batch_stats


OTHER = ", variant='abs_mean', k=12, weight=2, remat=True"


@pytest.mark.parametrize("options", ["", pytest.param(OTHER, marks=pytest.mark.slow)])
def test_the_loss_and_its_gradient(options):
    """Equal to the parts put together here with the attacked images held fixed; only the pass on these leaves
    statistics."""
    objective = make(f"art(mean=mean, std=std{options})")
    weight, variant = (2, "abs_mean") if options else (0.5, "signed")

    def mean(params, model):
        loss, metrics, stats = objective(KEYS, model, {**VARIABLES, "params": params}, BATCH, 0)
        return loss.mean(), (loss, metrics, stats)

    ours = jax.jit(lambda params: jax.value_and_grad(mean, has_aux=True)(params, MODEL))
    (_, (loss, metrics, stats)), gradient = ours(VARIABLES["params"])
    attacked = jax.jit(lambda params: mean(params, SPY)[1][2])(VARIABLES["params"])
    held = lambda params: (
        by_hand(attacked, params, weight, variant)[0].mean(),
        by_hand(attacked, params, weight, variant),
    )
    (_, expected), by_hands = jax.jit(jax.value_and_grad(held, has_aux=True))(VARIABLES["params"])
    np.testing.assert_allclose(loss, expected[0], atol=1e-5)
    np.testing.assert_allclose(metrics["cross_entropy"], expected[1], atol=1e-5)
    np.testing.assert_allclose(metrics["alignment"], expected[2], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), stats, expected[3])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient, by_hands)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 0.01


@pytest.mark.slow
def test_training_aligns():
    """40 steps on a fixed batch of noise: with the triplet loss, p ends nearer to the image than n by more than without
    it."""

    def train(weight):
        objective, optimizer = art(mean=MEAN, std=STD, weight=weight), optax.adam(0.02)

        @jax.jit
        def step(variables, state):
            def mean(params):
                loss, metrics, stats = objective(KEYS, MODEL, {**variables, "params": params}, BATCH, 0)
                return loss.mean(), (metrics, stats)

            gradient, (metrics, stats) = jax.grad(mean, has_aux=True)(variables["params"])
            updates, state = optimizer.update(gradient, state)
            return {"params": optax.apply_updates(variables["params"], updates), "batch_stats": stats}, state, metrics

        variables, state = VARIABLES, optimizer.init(VARIABLES["params"])
        for _ in range(40):
            variables, state, metrics = step(variables, state)
        return {name: float(values.mean()) for name, values in metrics.items()}

    without, with_ = train(0), train(2)
    assert with_["alignment"] < without["alignment"] - 0.01
    assert with_["cosine_true"] - with_["cosine_wrong"] > without["cosine_true"] - without["cosine_wrong"] + 0.02


@pytest.mark.slow
def test_jit_equals_eager_and_k_is_the_share(run):
    loss, metrics, attacked = art(mean=MEAN, std=STD, k=35)(KEYS, SPY, VARIABLES, BATCH, 0)
    np.testing.assert_allclose(loss, run()[0], atol=1e-4)
    assert (np.abs(attacked - run()[2]) < 1e-6).mean() > 0.99  # a derivative near 0 may have either sign


def test_no_steps_and_no_radius():
    """steps=0 leaves the random start, eps=0 the image itself: two of the paper's controls."""
    attacked = lambda **options: jax.jit(lambda v: art(mean=MEAN, std=STD, **options)(KEYS, SPY, v, BATCH, 0)[2])(
        VARIABLES
    )
    noise = attacked(steps=0) - BATCH["image"]
    assert np.abs(noise).max() <= EPS + 1e-6 and np.abs(noise).mean() == pytest.approx(EPS / 2, rel=0.05)
    np.testing.assert_array_equal(attacked(steps=0, eps=0), BATCH["image"])


@pytest.mark.slow
def test_bfloat16_computes_only_the_cross_entropy():
    """The attacked images, alignment and cosines of a bf16 network are those of its float32 twin."""
    backbone = models.small_resnet(widths=(4,), stem=4, stem_kernel=3, stem_stride=1)
    options = {"classes": CLASSES, "mean": MEAN, "std": STD}
    full, half = (
        models.classifier(backbone, models.map_head(pool.top_gap(k=5)), dtype=dtype, **options)
        for dtype in ("float32", "bfloat16")
    )
    variables = jax.jit(full.init)(jax.random.key(0), BATCH["image"])
    step = lambda model: jax.jit(lambda v: art(mean=MEAN, std=STD, steps=2)(KEYS, spied(model), v, BATCH, 0))(variables)
    (_, metrics, attacked), (_, rounded, same) = step(full), step(half)
    np.testing.assert_allclose(same, attacked, atol=1e-6)
    for name in ("alignment", "cosine_true", "cosine_wrong"):
        np.testing.assert_allclose(rounded[name], metrics[name], atol=1e-6)
    assert 1e-4 < np.abs(rounded["cross_entropy"] - metrics["cross_entropy"]).max() < 0.1


class Dropped(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3))(x))
        return nn.Dense(CLASSES)(nn.Dropout(self.rate, deterministic=not train)(nn.relu(x).mean((1, 2))))


class NNXDropped(nnx.Module):
    def __init__(self, rate):
        rngs = nnx.Rngs(0)
        self.conv, self.norm = nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.dropout, self.dense = nnx.Dropout(rate, rngs=rngs), nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.dropout(nnx.relu(self.norm(self.conv(x))).mean((1, 2))))


@pytest.mark.parametrize(
    "make",
    [
        lambda rate: models.linen(Dropped(rate)),
        pytest.param(lambda rate: models.nnx(NNXDropped(rate)), marks=pytest.mark.slow),
    ],
)
def test_dropout_is_in_the_cross_entropy_only(make):
    """On modules that nobody wrote for this: attack and alignment are those of the module without dropout."""
    dropped, whole = make(0.5), make(0.0)
    variables = dropped.init(jax.random.key(0), BATCH["image"])
    step = lambda model: jax.jit(lambda v: art(mean=MEAN, std=STD, steps=1)(KEYS, spied(model), v, BATCH, 0))(variables)
    (_, metrics, attacked), (_, plain, same) = step(dropped), step(whole)
    np.testing.assert_array_equal(attacked, same)
    np.testing.assert_allclose(metrics["alignment"], plain["alignment"], atol=1e-6)
    assert np.abs(metrics["cross_entropy"] - plain["cross_entropy"]).max() > 0.01


def test_the_twin_leaves_top_gap_alone():
    """Its arithmetic on counts is no ReLU."""
    with pytest.raises(UserError, match="the function has no functions named relu"):
        softened(pool.top_gap(k=5), 50.0)(BATCH["image"])


def test_padded_rows_pull_at_nothing(run):
    """Rows act on each other through batch norm, but a padded row's label has no say in another row's gradients."""
    mask = jnp.arange(B) < B - 3
    labels = BATCH["label"].at[-3:].add(1) % CLASSES
    changed = {**BATCH, "label": labels, "targets": jax.nn.one_hot(labels, CLASSES), "mask": mask}
    loss, metrics, attacked = run(batch={**BATCH, "mask": mask})
    for name, values in {**run(batch=changed)[1], "loss": run(batch=changed)[0]}.items():
        np.testing.assert_allclose(values[:-3], {**metrics, "loss": loss}[name][:-3], atol=1e-6)
    whole = run(batch={**changed, "mask": BATCH["mask"]})
    assert np.abs(whole[1]["alignment"][:-3] - metrics["alignment"][:-3]).max() > 1e-5


def test_errors():
    one = Model(None, lambda variables, images, **_: Output(jnp.maximum(images, 0).sum((1, 2, 3))[:, None], {}, {}))
    for call, text in {
        lambda: art(mean=MEAN, std=STD)(
            KEYS, one, {"params": {}, "batch_stats": {}}, BATCH, 0
        ): "alignment needs a best wrong class, and the model has 1 class; give it two or more",
        lambda: make("art(mean=mean)"): "art: missing a required argument: 'std'; usage: art(*, mean, std, weight=0.5,",
        lambda: make(
            "art(mean=mean, std=(1, 1))"
        ): "art: mean and std need one finite number per channel each, every std above 0;",
        lambda: make("art(mean=(0,), std=(1,))")(
            KEYS, MODEL, VARIABLES, BATCH, 0
        ): "the images have 3 channels, mean and std have 1; they must agree",
        lambda: make("art(mean=mean, std=std, k=200)")(
            KEYS, MODEL, VARIABLES, BATCH, 0
        ): "alignment: k=200 is more than the 108 entries of an image's gradient",
        lambda: make("art(mean=mean, std=std, k=0)"): "art: k must be a whole number of at least 1, got 0",
        lambda: make("art(mean=mean, std=std, fraction=2)"): "art: fraction must be a number in [1e-09, 1], got 2",
        lambda: make("art(mean=mean, std=std, eps=-1)"): "art: eps must be a number in [0, 1e+06], got -1",
        lambda: make(
            "art(mean=mean, std=std, variant='abs')"
        ): "art: variant must be 'signed' or 'abs_mean', got 'abs'",
    }.items():
        with pytest.raises(UserError) as raised:
            call()
        assert str(raised.value).startswith(text)
