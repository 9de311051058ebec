"""Flax's collections of variables as the two that training knows: "params", and "batch_stats" for all other state."""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from topgap_jax.errors import UserError
from topgap_jax.types import Variables


def packed(collections: Mapping[str, Any]) -> dict[str, Any]:
    """Flax's collections as "params" and "batch_stats", which holds the others as "(name)"."""
    others = {f"({name})": tree for name, tree in collections.items() if name not in ("params", "batch_stats")}
    return {"params": collections.get("params", {}), "batch_stats": {**collections.get("batch_stats", {}), **others}}


def unpacked(variables: Variables) -> dict[str, Any]:
    """Flax's collections again."""
    stats = variables["batch_stats"]
    others = {name[1:-1]: tree for name, tree in stats.items() if name.startswith("(")}
    if others:
        stats = {name: tree for name, tree in stats.items() if not name.startswith("(")}
    return {"params": variables["params"], "batch_stats": stats, **others}


def carried(packed: Variables, after: Any) -> dict[str, Any]:
    """Without the collections that grow with each call: what is sown there is a result, and no state."""
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    stats = {name: tree for name, tree in packed["batch_stats"].items() if shapes(tree) == shapes(after[name])}
    return {"params": packed["params"], "batch_stats": stats}


def with_weights(weights: Variables, drawn: Variables, kind: type) -> dict[str, Any]:
    """The weights that a module came with, in the form of those that it would have drawn."""
    if not isinstance(weights, Mapping):
        what = f"got a {type(weights).__name__}; pretrained.load and load_tree read files"
        raise UserError(f"linen: weights must be a tree of arrays, {what}")
    given = packed(weights if "params" in weights else {"params": weights})
    try:
        given = jax.tree.map(jnp.asarray, {**given, "batch_stats": {**drawn["batch_stats"], **given["batch_stats"]}})
    except (TypeError, ValueError) as error:
        raise UserError(f"linen: weights must be a tree of arrays of numbers: {error}") from error
    for (path, a), (other, b) in itertools.zip_longest(
        *(jax.tree.leaves_with_path(tree) for tree in (given, drawn)), fillvalue=(None, None)
    ):
        if path != other or a.shape != b.shape:
            name = lambda path, x: f"{jax.tree_util.keystr(path)} {x.shape}" if path else "nothing more"
            raise UserError(
                f"linen: the weights do not fit {kind.__name__}: {name(path, a)} where it has {name(other, b)}"
            )
    return given
