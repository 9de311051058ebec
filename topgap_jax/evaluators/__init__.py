"""Evaluators: what is measured of a model over a split. `accuracy()`, `localisation(cam())`, `regions(bank)`, ..."""

from topgap_jax.evaluators.accuracy import accuracy
from topgap_jax.evaluators.field import receptive_field
from topgap_jax.evaluators.localisation import localisation
from topgap_jax.evaluators.regions import background_bank, regions
from topgap_jax.evaluators.robust import robust

__all__ = ["TABLE", "accuracy", "background_bank", "localisation", "receptive_field", "regions", "robust"]

TABLE = {
    "accuracy": accuracy,
    "localisation": localisation,
    "receptive_field": receptive_field,
    "regions": regions,
    "robust": robust,
}
