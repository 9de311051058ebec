"""Randomness belongs to the example: one key for each, and what is made of it."""

import jax

from topgap_jax.types import Array, Keys


def example_keys(key: Array, ids: Array) -> Keys:
    """One key per example (b,), from its row of the split: the result does not depend on the batch it is in."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(ids)


def normal(keys: Keys, like: Array) -> Array:
    """Standard normal numbers of the shape and type of `like` (b, ...), each example's from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, like.shape[1:], like.dtype))(keys)


def split(keys: Keys, n: int = 2) -> Array:
    """n keys from each example's: (b,) -> (n, b), so that `a, b = split(keys)`."""
    return jax.vmap(lambda key: jax.random.split(key, n), out_axes=1)(keys)


def fold_in(keys: Keys, number: int | Array) -> Keys:
    """Each example's key with a number folded in: (b,); `number` is one for all, or one for each."""
    return jax.vmap(jax.random.fold_in, (0, 0 if getattr(number, "ndim", 0) else None))(keys, number)
