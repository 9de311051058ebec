"""Measures of maps: functions (keys, predict, maps, batch) -> {name: (b, ...)}, and the arithmetic under them."""

from topgap_jax.build import merged
from topgap_jax.metrics import boxes, field, localisation, perturbation, ranks, spread

TABLE = merged(localisation.TABLE, perturbation.TABLE, spread.TABLE)
globals().update(TABLE)  # the methods, also where a file has the name of one
