"""The perturbations an attack may use: `linf(8/255)`, `l2(0.5)`, cut by the pixel box [0, 1] (`papers`: attacks 3 and
4).

eps (b,) is each example's own radius, so that a curve over radii is one program; the ball's number is the default.
"""

import jax
import jax.numpy as jnp

from topgap_jax.build import check_number, table
from topgap_jax.norms import direction_and_length
from topgap_jax.types import Ball

AXES = (1, 2, 3)
LARGEST = 1e6
"""The largest radius of l2: beyond the diagonal of any picture, and its squares are still numbers of float32."""


def linf(eps: float) -> Ball:
    """No pixel value moves by more than `eps` (pixels in [0, 1]): ascent is the gradient's sign, start uniform in the
    cube."""
    check_number("eps", eps, 0)

    def start(keys, images, eps):
        draw = lambda key, image, eps: jax.random.uniform(key, image.shape, image.dtype, -eps, eps)
        return jax.vmap(draw)(keys, images, eps)

    def project(images, delta, eps):
        eps = _wide(eps)
        return _box(images, jnp.clip(delta, -eps, eps))

    return Ball(
        name=f"linf({radius_text(eps)})",
        eps=eps,
        start=start,
        project=project,
        ascent=jnp.sign,
        dual_norm=lambda gradient: jnp.abs(gradient).sum(AXES),
        size=lambda delta: jnp.abs(delta).max(AXES),
    )


def l2(eps: float) -> Ball:
    """The perturbation's Euclidean length is at most `eps`: ascent is g / |g|, start uniform in the ball.

    The projection scales to the ball, then cuts by the box: feasible, and what all references do, but not the nearest
    point of the intersection.
    """
    check_number("eps", eps, 0, LARGEST)

    def start(keys, images, eps):
        def draw(key, image, eps):
            direction, radius = jax.random.split(key)
            noise = jax.random.normal(direction, image.shape, image.dtype)
            length = jax.random.uniform(radius, (), image.dtype) ** (1 / image.size)
            return eps * length * noise / (jnp.linalg.norm(noise) + 1e-12)

        return jax.vmap(draw)(keys, images, eps)

    def project(images, delta, eps):
        return _box(images, delta * jnp.minimum(1.0, _wide(eps) / (_norm(delta) + 1e-12)))

    return Ball(
        name=f"l2({radius_text(eps)})",
        eps=eps,
        start=start,
        project=project,
        ascent=lambda gradient: direction_and_length(gradient, AXES)[0],
        dual_norm=lambda gradient: direction_and_length(gradient, AXES)[1][:, 0, 0, 0],
        size=lambda delta: _norm(delta)[:, 0, 0, 0],
    )


def radius_text(eps):
    """A radius as people write it: 8/255, 0.5."""
    levels = round(eps * 255)
    fraction = 0 < levels < 255 and abs(eps * 255 - levels) < 1e-6 and float(f"{eps:.2g}") != eps
    return f"{levels}/255" if fraction else f"{eps:.4g}"


def _box(images, delta):
    return jnp.clip(images + delta, 0.0, 1.0) - images


def _norm(values):
    return jnp.sqrt((values * values).sum(AXES, keepdims=True))


def _wide(eps):
    return eps[:, None, None, None]


TABLE = table(linf, l2)
