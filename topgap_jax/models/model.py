"""From a Flax module to a `Model`, and from a `Model` to a `Predict`."""

import functools
import inspect
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import flax
import flax.linen as nn
import jax

from topgap_jax.build import table
from topgap_jax.errors import UserError
from topgap_jax.keys import root
from topgap_jax.models import collections, switches
from topgap_jax.models.outputs import in_one_line, logits_of, with_axes
from topgap_jax.rewrite import speed
from topgap_jax.rewrite.names import NAMING, name_tree
from topgap_jax.types import Array, Keys, Model, Output, Predict, Variables


def linen(module: nn.Module, *, weights: Variables | None = None) -> Model:
    """A `Model` of any Linen module that maps images (b, h, w, c) to logits (b, k).

    The switch between training and evaluation is found where authors put it (`models.switches`): a parameter of
    `__call__` such as `train`, `is_training`, `deterministic` or `use_running_average`, what `**kwargs` pass on to a
    module inside, a field of the module; `step` is the pool's schedule. A module whose batch statistics do not move in
    training gets a warning. Logits may be in a dict, a dataclass or a tuple (`models.outputs.logits_of`).

    Every random stream draws from `keys[0]`, and so does a `key` or `rng` that the call takes; training mode without
    keys leaves out dropout and other layers without variables that have a switch. A named axis
    (`BatchNorm(axis_name=...)`) is the whole batch. Collections besides params count as batch statistics, under
    "(name)" but for `batch_stats` itself; what a module only sows is dropped.

    weights: variables that `init` returns whatever the key, of a network that is trained already: {"params": ...,
    "batch_stats": ...}, or the parameters alone. Raises UserError, in one line, for whatever the module raises.
    """
    _check(module, nn.Module, "linen")
    kind = type(module)
    passed_on: list[tuple[str, ...]] = []  # by `**kwargs`; one entry once it is known
    warned: list[bool] = []

    def switched(images, train, step):
        """The module, and the arguments of its call."""
        words = switches.arguments(kind.__call__, train, step)
        if switches.passes_on(kind.__call__):
            if not passed_on:
                inner = switches.with_fields(module, False)
                draw = lambda words: lambda images: inner.init(root(0), images, **words)
                described = jax.ShapeDtypeStruct(images.shape, images.dtype)
                passed_on.append(switches.accepted(lambda words: jax.eval_shape(draw(words), described)))
            words |= {word: switches.in_training(word) == train for word in passed_on[0]}
        return switches.with_fields(module, train), words

    def init(key, images):
        with in_one_line(kind, images, None):
            switched_off, words = switched(images, False, None)
            words |= switches.keys(kind.__call__, None, lambda x: x)
            variables = with_axes(lambda: switched_off.init({"params": key, "dropout": key}, images, **words))
            fresh = collections.packed(variables)
            if set(fresh["batch_stats"]) - set(variables.get("batch_stats", {})):
                step = lambda fresh, images: apply(fresh, images, train=True, keys=key[None]).batch_stats
                fresh = collections.carried(fresh, jax.eval_shape(step, fresh, images))
        return fresh if weights is None else collections.with_weights(weights, fresh, kind)

    def apply(variables, images, *, train=False, keys=None, targets=None, step=None):
        given = collections.unpacked(variables)
        rngs = None
        if keys is not None:
            # Streams that have no key of their own draw from that of the parameters. In evaluation there is none of
            # dropout: modules ask `has_rng("dropout")` whether they are trained.
            rngs = {
                "params": jax.random.fold_in(keys[0], 1),
                **dict.fromkeys(switches.STREAMS if train else (), keys[0]),
            }
        extra = [name for name in given if name not in ("params", "batch_stats")]

        def call():
            called, words = switched(images, train, step)
            words |= switches.keys(kind.__call__, None if keys is None else jax.random.fold_in(keys[0], 2), lambda x: x)
            without = nn.intercept_methods(_without_random_layers(given)) if keys is None else nullcontext()
            mutable = ["batch_stats", *extra] if train else extra  # what evaluation changes is dropped
            try:
                with without if train else nullcontext():
                    out, updates = called.apply(given, images, rngs=rngs, mutable=mutable, **words)
            except flax.errors.InvalidRngError as error:
                if keys is not None:
                    raise
                raise UserError(
                    f"{kind.__name__} draws random numbers in {_mode(train)}, and there are no keys"
                ) from error
            after = {**given, **updates} if train else given
            before, moved = given.get("batch_stats", {}), after.get("batch_stats", {})
            still = all(a is b for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(moved)))
            if train and still and jax.tree.leaves(before) and not warned:
                warned.append(True)
                warnings.warn(_unmoved(kind), stacklevel=3)
            return logits_of(out, images, kind), collections.packed(after)["batch_stats"]

        with in_one_line(kind, images, train):
            logits, after = with_axes(call)
        return Output(logits, after if train else variables["batch_stats"], {})

    return Model(init, apply, weights is not None)


