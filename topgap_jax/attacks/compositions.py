"""Several attacks as one measure: `worst_of`, `restarts`, `autoattack`. What they return is `Runs`, plain data: the
attacks in turn, each on the examples that are still unbroken."""

from topgap_jax.attacks.apgd import apgd, apgd_t
from topgap_jax.attacks.fab import fab, fab_t
from topgap_jax.attacks.naming import restarted
from topgap_jax.attacks.square import square
from topgap_jax.attacks.state import as_runs, check_ball, single
from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.scores import dlr
from topgap_jax.types import Attack, Ball, Runs

VERSIONS = ("standard", "plus", "rand")


def worst_of(*attacks: Attack | Runs) -> Runs:
    """The attacks in this order, each on the examples that the others have left: an example is broken if any breaks
    it."""
    return as_runs(attacks)


def restarts(attack: Attack, n: int) -> Attack:
    """The attack from n starts of its own, on each example until one breaks it: restarts(pgd(linf(8/255)), 10).

    An attack that draws nothing, such as fgsm, mim or fmn, makes the same search n times, unless the network draws.
    """
    check_number("n", n, 1, whole=True)
    if single(attack).runs > 1:
        raise UserError(f"'{attack.name}' has {attack.runs} runs already; give it its own option restarts={n}")
    return restarted(attack._replace(runs=n), n)


def autoattack(ball: Ball, *, version: str = "standard") -> Runs:
    """AutoAttack (Croce & Hein 2020, arXiv 2003.01690; in l1 2021, arXiv 2103.01208), with its authors' settings.

    standard: APGD on cross-entropy, APGD on targeted DLR at 9 classes, FAB at 9 classes, 100 steps each, and 5,000
    queries of Square; in l1 with larger radii, 5 restarts of the first and 5 classes for the second. plus: APGD on
    cross-entropy and on DLR and FAB of all classes, 5 starts each, Square, then the targeted ones; its APGD has no
    larger radii, so that in l1 it may be the weaker one (its authors warn of it). rand, for models that draw at random:
    APGD on cross-entropy and on DLR, means over 20 samples.

    With fewer than four classes DLR gives way to differences of logits (`dlr`, `targeted_dlr`), which an evaluation
    says in the terminal and in the attacks' names; the targeted attacks have fewer runs.
    """
    check_ball(ball)
    if version == "standard" and ball.p == 1:
        first = (apgd(ball, restarts=5, larger_radii=True), apgd_t(ball, targets=5, larger_radii=True))
        return worst_of(first, fab_t(ball), square(ball))
    if version == "standard":
        return worst_of(apgd(ball), apgd_t(ball), fab_t(ball), square(ball))
    if version == "plus":
        untargeted = (apgd(ball, restarts=5), apgd(ball, score=dlr, restarts=5), fab(ball, restarts=5), square(ball))
        return worst_of(untargeted, apgd_t(ball), fab_t(ball))
    if version == "rand":
        return worst_of(apgd(ball, samples=20), apgd(ball, score=dlr, samples=20))
    raise UserError(f"version must be one of {', '.join(VERSIONS)}, got {version!r}")


TABLE = table(worst_of, restarts, autoattack)
