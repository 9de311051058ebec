"""Attacks: searches for an adversarial example inside a ball, as pairs (init, step)."""

from topgap_jax.attacks import alignment, apgd, bpda, compositions, fab, fmn, gradient, maps, noise, square, state
from topgap_jax.attacks import transfer as transfers
from topgap_jax.attacks.state import State, as_runs, attack, finish, misclassified, norms
from topgap_jax.attacks.transfer import bound
from topgap_jax.build import merged

TABLE = merged(
    gradient.TABLE,
    apgd.TABLE,
    fab.TABLE,
    square.TABLE,
    fmn.TABLE,
    noise.TABLE,
    compositions.TABLE,
    bpda.TABLE,
    maps.TABLE,
    alignment.TABLE,
    transfers.TABLE,
)
globals().update(TABLE)  # the methods, also where a file has the name of one
