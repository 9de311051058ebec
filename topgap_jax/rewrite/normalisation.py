"""How images are normalised, and where a network's normalisation maps to zero."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal
from jax.extend.core.primitives import add_p, div_p, mul_p, sub_p

from topgap_jax.errors import UserError
from topgap_jax.rewrite.body import SAME
from topgap_jax.rewrite.interpreter import depending, evaluate, inline, trace
from topgap_jax.types import Array


def _divided(y, c):
    """y / c, and 0 where c is: any x goes to 0 there."""
    return jnp.where(c == 0, 0, y / jnp.where(c == 0, 1, c))


# The equation's other operand c and its result y -> x, by the position of x.
INVERSES = {
    (sub_p, 0): lambda y, c: y + c,
    (sub_p, 1): lambda y, c: c - y,
    (add_p, 0): lambda y, c: y - c,
    (add_p, 1): lambda y, c: y - c,
    (mul_p, 0): _divided,
    (mul_p, 1): _divided,
    (div_p, 0): lambda y, c: y * c,
}


def normalise(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """(images - mean) / std per channel, in float32."""
    if images.shape[-1] != len(mean):
        raise UserError(f"the images have {images.shape[-1]} channels, mean and std have {len(mean)}; they must agree")
    return (images.astype(jnp.float32) - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def channels(mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """mean and std as tuples of floats, one finite number per channel each; every std positive."""
    mean, std = tuple(float(x) for x in mean), tuple(float(x) for x in std)
    if len(mean) != len(std) or not all(map(math.isfinite, mean)) or not all(0 < x < math.inf for x in std):
        raise UserError(
            f"mean and std need one finite number per channel each, every std above 0; got mean={mean}, std={std}"
        )
    return mean, std


def zero_images(f: Callable, images: Array) -> Array:
    """The images (b, h, w, c) that are zero behind f's normalisation: for (images - mean) / std the mean.

    The normalisation is what f does first to the images and to nothing else: additions, subtractions, multiplications
    and divisions by values that do not depend on them. A function without any gives black, zeros. Nothing else of f is
    computed.
    """
    flat, arrays, _, steps, _ = _steps(f, images)
    depends = depending(flat.jaxpr, flat.jaxpr.invars)
    first = [eqn for eqn in flat.jaxpr.eqns if not depends.intersection(eqn.outvars)]
    others = [other for _, other in steps]
    values = evaluate(flat.jaxpr.replace(eqns=first, outvars=others), flat.consts, arrays, lambda *_: None)
    zero = jnp.zeros_like(images)
    for (inverse, _), value in zip(reversed(steps), reversed(values)):
        zero = inverse(zero, value)
    return zero.astype(images.dtype)


def normalisation(f: Callable, images: Array) -> tuple[Callable, Callable]:
    """f as (normalise, rest): rest(normalise(images)) is f(images), and nothing but `zero_images`' normalisation is in
    the first, which takes any images of this shape."""
    flat, arrays, variable, _, restore = _steps(f, images)
    is_first = variable is flat.jaxpr.invars[0]

    def normalise(points):
        wanted, eqns = {variable}, []
        for eqn in reversed(flat.jaxpr.eqns):
            if wanted.intersection(eqn.outvars):
                eqns.insert(0, eqn)
                wanted.update(v for v in eqn.invars if not isinstance(v, Literal))
        part = flat.jaxpr.replace(eqns=eqns, outvars=[variable])
        return evaluate(part, flat.consts, [points, *arrays[1:]], lambda *_: None)[0]

    def rest(value):
        given = lambda eqn, values, read: [value] if eqn.outvars[0] is variable else None
        start = [value if is_first else arrays[0], *arrays[1:]]
        return restore(evaluate(flat.jaxpr, flat.consts, start, given))

    return normalise, rest


def _steps(f: Callable, images: Array) -> tuple:
    """f's program and arguments, the variable behind its normalisation, (inverse, other operand) of each of its steps,
    and what puts results back into f's output tree."""
    closed, arrays, restore = trace(f, (images,), {})
    flat = inline(closed, arrays)
    variable, steps = flat.jaxpr.invars[0], []
    depends = depending(flat.jaxpr, flat.jaxpr.invars)
    while True:
        users = [eqn for eqn in flat.jaxpr.eqns if variable in [v for v in eqn.invars if not isinstance(v, Literal)]]
        if len(users) != 1:
            break
        (eqn,) = users
        position = eqn.invars.index(variable)
        other = [v for v in eqn.invars if v is not variable]
        free = len(other) == 1 and (isinstance(other[0], Literal) or other[0] not in depends)
        inverse = INVERSES.get((eqn.primitive, position)) if free else None
        if eqn.primitive not in SAME and inverse is None:
            break
        if inverse:
            steps.append((inverse, other[0]))
        variable = eqn.outvars[0]
    return flat, arrays, variable, steps, restore
