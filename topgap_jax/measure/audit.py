"""`audit_split`: the checks of an `Audit` over a split, the cheap ones first.

What needs attacks goes through the queue (`measure.audit_attacks`), the rest is rows of a batch (`evaluators.probes`);
`measure.criteria` says what follows from the numbers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from topgap_jax.edges import probabilities
from topgap_jax.evaluators import probes
from topgap_jax.keys import fold_in
from topgap_jax.measure import audit_attacks, criteria
from topgap_jax.measure.adversarial import Kept
from topgap_jax.measure.audit_attacks import Ask
from topgap_jax.measure.criteria import FAIL, GATES, conclude, skipped
from topgap_jax.measure.log import Log
from topgap_jax.measure.robust import attack_split
from topgap_jax.measure.rows import measure_split
from topgap_jax.measure.splits import Split, narrowed, rows_of
from topgap_jax.measure.verdicts import seen
from topgap_jax.models import bind
from topgap_jax.rewrite import speed
from topgap_jax.rewrite.broken import broken_gradients
from topgap_jax.rewrite.operations import operations
from topgap_jax.rules import straight_through
from topgap_jax.types import Audit, Check, Cost, Evaluator, Measure, Model, Robustness, Variables

ALONE = Cost(2 * 24 + (2 * probes.DIRECTIONS + 1) + (probes.NOISES + 1) + 8, 2 * 20 + 8)
"""Of what is asked of each image without an attack on the split: two paths, differences, noise and a ray."""


class Audited(NamedTuple):
    """checks in the order of their numbers; measures; cost per image of the split; seconds without compilation; the
    adversarial images that were kept, to be removed once the result is stored."""

    checks: tuple[Check, ...]
    measures: dict[str, Measure]
    cost: Cost
    seconds: float
    kept: list[Kept]


def audit_split(
    model: Model,
    variables: Variables,
    data: Split,
    audit: Audit,
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
    text: str = "audit",
    progress: bool | None = None,
    log: Callable[[str], Log | None] = lambda name: None,
) -> Audited:
    """All checks on at most `audit.points` images that are right when clean, evenly spaced in the split.

    A network that returns probabilities, draws at random or judges images by their neighbours fails at once, and what
    attacks would find in it is not asked. log(name): where each part of it notes what it has.
    """
    spent: list[tuple[Cost, float]] = []
    kept: list[Kept] = []
    options = lambda name: {"seed": seed, "mesh": mesh, "text": f"{text}: {name}", "progress": progress}

    def done(points, cost, seconds):
        spent.append((len(points) / data.examples * cost, seconds))

    def rows(name, probe, points, cost, arrays=None):
        def rows(keys, model, variables, batch, arrays):
            return probe(keys, bind(model, variables), batch["image"], batch["label"], arrays)

        evaluator = Evaluator(rows, lambda rows: rows, lambda predict, images: cost)
        values, cost, seconds = measure_split(
            model,
            variables,
            narrowed(rows_of(data, points), len(points), mesh),
            evaluator,
            prepared=arrays,
            log=log(f"{name} of {len(points)}"),
            **options(name),
        )
        done(points, cost, seconds)
        return values

    scaled = _scaled(model)

    def attacks(name, runs, points, *, eps=None, scale=None, keep=None):
        network = (model, variables)
        if scale is not None:
            params = {"network": variables["params"], "scale": np.float32(scale)}
            network = (scaled, {**variables, "params": params})
        robustness = Robustness(runs, () if eps is None else (float(eps),))
        part = f"{name}: {', '.join(attack.name for attack in runs)}, {eps}, {scale}"
        attacked = attack_split(*network, rows_of(data, points), robustness, log=log(part), keep=keep, **options(name))
        kept.extend([attacked.kept] if attacked.kept else [])
        done(points, attacked.cost, attacked.seconds)
        return attacked

    ask = Ask(rows, attacks)
    points, checks, margin = _gates(ask, data, audit)
    measures: dict[str, Measure] = {}
    failed = [check.id for check in checks if check.status == FAIL]
    if failed or not len(points):
        why = f"not made, since {' and '.join(failed)} failed" if failed else "no image is right when clean"
        checks += [skipped(check, why) for check in criteria.CHECKS if check not in GATES]
    else:
        values, improving = _alone(ask, points, audit)
        broken, passed = _operations(model, variables, data)
        values |= broken
        found, measures = audit_attacks.statistics(ask, data, audit, points, margin, improving, mesh, passed=passed)
        values |= found
        made = [check for check in criteria.CHECKS if check not in GATES and (check != "A9" or audit.twin)]
        checks += [conclude(check, values, len(points)) for check in made]
        if not audit.twin:
            checks.append(skipped("A9", "no twin was given"))
    checks = tuple(sorted(checks, key=lambda check: list(criteria.CHECKS).index(check.id)))
    cost = sum((each for each, _ in spent), start=Cost())
    return Audited(checks, measures | _counts(checks, len(points)), cost, sum(seconds for _, seconds in spent), kept)


def _gates(ask: Ask, data: Split, audit: Audit) -> tuple[np.ndarray, list[Check], float]:
    """The rows of the images to be looked at, the checks A10 to A12, and the median margin of those images.

    To find images that are right it looks at no more than twice as many."""
    looked = _spaced(np.arange(data.examples), 2 * audit.points)

    def passes(keys, predict, images, labels, _):
        found = {"logits": predict(images), "label": labels} | probes.batch_coupling(predict, images)
        return found | probes.repeated_passes(keys, predict, images, labels)

    rows = ask.rows("A10 to A12", passes, looked, Cost(probes.PASSES + 2, 0))
    logits = np.asarray(rows["logits"], np.float64)
    top = logits.max(1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
    values = {
        "probabilities": probabilities(logits).mean(),
        "log_probabilities": (np.abs(total) < 1e-5).mean(),
        "drift": rows["drift"].max(),
        "changed": rows["changed"].sum(),
        "coupling": rows["coupling"].max(),
    }
    clean = seen(rows["logits"], rows["label"])
    right = _spaced(np.flatnonzero(~clean.wrong), audit.points)
    margin = float(-np.median(clean.margin[right])) if len(right) else 0.0
    return looked[right], [conclude(check, values, len(looked)) for check in GATES], margin


def _spaced(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the rows, evenly spaced."""
    return rows[np.linspace(0, len(rows) - 1, most).round().astype(int)] if len(rows) > most else rows


