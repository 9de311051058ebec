"""Schedules: step -> number, for learning rates and the k of Top-GAP; pure functions of the step, as in optax.

`linear`, `cosine` and `geometric` stay at `start` for `hold` steps, go from `start` to `end` over the next `steps`
steps (u = clip((step - hold) / steps, 0, 1)), and stay at `end`. With `warmup` they rise in a straight line from 0 to
`start` first (Goyal et al. 2017, arXiv 1706.02677), and what it takes is taken off `steps`, so that the end stays where
it is: `warmup=100` are 100 steps, `warmup=.1`, a number below 1, is a tenth of `steps`.
"""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.types import Schedule


def linear(start: float, end: float, steps: int, *, hold: int = 0, warmup: float = 0) -> Schedule:
    """start + (end - start) u.

    >>> float(linear(784, 78, 100)(25))
    607.5
    """
    return _between(start, end, steps, hold, warmup, lambda u: start + (end - start) * u)


def cosine(start: float, end: float, steps: int, *, hold: int = 0, warmup: float = 0) -> Schedule:
    """end + (start - end) (1 + cos(pi u)) / 2 (Loshchilov & Hutter 2017, arXiv 1608.03983, without restarts).

    >>> [round(float(cosine(0.1, 0, 100, warmup=0.2)(step)), 3) for step in (0, 10, 20, 60, 100)]
    [0.0, 0.05, 0.1, 0.05, 0.0]
    """
    return _between(start, end, steps, hold, warmup, lambda u: end + (start - end) * (1 + jnp.cos(jnp.pi * u)) / 2)


def geometric(start: float, end: float, steps: int, *, hold: int = 0, warmup: float = 0) -> Schedule:
    """start (end / start)^u; both positive.

    >>> round(float(geometric(784, 78, 100)(50)), 3)
    247.289
    """
    check_number("start", start, 1e-30)
    check_number("end", end, 1e-30)
    return _between(start, end, steps, hold, warmup, lambda u: start * (end / start) ** u)


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
    """A straight line from 0 at step 0 to schedule(0) at step `steps`, where the whole `schedule` (or number) begins.

    For what has no keyword `warmup` of its own: warmup(.1, 500), warmup(piecewise(...), 500).

    >>> [float(warmup(linear(1, 0, 10), 4)(step)) for step in (0, 2, 4, 9, 14)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    check_number("steps", steps, 1)
    if not callable(schedule):
        check_number("schedule", schedule)
        schedule = optax.constant_schedule(schedule)
    return _warm(schedule, steps)


def _between(start: float, end: float, steps: int, hold: int, warm: float, value: Callable) -> Schedule:
    for name, number in (("start", start), ("end", end)):
        check_number(name, number)
    check_number("hold", hold, 0)
    check_number("warmup", warm, 0)
    if isinstance(steps, (int, float)) and steps < 1:
        raise UserError(
            f"steps must be a number of at least 1, got {steps!r}; where a warm-up was taken off total_steps it is "
            "longer than the run: write it as a share, such as cosine(.1, 0, total_steps, warmup=.1)"
        )
    check_number("steps", steps, 1)
    first = max(1, round(warm * steps)) if 0 < warm < 1 else warm
    rest = steps - first
    if rest < 1:
        raise UserError(
            f"warmup={warm:g} leaves nothing of a schedule of {steps:g} steps; give fewer steps, or a share such as "
            "warmup=.1"
        )
    schedule = lambda step: value(jnp.clip((step - hold) / rest, 0.0, 1.0))
    return _warm(schedule, first) if first else schedule


def _warm(schedule: Schedule, steps: int) -> Schedule:
    return optax.join_schedules([optax.linear_schedule(0.0, float(schedule(0)), steps), schedule], [steps])


TABLE = table(linear, cosine, geometric, piecewise, cyclic, warmup)
