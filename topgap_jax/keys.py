"""Randomness belongs to the example: one key for each, and what is made of it."""

from typing import Any

import jax

from topgap_jax.errors import UserError
from topgap_jax.types import Array, Keys


def root(seed: int) -> Array:
    """The root key of a seed, of kind threefry whatever `jax_default_prng_impl` says: with other kinds, what an example
    draws under `vmap` depends on its neighbours."""
    return jax.random.key(seed, impl="threefry2x32")


def example_keys(key: Array, ids: Array) -> Keys:
    """One key per example (b,), from its row of the split: the result does not depend on the batch it is in."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(ids)


def normal(keys: Keys, like: Array) -> Array:
    """Standard normal numbers of the shape and type of `like` (b, ...), each example's from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, like.shape[1:], like.dtype))(required(keys))


def split(keys: Keys, n: int = 2) -> Array:
    """n keys from each example's: (b,) -> (n, b), so that `a, b = split(keys)`."""
    return jax.vmap(lambda key: jax.random.split(key, n), out_axes=1)(required(keys))


def fold_in(keys: Keys, number: int | Array) -> Keys:
    """Each example's key with a number folded in: (b,); `number` is one for all, or one for each."""
    return jax.vmap(jax.random.fold_in, (0, 0 if getattr(number, "ndim", 0) else None))(required(keys), number)


def required(keys: Any) -> Keys:
    """`keys`; UserError where a caller gave None to a method that draws."""
    if keys is None:
        raise UserError(
            "keys=None: this method draws at random, and needs one key for each image,"
            " jax.random.split(jax.random.key(0), len(images))"
        )
    return keys
