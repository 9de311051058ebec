"""`bpda`: attacks that see other derivatives of the network, and its own values."""

from topgap_jax.attacks.state import as_runs
from topgap_jax.build import table
from topgap_jax.errors import UserError
from topgap_jax.rewrite import with_rules
from topgap_jax.rewrite.rules import checked
from topgap_jax.types import Attack, Rules, Runs


def bpda(attack: Attack | Runs, rules: Rules) -> Attack | Runs:
    """The attack with stand-ins on the backward pass of the network (Athalye et al. 2018, arXiv 1802.00420).

    bpda(pgd(linf(8/255)), straight_through) attacks through rounding, signs and thresholds, whose own derivative is
    zero. The forward pass stays the network's, bit for bit, and so do verdicts. rules may be any with backward passes
    only. UserError where the network has none of their operations: it needs no stand-in then.
    """
    runs = as_runs(attack)
    if not checked(rules):
        raise UserError("give rules such as straight_through")
    changed = [name for name, rule in rules.items() if rule.forward is not None]
    if changed:
        raise UserError(
            f"the rule of {changed[0]} changes the forward pass; give rules that change the backward pass alone, "
            "such as straight_through"
        )
    ruled = tuple(_ruled(each, rules) for each in runs)
    return ruled[0] if isinstance(attack, Attack) else ruled


def _ruled(attack, rules):
    def init(keys, predict, images, labels, logits, **options):
        return attack.init(keys, with_rules(predict, **rules), images, labels, logits, **options)

    step = lambda predict, state, **options: attack.step(with_rules(predict, **rules), state, **options)
    return attack._replace(init=init, step=step, name=f"BPDA of {attack.name}")


TABLE = table(bpda)
