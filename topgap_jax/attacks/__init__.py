"""Attacks: searches for an adversarial example inside a ball, as pairs (init, step)."""

from topgap_jax.attacks.explanation import MapState, topk_attack
from topgap_jax.attacks.gradient import State, as_runs, attack, fgsm, finish, misclassified, pgd, r_fgsm

__all__ = [
    "TABLE",
    "MapState",
    "State",
    "as_runs",
    "attack",
    "fgsm",
    "finish",
    "misclassified",
    "pgd",
    "r_fgsm",
    "topk_attack",
]

TABLE = {"fgsm": fgsm, "pgd": pgd, "r_fgsm": r_fgsm, "topk_attack": topk_attack}
