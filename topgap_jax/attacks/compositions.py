"""Several attacks as one measure: `worst_of`, `restarts`. What they return is `Runs`, plain data: the
attacks in turn, each on the examples that are still unbroken."""

from topgap_jax.attacks.state import as_runs
from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.types import Attack, Runs


def worst_of(*attacks: Attack | Runs) -> Runs:
    """The attacks in this order, each on the examples that the others have left: an example is broken if any breaks
    it."""
    return as_runs(attacks)


def restarts(attack: Attack, n: int) -> Attack:
    """The attack from n starts of its own, on each example until one breaks it: restarts(pgd(linf(8/255)), 10)."""
    if not isinstance(attack, Attack):
        raise UserError(f"give one attack such as pgd(linf(8/255)), got {attack!r}")
    check_number("n", n, 1, whole=True)
    if attack.runs > 1:
        raise UserError(f"'{attack.name}' has {attack.runs} runs already; give it its own option restarts={n}")
    return attack._replace(runs=n, name=f"{attack.name}, {n} restarts" if n > 1 else attack.name)


TABLE = table(worst_of, restarts)
