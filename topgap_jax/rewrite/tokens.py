"""Tokens of a transformer as features with positions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from topgap_jax.build import check_number
from topgap_jax.errors import UserError
from topgap_jax.types import Array


class Tokens(NamedTuple):
    """A layer whose value is tokens (b, prefix + gh * gw, c), seen as features (b, gh, gw, c)."""

    layer: str
    grid: tuple[int, int]
    prefix: int = 1

    def edit(self, value: Array, edit: Callable[[Array], tuple[Array, Any]]) -> tuple[Array, Any]:
        """The tokens with their features edited, and what `edit` gives beside them; the prefix stays as it is."""
        (rows, columns), n = self.grid, self.prefix + self.grid[0] * self.grid[1]
        if value.ndim != 3 or value.shape[1] != n:
            raise UserError(
                f"tokens: layer '{self.layer}' has shape {value.shape}; a {rows}x{columns} grid with {self.prefix}"
                f" tokens before it needs (b, {n}, c)"
            )
        b, _, c = value.shape
        features, beside = edit(value[:, self.prefix :].reshape(b, rows, columns, c))
        if features.shape != (b, rows, columns, c):
            raise UserError(
                f"tap: the features of '{self.layer}' have shape {(b, rows, columns, c)}, their replacement"
                f" {features.shape}; they must agree"
            )
        patches = features.astype(value.dtype).reshape(b, rows * columns, c)
        return jnp.concatenate([value[:, : self.prefix], patches], 1), beside


def tokens(layer: str, grid: tuple[int, int], prefix: int = 1) -> Tokens:
    """A transformer's layer, for any method that takes one: its tokens (b, prefix + gh * gw, c) as (b, gh, gw, c).

    grid: (gh, gw), patches row by row. prefix: how many tokens stand before them, a class token and the registers: it
    is never guessed from their number, n - prefix must be gh * gw. For class activation maps of a network that reads
    the class token take the last block's first layer norm, `grad_cam(tokens("block11/norm1", (14, 14)))`: behind that
    block the patches have no gradient.
    """
    if not (isinstance(grid, tuple) and len(grid) == 2):
        raise UserError(f"tokens: grid must be (rows, columns), such as (14, 14), got {grid!r}")
    for word, number in zip(("rows of the grid", "columns of the grid"), grid):
        check_number(word, number, 1, whole=True)
    check_number("prefix", prefix, 0, whole=True)
    return Tokens(layer, grid, prefix)
