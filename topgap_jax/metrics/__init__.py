"""Measures of maps: functions (keys, predict, maps, batch) -> {name: (b, ...)}, and the arithmetic under them."""

from topgap_jax.build import merged
from topgap_jax.metrics import (
    boxes,
    correlation,
    field,
    localisation,
    masking,
    perturbation,
    ranks,
    road,
    spread,
    structure,
    substrates,
)

TABLE = merged(correlation.TABLE, localisation.TABLE, masking.TABLE, perturbation.TABLE, road.TABLE, spread.TABLE)
globals().update(TABLE)  # the methods, also where a file has the name of one
