"""The audit: every check can pass and can fail; planted fakes fail the checks that they must; what is stored and said."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import fakes, laws
from topgap_jax import attacks, scores
from topgap_jax.attacks import fgsm, pgd, square
from topgap_jax.balls import l1, l2, linf
from topgap_jax.errors import UserError
from topgap_jax.evaluators import audit, probes, robust
from topgap_jax.evaluators.audit import comparable
from topgap_jax.measure import audit_attacks, criteria, results
from topgap_jax.measure import evaluate as evaluation
from topgap_jax.measure.audit import Audited, audit_split, slopes
from topgap_jax.measure.audit_attacks import Ask
from topgap_jax.measure.criteria import CHECKS, conclude, headline, sign_test
from topgap_jax.measure.log import Log
from topgap_jax.measure.robust import NONE, Attacked, Examples
from topgap_jax.measure.splits import narrowed, resident_split, rows_of
from topgap_jax.mesh import data_mesh
from topgap_jax.models import bind
from topgap_jax.report import compare, report, table
from topgap_jax.rewrite.broken import broken_gradients
from topgap_jax.types import Audit, Check, Cost, Measure, Network

BALL = linf(0.05)
HONEST = {
    "one_step_p": 1.0,
    "one_step_only": 0,
    "iterative_only": 9,
    "square_gain": 0.0,
    "at_unlimited": 0.0,
    "at_box": 0.0,
    "broken_at_zero": 0,
    "rise": 0.0,
    "noise_hits": 0,
    "zero_gradients": 0.0,
    "zero_cross_entropy": 0.0,
    "zero_dlr": 0.0,
    "underflow": 0.0,
    "not_above": 0.0,
    "falls": 0.1,
    "more_cost": 0.0,
    "still_improving": 0.0,
    "worst_scale": 10.0,
    "scale_drop": 0.0,
    "transfer_excess": -3,
    "transfer_broken": 2,
    "white_box_broken": 5,
    "transfer_only": 0,
    "probabilities": 0.0,
    "log_probabilities": 0.0,
    "drift": 0.0,
    "changed": 0,
    "coupling": 1e-7,
    "lost": 0,
    "sign_agreement": 0.98,
    "relative_error": 0.01,
    "unstable": 0.01,
    "inside_only": 0.0,
    "broken_gradients": 0,
    "through_gain": 0.0,
    "operations": "nothing that cuts a gradient",
    "outside": 0,
}


# Bounds, verdicts and sentences.


@pytest.mark.parametrize("check", CHECKS)
def test_honest_numbers_pass(check):
    found = conclude(check, HONEST, 512)
    assert (found.id, found.status, found.n) == (check, "pass", 512) and ": " not in found.sentence


@pytest.mark.parametrize(
    "check, changes, status",
    [
        ("A1", {"one_step_p": 0.04}, "fail"),
        ("A1", {"one_step_only": 3}, "warn"),
        ("A1", {"one_step_only": 2}, "pass"),
        ("A2", {"square_gain": 0.003}, "warn"),
        ("A2", {"square_gain": 0.011}, "fail"),
        ("A3", {"at_unlimited": 0.005}, "warn"),
        ("A3", {"at_unlimited": 0.02}, "fail"),
        ("A3", {"at_box": 0.02}, "fail"),
        ("A3", {"broken_at_zero": 1}, "fail"),
        ("A3", {"rise": 0.02}, "fail"),
        ("A4", {"noise_hits": 1}, "warn"),
        ("A4", {"noise_hits": 3}, "fail"),
        ("A5", {"zero_gradients": 0.002}, "warn"),
        ("A5", {"zero_gradients": 0.1}, "fail"),
        ("A6", {"not_above": 0.03}, "warn"),
        ("A6", {"not_above": 0.11}, "fail"),
        ("A6", {"falls": 0.31}, "warn"),
        ("A7", {"still_improving": 1.0}, "warn"),
        ("A7", {"more_cost": 0.006}, "warn"),
        ("A7", {"more_cost": 0.021, "still_improving": 1.0}, "fail"),
        ("A8", {"scale_drop": 0.02}, "warn"),
        ("A8", {"scale_drop": 0.04}, "fail"),
        ("A9", {"transfer_only": 3}, "warn"),
        ("A9", {"transfer_excess": 1}, "fail"),
        ("A10", {"log_probabilities": 1.0}, "warn"),
        ("A10", {"probabilities": 0.99}, "pass"),
        ("A10", {"probabilities": 1.0}, "fail"),
        ("A11", {"drift": 2e-4}, "fail"),
        ("A11", {"changed": 1}, "fail"),
        ("A12", {"coupling": 2e-4}, "fail"),
        ("A13", {"lost": 1}, "fail"),
        ("A14", {"relative_error": 0.4}, "warn"),
        ("A14", {"relative_error": 1.1}, "fail"),
        ("A14", {"sign_agreement": 0.6}, "fail"),
        ("A15", {"unstable": 0.2}, "warn"),
        ("A16", {"inside_only": 0.05}, "pass"),
        ("A16", {"inside_only": 0.06}, "warn"),
        ("A16", {"inside_only": 0.16}, "fail"),
        ("A17", {"broken_gradients": 1, "operations": "round"}, "warn"),
        ("A17", {"broken_gradients": 1, "operations": "round", "through_gain": 0.04}, "fail"),
        ("A18", {"outside": 1}, "fail"),
    ],
)
def test_bounds(check, changes, status):
    found = conclude(check, HONEST | changes, 512)
    assert found.status == status
    if status != "pass":
        assert ": " in found.sentence and found.statistic in changes.values()
        others = {other: conclude(other, HONEST | changes, 512).status for other in CHECKS if other != check}
        assert set(others.values()) == {"pass"}, others


def test_one_image_of_few_decides_nothing():
    """Of 16 images one is 6 %: more than a bound of 3 %, and no evidence."""
    shares = {"rise": "A3", "at_unlimited": "A3", "at_box": "A3", "square_gain": "A2", "more_cost": "A7"}
    for name, check in (shares | {"scale_drop": "A8"}).items():
        assert conclude(check, HONEST | {name: 1 / 16}, 16).status != "fail"
        assert conclude(check, HONEST | {name: 2 / 16}, 16).status == "fail"


def test_the_worst_question_of_a_check_decides():
    found = conclude("A7", HONEST | {"more_cost": 0.03, "still_improving": 1.0}, 512)
    assert (found.status, found.statistic, found.threshold) == ("fail", 0.03, 0.02)
    assert found.sentence == (
        "Ten times the steps and ten restarts lower robust accuracy by 3.00 %: the attacks were too short"
    )
    assert "samples=20" in conclude("A11", HONEST | {"drift": 0.1}, 9).sentence


def test_sign_test():
    """attacks 15.14: b = 5, c = 0 fails, b = 3, c = 0 does not."""
    assert sign_test(5, 0) == 1 / 32 and sign_test(3, 0) == 0.125 and sign_test(0, 0) == 1
    assert sign_test(3, 7) == pytest.approx(1 - sum([1, 10, 45]) / 1024)


def test_headlines():
    of = lambda *statuses: headline([Check("A1", status, 0.0, 0.0, 1, "") for status in statuses])
    assert of("pass", "warn", "skipped") == "no check failed (2 checks of 1 image, 1 warning)"
    assert of("fail", "warn", "skipped", "fail") == "UPPER BOUND ONLY: 2 of 3 checks failed"
    assert of("skipped") == "no check could be made"


# What is asked of a batch, on a network of a few hundred parameters.


def predict_of(fake=None):
    return bind(fake(laws.MODEL) if fake else laws.MODEL, laws.VARIABLES)


def asked(probe, *first, fake=None):
    """The rows of a probe, NumPy."""
    given = (laws.KEYS, predict_of(fake), laws.IMAGES, laws.LABELS)
    found = jax.jit(lambda: probe(*first, *(given if probe is not probes.one_step_ray else given[1:])))()
    return jax.tree.map(np.asarray, found)


def test_passes_differ_of_a_network_that_draws():
    honest, noisy = (asked(probes.repeated_passes, fake=fake) for fake in (None, fakes.noise_layer))
    assert honest["drift"].max() == 0 and not honest["changed"].any()
    assert noisy["drift"].min() > 1e-4
    assert asked(probes.repeated_passes, fake=functools.partial(fakes.noise_layer, size=9.0))["changed"].any()


def test_the_rest_of_the_batch_matters_to_batch_statistics():
    couple = lambda keys, predict, images, labels: probes.batch_coupling(predict, images)
    assert (
        asked(couple)["coupling"].max() < 1e-6 and asked(couple, fake=fakes.batch_statistics)["coupling"].min() > 1e-3
    )


@pytest.mark.parametrize(
    "fake, cross_entropy, dlr",
    [
        (None, False, False),
        (fakes.large_logits, True, False),
        (fakes.quantised, True, True),
        (functools.partial(fakes.on_logits, change=lambda logits: 20 * jnp.tanh(1e4 * logits)), True, True),
    ],
)
def test_zero_gradients(fake, cross_entropy, dlr):
    """Of the images that are right; of the two that are not, nothing is said."""
    zero = lambda keys, predict, images, labels: probes.zero_gradients(predict, images, labels)
    found = asked(zero, fake=fake)
    right = np.asarray(predict_of(fake)(laws.IMAGES).argmax(-1)) == laws.LABELS
    assert (found["cross_entropy"] == (right & cross_entropy)).all() and (found["dlr"] == (right & dlr)).all()
    assert found["underflow"][right].all() == (cross_entropy and not dlr) or fake is not None


def test_finite_differences():
    """Of a linear network exact; a wave that nothing sees makes the gradient wrong, noise in its place too."""
    weights = jax.random.normal(jax.random.key(1), (laws.IMAGES[0].size, 3))
    linear = lambda images, keys=None: images.reshape(len(images), -1) @ weights
    exact = jax.jit(lambda: probes.finite_differences(l2(0.5), laws.KEYS, linear, laws.IMAGES, laws.LABELS))()
    assert exact["rise"].shape == (laws.B, probes.DIRECTIONS)
    np.testing.assert_allclose(exact["rise"], exact["expected"], atol=1e-5)
    honest = slopes(**asked(probes.finite_differences, BALL))
    assert honest["sign_agreement"] > 0.95 and honest["relative_error"] < 0.05
    for fake in (fakes.wave, fakes.noise_gradient):
        found = HONEST | slopes(**asked(probes.finite_differences, BALL, fake=fake))
        assert conclude("A14", found, 512).status == "fail"
    assert slopes(np.zeros((2, 3)), np.ones((2, 3))) == {"relative_error": 0.0, "sign_agreement": 1.0}
    assert slopes(np.array([1.0, 1.0, -2.0, 0.0]), np.array([2.0, -1.0, -2.0, 5.0])) == {
        "relative_error": pytest.approx(0.5),
        "sign_agreement": pytest.approx(2 / 3),
    }


def test_late_improvement():
    """attacks 15.14."""
    falling = lambda n: np.linspace(0, 1, n)[None]
    assert float(probes.late_improvement(jnp.array(falling(20)))[0]) == pytest.approx(0.473684, abs=1e-6)
    assert float(probes.late_improvement(jnp.array(falling(101)))[0]) == pytest.approx(0.09, abs=1e-6)
    once = jnp.array([[0.0] + [3.0] * 30, [2.0] * 31, [3.0] + [1.0] * 29 + [2.0]])
    assert probes.late_improvement(once).tolist() == [0, 0, 0]


def test_the_path_of_an_attack_and_what_it_returns():
    """The losses are those of the iterates; an attack that looks at its last iterate only loses breaks."""
    wide, predict = pgd(linf(0.3), steps=6, step_size=0.25), predict_of()
    found = asked(probes.path, wide)
    state = wide.init(laws.KEYS, predict, laws.IMAGES, laws.LABELS, predict(laws.IMAGES))
    step = jax.jit(lambda state: wide.step(predict, state))
    for column in found["losses"].T:
        points = state.images + state.delta
        np.testing.assert_allclose(column, scores.cross_entropy(predict(points), laws.LABELS), atol=1e-5)
        last, state = points, step(state)
    np.testing.assert_allclose(found["last"], last, atol=1e-6)
    assert not found["lost"].any()
    there_and_back = attacks.noise(linf(0.3), draws=4)
    assert not asked(probes.path, there_and_back)["lost"].any()
    assert asked(probes.path, fakes.last_iterate(there_and_back))["lost"].any()


def test_small_steps_raise_the_loss():
    honest, noise = asked(probes.ascent, BALL), asked(probes.ascent, BALL, fake=fakes.noise_gradient)
    assert not honest["not_above"].any() and honest["falls"].max() < 0.1
    downhill = lambda model: fakes.on_images(model, lambda x: 2 * jax.lax.stop_gradient(x) - x)
    assert asked(probes.ascent, BALL, fake=downhill)["not_above"].all() and noise["falls"].mean() > 0.2


def test_loss_under_noise():
    assert asked(probes.loss_under_noise, BALL)["unstable"].max() < 0.1
    shattered = functools.partial(fakes.wave, size=3.0)
    assert asked(probes.loss_under_noise, BALL, fake=shattered)["unstable"].mean() > 0.1


def test_the_way_of_one_step():
    """A network with a trough half way: broken inside and not at the end. One class against another, one number."""
    slope = lambda images: 0.5 - 0.1 * (images - 0.5).mean((1, 2, 3)) / 0.04
    trough = lambda images: slope(images) - jnp.exp(-((((images - 0.5).mean((1, 2, 3)) - 0.02) / 0.004) ** 2))
    ray = lambda f: jax.jit(
        lambda: probes.one_step_ray(
            linf(0.04),
            lambda x, keys=None: jnp.stack([f(x), 0 * f(x)], 1),
            jnp.full((2, 2, 2, 1), 0.5),
            jnp.zeros(2, int),
        )
    )()
    for f, inside, end in ((slope, False, False), (trough, True, False), (lambda x: slope(x) - 0.45, True, True)):
        found = ray(f)
        assert found["inside"].tolist() == [inside] * 2 and found["end"].tolist() == [end] * 2


def test_points_outside():
    clean = jnp.full((5, 2, 2, 1), 0.02)
    points = clean.at[0].add(0.05).at[1].add(0.051).at[2].add(-0.03).at[3].set(jnp.nan)
    assert probes.outside(BALL, clean, points).tolist() == [False, True, True, True, False]
    corner = jnp.full((1, 2, 2, 1), 0.9) + 0.5 / 255  # in float32 this is .5 / 255 + 2e-8 away
    assert corner[0, 0, 0, 0] - jnp.float32(0.9) > 0.5 / 255 * (1 + 1e-5)
    assert not probes.outside(linf(0.5 / 255), jnp.full((1, 2, 2, 1), 0.9), corner).any()
    assert probes.outside(linf(0.5 / 255), jnp.full((1, 2, 2, 1), 0.9), corner + 1e-6).all()
    assert probes.outside(l2(0.1), clean, clean.at[0].add(0.05).at[1].add(0.051)).tolist() == [False, True] + 3 * [
        False
    ]


def test_broken_gradients():
    """What depends on the image alone, at any depth; functions with a backward pass of their own by name."""

    @jax.custom_vjp
    def guided(x):
        return x

    guided.defvjp(lambda x: (x, None), lambda _, g: (2 * g,))
    inside = jax.jit(lambda w, x: jnp.ceil(w) * jnp.sign(x))
    looped = lambda x: jax.lax.fori_loop(0, 2, lambda i, x: jnp.floor(x), x)
    f = lambda w, x: jax.nn.relu(jnp.round(w) * x) + inside(w, x) + guided(x) + jnp.sort(x) + looped(x)
    of = lambda f, i=1: broken_gradients(f, jnp.ones(3), jnp.ones(3), of=i)
    assert of(f) == ["sign", "custom_vjp of guided", "floor"] and of(f, 0) == ["round", "ceil"]
    assert of(lambda w, x: jax.lax.stop_gradient(x) + x) == ["stop_gradient"]
    images = jax.ShapeDtypeStruct(laws.IMAGES.shape, jnp.float32)
    found = lambda fake: broken_gradients(lambda v, x: bind(fake(laws.MODEL), v)(x), laws.VARIABLES, images, of=1)
    assert "round" in found(fakes.quantised) and "custom_vjp of unchanged" in found(fakes.noise_gradient)
    assert set(found(lambda model: model)) <= {"stop_gradient"}  # of top_gap's mask


# What attacks find.

POINTS = np.arange(0, 20, 2)


def examples(broken, attack=0):
    """Of ten images those that broke, by which attack."""
    radius = np.full(10, np.inf, np.float32)
    radius[list(broken)] = 0.05
    number = np.where(np.isfinite(radius), attack, NONE)
    return Examples(*(np.zeros(10),) * 8)._replace(radius=radius, attack=number)


TWIN = Network(laws.MODEL, laws.VARIABLES | {"params": laws.parameters(7)}, "twin")


def statistics(found, ball=BALL, twin=None, passed=False, **rows):
    """The statistics where the attacks broke `found`: {name of the check: images}, A3 by radius, A8 by scale."""

    class Images:
        images = np.linspace(0.4, 0.58, 10, dtype=np.float32)[:, None, None, None] + np.zeros((2, 2, 3), np.float32)

    asked = []

    def attacked(name, runs, points, *, eps=None, scale=None, keep=None):
        asked.append((name, runs, tuple(points)))
        broken = found.get((name, eps if scale is None else scale), found.get(name, ()))
        one = broken if isinstance(broken, Examples) else examples(broken)
        stands = Measure(float(np.isinf(one.radius).mean()))
        measures = {"accuracy_at_1": stands, "robust_accuracy": stands}
        cut = one._replace(radius=one.radius[: len(points)])
        return Attacked(measures, Cost(), 0.0, cut, Images() if keep else None)

    images = np.full((20, 2, 2, 3), 128, np.uint8)
    data = resident_split({"image": images, "label": np.zeros(20, np.int32)}, classes=2, batch=8)
    ask = Ask(lambda *a: {name: np.array(value) for name, value in rows.items()}, attacked)
    plan = Audit(ball, (pgd(ball), attacks.apgd(ball)), twin)
    return *audit_attacks.statistics(ask, data, plan, POINTS, 4.0, np.linspace(0, 1, 10), None, passed=passed), asked


def test_what_attacks_find():
    base = examples(range(6))
    base.attack[5] = 1  # by APGD
    zero, unlimited = {("A3", 0.0): ()}, {("A3", 0.5): [1, 2], ("A3", 0.1): range(10), ("A3", 0.2): range(8)}
    found = {"the base": base, "A1": [0, 6, 5], "A2": [0], "A4": [0, 1, 2], "A7": [3], "A8": range(5)}
    found |= {"A3": range(9), ("A8", 0.1): range(8)} | zero | unlimited | {"l2(0.02887)": [7], "l1(0.1)": range(10)}
    values, measures, asked = statistics(found)
    assert (values["one_step_only"], values["iterative_only"]) == (2, 4)
    assert values["one_step_p"] == sign_test(2, 4)
    assert values["square_gain"] == 0.1 and values["noise_hits"] == 3 and values["more_cost"] == 0.1
    assert values["broken_at_zero"] == 0 and values["at_unlimited"] == 0.8
    assert values["rise"] == pytest.approx(0.7) and values["at_box"] == pytest.approx(0.1)
    assert (values["worst_scale"], values["scale_drop"]) == (0.1, pytest.approx(0.3))
    assert values["still_improving"] == 1.0 and values["outside"] == 5  # further than .05 from 128 / 255
    left = tuple(POINTS[6:])
    assert {points for name, _, points in asked if name in ("A2", "A4", "A7")} == {left}
    assert {points for name, _, points in asked if name not in ("A2", "A4", "A7")} == {tuple(POINTS)}
    (longer,) = next(runs for name, runs, _ in asked if name == "A7")
    assert longer.steps == 10 * pgd(BALL).steps and longer.runs == 10


def test_what_stands_in_every_norm():
    """The name of the others at comparable radii; all three at once."""
    others = [ball.name for ball in comparable(BALL, 12) if ball.norm != "linf"]
    assert others[0].startswith("l2(") and others[1].startswith("l1(")
    _, measures, _ = statistics({"the base": range(6), others[0]: [6], others[1]: [0, 7, 8]})
    assert {name: measure.value for name, measure in measures.items()} == {
        "stands_linf": 0.4,
        "stands_l2": 0.9,
        "stands_l1": 0.7,
        "stands_in_all": 0.1,
    }
    assert next(iter(measures)) == "stands_linf" and all(measure.n == 10 for measure in measures.values())


def test_nothing_is_attacked_where_nothing_stands():
    values, _, asked = statistics({"the base": range(10)})
    assert not {"A2", "A4", "A7"} & {name for name, _, _ in asked}
    assert values["square_gain"] == values["noise_hits"] == values["more_cost"] == values["still_improving"] == 0


def test_attacks_through_rounding():
    """On what stands; not where the network has nothing of the kind."""
    values, _, asked = statistics({"the base": range(4), "A17": [1]}, passed=True)
    assert values["through_gain"] == 0.1
    assert [(runs[0].name, len(points)) for name, runs, points in asked if name == "A17"] == [
        (f"BPDA of {pgd(BALL).name}", 6)
    ]
    values, _, asked = statistics({"the base": range(4)})
    assert values["through_gain"] == 0 and "A17" not in {name for name, _, _ in asked}


def test_a_twin():
    values, _, asked = statistics({"the base": range(2), "A9": [0, 8, 9]}, twin=TWIN)
    assert {
        name: values[name] for name in ("transfer_broken", "white_box_broken", "transfer_excess", "transfer_only")
    } == {
        "transfer_broken": 3,
        "white_box_broken": 2,
        "transfer_excess": 1,
        "transfer_only": 2,
    }
    assert [tuple(points) for name, _, points in asked if name == "A9"] == [tuple(POINTS)]


def test_comparable_radii():
    """Those of CIFAR-10 in the literature; on ImageNet they grow with sqrt(n) and n."""
    assert [ball.eps for ball in comparable(linf(8 / 255), 3072)] == pytest.approx([8 / 255, 0.5, 12])
    assert [ball.eps for ball in comparable(l2(0.25), 3072)] == pytest.approx([4 / 255, 0.25, 6])
    assert [ball.eps for ball in comparable(l1(12 * 49), 3072 * 49)] == pytest.approx([8 / 255, 3.5, 588])


def test_rows_of_a_split():
    images = np.arange(20 * 12).reshape(20, 2, 2, 3).astype(np.uint8)
    data = resident_split({"image": images, "label": np.arange(20) % 2}, classes=2, batch=4)
    part = rows_of(data, np.array([3, 5, 8, 13, 19]))
    assert part.examples == 5 and part.batch == 4
    for ids, rows in ((None, [[3, 5, 8, 13], [19]]), (np.array([4, 0]), [[19, 3]])):
        for (some, batch), expected in zip(part.batches(ids), rows, strict=True):
            assert np.array([3, 5, 8, 13, 19])[some].tolist() == expected
            assert np.asarray(batch["id"])[: len(some)].tolist() == expected


@pytest.mark.parametrize(
    "batch, devices, examples, width",
    [(128, 1, 1000, 112), (128, 1, 915, 96), (128, 1, 1024, 128), (128, 1, 140, 80), (100, 1, 37, 38), (100, 1, 0, 13),
     (4, 1, 1, 1), (4, 1, 3, 3), (4, 1, 5, 3), (64, 8, 37, 40), (64, 8, 3, 8), (8, 8, 1, 8), (24, 8, 17, 24)],
)  # fmt: skip
def test_a_narrowed_split_fills_its_slots(batch, devices, examples, width):
    images = np.arange(max(examples, 1) * 12, dtype=np.uint32).reshape(-1, 2, 2, 3).astype(np.uint8)
    mesh = None if devices == 1 else data_mesh()
    labels = np.arange(len(images)) % 2
    data = narrowed(
        resident_split({"image": images, "label": labels}, classes=2, batch=batch, mesh=mesh), examples, mesh
    )
    assert data.batch == width and width % devices == 0
    slots = lambda width: -(-examples // width) * width
    assert slots(width) <= slots(batch) and (examples <= width or 2 * width >= batch)
    ids = np.arange(examples, dtype=np.int32)
    for some, one in data.batches(ids):
        assert one["image"].shape[0] == width and int(one["mask"].sum()) == len(some)
        assert np.array_equal(np.asarray(one["id"])[: len(some)], some)


# Mistakes.


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: audit(linf(0)), "audit: linf(0) holds one image; give a radius above 0"),
        (lambda: audit(BALL, points=0), "points must be a whole number of at least 1, got 0"),
        (
            lambda: audit(BALL, twin=3),
            "audit: twin must be the folder of a run, or Network(model, variables, name), got 3",
        ),
        (lambda: audit(BALL._replace(name="mine")), "audit: the ball must be linf, l2 or l1, got mine"),
        (lambda: laws.make("audit(pgd(linf(.1)))"), "audit: ball must be a value of type Ball, got "),
    ],
)
def test_mistakes_are_told_in_one_line(make, words):
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


def test_a_text_makes_one():
    made = laws.make("audit(linf(8/255))")
    assert made.ball.name == "linf(8/255)" and [attack.steps for attack in made.white_box] == [20, 100]
    assert (made.twin, made.points) == (None, 512)
    assert [attack.norm for attack in (fgsm(BALL), square(l2(1)), *laws.make("autoattack(l1(12))"))] == [
        "linf",
        "l2",
        *["l1"] * 4,
    ]


# What is stored, and said beside robust numbers.


def of(*changed):
    """The checks of an audit, as the statistics of these make them."""
    values = functools.reduce(lambda a, b: a | b, changed, HONEST)
    checks = [conclude(check, values, 64) for check in CHECKS if check != "A9"]
    return (*checks, criteria.skipped("A9", "no twin was given"))


def a_row(split="test", evaluator="audit(linf(8/255))", norms=("linf",), checks=None, **fields):
    checks = of() if checks is None else checks
    measures = {"stands_linf": Measure(0.4, 0.3, 0.5, 64, "higher", "stands in linf(8/255)")}
    measures |= {"checks_failed": Measure(0, n=64, better="lower", label="audit checks that failed", main=False)}
    words = f"audit at linf(8/255): {headline(checks)}" if checks else results.NOT_AUDITED
    made = results.Row(split, evaluator, {}, 100, measures, {"seconds": 1.0}, words, norms, checks)
    return made._replace(**fields)


def attacked_row(norms, **fields):
    measures = {"robust_accuracy": Measure(0.3, 0.2, 0.4, 100, "higher", "accuracy under pgd-20, linf(8/255)")}
    return a_row(evaluator="robust(x)", checks=(), norms=norms, measures=measures, **fields)


def test_a_robust_number_says_what_the_audit_of_its_norm_says():
    audits = [a_row(), a_row(split="other", checks=of({"lost": 1})), a_row(norms=("l2",), checks=of({"outside": 2}))]
    fails = "audit at linf(8/255): UPPER BOUND ONLY: 1 of 17 checks failed"
    passes = "audit at linf(8/255): no check failed (17 checks of 64 images, 0 warnings)"
    said = lambda row: results.with_audits([*audits, row])[-1].audit
    assert said(attacked_row(("linf",))) == passes and said(attacked_row(("l2",))) == fails
    assert said(attacked_row(("linf",), split="other")) == fails
    assert said(attacked_row(("l1",))) == "not audited" == said(attacked_row(("linf",), split="third"))
    assert said(attacked_row(("linf", "l1"))) == f"{passes}; not audited in l1"
    assert said(attacked_row(("linf",), overrides={"pool": "gmp()"})) == "not audited"
    with_eps = attacked_row(("linf",), overrides={"eps": "1/255"})._replace(evaluator="robust(pgd(linf(eps)))")
    assert said(with_eps) == passes, "the radius is no other network"
    assert said(attacked_row(())._replace(audit="old words")) == "old words"
    gone = results.with_audits([attacked_row(("linf",), audit=passes)])
    assert gone[0].audit == "not audited", "an audit that is no longer there says nothing"


def test_checks_are_stored_and_read_again(tmp_path):
    path, checks = tmp_path / "evaluation.json", of({"drift": np.float32(0.25)}, {"outside": 2})
    for row in (attacked_row(("linf",)), a_row(checks=checks)):
        results.write(path, row, "w", "s")
    robust_row, audit_row = results.read(path).rows
    assert audit_row.checks == checks and audit_row.norms == ("linf",)
    assert robust_row.audit == audit_row.audit == "audit at linf(8/255): UPPER BOUND ONLY: 2 of 17 checks failed"
    text = json.loads(path.read_text())
    assert text["rows"][1]["checks"][9]["statistic"] == 0.25 and "checks" not in text["rows"][0]
    text["rows"][1]["checks"][0]["statistic"] = "many"
    path.write_text(json.dumps(text))
    with pytest.raises(
        UserError,
        match=r"is not an evaluation of this program \(rows\[1\]\.checks\[0\]\.statistic is 'many', not a number",
    ):
        results.read(path)


def test_an_audit_stands_beside_the_robust_numbers_of_the_same_command(tmp_path, monkeypatch):
    """Of the row that is returned, of the one that is stored, and of one that a later audit is about."""
    left = []

    def canned(model, variables, data, audit, *, log, **options):
        for name in ("A1", "A2"):
            log(name).append({"phase": 0})
        log("A1")
        left.extend(tmp_path.glob("unfinished-*.jsonl"))
        return Audited(of({"broken_gradients": 1, "operations": "round"}), a_row().measures, Cost(3, 4), 5.0, [])

    monkeypatch.setattr(evaluation, "audit_split", canned)
    options = {"split": "test", "classes": laws.CLASSES, "progress": False, "workdir": tmp_path, "weights": "w"}
    make = lambda *evaluators: evaluation.evaluate(
        laws.MODEL, laws.VARIABLES, split_of(8), {f"{name}": one for name, one in evaluators}, **options
    )
    words = "audit at linf(0.05): no check failed (17 checks of 64 images, 1 warning)"
    attack = ("robust(fgsm(linf(.05)))", robust(fgsm(BALL)))
    (row,) = make(attack)
    assert (row.audit, row.norms) == ("not audited", ("linf",))
    (audited,) = make(("audit(linf(.05))", audit(BALL)))
    assert audited.audit == words and audited.norms == ("linf",) and len(audited.checks) == 18
    assert (audited.cost["forward_passes"], audited.cost["gradient_evaluations"], audited.cost["seconds"]) == (3, 4, 5)
    assert len(left) == 2 and not list(tmp_path.glob("unfinished-*"))
    assert [row.audit for row in results.read(tmp_path / "evaluation.json").rows] == [words, words]
    assert [row.audit for row in make(attack)] == [words]


def split_of(n, batch=8, mesh=None):
    images = np.random.default_rng(0).integers(0, 256, (n, laws.SIZE, laws.SIZE, 3)).astype(np.uint8)
    labels = np.asarray(laws.PREDICT(images / np.float32(255)).argmax(1)).astype(np.int32)
    return resident_split({"image": images, "label": labels}, classes=laws.CLASSES, batch=batch, mesh=mesh)


def test_the_table_in_the_terminal():
    failing = of({"zero_gradients": 0.5, "zero_dlr": 0.5}, {"broken_gradients": 1, "operations": "round"})
    lines = table(results.with_audits([attacked_row(("linf",)), a_row(checks=failing)])).splitlines()
    words = "UPPER BOUND ONLY: 1 of 17 checks failed"
    assert any(line.startswith(f"robust(x) on test: audit at linf(8/255): {words}; not measured") for line in lines)
    start = lines.index(f"audit(linf(8/255)) on test: {words}")
    assert lines[start + 2].startswith("A5   fail     gradients that are 0") and all(
        len(line) <= 120 for line in lines[start:]
    )
    assert lines[start + 3].startswith(" " * 46 + "exactly 0")
    ids = [line.split()[0] for line in lines[start + 2 :] if line[:1] == "A" and line.split()[0] in CHECKS]
    assert ids[:2] == ["A5", "A17"] and ids[-1] == "A9" and set(ids) == set(CHECKS)
    assert "2002.08347" in " ".join(lines) and "2002.08347" not in table([a_row()])
    cut = of({"broken_gradients": 1, "operations": "round", "through_gain": 0.04})
    assert [check.status for check in cut if check.id == "A17"] == ["fail"]
    assert "2002.08347" in table([a_row(checks=cut)])


def test_the_report_shows_the_checks_and_compare_the_verdict(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": {"source": "shapes()", "train": "train"}}))
    failing = of({"lost": 2}, {"unstable": 0.5})
    for row in (attacked_row(("linf",)), attacked_row(("l2",))._replace(evaluator="robust(y)"), a_row(checks=failing)):
        results.write(folder / "evaluation.json", row, "w", "s")
    page = report([folder], tmp_path / "page.html").read_text()
    words = "UPPER BOUND ONLY: 1 of 17 checks failed"
    assert page.count(f">audit at linf(8/255): {words}</span>") == 2, (
        "in the results and in the table of robust numbers"
    )
    assert page.count(">not audited</span>") == 2
    assert f'<span class="badge fail">{words}</span></h3>' in page and '<span class="badge">not audited</span>' in page
    assert '<span class="status fail">fail</span>' in page and '<span class="status skipped">skipped</span>' in page
    assert "2 images were broken on the attack&#39;s path and not in what it returned" in page
    assert "stands in linf(8/255) <b>0.4000</b>" in page
    text = compare([folder])
    assert f"a: audit(linf(8/255)) on test: {words}; failed: A13; warn: A15" in text.splitlines()
    assert f"a: robust(x) on test: audit at linf(8/255): {words}; not measured" in text
    assert "a: robust(y) on test: not audited" in text


# Whole audits.


@pytest.mark.parametrize(
    "fake, check", [(fakes.probabilities, "A10"), (fakes.noise_layer, "A11"), (fakes.batch_statistics, "A12")]
)
def test_what_fails_at_the_gate_is_not_attacked(fake, check):
    mesh = data_mesh() if check == "A10" else None  # one of them split over devices
    found = audit_split(
        fake(laws.MODEL), laws.VARIABLES, split_of(16, mesh=mesh), audit(BALL), mesh=mesh, progress=False
    )
    assert {one.id for one in found.checks if one.status == "fail"} == {check}
    rest = [one for one in found.checks if one.id not in criteria.GATES]
    assert {one.status for one in rest} == {"skipped"} and {one.sentence for one in rest} == {
        f"Not made, since {check} failed"
    }
    assert headline(found.checks) == "UPPER BOUND ONLY: 1 of 3 checks failed" and found.cost.gradients == 0
    assert found.measures["checks_failed"].value == 1 and found.measures["checks_skipped"].value == 15


def test_a_network_that_is_never_right_is_not_audited():
    shifted = lambda logits: jnp.roll(logits, 1, axis=-1)
    found = audit_split(fakes.on_logits(laws.MODEL, shifted), laws.VARIABLES, split_of(8), audit(BALL), progress=False)
    assert [check.sentence for check in found.checks if check.status == "skipped"] == [
        "No image is right when clean"
    ] * 15


@pytest.mark.slow
@pytest.mark.parametrize(
    "fake, fails",
    [
        (None, set()),
        (fakes.large_logits, {"A5", "A8"}),
        (fakes.quantised, {"A5", "A17"}),
        (fakes.wave, {"A14"}),
        (fakes.noise_gradient, {"A14"}),
    ],
)
def test_whole_audits(fake, fails, tmp_path):
    """Also with a twin; what the logs of an audit that was stopped hold is not attacked again."""
    model = fake(laws.MODEL) if fake else laws.MODEL
    twin = TWIN if fake is None else None
    found = audit_split(model, laws.VARIABLES, split_of(48, 16), audit(BALL, twin=twin), progress=False)
    failed = {check.id for check in found.checks if check.status == "fail"}
    assert failed >= fails and (fails or not failed)
    assert (found.checks[8].status == "skipped") == (twin is None)
    if fake is None:
        logs, appended = {}, []

        class Counting(Log):
            def append(self, entry):
                appended.append(entry)
                super().append(entry)

        def log(part):
            return logs.setdefault(part, Counting(tmp_path / f"{len(logs)}.jsonl", {"part": part}))

        for first in (True, False):
            options = {"log": log, "progress": False}
            again = audit_split(model, laws.VARIABLES, split_of(48, 16), audit(BALL, twin=twin), **options)
            assert again.checks == found.checks and again.measures == found.measures
            assert bool(appended) == first
            appended.clear()
            logs = {part: Counting(one.path, {"part": part}) for part, one in logs.items()}
