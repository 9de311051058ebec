"""From a Flax module to a `Model`, and from a `Model` to a `Predict`."""

import functools
import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from topgap_jax.build import table
from topgap_jax.errors import UserError
from topgap_jax.rewrite import speed
from topgap_jax.rewrite.names import NAMING, name_tree
from topgap_jax.types import Array, Keys, Model, Output, Predict, Variables

# How authors spell the switch between training and evaluation, and what it is in training.
SWITCHES = {
    "train": True, "training": True, "is_training": True,
    "deterministic": False, "use_running_average": False, "eval": False, "inference": False,
}  # fmt: skip


def linen(module: nn.Module) -> Model:
    """A `Model` of any Linen module that maps images (b, h, w, c) to logits (b, k).

    Its `__call__` may take `train`, `training`, `deterministic` or `use_running_average`, and `step` (the pool's
    schedule). Random layers draw from `keys[0]`; training mode without keys leaves dropout out. Collections other than
    params and batch_stats are an error.
    """
    kind = type(module)

    def init(key, images):
        variables = module.init({"params": key, "dropout": key}, images, **_switches(kind, False, None))
        extra = set(variables) - {"params", "batch_stats"}
        if extra:
            raise UserError(
                f"linen: {kind.__name__} keeps collections that are not supported: {', '.join(sorted(extra))}"
            )
        return {"params": variables.get("params", {}), "batch_stats": variables.get("batch_stats", {})}

    def apply(variables, images, *, train=False, keys=None, targets=None, step=None):
        rngs = None if keys is None else {"dropout": keys[0]}
        collections = {"params": variables["params"], "batch_stats": variables["batch_stats"]}
        if not train:
            logits = module.apply(collections, images, rngs=rngs, **_switches(kind, False, step))
            return Output(_checked(logits, images, kind), variables["batch_stats"], {})
        with nullcontext() if keys is not None else nn.intercept_methods(_without_dropout):
            logits, updates = module.apply(
                collections, images, rngs=rngs, mutable=["batch_stats"], **_switches(kind, True, step)
            )
        return Output(_checked(logits, images, kind), updates.get("batch_stats", variables["batch_stats"]), {})

    return Model(init, apply)


def nnx(module: "flax.nnx.Module") -> Model:
    """A `Model` of any NNX module that maps images (b, h, w, c) to logits (b, k).

    `init` returns the module's own parameters, whatever the key: an NNX module is born with them. Random layers are
    seeded from `keys[0]`, and so are the `rngs` of a `__call__` that takes them; without keys, training mode leaves
    dropout out, and for whatever else is random the module's own random state serves again and again. Everything that
    is neither a parameter nor random state counts as batch statistics.
    """
    from flax import nnx as flax_nnx  # here, since few models need it and it takes half a second

    kind = type(module)
    graph, params, random, rest = flax_nnx.split(module, flax_nnx.Param, flax_nnx.RngState, ...)
    takes_rngs = "rngs" in inspect.signature(kind.__call__).parameters

    def init(key, images):
        return {"params": flax_nnx.to_pure_dict(params), "batch_stats": flax_nnx.to_pure_dict(rest)}

    def apply(variables, images, *, train=False, keys=None, targets=None, step=None):
        states = [
            _filled(params, variables["params"]),
            _reseeded(random, keys),
            _filled(rest, variables["batch_stats"]),
        ]
        merged = flax_nnx.merge(graph, *states)
        merged.train() if train else merged.eval()
        if keys is None:
            merged.set_attributes(deterministic=True, raise_if_not_found=False)
        rngs = {"rngs": None if keys is None else flax_nnx.Rngs(keys[0])} if takes_rngs else {}
        logits = _checked(_named_call(merged, images, **rngs, **_switches(kind, train, step)), images, kind)
        after = flax_nnx.to_pure_dict(flax_nnx.split(merged, flax_nnx.Param, flax_nnx.RngState, ...)[3])
        return Output(logits, after if train else variables["batch_stats"], {})

    return Model(init, apply)


def bind(model: Model, variables: Variables, *, train: bool = False, step: Array | None = None) -> Predict:
    """The model with its variables: images -> logits. `train=True` uses batch statistics and drops their update; called
    without keys, it leaves dropout out.

    `step` is for a pool with a schedule; None means the schedule's end.

    Bind inside the jitted function, so that variables are its arguments and not constants.
    """

    def predict(images: Array, keys: Keys | None = None) -> Array:
        return model.apply(variables, images, train=train, keys=keys, step=step).logits

    return predict


def fast(model: Model) -> Model:
    """The same network with all that makes it fast on a CPU: the engine's convolutions, with batch norm folded into
    them (`rewrite.speed.fast`). Models of configs are like this by themselves; on a GPU or TPU it is the network
    itself.
    """
    return model._replace(apply=speed.fast(model.apply))


def _without_dropout(next_fun, args, kwargs, context):
    """A Linen interceptor under which dropout layers return what they are given."""
    if isinstance(context.module, nn.Dropout) and context.method_name == "__call__":
        return args[0] if args else kwargs["inputs"]
    return next_fun(*args, **kwargs)


def _switches(kind: type, train: bool, step: Array | None) -> dict[str, Any]:
    """What the module's `__call__` wants to be told besides the images."""
    parameters = inspect.signature(kind.__call__).parameters
    chosen = {word: value == train for word, value in SWITCHES.items() if word in parameters}
    return chosen | ({"step": step} if "step" in parameters else {})


def _checked(logits: Any, images: Array, kind: type) -> Array:
    if not isinstance(logits, jax.Array) or logits.ndim != 2 or logits.shape[0] != images.shape[0]:
        what = f"an array of shape {logits.shape}" if isinstance(logits, jax.Array) else f"a {type(logits).__name__}"
        raise UserError(
            f"{kind.__name__} must return logits (b, k) for images of shape {images.shape}, it returned {what}"
        )
    return logits.astype(jnp.float32)


def _filled(state, values: Mapping[str, Any]):
    from flax import nnx as flax_nnx

    new = _copied(state)
    flax_nnx.replace_by_pure_dict(new, values)
    return new


def _copied(state):
    # `merge` uses the state's own Variables; shared, a call's counters would leak into the next call.
    return jax.tree.map(lambda x: x, state)


def _reseeded(random, keys):
    if keys is None:
        return _copied(random)
    number = iter(range(10**6))

    def fresh(value):
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            return jax.random.fold_in(keys[0], next(number))
        return value * 0

    return jax.tree.map(fresh, random)


def _named_call(module, images, **kwargs):
    """Call the module; while names are asked for, its submodules name what they return.

    Python looks `__call__` up on the class, so each submodule of this merged copy gets a subclass of its own for the
    call.
    """
    if NAMING.value is None:
        return module(images, **kwargs)
    from flax import nnx as flax_nnx

    originals = []
    for path, child in flax_nnx.iter_modules(module):
        if path and callable(child):
            originals.append((child, type(child)))
            label = "/".join(map(str, path))
            object.__setattr__(child, "__class__", _naming_class(type(child), label))
    try:
        return module(images, **kwargs)
    finally:
        for child, original in originals:
            object.__setattr__(child, "__class__", original)


@functools.cache  # every class is registered with JAX for good
def _naming_class(original, label):
    def __call__(self, *args, **kwargs):
        return name_tree(original.__call__(self, *args, **kwargs), label)

    return type(original.__name__, (original,), {"__call__": __call__})


TABLE = table(linen, nnx)
