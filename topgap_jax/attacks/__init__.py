"""Attacks: searches for an adversarial example inside a ball, as pairs (init, step)."""

from topgap_jax.attacks.gradient import State, as_runs, attack, fgsm, finish, misclassified, pgd

__all__ = ["TABLE", "State", "as_runs", "attack", "fgsm", "finish", "misclassified", "pgd"]

TABLE = {"fgsm": fgsm, "pgd": pgd}
