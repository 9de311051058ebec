"""Evaluators: what is measured of a model over a split. `accuracy()`, `localisation(cam())`, `measures(cam(), gini())`,
..."""

from topgap_jax.build import merged
from topgap_jax.evaluators import (
    accuracy,
    agreement,
    attributional,
    audit,
    background,
    cluster,
    combined,
    completeness,
    coverage,
    field,
    infidelity,
    localisation,
    measures,
    regions,
    robust,
    stability,
    trust,
)
from topgap_jax.evaluators.regions import background_bank

TABLE = merged(
    accuracy.TABLE,
    agreement.TABLE,
    attributional.TABLE,
    audit.TABLE,
    background.TABLE,
    cluster.TABLE,
    combined.TABLE,
    completeness.TABLE,
    coverage.TABLE,
    field.TABLE,
    infidelity.TABLE,
    localisation.TABLE,
    measures.TABLE,
    regions.TABLE,
    robust.TABLE,
    stability.TABLE,
    trust.TABLE,
)
globals().update(TABLE)  # the methods, also where a file has the name of one
