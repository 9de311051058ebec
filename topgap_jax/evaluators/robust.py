"""`robust(attacks)` and `curve(attacks, eps)`: accuracy that is left when every example is attacked."""

from topgap_jax.attacks import as_runs
from topgap_jax.balls import LARGEST
from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.types import Attack, Robustness, Runs


def robust(*runs: Attack | Runs) -> Robustness:
    """Accuracy under attack: the share of examples that none of the attacks breaks, each run on what is still unbroken.

    With its 95 % interval, the clean accuracy beside it and, where the data have groups, the worst group's. An attack
    finds an upper bound of the true robust accuracy: a stronger one may break more. robust(pgd(linf(8/255)),
    fgsm(linf(8/255))) runs two, one after the other.
    """
    attacks = _attacks("robust", runs)
    for attack in attacks:
        if attack.aim == "norm":
            raise UserError(
                f"robust: '{attack.name}' looks for the smallest perturbation, at no radius of its own; give it to "
                "curve(attack, eps=(2/255, 4/255, 8/255))"
            )
    return Robustness(attacks)


def curve(*runs: Attack | Runs, eps: tuple[float, ...]) -> Robustness:
    """Accuracy over the radius: that of `robust(attacks)` at each `eps`, in the attacks' own norm.

    From the smallest radius to the largest in one compiled program, and one more whenever what stands fills half its
    batch. What breaks at one is inside every larger ball, so that only what stands is attacked again; such carried
    verdicts can only lower the accuracy that the attacks alone would find there. An attack on the norm (`fmn`) gives
    all radii at once. Where the data have groups, the worst group's accuracy stands beside each.
    """
    attacks = _attacks("curve", runs)
    norms = dict.fromkeys(attack.norm for attack in attacks if attack.norm)
    if len(norms) > 1:
        raise UserError(f"curve: the attacks are in several norms, {' and '.join(norms)}; give each a curve of its own")
    if not isinstance(eps, tuple | list) or not eps:
        raise UserError(f"curve: eps must be radii such as (2/255, 4/255, 8/255), got {eps!r}")
    for radius in eps:
        check_number("eps", radius, 0, LARGEST)
    if list(eps) != sorted(set(eps)) or eps[0] == 0:
        raise UserError(f"curve: eps must be radii above 0, each larger than the one before, got {tuple(eps)!r}")
    return Robustness(attacks, tuple(map(float, eps)))


def _attacks(name, runs):
    attacks = as_runs(runs)
    if not attacks:
        radii = ", eps=(2/255, 8/255)" if name == "curve" else ""
        raise UserError(f"{name}: give one or more attacks, such as {name}(pgd(linf(8/255)){radii})")
    for attack in attacks:
        if attack.aim == "map":
            raise UserError(
                f"{name}: '{attack.name}' keeps the label; give it to attributional_robustness(explain, attack)"
            )
    return attacks


TABLE = table(robust, curve)
