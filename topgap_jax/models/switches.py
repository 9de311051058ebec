"""How authors of networks spell the switch between training and evaluation, and where they put it: an argument of the
call, what a call passes on through `**kwargs`, a field of the module. Likewise keys that a call takes."""

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn

# A word is a switch where its parts are one of these and words that say nothing: is_train, train_mode, isTraining.
PARTS = {
    "train": True, "training": True,
    "eval": False, "evaluate": False, "evaluation": False, "test": False, "testing": False,
    "infer": False, "inference": False, "deterministic": False,
}  # fmt: skip
FILLERS = {"is", "in", "do", "mode", "phase", "flag", "for"}
OPTIONS = {
    "use_batch_stats": True, "track_running_stats": True,
    "stochastic": True, "enable_dropout": True, "apply_dropout": True, "use_dropout": True,
}  # fmt: skip
"""Switches of a call, which as a field or an attribute only say of the network what holds in both modes."""
WORDS = {
    "use_running_average": False, "use_running_averages": False, "use_running_avg": False, "use_running_stats": False,
    "use_global_stats": False, "use_moving_average": False, "use_moving_averages": False,
    "update_stats": True, "update_batch_stats": True, **OPTIONS,
}  # fmt: skip
KEYS = (
    "rngs", "rng", "key", "prng_key", "rng_key", "random_key", "dropout_rng", "dropout_key", "noise_rng", "noise_key",
)  # fmt: skip
STREAMS = ("dropout", "drop_path", "droppath", "stochastic_depth", "noise")
"""Random streams that modules ask for by `has_rng`; Flax derives a stream's keys from its name."""
PASSED_ON = (
    *("train", "training", "is_training", "is_train", "deterministic", "use_running_average"),
    *("train_mode", "is_eval", "eval", "eval_mode", "test", "inference"),
)
"""What is tried on a call that takes `**kwargs`."""


def in_training(word: str) -> bool | None:
    """The value of the switch in training; None where the word is none."""
    if word in WORDS:
        return WORDS[word]
    parts = [part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", word)]
    values = {PARTS[part] for part in parts if part in PARTS}
    rest = [part for part in parts if part not in PARTS and part not in FILLERS]
    return values.pop() if len(values) == 1 and not rest else None


def _kept(word: str) -> bool | None:
    """The value in training of a switch that a module keeps, as a field or an attribute."""
    return None if word in OPTIONS else in_training(word)


def arguments(call: Callable, train: bool, step: Any) -> dict[str, Any]:
    """The switches, and `step`, that a `__call__` names among its parameters."""
    switches = {}
    for word, parameter in inspect.signature(call).parameters.items():
        value = in_training(word)
        plain = parameter.default is inspect.Parameter.empty or isinstance(parameter.default, bool | None)
        if value is not None and plain and parameter.kind is not inspect.Parameter.POSITIONAL_ONLY:
            switches[word] = value == train
        if word == "step" and (step is not None or parameter.default is inspect.Parameter.empty):
            switches["step"] = step
    return switches


def keys(call: Callable, key: Any, rngs: Callable[[Any], Any]) -> dict[str, Any]:
    """What a `__call__` names among its parameters that is random: a key, or `rngs(key)` where it takes `nnx.Rngs`.

    Without a key it is None, or what the call has by itself.
    """
    parameters = list(inspect.signature(call).parameters.items())[2:]  # not the module and the images
    given = {}
    for word, parameter in parameters:
        kind = getattr(parameter.annotation, "__name__", str(parameter.annotation))
        if word not in KEYS or (key is None and parameter.default is not inspect.Parameter.empty):
            continue
        takes_rngs = word == "rngs" and not any(name in kind for name in ("Array", "Key"))
        given[word] = rngs(key) if takes_rngs and key is not None else key
    return given


def passes_on(call: Callable) -> bool:
    """Whether the call takes `**kwargs` and names no switch of its own."""
    kinds = [parameter.kind for parameter in inspect.signature(call).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds and not arguments(call, True, None).keys() - {"step"}


def accepted(attempt: Callable[[dict[str, bool]], Any]) -> tuple[str, ...]:
    """The switches that a call with `**kwargs` passes on to somebody who takes them; attempt(switches) makes the call.

    Whoever is called last says which word it does not know; where it says so in another way, one word is tried after
    the other.
    """
    words = list(PASSED_ON)
    while words:
        try:
            attempt({word: not in_training(word) for word in words})
        except TypeError as error:
            refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if refused is None or refused[1] not in words:
                break
            words.remove(refused[1])
        except Exception:  # of every kind: "unknown argument", an assertion
            break
        else:
            return tuple(words)
    for word in PASSED_ON:
        with contextlib.suppress(Exception):
            attempt({word: not in_training(word)})
            return (word,)
    return ()


def with_fields(module: nn.Module, train: bool) -> nn.Module:
    """The Linen module, and the modules it was given, with the fields that are switches set: `Net(train=False)`.

    A field that a call may name instead stays as it is, and so does a None of a module inside, whose call names it.
    """
    copies: dict[int, Any] = {}

    def copied(value):
        if isinstance(value, list | tuple):
            new = [copied(item) for item in value]
            same = all(a is b for a, b in zip(new, value))
            return value if same else type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
        if isinstance(value, Mapping):
            new = {name: copied(item) for name, item in value.items()}
            return value if all(new[name] is item for name, item in value.items()) else type(value)(new)
        if not isinstance(value, nn.Module):
            return value
        if id(value) not in copies:
            named = inspect.signature(type(value).__call__).parameters if callable(value) else {}
            changes = {}
            for field in dataclasses.fields(value):
                before, switch = getattr(value, field.name, None), _kept(field.name)
                if field.name in ("parent", "name"):
                    continue
                is_open = before is None and value is module and "bool" in str(field.type)
                if switch is not None and field.name not in named and (isinstance(before, bool) or is_open):
                    after = switch == train
                else:
                    after = copied(before)
                if after is not before:
                    changes[field.name] = after
            copies[id(value)] = value.clone(**changes) if changes else value
        return copies[id(value)]

    return copied(module)


def set_attributes(modules: Iterable[Any], train: bool) -> None:
    """The same for the modules of an NNX module, in place."""
    for module in modules:
        for word, value in list(vars(module).items()):
            switch = _kept(word)
            if isinstance(value, bool) and switch is not None:
                setattr(module, word, switch == train)
