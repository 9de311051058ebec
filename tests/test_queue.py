"""The queue of attacks: verdicts depend neither on order, neighbours, width, chunks nor devices, nor on a stop; what it
costs; curves over radii; what is saved."""

import contextlib
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import laws
from topgap_jax import scores
from topgap_jax.attacks import attack as attacked
from topgap_jax.attacks import fgsm, pgd
from topgap_jax.attacks.state import BROKEN, FINISHED, NEVER, RUNNING, norms, select, start
from topgap_jax.balls import linf
from topgap_jax.evaluators import curve, robust
from topgap_jax.keys import example_keys, fold_in, split
from topgap_jax.measure import evaluate, queue
from topgap_jax.measure import robust as robust_module
from topgap_jax.measure.log import Log
from topgap_jax.measure.robust import attack_split
from topgap_jax.measure.splits import Split, narrowed, resident_split, rows_of
from topgap_jax.mesh import data_mesh
from topgap_jax.models import bind
from topgap_jax.rewrite.interpreter import subjaxprs
from topgap_jax.types import Attack, Cost, Model, Output

N, WIDTH, CLASSES = 64, 16, 3
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (N, 4, 4, 3)).astype(np.uint8)
# attacks 11.8: pixels are multiples of 2^-8, weights of 2^-6, so that every sum of the 48 products is exact.
WEIGHTS = jnp.asarray(RNG.integers(-64, 65, (48, CLASSES)) / 64, jnp.float32)
VARIABLES = {"params": WEIGHTS, "batch_stats": {}}


@jax.custom_jvp
def quantised(images):
    return jnp.round(images * 256) / 256


@quantised.defjvp
def _(primals, tangents):
    return quantised(*primals), tangents[0]


def apply(variables, images, *, train=False, keys=None, targets=None, step=None):
    return Output(quantised(images).reshape(images.shape[0], -1) @ variables["params"], {}, {})


MODEL = Model(None, apply)
PIXELS = IMAGES * np.float32(1 / 255)  # as a split decodes them
LOGITS = np.asarray(apply(VARIABLES, PIXELS).logits)
LABELS = LOGITS.argmax(1).astype(np.int32)
LABELS[::9] = (LABELS[::9] + 1) % CLASSES
MARGIN = np.sort(LOGITS, 1)[:, -1] - np.sort(LOGITS, 1)[:, -2]
EPS = float(np.quantile(MARGIN, 0.7)) / 48
ATTACK = pgd(linf(EPS), score=scores.margin, steps=6, step_size=EPS / 4)._replace(runs=3)
ATTACKS = robust(fgsm(linf(EPS / 4), score=scores.margin), ATTACK)


def split_of(width=WIDTH, mesh=None, images=IMAGES):
    return resident_split({"image": images, "label": LABELS}, classes=CLASSES, batch=width, mesh=mesh)


def shuffled(data, seed):
    """The same split, whose batches come in another order."""

    def batches(ids, width=None):
        ids = np.arange(N) if ids is None else ids
        yield from data.batches(np.random.default_rng(seed).permutation(ids), width)

    return Split(N, batches, data.batch)


def run(data, attacks=ATTACKS, model=MODEL, variables=VARIABLES, **options):
    return attack_split(model, variables, data, attacks, seed=4, progress=False, **options)


@functools.cache
def plain():
    return run(split_of(), keep="all")


def assert_same(one, other, but=()):
    """Every array of what became of the examples is equal bit for bit; also the images, and all that is counted."""
    rows = np.setdiff1d(np.arange(N), but)
    for name, a, b in zip(one.examples._fields, one.examples, other.examples):
        np.testing.assert_array_equal(a[rows], b[rows], err_msg=name)
    if other.kept is not None:
        np.testing.assert_array_equal(one.kept.images[rows], other.kept.images[rows])
    if not len(but):
        same = lambda measures: {name: measure for name, measure in measures.items() if name != "utilisation"}
        assert same(one.measures) == same(other.measures) and one.cost == other.cost


