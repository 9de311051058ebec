"""Evaluators: what is measured of a model over a split. `accuracy()`, `localisation(cam())`, `measures(cam(), gini())`, ..."""

from topgap_jax.evaluators.accuracy import accuracy
from topgap_jax.evaluators.attributional import attributional_robustness
from topgap_jax.evaluators.coverage import coverage
from topgap_jax.evaluators.field import receptive_field
from topgap_jax.evaluators.localisation import localisation
from topgap_jax.evaluators.measures import measures
from topgap_jax.evaluators.regions import background_bank, regions
from topgap_jax.evaluators.robust import robust

__all__ = [
    "TABLE",
    "accuracy",
    "attributional_robustness",
    "background_bank",
    "coverage",
    "localisation",
    "measures",
    "receptive_field",
    "regions",
    "robust",
]

TABLE = {
    "accuracy": accuracy,
    "attributional_robustness": attributional_robustness,
    "coverage": coverage,
    "localisation": localisation,
    "measures": measures,
    "receptive_field": receptive_field,
    "regions": regions,
    "robust": robust,
}
