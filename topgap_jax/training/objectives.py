"""What training lowers. An objective sees the model, so every method of training is one."""

from topgap_jax.training.art import art
from topgap_jax.training.norm_regularised import norm_regularised
from topgap_jax.training.standard import adversarial, standard

__all__ = ["TABLE", "adversarial", "art", "norm_regularised", "standard"]

TABLE = {f.__name__: f for f in (standard, adversarial, norm_regularised, art)}