def test_the_verdicts_are_those_of_each_example_alone():
    """Run after run, step after step, without a queue."""
    alone = {}
    images, labels = jnp.asarray(PIXELS), jnp.asarray(LABELS)
    predict = bind(MODEL, VARIABLES)
    for number, attack in enumerate(ATTACKS.runs):
        keys = example_keys(jax.random.fold_in(jax.random.key(4), number), jnp.arange(N))
        alone[number] = jax.jit(lambda keys=keys, attack=attack: attacked(attack, keys, predict, images, labels))()
    examples, kept = plain().examples, plain().kept
    wrong = LOGITS.argmax(1) != LABELS
    first = np.where(
        np.asarray(alone[0].status) == BROKEN, 0, np.where(np.asarray(alone[1].status) == BROKEN, 1, NEVER)
    )
    np.testing.assert_array_equal(examples.attack, np.where(wrong, NEVER, first))
    np.testing.assert_array_equal(examples.radius == 0, wrong)
    np.testing.assert_array_equal(np.isinf(examples.radius), first == NEVER)
    for number, state in alone.items():
        rows = np.flatnonzero(examples.attack == number)
        assert len(rows) > 4
        np.testing.assert_array_equal(examples.run[rows], np.asarray(state.run)[rows])
        np.testing.assert_array_equal(examples.step[rows], np.asarray(state.broken_at)[rows])
        np.testing.assert_allclose(kept.images[rows], np.asarray(state.best)[rows], atol=1e-6)  # another program
    stands = examples.attack == NEVER
    np.testing.assert_array_equal(kept.images[stands], np.asarray(images)[stands])
    assert set(examples.run[examples.attack == 1]) >= {0, 1} and len(set(examples.step)) > 3
    assert (np.isinf(examples.radius).sum() > 4) and plain().measures["unconfirmed"].value == 0


def draws(variables, images, *, train=False, keys=None, targets=None, step=None):
    """The linear network plus what each example's key draws, in 64ths, so that a mean over four is exact too."""
    logits = apply(variables, images).logits
    if keys is None:
        return Output(logits, {}, {})
    noise = jax.vmap(lambda key: jax.random.randint(key, (CLASSES,), -128, 129))(keys)
    return Output(logits + noise / 64, {}, {})


RANDOM = Model(None, draws)
SAMPLED = pgd(linf(EPS), score=scores.margin, steps=3, step_size=EPS / 2, samples=4)


@functools.cache
def sampled():
    return run(split_of(), robust(SAMPLED), RANDOM)


@pytest.mark.parametrize("other", ["width 4", "order", "eight devices"])
def test_verdicts_on_a_network_that_draws_are_each_example_s_own(other):
    mesh = data_mesh() if other == "eight devices" else None
    data = split_of(4 if other == "width 4" else WIDTH, mesh)
    assert_same(sampled(), run(shuffled(data, 1) if other == "order" else data, robust(SAMPLED), RANDOM, mesh=mesh))


def test_verdicts_on_a_network_that_draws_are_means_over_fresh_draws():
    """Step after step without a queue, then four passes that no step has made."""
    images, labels, predict = jnp.asarray(PIXELS), jnp.asarray(LABELS), bind(RANDOM, VARIABLES)
    keys = example_keys(jax.random.fold_in(jax.random.key(4), 0), jnp.arange(N))

    @jax.jit
    def alone():
        state = SAMPLED.init(keys, predict, images, labels, jnp.asarray(LOGITS))
        for _ in range(SAMPLED.steps):
            state = select(queue.goes_on(SAMPLED, state.status, state.count), SAMPLED.step(predict, state), state)
        points = jnp.where((state.status == BROKEN)[:, None, None, None], state.best, state.images + state.delta)
        passes = [predict(points, each) for each in split(fold_in(keys, queue.VERDICT), 4)]
        return state, sum(passes) / 4

    state, means = jax.device_get(alone())
    right = LOGITS.argmax(1) == LABELS
    examples, broken = sampled().examples, right & (means.argmax(1) != LABELS)
    np.testing.assert_array_equal(np.isinf(examples.radius), right & ~broken)
    np.testing.assert_array_equal(examples.step[broken], np.where(state.status == BROKEN, state.broken_at, 3)[broken])
    np.testing.assert_array_equal(examples.predicted[broken], means.argmax(1)[broken])
    unconfirmed = right & (state.status == BROKEN) & ~broken
    assert sampled().measures["unconfirmed"].value == unconfirmed.sum() and 4 < broken.sum() < right.sum() - 4


