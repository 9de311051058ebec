"""What training lowers. An objective sees the model, so every method of training is one."""

from topgap_jax.build import merged
from topgap_jax.training import art, norm_regularised, standard

TABLE = merged(standard.TABLE, norm_regularised.TABLE, art.TABLE)
globals().update(TABLE)  # the methods, also where a file has the name of one
