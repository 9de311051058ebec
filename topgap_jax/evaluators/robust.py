"""`robust(runs)`: accuracy that is left when every example is attacked."""

from topgap_jax.attacks import as_runs
from topgap_jax.build import table
from topgap_jax.errors import UserError
from topgap_jax.types import Attack, Robustness, Runs


def robust(*runs: Attack | Runs) -> Robustness:
    """Accuracy under attack: the share of examples that none of the attacks breaks, each run on what is still unbroken.

    With its 95 % interval, and the clean accuracy beside it. An attack finds an upper bound of the true robust
    accuracy: a stronger one may break more. robust(pgd(linf(8/255)), fgsm(linf(8/255))) runs two, one after the other.
    """
    attacks = as_runs(runs)
    if not attacks:
        raise UserError("robust: give one or more attacks, such as robust(pgd(linf(8/255)))")
    for attack in attacks:
        if attack.aim != "label":
            raise UserError(
                f"robust: '{attack.name}' keeps the label; give it to attributional_robustness(explain, attack)"
            )
    return Robustness(attacks)


TABLE = table(robust)
