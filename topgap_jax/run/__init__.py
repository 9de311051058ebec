"""A run on the disk: the training loop, checkpoints, the folder, where it came from, the CPU's settings."""

from topgap_jax.run import checkpoint, cpu, fit, provenance, workdir
