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
    word = getattr(score, "__name__", type(score).__name__)
    return f"{method}-{steps}" + ("" if score is cross_entropy else f" on {word}")


def telling(*told: str) -> Callable[[Callable[..., Attack]], Callable[..., Attack]]:
    """For a function that makes attacks: options that are not the defaults stand behind the attack's name, such as
    "apgd-100, linf(8/255), 5 restarts, rho=0.5", save those that are `told` in it already."""

    def decorate(function):
        parameters = inspect.signature(function).parameters

        @functools.wraps(function)
        def build(ball, **options):
            attack = function(ball, **options)
            others = {name: value for name, value in options.items() if name not in told}
            texts = [_option(name, value) for name, value in others.items() if value != parameters[name].default]
            return attack._replace(name=", ".join([attack.name, *sorted(texts)]))

        return build

    return decorate


def _option(name: str, value: Any) -> str:
    if name == "restarts":
        return restarted(value)
    if value is True or isinstance(value, optax.GradientTransformation):
        return name
    return f"{name}={getattr(value, '__name__', None) or (f'{value:.4g}' if isinstance(value, float) else value)}"


def restarted(n: int) -> str:
    """What the name of an attack from n starts says of them."""
    return f"{n} restarts"
