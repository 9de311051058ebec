"""`audit(ball)`: whether what attacks in a ball leave of a network is to be believed."""

from topgap_jax.attacks import apgd, pgd
from topgap_jax.attacks.state import check_ball
from topgap_jax.balls import l1, l2, linf
from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.types import Audit, Ball, Network, Runs

RADII = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}
"""Of CIFAR-10 in the literature on several norms (Croce & Hein 2022, arXiv 2105.12508)."""
PIXELS = 32 * 32 * 3
GROWTH = {"linf": 0.0, "l2": 0.5, "l1": 1.0}
"""The power of the number of pixel values with which a radius grows: that of the norm of an image of ones."""


def audit(ball: Ball, *, twin: str | Network | None = None, points: int = 512) -> Audit:
    """Eighteen checks of whether the robust accuracy in `ball` is to be believed: "UPPER BOUND ONLY: k of m checks
    failed", or "no check failed".

    It looks at `points` images that are right when clean, evenly spaced in the split. The base are PGD-20 and APGD-100
    on cross-entropy. Does one step break what they do not (A1); Square (A2); noise (A4); a twin's examples (A9); ten
    times the steps and ten restarts (A7)? Does a larger ball always leave less, and the largest nothing (A3)? Are
    gradients 0 (A5), or something else than the slope (A14); does the loss follow them (A6); is it saturated (A8) or
    unstable (A15)? Are outputs probabilities (A10), random (A11), or dependent on the batch (A12)? Does the attack lose
    what it finds (A13), or leave its ball (A18)? Does the network overfit to one step (A16); does something on the way
    cut the gradient, and do attacks through it find more (A17)? Checks and bounds: `measure/criteria.py`; after
    Carlini et al. 2019 (arXiv 1902.06705) and Pintor et al. 2022 (arXiv 2106.09947).

    Beside them, the share of the images that stands in linf, l2 and l1, each alone and in all three, at radii that are
    comparable: in the proportion 8/255 : .5 : 12 of CIFAR-10 (arXiv 2105.12508), where those of l2 and l1 grow with
    sqrt(n) and n, n the number of pixel values, as the norms of an image of ones do.

    twin: another network for A9, of the same data without the defence: the folder of a run, a file of weights or the
    name of a published network; in Python also a `Network`.
    """
    check_ball(ball)
    check_number("points", points, 1, whole=True)
    if ball.eps <= 0:
        raise UserError(f"audit: {ball.name} holds one image; give a radius above 0")
    if ball.norm not in RADII:
        raise UserError(f"audit: the ball must be linf, l2 or l1, got {ball.name}")
    if not (twin is None or isinstance(twin, str | Network)):
        raise UserError(f"audit: twin must be the folder of a run, or Network(model, variables, name), got {twin!r}")
    return Audit(ball, white_box(ball), twin, points)


def white_box(ball: Ball) -> Runs:
    """The attacks with gradients that an audit takes as its base."""
    return pgd(ball), apgd(ball)


def comparable(ball: Ball, pixels: int) -> tuple[Ball, Ball, Ball]:
    """linf, l2 and l1 balls of radii that are comparable on images of so many pixel values; one of them is `ball`.

    >>> [one.name for one in comparable(linf(8 / 255), 32 * 32 * 3)], [one.name for one in comparable(l2(2), 150528)]
    (['linf(8/255)', 'l2(0.5)', 'l1(12)'], ['linf(0.01793)', 'l2(2)', 'l1(336)'])
    """
    size = {norm: radius * (pixels / PIXELS) ** GROWTH[norm] for norm, radius in RADII.items()}
    factor = ball.eps / size[ball.norm]
    return tuple(
        ball if ball.norm == norm else make(factor * size[norm])
        for norm, make in (("linf", linf), ("l2", l2), ("l1", l1))
    )


TABLE = table(audit)
