"""Lengths of arrays, exact where squares are too small or too large for float32."""

import jax.numpy as jnp

from topgap_jax.types import Array


def direction_and_length(values: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Unit vectors and lengths over `axes`, which stay with length 1; of zeros, zeros, also in the derivative."""
    # By the largest entry first: the squares of a confident image's gradient (1e-25) are 0 in float32.
    largest = jnp.abs(values).max(axes, keepdims=True)
    empty = largest == 0
    scaled = values / jnp.where(empty, 1.0, largest)
    length = jnp.sqrt(jnp.where(empty, 1.0, (scaled * scaled).sum(axes, keepdims=True)))
    return scaled / length, jnp.where(empty, 0.0, largest * length)