@pytest.mark.parametrize("attacks, model", [(ATTACKS, MODEL), (robust(SAMPLED), RANDOM)])
def test_a_part_of_a_split_draws_as_the_whole(attacks, model):
    rows = np.arange(3, N, 5)
    whole = (plain if model is MODEL else sampled)().examples
    part = run(rows_of(split_of(), rows), attacks, model).examples
    for name, a, b in zip(part._fields, whole, part):
        np.testing.assert_array_equal(a[rows], b, err_msg=name)


@pytest.mark.parametrize("width", [1, 4])
def test_the_width_changes_nothing(width):
    assert_same(plain(), run(split_of(width)))


@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_changes_nothing(seed):
    assert_same(plain(), run(shuffled(split_of(), seed), keep="all"))


@pytest.mark.parametrize(("longest", "share"), [(1, 8), (64, 1)])
def test_the_chunks_and_the_refilling_change_nothing(longest, share, monkeypatch):
    monkeypatch.setattr(queue, "LONGEST", longest)
    monkeypatch.setattr(queue, "SHARE", share)
    assert_same(plain(), run(split_of()))


def test_eight_devices_change_nothing():
    mesh = data_mesh()
    assert_same(plain(), run(split_of(mesh=mesh), mesh=mesh, keep="all"))


def test_the_neighbours_change_nothing():
    """One example replaced by noise: the others are as they were, also with a network whose sums are not exact."""
    noise = IMAGES.copy()
    noise[5] = RNG.integers(0, 256, IMAGES[5].shape)
    assert_same(plain(), run(split_of(images=noise)), but=[5])
    images = RNG.integers(0, 256, (N, laws.SIZE, laws.SIZE, 3)).astype(np.uint8)
    labels = np.asarray(laws.PREDICT(images / np.float32(255)).argmax(1)).astype(np.int32)
    attacks, results = robust(pgd(linf(0.1), steps=4)._replace(runs=2)), []
    for seed in (None, 3):
        arrays = {"image": images.copy(), "label": labels}
        if seed:
            arrays["image"][5] = noise[5, :1, :1]
        data = resident_split(arrays, classes=laws.CLASSES, batch=8)
        data = shuffled(data, seed) if seed else data
        results.append(run(data, attacks, laws.MODEL, laws.VARIABLES))
    assert_same(*results, but=[5])
    assert 4 < np.isfinite(results[0].examples.radius).sum() < N - 4


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_point_it_goes_on_where_it_was(seed, tmp_path):
    """Also a half-written line and half-written images: nothing differs, and what was decided is not attacked again."""
    data, stop = split_of(), int(np.random.default_rng(seed).integers(1, 8))
    asked = []

    class Killed(BaseException):
        pass

    class Dying(Log):
        def append(self, entry):
            if len(asked) == stop:
                with self.path.open("a") as file:
                    file.write('{"phase": 0, "ids": [3')
                raise Killed
            asked.append(entry["ids"])
            super().append(entry)

    path = tmp_path / "log.jsonl"
    with pytest.raises(Killed):
        run(data, log=Dying(path, {"a": 1}), keep="all")
    log = Log(path, {"a": 1})
    assert [entry["ids"] for entry in log.entries] == asked
    resumed = run(data, log=log, keep="all")
    assert_same(plain(), resumed)
    again = [entry["ids"] for entry in Log(path, {"a": 1}).entries]
    assert again[:stop] == asked and len(again) > stop
    assert Log(path, {"a": 2}).entries == []


