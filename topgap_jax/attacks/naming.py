"""Names of attacks, by which labels, rows and reports tell them apart."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import optax

from topgap_jax.scores import cross_entropy
from topgap_jax.types import Attack, Score


def named(method: str, steps: int, score: Score) -> str:
    """An attack's name, with its score where that is not cross-entropy: "pgd-20", "pgd-20 on margin"."""
    return f"{method}-{steps}" + ("" if score is cross_entropy else f" on {_word(score)}")


def options_in_name(*shown: str) -> Callable[[Callable[..., Attack]], Callable[..., Attack]]:
    """For a function that makes attacks: options that are not the defaults stand behind the attack's name, such as
    "apgd-100, linf(8/255), 5 restarts, rho=0.5", save those that are `shown` in it already."""

    def decorate(function):
        parameters = inspect.signature(function).parameters

        @functools.wraps(function)
        def build(ball, **options):
            attack = function(ball, **options)
            others = {name: value for name, value in options.items() if name not in shown}
            texts = [_option(name, value) for name, value in others.items() if value != parameters[name].default]
            return attack._replace(name=", ".join([attack.name, *sorted(texts)]))

        return build

    return decorate


def _option(name: str, value: Any) -> str:
    if name == "restarts":
        return restarted(value)
    if value is True or isinstance(value, optax.GradientTransformation):
        return name
    return f"{name}={_word(value) if callable(value) else f'{value:.4g}' if isinstance(value, float) else value}"


def _word(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)


def restarted(n: int) -> str:
    """What the name of an attack from n starts says of them."""
    return f"{n} restarts"
