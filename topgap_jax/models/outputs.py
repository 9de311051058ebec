"""What a module of somebody else returns, and what it raises."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from topgap_jax.errors import UserError
from topgap_jax.types import Array


def logits_of(out: Any, images: Array, kind: type) -> Array:
    """The logits (b, k), float32, of what a module returned.

    An array; what is named `logits` in a dict, dataclass or named tuple (Hugging Face's ModelOutput), or in one that is
    inside; else the only float array (b, k) in it, or the first of several of one shape (a classifier with auxiliary
    heads); else the same of what is inside. UserError otherwise.
    """
    level, candidates, named = [out], [], []
    while level and not named:
        candidates = candidates or [x for x in level if _may_be_logits(x, images)]
        named = [x for each in level if _may_be_logits(x := _named(each).get("logits"), images)]
        level = [part for x in level for part in _parts(x)]
    candidates = named or candidates
    shapes = sorted({x.shape for x in candidates})
    if len(shapes) == 1:
        return candidates[0].astype(jnp.float32)
    if shapes:
        what = f"several arrays, {' and '.join(map(str, shapes))}: return the logits alone, or name them logits"
    elif isinstance(out, jax.Array):
        what = f"an array of shape {out.shape}"
    else:
        named = _named(out)
        what = f"a {type(out).__name__}" + (f" of {', '.join(map(str, named))}" if named else "")
    raise UserError(f"{kind.__name__} must return logits (b, k) for images of shape {images.shape}, it returned {what}")


def _may_be_logits(x: Any, images: Array) -> bool:
    floats = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
    return floats and x.ndim == 2 and x.shape[0] == images.shape[0]


def _named(out: Any) -> Mapping[str, Any]:
    if dataclasses.is_dataclass(out):
        return {field.name: getattr(out, field.name) for field in dataclasses.fields(out)}
    if isinstance(out, Mapping):
        return out
    return dict(zip(out._fields, out)) if hasattr(out, "_fields") else {}


def _parts(out: Any) -> list[Any]:
    """What a container holds; of one that names its logits, these alone."""
    named = _named(out)
    if "logits" in named:
        return [named["logits"]]
    return list(named.values() if named else out if isinstance(out, tuple | list) else ())


@contextlib.contextmanager
def in_one_line(kind: type, images: Any, train: bool | None) -> Iterator[None]:
    """What a module raises becomes a UserError of one line, which says at which call of ours; its traceback is kept.

    train: None while it is initialised.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        mode = "initialised" if train is None else "called in training mode" if train else "called in eval mode"
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        said = re.sub(r" \(https?://\S+\)$", "", said)  # Flax ends in the address of a page
        raise UserError(
            f"{kind.__name__}, {mode} with images of shape {tuple(images.shape)}, raised {type(error).__name__}:"
            f" {said[:200]}"
        ) from error


def with_axes(call: Callable[[], Any], bound: tuple[str, ...] = ()) -> Any:
    """call(), inside a mapped axis of size 1 for each name that it asks for and nobody has bound.

    A `BatchNorm(axis_name="batch")` then has the statistics of the whole batch, which is what it asks for, as a batch
    that `jit` divides among devices is one array here. An axis that is bound, as in `pmap`, stays what it is.
    """
    try:
        return call()
    except NameError as error:
        unbound = re.search(r"unbound axis name: (.+?)(?:\. |$)", str(error))
        if unbound is None or unbound[1] in bound:
            raise
        name = unbound[1]
    mapped = lambda out_axes: jax.vmap(call, axis_name=name, axis_size=1, out_axes=out_axes)()

    def within():
        try:
            return mapped(None)
        except ValueError as error:
            if "mapped output" not in str(error):
                raise
            return jax.tree.map(lambda x: x[0], mapped(0))  # of what depends on `axis_index`

    return with_axes(within, (*bound, name))