@pytest.mark.slow
@pytest.mark.parametrize("left", [b"x", None])
def test_images_that_are_lost_are_made_again(left, tmp_path):
    """The log alone would leave the clean image in the place of one that broke."""
    path = tmp_path / "log.jsonl"
    images = np.array(run(split_of(), log=Log(path, {}), keep="all").kept.images)
    file = path.with_suffix(".npy")
    file.unlink() if left is None else file.write_bytes(left)
    log = Log(path, {})
    assert log.entries
    again = run(split_of(), log=log, keep="all")
    assert_same(plain(), again)
    np.testing.assert_array_equal(again.kept.images, images)


# What it costs.


def endless(attack):
    """The attack, whose runs take all their steps where nothing breaks: also those that go round."""

    def step(predict, state):
        state = attack.step(predict, state)
        return state._replace(status=jnp.where(state.status == FINISHED, RUNNING, state.status))

    return attack._replace(step=step)


def counted(data, attacks, **options):
    """(result, [(steps in a dispatch)], slot steps)."""
    dispatches, functions = [], queue.functions

    def watched(*arguments):
        parts = functions(*arguments)

        def steps(variables, source, state, n):
            dispatches.append(n)
            return parts.steps(variables, source, state, n)

        steps.lower = parts.steps.lower
        return parts._replace(steps=steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue, "functions", watched)
        return run(data, attacks, **options), dispatches


def test_weights_that_are_committed_to_a_device_compile_nothing_twice():
    """As those of a checkpoint are; the state of the first step, which depends on no weight, would not be."""
    attack = pgd(linf(EPS), score=scores.margin, steps=4, step_size=EPS / 4)
    run(split_of(), robust(attack), variables=jax.device_put(VARIABLES, jax.devices()[0]))
    parts = queue.functions(attack, MODEL, None)
    for jitted in (parts.start, parts.steps, parts.fill, parts.retire):
        assert jitted._cache_size() == 1


def test_where_all_stand_nothing_is_wasted():
    """Full batches: every slot takes every step, in dispatches of 1, 2, 4, 8 and what is left."""
    stands = endless(pgd(linf(1e-6), steps=20, start=None))
    right = np.flatnonzero(LOGITS.argmax(1) == LABELS)[:48]
    data = resident_split({"image": IMAGES[right], "label": LABELS[right]}, classes=CLASSES, batch=WIDTH)
    result, dispatches = counted(data, robust(stands))
    assert dispatches == [1, 2, 4, 8, 5] * 3
    assert result.measures["utilisation"].value == 1
    assert result.cost == Cost(2, 20)


def test_where_all_break_at_once_hardly_anything_is_computed():
    """At most a twentieth of the full run's gradients, by the images that need them and by the slots that compute."""
    data, n = split_of(), (LOGITS.argmax(1) == LABELS).sum()
    result, dispatches = counted(data, robust(pgd(linf(8 * EPS), score=scores.margin, steps=100, step_size=4 * EPS)))
    assert result.measures["robust_accuracy"].value == 0
    assert result.cost.gradients * N <= n * 100 / 20
    assert sum(dispatches) * WIDTH <= n * 100 / 20


def test_the_queue_beats_batches_that_wait_for_their_last():
    """attacks 11.9: half of the examples stand; the steps of all slots are fewer than in batches of the same width."""
    attack = endless(pgd(linf(EPS), score=scores.margin, steps=40, step_size=EPS / 4))
    result, dispatches = counted(split_of(4), robust(attack))
    right = np.flatnonzero(LOGITS.argmax(1) == LABELS)
    steps = np.where(np.isinf(result.examples.radius), 40, result.examples.step + 1)[right]
    static = sum(max(steps[i : i + 4]) for i in range(0, len(steps), 4))
    assert 0.2 < (steps == 40).mean() < 0.8
    assert sum(dispatches) < 0.9 * static
    used = result.measures["utilisation"].value
    assert used == pytest.approx(steps.sum() / (4 * sum(dispatches))) and used > 0.75


