"""What makes any function fast and small: the convolutions of the machine, and loops that hold one round at a time.

Inside a loop XLA's CPU has naive convolutions for the kernels that a gradient transposes (12 times slower with a
ResNet-20), so that every loop here writes its convolutions in the layout it is fast with. What a loop here is
differentiated through is a loop again, whose convolutions the caller puts in order: `canonical_convs(jax.grad(...))`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from topgap_jax.rewrite.activations import gelu_by_erf
from topgap_jax.rewrite.convs import canonical_convs, fast_convs
from topgap_jax.rewrite.folding import fold_batch_norm
from topgap_jax.rewrite.sums import sum_first
from topgap_jax.types import Array


def fast(f: Callable) -> Callable:
    """f with all that makes it fast before it is differentiated; f itself where that is nothing, on a GPU or TPU.

    On a CPU: the engine's convolutions (`fast_convs`), batch norm folded into them (`fold_batch_norm`, which knows the
    engine's), the exact GELU by erf (`gelu_by_erf`), and sums over positions before dense layers (`sum_first`). Works
    on any JAX function and has its derivatives. What is fused around a function that has been differentiated is
    `fused`, outermost under `jit`: `jax.jit(fused(lambda x: jax.grad(fast(f))(x)))`.
    """
    folded = sum_first(fold_batch_norm(fast_convs(gelu_by_erf(f))))
    return lambda *args, **kwargs: (folded if jax.default_backend() == "cpu" else f)(*args, **kwargs)


def sum_over(f: Callable, rows: tuple, like: Array) -> Any:
    """The sum of f(*row) over the leading axis of the arrays in `rows`, in float32, one row after another.

    rows: a tuple of arrays (n, ...), or trees of them, n at least 1. f(*row): an array (b, ...), or a tree of them.
    like: an array (b, ...), usually the images: the sum is split over devices as it is. Memory is that of one call; f
    is compiled once. Differentiable where f is.
    """
    rows = jax.tree.map(jnp.asarray, tuple(rows))
    shapes = jax.eval_shape(f, *jax.tree.map(lambda row: row[0], rows))
    zeros = jnp.zeros_like(like[(slice(None), *(0,) * (like.ndim - 1))], jnp.float32)
    start = jax.tree.map(lambda x: jnp.broadcast_to(zeros.reshape(-1, *(1,) * (len(x.shape) - 1)), x.shape), shapes)
    g = canonical_convs(f)
    add = lambda total, row: jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, g(*row))
    return lax.scan(lambda total, row: (add(total, row), None), start, rows)[0]


def map_over(f: Callable, rows: tuple, chunk: int = 1) -> Any:
    """f(*row) for each row of the arrays in `rows`, stacked: results (n, ...), at most `chunk` of them computed at a
    time.

    rows: a tuple of arrays (n, ...), or trees of them, n at least 1. Chunks are of one size, so that f is compiled
    once: 10 rows by chunks of 8 are two chunks of 5; where n does not divide, the last rows are repeated and dropped.
    Memory is that of one chunk, and of the results. Differentiable where f is.

    With images split over devices leave chunk at 1, or call inside `shard_map`: `vmap` folds the rows of a chunk into
    the batch of each convolution, in an order in which the partitioner cannot keep the batch split, so that every
    device computes everything.
    """
    rows = jax.tree.map(jnp.asarray, tuple(rows))
    n = len(jax.tree.leaves(rows)[0])
    chunks = -(-n // chunk)
    size = -(-n // chunks)
    if size == 1:
        return lax.map(lambda row: canonical_convs(f)(*row), rows)
    several = jax.vmap(f)
    if chunks == 1:
        return several(*rows)
    order = np.minimum(np.arange(chunks * size), n - 1).reshape(chunks, size)
    results = lax.map(lambda row: canonical_convs(several)(*row), jax.tree.map(lambda row: row[order], rows))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], results)


def loop(step: Callable[[Any], Any], n: int | Array, state: Any) -> Any:
    """The state after n calls of `step`, a function from a state to one of the same shapes; `step` is compiled once.

    Where n is an int it is differentiable where `step` is; where it is an array, one program serves every n.
    """
    if isinstance(n, int) and n == 1:
        return step(state)
    return lax.fori_loop(0, n, lambda _, state: canonical_convs(step)(state), state)
