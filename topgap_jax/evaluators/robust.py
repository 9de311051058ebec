"""`robust(runs)`: accuracy that is left when every example is attacked."""

from topgap_jax.attacks import as_runs
from topgap_jax.build import table
from topgap_jax.errors import UserError
from topgap_jax.types import Attack, Robustness, Runs


def robust(*runs: Attack | Runs) -> Robustness:
    """Plain data for `measure.robust`: the attacks, worked through in turn on the examples that are still unbroken."""
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