def test_what_is_counted_is_what_was_done():
    """fgsm evaluates each attacked image once; of the runs of pgd each takes the steps up to its break."""
    examples = plain().examples
    right = examples.radius > 0
    after_fgsm = right & (examples.attack != 0)
    broken = examples.attack == 1
    # A break at the last iterate is seen by the verdict's forward pass, one before by the step that evaluates it.
    steps = np.where(broken, 6 * examples.run + np.minimum(examples.step + 1, 6), 18)[after_fgsm].sum()
    assert plain().cost.gradients * N == pytest.approx(right.sum() + steps)
    runs = np.where(broken, examples.run + 1, 3)[after_fgsm].sum()
    assert plain().cost.forwards * N == pytest.approx(N + right.sum() + runs)
    curve = plain().measures["after_runs"].y
    assert curve == pytest.approx([right.mean(), after_fgsm.mean(), np.isinf(examples.radius).mean()])
    assert plain().measures["after_1"].label.startswith("accuracy after fgsm")
    assert plain().measures["after_1"].value == pytest.approx(curve[1])


def primitives(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for body in subjaxprs(eqn):
            yield from primitives(body)


IN_A_CHUNK = (
    "pgd(linf(.06), steps=4)", "fgsm(l2(.3))", "r_fgsm(linf(.06))", "mim(l2(.3), steps=4)", "noise(l2(.3), draws=4)",
    "apgd(l2(.3), steps=4)", "apgd_t(l1(1), steps=4)", "fab(linf(.06), steps=4)", "fab_t(l1(1), steps=4)",
    "square(l2(.3), queries=9)", "fmn(l1(1), steps=4)", "pgd(l2(.3), steps=4, optimizer=adamw(.02, weight_decay=0))",
    "bpda(pgd(linf(.06), steps=4), guided_backprop)",
)  # fmt: skip


@pytest.mark.parametrize("text", IN_A_CHUNK)
def test_no_host_callback_in_a_chunk(text):
    parts = queue.functions(laws.make(text), laws.MODEL, None)
    variables = laws.VARIABLES
    rows = jax.ShapeDtypeStruct((laws.B,), jnp.int32)
    arguments = (
        jax.random.key(0),
        variables,
        (),
        laws.BATCH,
        jax.ShapeDtypeStruct((laws.B, laws.CLASSES), jnp.float32),
        rows,
    )
    state = jax.eval_shape(parts.start, *arguments, None)
    traced = [parts.start.trace(*arguments, None), parts.steps.trace(variables, (), state, 8)]
    names = {name for one in traced for name in primitives(one.jaxpr.jaxpr)}
    assert "while" in names and not [name for name in names if "callback" in name or "infeed" in name]


# Runs that end by themselves, and norms.


def one_pixel(points, keys=None):
    """Its score rises to .53 and falls beyond: signs of a fixed size go round there."""
    x = points[:, 0, 0, 0]
    return jnp.stack([jnp.ones_like(x), 0.9 - jnp.abs(x - 0.53)], -1)


def test_a_cycle_of_iterates_ends_a_run():
    """breadth_attacks 3, with steps of 1/64: .5, .515625, .53125, .515625, ... is seen once the kept .53125 is back."""
    attack = pgd(linf(0.1), score=scores.margin, steps=20, step_size=1 / 64, start=None)
    images, labels = jnp.full((1, 1, 1, 1), 0.5), jnp.zeros(1, jnp.int32)
    keys, step = jax.random.split(jax.random.key(0), 1), jax.jit(lambda state: attack.step(one_pixel, state))
    state, seen = attack.init(keys, one_pixel, images, labels, one_pixel(images)), []
    for _ in range(8):
        seen.append((float(state.delta[0, 0, 0, 0]) + 0.5, int(state.status[0])))
        state = step(state)
    assert [point for point, _ in seen[:6]] == [0.5, 0.515625, 0.53125, 0.515625, 0.53125, 0.515625]
    assert [status for _, status in seen] == [RUNNING] * 5 + [FINISHED] * 3


def test_without_the_end_of_cycles_the_verdicts_are_the_same():
    attack = pgd(linf(EPS), score=scores.margin, steps=40, step_size=EPS / 4)._replace(runs=2)
    early, late = run(split_of(), robust(attack)), run(split_of(), robust(endless(attack)))
    for name in ("radius", "attack", "run", "step"):
        np.testing.assert_array_equal(getattr(early.examples, name), getattr(late.examples, name))
    assert early.cost.gradients < 0.6 * late.cost.gradients


def ends(attack, at):
    """The attack, whose runs of number 1 have nothing to try, and whose others finish after `at` steps."""

    def init(*arguments, run=None, **options):
        state = attack.init(*arguments, run=run, **options)
        return state._replace(status=jnp.where(state.run == 1, FINISHED, state.status))

    def step(predict, state):
        state = attack.step(predict, state)
        return state._replace(status=jnp.where((state.status != BROKEN) & (state.count >= at), FINISHED, state.status))

    return attack._replace(init=init, step=step)


def test_a_run_may_finish_early():
    attack = ends(pgd(linf(1e-6), steps=20, start=None)._replace(runs=3), 5)
    result = run(split_of(), robust(attack))
    right = result.examples.radius > 0
    assert np.isinf(result.examples.radius[right]).all()
    assert result.cost.gradients * N == pytest.approx(2 * 5 * right.sum())
    assert result.cost.forwards * N == pytest.approx(N + 3 * right.sum())


def line_search(steps=8):
    """An attack on the norm: ever smaller sign steps, exact on a linear model up to its grid."""

    def init(keys, predict, images, labels, logits, *, run=None, eps=None):
        return start(keys, images, labels, logits, eps=0.0, run=run)

    def step(predict, state):
        gradient = jax.grad(lambda points: scores.margin(predict(points), state.labels).sum())(state.images)
        size = EPS * (steps - state.count[:, None, None, None]) / 4
        points = jnp.clip(state.images + size * jnp.sign(gradient), 0, 1)
        wrong = jnp.argmax(predict(points), -1) != state.labels
        norm = jnp.abs(points - state.images).max((1, 2, 3))
        better = wrong & (-norm > state.score)
        return state._replace(
            best=jnp.where(better[:, None, None, None], points, state.best),
            score=jnp.where(better, -norm, state.score),
            status=jnp.where(better, BROKEN, state.status),
            broken_at=jnp.where(better, state.count, state.broken_at),
            count=state.count + 1,
        )

    return Attack(init, step, steps, lambda predict, images: Cost(1, 1), "line search", aim="norm")


RADII = tuple(EPS * k / 4 for k in (1, 2, 4))


def test_a_curve_is_each_radius_alone_but_for_what_is_carried():
    """One compiled program, and one of half its slots or fewer where so few stand; only those are attacked again."""
    attack = pgd(linf(0.5), score=scores.margin, steps=6)
    queue.functions.cache_clear()
    result, dispatches = counted(split_of(), curve(attack, eps=RADII))
    parts = queue.functions(attack, MODEL, None)
    widths, narrowest = 1, WIDTH
    for eps, stand in zip(RADII, N * np.array(result.measures["over_eps"].y)):
        narrow = narrowed(split_of(), round(stand)).batch
        if eps == RADII[0]:
            narrowest = narrow
        elif 2 * narrow <= narrowest:
            widths, narrowest = widths + 1, narrow
    assert parts.steps._cache_size() == parts.start._cache_size() == widths < len(RADII)
    accuracies = [result.measures[f"accuracy_at_{i}"] for i in (1, 2, 3)]
    broken = np.zeros(N, bool)
    for radius, accuracy in zip(RADII, accuracies):
        one = attack._replace(
            init=lambda *a, radius=radius, **o: attack.init(*a, **{**o, "eps": jnp.full(len(a[0]), radius)})
        )
        broken |= np.isfinite(run(split_of(), robust(one)).examples.radius)
        assert accuracy.value == pytest.approx(1 - broken.mean())
    over = result.measures["over_eps"]
    assert over.x == [0, *RADII] and over.y == [result.measures["clean_accuracy"].value, *(a.value for a in accuracies)]
    right = (result.examples.radius > 0).sum()
    fallen = [right - a.value * N for a in accuracies]
    assert 0 < fallen[0] < fallen[1] < fallen[2] < right
    assert [result.measures[f"carried_to_{i}"].value for i in (2, 3)] == pytest.approx(fallen[:-1])
    assert set(result.examples.radius) == {0, np.inf, *np.float32(RADII)}


def test_an_attack_on_the_norm_gives_the_whole_curve_at_once():
    """And an attack at every radius beside it has only what the norm leaves."""
    search = line_search()
    result, dispatches = counted(split_of(), curve(search, eps=RADII))
    assert sum(dispatches) * WIDTH >= search.steps * (result.examples.radius > 0).sum(), "it goes on after a break"
    state = jax.jit(
        lambda images: attacked(search, jax.random.split(jax.random.key(0), N), bind(MODEL, VARIABLES), images, LABELS)
    )(jnp.asarray(PIXELS))
    sizes = np.where(LOGITS.argmax(1) != LABELS, 0, np.asarray(norms(state)))
    np.testing.assert_allclose(result.examples.radius, sizes, atol=1e-6)  # another program
    for i, radius in enumerate(RADII, 1):
        assert result.measures[f"accuracy_at_{i}"].value == pytest.approx(
            (result.examples.radius > np.float32(radius)).mean()
        )
    both = run(split_of(), curve(search, pgd(linf(0.5), score=scores.margin, steps=6), eps=RADII))
    assert (both.examples.radius <= result.examples.radius).all()
    assert {0, 1} <= set(both.examples.attack)


# What is saved.


def test_images_are_saved(tmp_path):
    file = tmp_path / "new" / "all.npz"
    options = {"split": "test", "classes": CLASSES, "progress": False, "seed": 4, "save": lambda text: file}
    (row,) = evaluate.evaluate(MODEL, VARIABLES, split_of(), {"robust": ATTACKS}, workdir=tmp_path, **options)
    with np.load(file) as stored:
        np.testing.assert_array_equal(stored["adversarial"], plain().kept.images)
        for name, column in plain().examples._asdict().items():
            np.testing.assert_array_equal(stored[name], column)
        assert list(stored["attacks"]) == [attack.name for attack in ATTACKS.runs]
        broken = stored["attack"] >= 0
        predicted = apply(VARIABLES, stored["adversarial"]).logits.argmax(1)
        assert (predicted[broken] == stored["predicted"][broken]).all() and (predicted != LABELS)[broken].all()
        assert (np.abs(stored["adversarial"] - PIXELS).max((1, 2, 3)) <= EPS + 1e-6).all()
    (few,) = (tmp_path / "adversarial").glob("*.npz")
    with np.load(few) as stored:
        assert len(stored["id"]) == 24 and (stored["radius"] > 0).all() and str(stored["evaluator"]) == "robust"
        np.testing.assert_array_equal(stored["adversarial"], plain().kept.images[stored["id"]])
        np.testing.assert_array_equal(stored["clean"], PIXELS[stored["id"]])
    assert row.measures["robust_accuracy"] == plain().measures["robust_accuracy"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adversarial", "evaluation.json", "new"]


def test_images_are_kept_where_every_one_is_misclassified():
    arrays = {"image": IMAGES, "label": (LOGITS.argmax(1) + 1) % CLASSES}
    wrong = resident_split(arrays, classes=CLASSES, batch=WIDTH)
    kept = run(wrong, keep="all").kept
    np.testing.assert_array_equal(kept.images, PIXELS)
    assert kept.few.shape == (0,) and kept.clean.shape == (0, *IMAGES.shape[1:])
    assert run(wrong, keep="few").kept is None


@pytest.mark.parametrize("eps", [1e-6, EPS])
@pytest.mark.parametrize("restarts", [1, 3])
def test_no_more_steps_are_left_than_is_said(monkeypatch, eps, restarts):
    """Whatever breaks: at every moment those that are done and those that are left at most are as many as there will be
    at the end."""
    said = []

    @contextlib.contextmanager
    def heard(*args, **options):
        yield types.SimpleNamespace(update=lambda n: None, at_most=lambda done, left: said.append((done, left)))

    monkeypatch.setattr(robust_module, "bar", heard)
    run(split_of(), robust(pgd(linf(eps), steps=5, restarts=restarts)))
    done, left = np.array(said).T
    assert (np.diff(done) > 0).all() and (done + left >= done[-1]).all() and left[-1] == 0
