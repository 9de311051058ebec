"""Transfer in the queue: a network beside the one under attack, whose variables are arguments of the programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_queue import (
    CLASSES,
    EPS,
    LABELS,
    LOGITS,
    MODEL,
    PIXELS,
    RNG,
    VARIABLES,
    WIDTH,
    N,
    assert_same,
    run,
    shuffled,
    split_of,
)  # fmt: skip
from topgap_jax import attacks, scores
from topgap_jax.attacks import apgd, pgd
from topgap_jax.attacks.state import BROKEN
from topgap_jax.balls import linf
from topgap_jax.errors import UserError
from topgap_jax.evaluators import curve, robust
from topgap_jax.keys import example_keys
from topgap_jax.measure import evaluate, queue
from topgap_jax.measure.log import Log
from topgap_jax.measure.verdicts import fingerprint
from topgap_jax.mesh import data_mesh
from topgap_jax.models import bind
from topgap_jax.types import Cost, Network

# Near the network under attack, so that much of what breaks it breaks that; and another, whose examples do less.
NEAR = {"params": VARIABLES["params"] + jnp.asarray(RNG.integers(-64, 65, (48, CLASSES)) / 64), "batch_stats": {}}
FAR = {"params": jnp.asarray(RNG.integers(-64, 65, (48, CLASSES)) / 64, jnp.float32), "batch_stats": {}}
BALL = linf(2 * EPS)
INNER = pgd(BALL, score=scores.margin, steps=3, step_size=EPS / 2)._replace(runs=3)
network = lambda variables: Network(MODEL, variables, "runs/near")
TRANSFER = robust(attacks.transfer(BALL, INNER, network(NEAR)))


@functools.cache
def plain():
    return run(split_of(), TRANSFER, keep="all")


def test_the_verdicts_are_those_of_the_driver():
    """Of `attack` on both networks as functions, run after run."""
    predict, source = bind(MODEL, VARIABLES), bind(MODEL, NEAR)
    alone = attacks.transfer(BALL, INNER, source)
    keys = example_keys(jax.random.fold_in(jax.random.key(4), 0), jnp.arange(N))
    images, labels = jnp.asarray(PIXELS), jnp.asarray(LABELS)
    state = jax.jit(lambda: attacks.attack(alone, keys, predict, images, labels))()
    examples, kept = plain().examples, plain().kept
    right, broken = LOGITS.argmax(1) == LABELS, np.asarray(state.status) == BROKEN
    np.testing.assert_array_equal(np.isinf(examples.radius), right & ~broken)
    rows = np.flatnonzero(right & broken)
    assert 4 < len(rows) < right.sum() - 4 and set(examples.run[rows]) > {0}
    np.testing.assert_array_equal(examples.step[rows], np.asarray(state.broken_at)[rows])
    np.testing.assert_allclose(kept.images[rows], np.asarray(state.best)[rows], atol=1e-6)  # another program
    assert plain().cost.gradients > 0 and plain().cost.forwards > plain().cost.gradients + 1
    assert TRANSFER.runs[0].name == f"transfer of {INNER.name}, from runs/near"
    assert attacks.bound(TRANSFER.runs[0], source).cost(predict, images) == Cost(1, 1)


def test_it_is_no_attack_on_the_network_itself():
    """One with its own gradients breaks more, the far network's examples less."""
    share = lambda result: result.measures["robust_accuracy"].value
    far = run(split_of(), robust(attacks.transfer(BALL, INNER, network(FAR))))
    assert share(run(split_of(), robust(INNER))) < share(plain()) < share(far)


def test_width_order_and_devices_change_nothing():
    assert_same(plain(), run(split_of(4), TRANSFER))
    assert_same(plain(), run(shuffled(split_of(), 1), TRANSFER, keep="all"))
    mesh = data_mesh()
    assert_same(plain(), run(split_of(mesh=mesh), TRANSFER, mesh=mesh, keep="all"))


