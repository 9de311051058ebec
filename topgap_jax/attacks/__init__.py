"""Attacks: searches for an adversarial example inside a ball, as pairs (init, step)."""

from topgap_jax.attacks import explanation, gradient
from topgap_jax.attacks.explanation import MapState
from topgap_jax.attacks.gradient import State, as_runs, attack, finish, misclassified
from topgap_jax.build import merged

TABLE = merged(explanation.TABLE, gradient.TABLE)
globals().update(TABLE)  # the methods, also where a file has the name of one