def _alone(ask: Ask, points: np.ndarray, audit: Audit) -> tuple[dict[str, Any], np.ndarray]:
    """Statistics of A5, A6, A13 to A16, and of each image what its path gained in the last steps (A7)."""
    ball, first = audit.ball, audit.white_box[0]

    def probe(keys, predict, images, labels, _):
        given = (ball, keys, predict, images, labels)
        path = probes.path(first, keys, predict, images, labels)
        radius = jnp.full_like(images[:, 0, 0, 0], ball.eps)
        start = ball.project(images, ball.start(fold_in(keys, 1), images, radius), radius)
        places = (jnp.stack([images, images + start, path["last"]]),)
        zeros = speed.map_over(lambda points: probes.zero_gradients(predict, points, labels), places)
        return {
            "lost": path["lost"],
            "improvement": probes.late_improvement(path["losses"]),
            **{f"zero_{name}": zeros[name].T for name in ("cross_entropy", "dlr")},
            "underflow": zeros["underflow"][0],
            **probes.ascent(*given),
            **probes.finite_differences(*given),
            **probes.loss_under_noise(*given),
            **probes.one_step_ray(ball, predict, images, labels),
        }

    rows = ask.rows("A5, A6, A7, A13 to A16", probe, points, ALONE)
    zeros = {name: rows[name].mean(0).max() for name in ("zero_cross_entropy", "zero_dlr")}
    return {
        **zeros,
        "zero_gradients": max(zeros.values()),
        **{name: rows[name].mean() for name in ("underflow", "not_above", "falls", "unstable")},
        "lost": rows["lost"].sum(),
        "inside_only": (rows["inside"] & ~rows["end"]).mean(),
        **slopes(rows["rise"], rows["expected"]),
    }, rows["improvement"]


def slopes(rise: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """A14: how far the differences of a function are from what its gradient says, as a share of that, and how often
    they have its sign; differences below 1e-5, where float32 has few digits left, are left out."""
    clear = np.abs(rise) > 1e-5
    if not clear.any():
        return {"relative_error": 0.0, "sign_agreement": 1.0}
    rise, expected = rise[clear], expected[clear]
    error = np.nan_to_num(np.abs(rise - expected) / (np.abs(expected) + 1e-8), nan=np.inf)  # no gradient at all
    return {"relative_error": float(np.median(error)), "sign_agreement": float((rise * expected > 0).mean())}


def _operations(model, variables, data):
    """A17, traced for one image of the split, and whether `straight_through` has stand-ins for something in it."""
    _, batch = next(iter(data.batches(np.arange(1, dtype=np.int32))))
    image = jax.ShapeDtypeStruct(batch["image"].shape, batch["image"].dtype)
    predict = lambda variables, images: bind(model, variables)(images)
    names = broken_gradients(predict, variables, image, of=1)
    stand_ins = operations(jax.make_jaxpr(lambda image: predict(variables, image))(image).jaxpr) & set(straight_through)
    names += [name for name in ("threshold", "step") if name in stand_ins]
    if "floor" in stand_ins and not {"floor", "ceil"} & set(names):
        names.append("conversion to whole numbers")
    words = ", ".join(names) or "nothing that cuts a gradient"
    return {"broken_gradients": len(names), "operations": words}, bool(stand_ins)


def _scaled(model: Model) -> Model:
    """The network with logits that are multiplied by a number, which stands among its parameters."""

    def apply(variables, images, **options):
        inside = variables["params"]
        output = model.apply({**variables, "params": inside["network"]}, images, **options)
        return output._replace(logits=inside["scale"] * output.logits)

    return Model(model.init, apply)


def _counts(checks, n):
    about = lambda status, label: Measure(
        sum(check.status == status for check in checks), n=n, better="lower", label=label, main=False
    )
    return {
        "checks_failed": about(FAIL, "audit checks that failed"),
        "checks_warned": about(criteria.WARN, "audit checks that warn"),
        "checks_skipped": about(criteria.SKIPPED, "audit checks not made")._replace(better=None),
    }
