"""Schedules: step -> number, for learning rates and the k of Top-GAP; pure functions of the step, as in optax.

Those with `hold` stay at `start` for that many steps, go from `start` to `end` over the next `steps` steps
(u = clip((step - hold) / steps, 0, 1)), and stay at `end`.
"""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from topgap_jax.build import check_number, table
from topgap_jax.types import Schedule


def linear(start: float, end: float, steps: int, *, hold: int = 0) -> Schedule:
    """start + (end - start) u.

    >>> float(linear(784, 78, 100)(25))
    607.5
    """
    return _between(start, end, steps, hold, lambda u: start + (end - start) * u)


def cosine(start: float, end: float, steps: int, *, hold: int = 0) -> Schedule:
    """end + (start - end) (1 + cos(pi u)) / 2 (Loshchilov & Hutter 2017, arXiv 1608.03983, without restarts).

    >>> float(cosine(0.1, 0, 100)(100))
    0.0
    """
    return _between(start, end, steps, hold, lambda u: end + (start - end) * (1 + jnp.cos(jnp.pi * u)) / 2)


def geometric(start: float, end: float, steps: int, *, hold: int = 0) -> Schedule:
    """start (end / start)^u; both positive.

    >>> round(float(geometric(784, 78, 100)(50)), 3)
    247.289
    """
    check_number("start", start, 1e-30)
    check_number("end", end, 1e-30)
    return _between(start, end, steps, hold, lambda u: start * (end / start) ** u)


def piecewise(value: float, *, boundaries: tuple[int, ...], factor: float = 0.1) -> Schedule:
    """`value`, times `factor` from each of the steps `boundaries` on.

    >>> [round(float(piecewise(1.0, boundaries=(10, 20))(step)), 3) for step in (9, 10, 20)]
    [1.0, 0.1, 0.01]
    """
    check_number("value", value)
    check_number("factor", factor, 0)
    boundaries = boundaries if isinstance(boundaries, tuple | list) else (boundaries,)
    for boundary in boundaries:
        check_number("boundaries", boundary, 0)
    return optax.piecewise_constant_schedule(value, {int(boundary): factor for boundary in boundaries})


def cyclic(peak: float, steps: int, *, peak_at: float = 0.5) -> Schedule:
    """A triangle: from 0 up to `peak` at the share `peak_at` of `steps`, then down to 0 (Smith 2017, arXiv 1506.01186).

    >>> [float(cyclic(1.0, 10)(step)) for step in (0, 5, 10)]
    [0.0, 1.0, 0.0]
    """
    check_number("peak", peak)
    check_number("steps", steps, 1)
    check_number("peak_at", peak_at, 0.01, 0.99)
    return lambda step: peak * jnp.interp(step / steps, jnp.array([0.0, peak_at, 1.0]), jnp.array([0.0, 1.0, 0.0]))


def warmup(schedule: Schedule | float, steps: int) -> Schedule:
    """A straight line from 0 at step 0 to schedule(0) at step `steps`, where `schedule` begins.

    The schedule is shifted, not squeezed: to end with it, give it `steps` fewer (Goyal et al. 2017, arXiv 1706.02677).

    >>> [float(warmup(linear(1, 0, 10), 4)(step)) for step in (0, 2, 4, 9, 14)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    check_number("steps", steps, 1)
    if not callable(schedule):
        check_number("schedule", schedule)
        schedule = optax.constant_schedule(schedule)
    return optax.join_schedules([optax.linear_schedule(0.0, float(schedule(0)), steps), schedule], [steps])


def _between(start: float, end: float, steps: int, hold: int, value: Callable) -> Schedule:
    for name, number in (("start", start), ("end", end)):
        check_number(name, number)
    check_number("steps", steps, 1)
    check_number("hold", hold, 0)
    return lambda step: value(jnp.clip((step - hold) / steps, 0.0, 1.0))


TABLE = table(linear, cosine, geometric, piecewise, cyclic, warmup)