def test_killed_it_goes_on_where_it_was(tmp_path):
    class Killed(BaseException):
        pass

    class Dying(Log):
        def append(self, entry):
            if len(self.path.read_text().splitlines()) > 2:
                raise Killed
            super().append(entry)

    path = tmp_path / "log.jsonl"
    with pytest.raises(Killed):
        run(split_of(), TRANSFER, log=Dying(path, {}), keep="all")
    log = Log(path, {})
    assert len(log.entries) == 2
    assert_same(plain(), run(split_of(), TRANSFER, log=log, keep="all"))


def test_the_variables_of_the_source_are_arguments():
    """Other variables of the same model compile nothing, and no array is a constant of the programs."""
    attack = TRANSFER.runs[0]._replace(source=network(None))
    parts = queue.functions(attack, MODEL, None)
    run(split_of(), TRANSFER)
    sizes = parts.start._cache_size(), parts.steps._cache_size()
    run(split_of(), robust(TRANSFER.runs[0]._replace(source=network(FAR))))
    assert queue.functions(attack, MODEL, None) is parts
    assert (parts.start._cache_size(), parts.steps._cache_size()) == sizes
    (_, batch) = next(iter(split_of().batches(None)))
    rows = jax.ShapeDtypeStruct((WIDTH,), jnp.int32)
    logits = jax.ShapeDtypeStruct((WIDTH, CLASSES), jnp.float32)
    given = (jax.random.key(0), VARIABLES, NEAR, batch, logits, rows, None)
    state = jax.eval_shape(parts.start, *given)
    for traced in (parts.start.trace(*given), parts.steps.trace(VARIABLES, NEAR, state, 8)):
        assert sum(np.size(constant) for constant in traced.jaxpr.consts) < CLASSES


def test_a_curve_and_several_sources():
    near, far = (attacks.transfer(BALL, apgd(BALL, steps=4), network(each)) for each in (NEAR, FAR))
    result = run(split_of(), curve(far, near, eps=(EPS / 2, EPS, 2 * EPS)))
    accuracies = [result.measures[f"accuracy_at_{i}"].value for i in (1, 2, 3)]
    assert accuracies[0] > accuracies[1] > accuracies[2] and {0, 1} <= set(result.examples.attack)


def test_the_log_says_which_weights_the_source_has(tmp_path, monkeypatch):
    headers = []
    monkeypatch.setattr(evaluate, "Log", lambda path, header: headers.append(header) or Log(path, header))
    options = {"split": "test", "classes": CLASSES, "progress": False, "workdir": tmp_path}
    for variables in (NEAR, FAR):
        robustness = robust(attacks.transfer(BALL, INNER, network(variables)))
        evaluate.evaluate(MODEL, VARIABLES, split_of(), {"transfer": robustness}, **options)
    assert [header["sources"] for header in headers] == [{"runs/near": fingerprint(each)} for each in (NEAR, FAR)]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: run(split_of(), robust(attacks.transfer(BALL, INNER, "runs/x"))),
            f"'transfer of {INNER.name}, from runs/x': load 'runs/x' and give it as Network(model, variables, name)",
        ),
        (
            lambda: attacks.attack(TRANSFER.runs[0], *([None] * 4)),
            "attack: give 'transfer of",
        ),
        (lambda: attacks.transfer(BALL, TRANSFER.runs[0], "x"), f"'{TRANSFER.runs[0].name}' is a transfer already"),
        (lambda: attacks.transfer(BALL, 3, "x"), "give one attack such as pgd(linf(8/255)), got 3"),
        (
            lambda: attacks.transfer(BALL, attacks.fmn(BALL), "x"),
            f"'fmn-100, {BALL.name}' is no attack on the label in a ball; give one such as apgd(linf(8/255))",
        ),
    ],
)
def test_errors(call, text):
    with pytest.raises(UserError) as raised:
        call()
    assert str(raised.value).startswith(text)
