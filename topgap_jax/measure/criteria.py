"""What an audit concludes from what it has measured: the checks A1 to A18, their bounds, and their sentences.

The checks are those of the papers that they name; the bounds are this library's where no source is named. A check that
fails says that the robust accuracy is an upper bound only: another attack would find less.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from topgap_jax.types import Check

PASS, WARN, FAIL, SKIPPED = "pass", "warn", "fail", "skipped"
GATES = ("A10", "A11", "A12")
"""Checks that come first: what attacks find in a network that fails one of them means nothing."""
REMINDER = (
    "Attack the whole pipeline with one simple loss; put smooth stand-ins on the backward pass only; a higher loss must"
    " mean closer to success (Tramer et al. 2020, arXiv 2002.08347)."
)


class Bound(NamedTuple):
    """A side and a limit, which may depend on the number of images: `above(.1)` is crossed by what is larger."""

    side: str
    limit: float | Callable[[int], float]

    def at(self, n: int) -> float:
        """The limit for n images."""
        return self.limit(n) if callable(self.limit) else self.limit

    def crossed(self, value: float, n: int) -> bool:
        """Whether the value is on the wrong side of the limit."""
        limit = self.at(n)
        return {"above": value > limit, "from": value >= limit, "below": value < limit}[self.side]


above, from_, below = (lambda limit, side=side: Bound(side, limit) for side in ("above", "from", "below"))


class Criterion(NamedTuple):
    """One question of a check: a statistic with the bounds from which it warns and fails.

    evidence, conclusion                                 what the statistics say, by their names, and what follows where
                                                         a bound is crossed
    """

    check: str
    statistic: str
    evidence: str
    conclusion: str
    warn: Bound | None = None
    fail: Bound | None = None


_few = lambda n: max(3, 0.005 * n)  # images that are too many to be chance
_share = lambda share: lambda n: max(share, 1.5 / n)  # of few images a single one decides nothing

ONE_STEP = (
    "one step breaks {one_step_only:.0f} images that PGD-20 leaves, PGD-20 {iterative_only:.0f} that one step leaves"
)
RANDOM = "the network draws at random: attack it with samples=20, such as autoattack(ball, version='rand')"

CRITERIA = (
    Criterion(
        "A1",  # Athalye et al. 2018, arXiv 1802.00420; Carlini et al. 2019, arXiv 1902.06705
        "one_step_p",
        ONE_STEP,
        "gradients are probably masked",
        fail=below(0.05),
    ),
    Criterion(
        "A1",
        "one_step_only",
        ONE_STEP,
        "a step along the gradient leads where following it does not",
        warn=from_(_few),
    ),
    Criterion(
        "A2",  # the same; AutoAttack's own bound warns
        "square_gain",
        "Square lowers robust accuracy by {square_gain:.2%} after the attacks with gradients",
        "a search without gradients should find nothing that they do not",
        warn=above(0.002),
        fail=above(_share(0.01)),
    ),
    Criterion(
        "A3",
        "at_unlimited",
        "{at_unlimited:.1%} of the images stand when every pixel may turn grey",
        "the attack fails, not the network",
        warn=above(0),
        fail=above(_share(0.01)),
    ),
    Criterion(
        "A3",  # Pintor et al. 2022, arXiv 2106.09947
        "at_box",
        "{at_box:.1%} of the images stand when only the pixel box bounds the attack",
        "the attack fails, not the network",
        fail=above(_share(0.01)),
    ),
    Criterion(
        "A3",
        "broken_at_zero",
        "{broken_at_zero:.0f} images break at radius 0",
        "what is attacked is not what was evaluated",
        fail=above(0),
    ),
    Criterion(
        "A3",
        "rise",
        "robust accuracy rises by {rise:.2%} from one radius to the next larger one",
        "a larger ball holds the smaller one: the attack fails",
        fail=above(_share(0.01)),
    ),
    Criterion(
        "A4",
        "noise_hits",
        "random points of the ball break {noise_hits:.0f} images that stand under the attacks with gradients",
        "noise should find nothing that they do not",
        warn=from_(1),
        fail=above(lambda n: max(1, 0.005 * n)),
    ),
    Criterion(
        "A5",
        "zero_gradients",
        "{zero_cross_entropy:.1%} of the gradients of cross-entropy and {zero_dlr:.1%} of those of DLR are exactly 0"
        " or NaN (cross-entropy itself is 0 on {underflow:.1%} of the images)",
        "there the attacks see nothing",
        warn=above(0),
        fail=from_(0.1),
    ),
    Criterion(
        "A6",
        "not_above",
        "the loss ends at most where it began for {not_above:.1%} of the images",
        "small steps along the gradient do not raise the loss",
        warn=above(0.02),
        fail=above(0.1),
    ),
    Criterion(
        "A6",
        "falls",
        "{falls:.1%} of small steps along the gradient lower the loss",
        "the gradient does not point up",
        warn=above(0.3),
    ),
    Criterion(
        "A7",  # the same; the share of paths that still rise only warns: on honest networks it may be 1
        "more_cost",
        "ten times the steps and ten restarts lower robust accuracy by {more_cost:.2%}",
        "the attacks were too short",
        warn=above(0.005),
        fail=above(_share(0.02)),
    ),
    Criterion(
        "A7",
        "still_improving",
        "the loss was still rising at the end for {still_improving:.1%} of the images that stand",
        "more steps may break more",
        warn=above(0.05),
    ),
    Criterion(
        "A8",
        "scale_drop",
        "logits x {worst_scale:.3g} lower robust accuracy by {scale_drop:.2%}",
        "the loss saturates at the network's own scale",
        warn=above(0.01),
        fail=above(_share(0.03)),
    ),
    Criterion(
        "A9",  # Carlini et al. 2019, arXiv 1902.06705
        "transfer_excess",
        "examples of the twin break {transfer_broken:.0f} images, the attacks with gradients {white_box_broken:.0f}",
        "a network's own gradients should help more than another's",
        fail=above(0),
    ),
    Criterion(
        "A9",
        "transfer_only",
        "examples of the twin break {transfer_only:.0f} images that stand under the attacks with gradients",
        "a network's own gradients should find them",
        warn=from_(_few),
    ),
    Criterion(
        "A10",
        "probabilities",
        "{probabilities:.1%} of the outputs are not negative and add up to 1",
        "the network returns probabilities, attacks need logits: leave out the softmax",
        fail=from_(1),
    ),
    Criterion(
        "A10",
        "log_probabilities",
        "{log_probabilities:.1%} of the outputs are logarithms of probabilities",
        "they serve as logits, but say that log_softmax is in the network",
        warn=from_(1),
    ),
    Criterion(
        "A11",
        "drift",
        "passes of the same images differ by up to {drift:.1e}, and in {changed:.0f} verdicts",
        RANDOM,
        fail=above(1e-4),
    ),
    Criterion(
        "A11",
        "changed",
        "passes of the same images differ in {changed:.0f} verdicts",
        RANDOM,
        fail=above(0),
    ),
    Criterion(
        "A12",
        "coupling",
        "logits differ by up to {coupling:.1e} with the rest of the batch",
        "images are not judged one by one (batch norm in training mode?)",
        fail=above(1e-4),
    ),
    Criterion(
        "A13",  # Pintor et al. 2022, arXiv 2106.09947
        "lost",
        "{lost:.0f} images were broken on the attack's path and not in what it returned",
        "the attack loses what it finds",
        fail=above(0),
    ),
    Criterion(
        "A14",  # Athalye et al. 2018, arXiv 1802.00420
        "sign_agreement",
        "the gradient has the sign of a finite difference in {sign_agreement:.0%} of the cases"
        " (median difference {relative_error:.2g} of its size)",
        "gradients are shattered or replaced",
        fail=below(0.7),
    ),
    Criterion(
        "A14",
        "relative_error",
        "gradient and finite difference differ by {relative_error:.2g} of its size (median)",
        "gradients are shattered or replaced",
        warn=above(0.3),
        fail=above(1),
    ),
    Criterion(
        "A15",  # Pintor et al. 2022, arXiv 2106.09947
        "unstable",
        "the loss moves by {unstable:.0%} under noise of half the radius",
        "predictions are unstable where the attack walks",
        warn=above(0.1),
    ),
    Criterion(
        "A16",  # Kim et al. 2020, arXiv 2010.01799; honest networks have some such images too
        "inside_only",
        "{inside_only:.1%} of the images break on the way of a full step and not at its end",
        "catastrophic overfitting: one step says nothing of this network",
        warn=above(0.05),
        fail=above(_share(0.15)),
    ),
    Criterion(
        "A17",
        "broken_gradients",
        "the way from image to logits holds {operations}",
        "gradients there are 0 or replaced",
        warn=above(0),
    ),
    Criterion(
        "A17",  # Athalye et al. 2018, arXiv 1802.00420; bounds as A2
        "through_gain",
        "attacks through {operations}, with stand-ins on the backward pass, find {through_gain:.2%} more",
        "gradients there are 0 or replaced",
        warn=above(0.002),
        fail=above(_share(0.01)),
    ),
    Criterion(
        "A18",
        "outside",
        "{outside:.0f} adversarial images are outside the ball or the pixel box, or have pixels that are NaN",
        "the attack does not keep to its rules",
        fail=above(0),
    ),
)
CHECKS = {
    "A1": "one step against many",
    "A2": "a search without gradients",
    "A3": "larger and smaller radii",
    "A4": "noise",
    "A5": "gradients that are 0",
    "A6": "small steps",
    "A7": "more steps, more starts",
    "A8": "the scale of the logits",
    "A9": "a twin's examples",
    "A10": "probabilities for logits",
    "A11": "the same pass again",
    "A12": "the rest of the batch",
    "A13": "what the attack returns",
    "A14": "finite differences",
    "A15": "loss under noise",
    "A16": "the way of one step",
    "A17": "operations without a gradient",
    "A18": "inside the ball",
}
"""Every check with what it looks at."""


def conclude(check: str, values: Mapping[str, float | str], n: int) -> Check:
    """The check's verdict from its statistics over n images: that of the criterion with the worst one, the first of
    several."""
    checks = [_verdict(criterion, values, n) for criterion in CRITERIA if criterion.check == check]
    return min(checks, key=lambda check: (FAIL, WARN, PASS).index(check.status))


def _verdict(criterion: Criterion, values: Mapping[str, float | str], n: int) -> Check:
    value = float(values[criterion.statistic])
    wrong = lambda bound: bound is not None and bound.crossed(value, n)
    status = FAIL if wrong(criterion.fail) else WARN if wrong(criterion.warn) else PASS
    bound = criterion.fail if status == FAIL else criterion.warn or criterion.fail
    words = criterion.evidence.format_map(values).replace("%", " %")
    sentence = words if status == PASS else f"{words}: {criterion.conclusion}"
    return Check(criterion.check, status, value, float(bound.at(n)), n, sentence[0].upper() + sentence[1:])


def skipped(check: str, reason: str) -> Check:
    """A check that was not made."""
    return Check(check, SKIPPED, None, None, 0, reason[0].upper() + reason[1:])


def headline(checks: Sequence[Check]) -> str:
    """The verdict of an audit in a line.

    >>> headline([Check("A1", "pass", 1.0, 0.05, 9, ""), Check("A2", "warn", 0.005, 0.002, 9, "")])
    'no check failed (2 checks of 9 images, 1 warning)'
    """
    count = lambda status: sum(check.status == status for check in checks)
    made = len(checks) - count(SKIPPED)
    if count(FAIL):
        return f"UPPER BOUND ONLY: {count(FAIL)} of {made} checks failed"
    if not made:
        return "no check could be made"
    images, warnings = max(check.n for check in checks), count(WARN)
    of = f"{made} checks of {images} image{'' if images == 1 else 's'}"
    return f"no check failed ({of}, {warnings} warning{'' if warnings == 1 else 's'})"


def sign_test(b: int, c: int) -> float:
    """P(X >= b) for X binomial of b + c tries with probability 1/2: whether b is more than c by chance.

    >>> sign_test(5, 0), sign_test(3, 0), sign_test(0, 0)
    (0.03125, 0.125, 1.0)
    """
    n = b + c
    return sum(math.comb(n, k) for k in range(b, n + 1)) / 2**n