def nnx(module: "flax.nnx.Module") -> Model:
    """A `Model` of any NNX module that maps images (b, h, w, c) to logits (b, k).

    `init` returns the module's own parameters, whatever the key: an NNX module is born with them. Random layers are
    seeded from `keys[0]`, and so are the `rngs`, `rng` or `key` of a `__call__` that takes them; without keys, training
    mode leaves dropout out, and for whatever else is random the module's own random state serves again and again.
    Everything that is neither a parameter nor random state counts as batch statistics. Switches, named axes, outputs
    and errors are as `linen` has them.
    """
    from flax import nnx as flax_nnx  # here, since few models need it and it takes half a second

    _check(module, flax_nnx.Module, "nnx")
    kind = type(module)
    graph, params, random, rest = flax_nnx.split(module, flax_nnx.Param, flax_nnx.RngState, ...)
    has_statistics = bool(jax.tree.leaves(flax_nnx.split(module, flax_nnx.BatchStat, ...)[1]))
    passed_on: list[tuple[str, ...]] = []
    warned: list[bool] = []

    def init(key, images):
        return {"params": flax_nnx.to_pure_dict(params), "batch_stats": flax_nnx.to_pure_dict(rest)}

    def apply(variables, images, *, train=False, keys=None, targets=None, step=None):
        def run(train, words):
            states = [
                _filled(params, variables["params"]),
                _reseeded(random, keys),
                _filled(rest, variables["batch_stats"]),
            ]
            merged = flax_nnx.merge(graph, *states)
            merged.train() if train else merged.eval()
            switches.set_attributes((child for _, child in flax_nnx.iter_modules(merged)), train)
            if keys is None:
                merged.set_attributes(deterministic=True, raise_if_not_found=False)
            for i, (_, child) in enumerate(flax_nnx.iter_modules(merged)):
                if isinstance(child, flax_nnx.Dropout) and keys is None:
                    child.rate = 0.0  # also where the call says deterministic=False
                elif isinstance(child, flax_nnx.Dropout) and child.rngs is None:
                    child.rngs = flax_nnx.Rngs(jax.random.fold_in(keys[0], 10**6 + i))  # where the call has none
            random_keys = switches.keys(kind.__call__, None if keys is None else keys[0], flax_nnx.Rngs)
            out = _named_call(merged, images, **random_keys, **words)
            after = flax_nnx.split(merged, flax_nnx.Param, flax_nnx.RngState, ...)[3]
            return logits_of(out, images, kind), _of(flax_nnx.to_pure_dict(after), variables["batch_stats"])

        def call():
            words = switches.arguments(kind.__call__, train, step)
            if switches.passes_on(kind.__call__):
                if not passed_on:
                    passed_on.append(switches.accepted(lambda words: jax.eval_shape(lambda: run(False, words))))
                words |= {word: switches.in_training(word) == train for word in passed_on[0]}
            logits, after = run(train, words)
            still = all(a is b for a, b in zip(*map(jax.tree.leaves, (variables["batch_stats"], after))))
            if train and still and has_statistics and not warned:
                warned.append(True)
                warnings.warn(_unmoved(kind), stacklevel=3)
            return logits, after

        with in_one_line(kind, images, train):
            logits, after = with_axes(call)
        return Output(logits, after if train else variables["batch_stats"], {})

    return Model(init, apply, True)


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


def _check(module: Any, kind: type, name: str) -> None:
    if isinstance(module, kind):
        return
    what = f"the class {module.__name__}" if isinstance(module, type) else f"a {type(module).__name__}"
    inside = isinstance(getattr(module, "module", None), kind) and not isinstance(module, type)
    hint = "; give its .module, and weights=its .params" if inside and name == "linen" else ""
    raise UserError(f"{name} needs an instance of a {kind.__module__.split('.')[1]} Module, got {what}{hint}")


def _without_random_layers(collections: Mapping[str, Any]):
    """A Linen interceptor under which layers that only draw do what they do in eval mode, as there are no keys.

    Dropout, and any module with a switch and no variables (a stochastic depth).
    """

    def intercept(next_fun, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        if isinstance(module, nn.Dropout):
            return args[0] if args else kwargs["inputs"]
        words = switches.arguments(type(module).__call__, False, None)
        words.pop("step", None)
        if not words or any(_inside(tree, module.path) for tree in collections.values()):
            return next_fun(*args, **kwargs)
        bound = inspect.signature(next_fun).bind(*args, **kwargs)
        bound.arguments.update(words)
        return next_fun(*bound.args, **bound.kwargs)

    return intercept


def _inside(tree: Any, path: Sequence[str]) -> bool:
    """Whether the tree has anything at this path."""
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return False
        tree = tree[name]
    return True


def _mode(train: bool) -> str:
    return "training mode" if train else "eval mode"


def _unmoved(kind: type) -> str:
    return (
        f"{kind.__name__}: in training mode its batch statistics did not move, so no switch between training and"
        " evaluation was found: its __call__ should take one, such as `train`, and pass it on"
    )


def _filled(state, values: Mapping[str, Any]):
    from flax import nnx as flax_nnx

    new = _copied(state)
    flax_nnx.replace_by_pure_dict(new, values)
    return new


def _of(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The state after a call, without what the call has only sown or kept on the module."""
    inside = lambda new, old: _of(new, old) if isinstance(new, Mapping) and isinstance(old, Mapping) else new
    return {name: inside(value, before[name]) for name, value in after.items() if name in before}


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
        with jax.named_scope(label):  # as Linen has it of its own accord
            return name_tree(original.__call__(self, *args, **kwargs), label)

    return type(original.__name__, (original,), {"__call__": __call__})


TABLE = table(linen, nnx)
