"""Names of attacks on the label, by which rows, tables and reports tell them apart."""

import functools
import inspect
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import optax

from topgap_jax.scores import cross_entropy
from topgap_jax.types import Attack, Score


def named(method: str, score: Score) -> str:
    """A method's name, with its score where that is not cross-entropy: "pgd-20", "pgd-20 on margin"."""
    return method + ("" if score is cross_entropy else f" on {_word(score)}")


def options_in_name(*shown: str) -> Callable[[Callable[..., Attack]], Callable[..., Attack]]:
    """For a function that makes attacks: options that are not the defaults stand behind the attack's name, such as
    "apgd-100, linf(8/255), rho=0.5, 5 restarts", save those that are `shown` in it already. Of a transformation of
    optax, which has no name, it says that there is one."""

    def decorate(function):
        parameters = inspect.signature(function).parameters

        @functools.wraps(function)
        def build(*args, **options):
            attack = function(*args, **options)
            others = {name: options[name] for name in sorted(options) if name not in (*shown, "ball", "restarts")}
            texts = [_option(name, value) for name, value in others.items() if value != parameters[name].default]
            return restarted(attack._replace(name=", ".join([attack.name, *texts])), options.get("restarts", 1))

        return build

    return decorate


def restarted(attack: Attack, n: int) -> Attack:
    """The attack with a name that says from how many starts it is made, where that is more than one."""
    return attack._replace(name=f"{attack.name}, {n} restarts") if n > 1 else attack


def _option(name: str, value: Any) -> str:
    if value is True or isinstance(value, optax.GradientTransformation):
        return name
    if callable(value):
        return f"{name}={_word(value)}"
    return f"{name}={f'{value:.4g}' if isinstance(value, Real) and not isinstance(value, Integral) else value}"


def _word(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)
