"""The perturbations an attack may use: `linf(8/255)`, `l2(0.5)`, `l1(12)`, cut by the pixel box [0, 1].

eps (b,) is each example's own radius, so that a curve over radii is one program; the ball's number is the default.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from topgap_jax.build import check_number, table
from topgap_jax.norms import direction_and_length
from topgap_jax.order import kth_largest
from topgap_jax.types import Array, Ball

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
        p=math.inf,
        ascent=jnp.sign,
        direction=lambda images, delta, gradient: jnp.sign(gradient),
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

    ascent = lambda gradient: direction_and_length(gradient, AXES)[0]
    return Ball(
        name=f"l2({radius_text(eps)})",
        eps=eps,
        p=2,
        start=start,
        project=project,
        ascent=ascent,
        direction=lambda images, delta, gradient: ascent(gradient),
        dual_norm=lambda gradient: direction_and_length(gradient, AXES)[1][:, 0, 0, 0],
        size=lambda delta: _norm(delta)[:, 0, 0, 0],
    )


def l1(eps: float) -> Ball:
    """The perturbation's absolute values add up to at most `eps`: ascent is all on the largest |g|.

    The start is the projection of N(0, I). Projections are exact, on ball and pixel box at once (`project_l1`: Croce &
    Hein 2021, arXiv 2103.01208). `direction` is sign(g) / count on the hundredth of the entries with the largest |g|,
    among those that the box does not stop (SparseL1Descent: Tramer & Boneh 2019, arXiv 1904.13000).
    """
    check_number("eps", eps, 0)

    def start(keys, images, eps):
        noise = jax.vmap(lambda key, image: jax.random.normal(key, image.shape, image.dtype))(keys, images)
        return project_l1(images, noise, eps)

    def ascent(gradient):
        size = jnp.abs(_flat(gradient))
        largest = jnp.arange(size.shape[1]) == jnp.argmax(size, 1)[:, None]
        return jnp.sign(gradient) * largest.reshape(gradient.shape)

    def direction(images, delta, gradient):
        points = images + delta
        stopped = ((points <= 0) & (gradient < 0)) | ((points >= 1) & (gradient > 0))
        return sparse_sign(jnp.where(stopped, 0.0, gradient), -(-gradient[0].size // 100))

    return Ball(
        name=f"l1({radius_text(eps)})",
        eps=eps,
        p=1,
        start=start,
        project=project_l1,
        ascent=ascent,
        direction=direction,
        dual_norm=lambda gradient: jnp.abs(gradient).max(AXES),
        size=lambda delta: jnp.abs(delta).sum(AXES),
    )


def project_l1(images: Array, delta: Array, eps: Array) -> Array:
    """The nearest perturbation with |d|_1 <= eps and images + d in [0, 1], exactly (Croce & Hein 2021, arXiv
    2103.01208).

    images, delta (b, h, w, c), eps (b,) -> (b, h, w, c). With room_i = 1 - x_i where delta_i > 0, else x_i, it is
    sign(delta_i) clip(|delta_i| - t, 0, room_i), t = 0 if that is short enough, else the t for which its length is eps.
    The length is linear in t between the 2n numbers |delta_i| and max(|delta_i| - room_i, 0): they are sorted, the
    lengths there are cumulative sums, and t lies between two of them.
    """
    size, room = jnp.abs(delta), jnp.where(delta > 0, 1 - images, images)
    sides = _flat(size), _flat(jnp.maximum(size - room, 0))  # from here on zero; up to here as far as there is room
    changes = jnp.concatenate([jnp.ones_like(sides[0]), -jnp.ones_like(sides[1])], 1)
    # From the largest t, where the length is 0, downwards: `moving` entries grow as t falls.
    knots, changes = lax.sort((-jnp.concatenate(sides, 1), changes), dimension=1, num_keys=1)
    moving = jnp.cumsum(changes, 1)
    grown = jnp.cumsum((knots[:, 1:] - knots[:, :-1]) * moving[:, :-1], 1)
    lengths = jnp.concatenate([jnp.zeros_like(grown[:, :1]), grown], 1)
    last = jnp.maximum((lengths < eps[:, None]).sum(1, keepdims=True) - 1, 0)
    knot, length, number = (jnp.take_along_axis(x, last, 1)[:, 0] for x in (-knots, lengths, moving))
    t = jnp.maximum(knot - (eps - length) / jnp.maximum(number, 1), 0)
    inside = jnp.minimum(size, room).sum(AXES) <= eps
    nearest = jnp.sign(delta) * jnp.clip(size - _wide(jnp.where(inside, 0.0, t)), 0, room)
    # |delta_i| - t has the rounding error of |delta_i|, which may be much larger than eps.
    return nearest * jnp.minimum(1.0, _wide(eps) / jnp.maximum(jnp.abs(nearest).sum(AXES, keepdims=True), 1e-30))


def sparse_sign(gradient: Array, count: int | Array) -> Array:
    """sign(g) on the `count` entries (an int, or (b,)) with the largest |g| of each example, over their number: (b, h,
    w, c) of unit l1 norm.

    Where several share the smallest |g| among them, all of those are in.
    """
    size = jnp.abs(_flat(gradient))[..., None]
    smallest = kth_largest(size, jnp.broadcast_to(jnp.asarray(count), gradient.shape[:1])[:, None])
    sign = jnp.sign(gradient) * (size >= smallest[:, None]).reshape(gradient.shape)
    return sign / (jnp.abs(sign).sum(AXES, keepdims=True) + 1e-10)


def radius_text(eps: float) -> str:
    """A radius as people write it: 8/255, 0.5."""
    levels = round(eps * 255)
    fraction = 0 < levels < 255 and abs(eps * 255 - levels) < 1e-6 and float(f"{eps:.2g}") != eps
    return f"{levels}/255" if fraction else f"{eps:.4g}"


def _box(images, delta):
    return jnp.clip(images + delta, 0.0, 1.0) - images


def _flat(values):
    return values.reshape(values.shape[0], -1)


def _norm(values):
    return jnp.sqrt((values * values).sum(AXES, keepdims=True))


def _wide(eps):
    return eps[:, None, None, None]


TABLE = table(linf, l2, l1)
