"""How a network is trained: objectives, augmentation, optimizers, schedules."""

from topgap_jax.training import augment, objectives, optimizers, schedules
