"""The statistics of an audit that attacks give: A1 to A4, A7 to A9, A17, A18, and what stands in other norms."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from topgap_jax.attacks import apgd, bpda, fgsm, noise, pgd, r_fgsm, restarts, square, transfer
from topgap_jax.balls import linf
from topgap_jax.evaluators import probes
from topgap_jax.evaluators.audit import GROWTH, comparable, white_box
from topgap_jax.measure.criteria import sign_test
from topgap_jax.measure.robust import whole
from topgap_jax.measure.splits import Split, rows_of
from topgap_jax.metrics.summaries import share
from topgap_jax.rules import straight_through
from topgap_jax.types import Audit, Measure

SWEEP = (0, 1, 2, 4, 8, 16, 32)  # radii of A3, in those of the ball
GREY = 0.5  # a pixel value that may move by so much may turn grey
SCALES = (0.01, 0.1, 10, 100)  # of the logits in A8; one more gives them a median margin of 1


class Ask(NamedTuple):
    """How the checks ask about images, whose rows of the split are `points` (m,).

    rows(name, probe, points, cost, arrays=None)         probe(keys, predict, images, labels, arrays) of each, in NumPy
    attacks(name, runs, points, eps=, scale=, keep=)     `measure.robust.Attacked`; eps: at another radius; scale: of
                                                         the network with logits that are multiplied by it
    """

    rows: Callable[..., Any]
    attacks: Callable[..., Any]


def statistics(
    ask: Ask,
    data: Split,
    audit: Audit,
    points: np.ndarray,
    margin: float,
    improving: np.ndarray,
    mesh: Any,
    *,
    passed: bool = False,
) -> tuple[dict[str, float], dict[str, Measure]]:
    """(statistics by the names of `measure.criteria`, measures) of the images `points`, which are right when clean.

    margin: the median of their clean margins; improving (m,): the late gain of each one's path; passed: whether the
    network holds operations that `straight_through` passes the gradient through.
    """
    ball, base = audit.ball, ask.attacks("the base", audit.white_box, points, keep="all")
    stands = np.isinf(base.examples.radius)
    by_pgd, left = base.examples.attack == 0, points[stands]
    values = {"outside": _outside(base.kept.images, data, audit, points, mesh)}
    values |= _one_step(ask, ball, points, by_pgd)
    values |= _sweep(ask, ball, points, _pixels(data))
    values |= _scales(ask, audit, points, by_pgd, margin)
    if audit.twin:
        values |= _transferred(ask, audit, points, stands)
    longer, through = restarts(pgd(ball, steps=200), 10), bpda(audit.white_box, straight_through) if passed else ()
    for name, check, runs in (
        ("square", "A2", (square(ball),)),
        ("noise", "A4", (noise(ball),)),
        ("longer", "A7", (longer,)),
        ("through", "A17", through),
    ):
        more = ask.attacks(check, runs, left).examples.radius if len(left) and runs else np.array([])
        values[f"{name}_hits"] = int(np.isfinite(more).sum())
    for gain, hits in (("square_gain", "square"), ("more_cost", "longer"), ("through_gain", "through")):
        values[gain] = values[f"{hits}_hits"] / len(points)
    values["still_improving"] = float((improving[stands] > 0.05).mean()) if stands.any() else 0.0
    return values, _norms(ask, audit, points, stands, _pixels(data))


def _outside(images, data, audit, points, mesh):
    """A18: how many of the adversarial images (m, h, w, c) break the rules."""
    count = 0
    for ids, batch in rows_of(data, points).batches(None):
        clean = np.asarray(jax.device_get(whole(mesh)(batch["image"])))[: len(ids)]
        count += int(np.sum(probes.outside(audit.ball, clean, np.asarray(images[ids]))))
    return count


def _one_step(ask, ball, points, by_pgd):
    """A1."""
    broken = np.isfinite(ask.attacks("A1", (fgsm(ball), r_fgsm(ball)), points).examples.radius)
    only, iterative_only = int((broken & ~by_pgd).sum()), int((by_pgd & ~broken).sum())
    values = {"one_step_only": only, "iterative_only": iterative_only}
    return values | {"one_step_p": sign_test(only, iterative_only)}


def _sweep(ask, ball, points, pixels):
    """A3: no verdict is carried from one radius to the next, or no rise could be seen."""
    unlimited = GREY * pixels ** GROWTH[ball.norm]
    radii, runs = sorted({*(float(times * ball.eps) for times in SWEEP), unlimited}), (pgd(ball, steps=50),)
    stands = {eps: ask.attacks("A3", runs, points, eps=eps).measures["accuracy_at_1"].value for eps in radii}
    accuracies = [stands[eps] for eps in radii]
    box = ask.attacks("A3", (pgd(linf(1.0), steps=100, step_size=0.01),), points).measures["robust_accuracy"]
    return {
        "broken_at_zero": round((1 - stands[0.0]) * len(points)),
        "at_unlimited": stands[unlimited],
        "at_box": box.value,
        "rise": max(after - before for before, after in itertools.pairwise(accuracies)),
    }


def _scales(ask, audit, points, by_pgd, margin):
    """A8, against the same attack on the logits as they are."""
    drops = {}
    for scale in (*SCALES, 1 / max(margin, 1e-30)):
        examples = ask.attacks("A8", audit.white_box[:1], points, scale=scale).examples
        drops[scale] = float((~by_pgd).mean() - np.isinf(examples.radius).mean())
    worst = max(drops, key=drops.get)
    return {"worst_scale": worst, "scale_drop": max(drops[worst], 0.0)}


def _transferred(ask, audit, points, stands):
    """A9: APGD on the twin, every iterate of which is tried on the network."""
    crafted = transfer(audit.ball, apgd(audit.ball), audit.twin)
    broken = np.isfinite(ask.attacks("A9", (crafted,), points).examples.radius)
    counts = {"transfer_broken": int(broken.sum()), "white_box_broken": int((~stands).sum())}
    excess = counts["transfer_broken"] - counts["white_box_broken"]
    return counts | {"transfer_excess": excess, "transfer_only": int((broken & stands).sum())}


def _norms(ask, audit, points, stands, pixels):
    """The share of the images that stands in each norm, that of the audit first, and in all."""
    about = lambda where: Measure(better="higher", label=f"stands in {where}")
    balls, standing = comparable(audit.ball, pixels), {audit.ball.norm: stands}
    for ball in balls:
        if ball.norm != audit.ball.norm:
            examples = ask.attacks(ball.name, white_box(ball), points).examples
            standing[ball.norm] = np.isinf(examples.radius)
    names = {ball.norm: ball.name for ball in balls}
    measures = {f"stands_{norm}": share(stand, about(names[norm])) for norm, stand in standing.items()}
    return measures | {"stands_in_all": share(np.logical_and.reduce(list(standing.values())), about("all three"))}


def _pixels(data):
    _, batch = next(iter(data.batches(np.arange(1, dtype=np.int32))))
    return batch["image"][0].size
