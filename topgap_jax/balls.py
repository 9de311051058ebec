"""The perturbations an attack may use: `linf(8/255)`, `l2(0.5)`, `l1(12)`, cut by the pixel box [0, 1].

eps (b,) is each example's own radius, so that a curve over radii is one program; the ball's number is the default.
`optax.projections` projects onto the ball or the box; in l2 and l1 that onto both is not one after the other.
"""

import math

import jax
import jax.numpy as jnp

from topgap_jax.build import check_number, table
from topgap_jax.keys import normal
from topgap_jax.norms import direction_and_length
from topgap_jax.order import kth_largest, largest_float
from topgap_jax.types import Array, Ball

AXES = (1, 2, 3)
LARGEST = 1e6
"""The largest radius, and step: beyond the diagonal of any picture, and its squares are still numbers of float32."""


def linf(eps: float) -> Ball:
    """No pixel value moves by more than `eps` (pixels in [0, 1]): ascent is the gradient's sign, start uniform in the
    cube."""
    check_number("eps", eps, 0, LARGEST)

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
        hyperplane=hyperplane_linf,
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
        delta = jnp.clip(delta, -LARGEST, LARGEST)  # an optimizer's step may be too large to square
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
        hyperplane=hyperplane_l2,
    )


def l1(eps: float) -> Ball:
    """The perturbation's absolute values add up to at most `eps`: ascent is all on the largest |g|.

    The start is the projection of N(0, I). Projections are exact, on ball and pixel box at once (`project_l1`: Croce &
    Hein 2021, arXiv 2103.01208). `direction` is sign(g) / count on the hundredth of the entries with the largest |g|,
    among those that the box does not stop (SparseL1Descent: Tramer & Boneh 2019, arXiv 1904.13000).
    """
    check_number("eps", eps, 0, LARGEST)

    def start(keys, images, eps):
        return project_l1(images, normal(keys, images), eps)

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
        hyperplane=hyperplane_l1,
    )


def project_l1(images: Array, delta: Array, eps: Array) -> Array:
    """The nearest perturbation with |d|_1 <= eps and images + d in [0, 1], exactly (Croce & Hein 2021, arXiv
    2103.01208).

    images, delta (b, h, w, c), eps (b,) -> (b, h, w, c). With room_i = 1 - x_i where delta_i > 0, else x_i, it is
    sign(delta_i) clip(|delta_i| - t, 0, room_i), t = 0 if that is short enough, else the t for which its length is eps.
    """
    size, room = _flat(jnp.abs(delta)), _flat(jnp.where(delta > 0, 1 - images, images))
    lengths = lambda t: jnp.clip(size - t[:, None], 0, room)
    t = largest_float(lambda t: lengths(t).sum(1) >= eps, size.max(1))
    # From here to the next bend every entry that is neither 0 nor at its bound shrinks as t grows.
    free = (lengths(t) > 0) & (lengths(t) < room)
    rest = jnp.where(free, size, lengths(t)).sum(1) - eps
    t = jnp.where(free.any(1), rest / jnp.maximum(free.sum(1), 1), t)
    inside = lengths(jnp.zeros_like(t)).sum(1) <= eps
    nearest = lengths(jnp.where(inside, 0.0, t))
    # |delta_i| - t has the rounding error of |delta_i|, which may be much larger than eps.
    nearest *= jnp.minimum(1.0, eps / jnp.maximum(nearest.sum(1), 1e-30))[:, None]
    return jnp.sign(delta) * nearest.reshape(delta.shape)


def sparse_sign(gradient: Array, count: int | Array) -> Array:
    """sign(g) on the `count` entries (an int, or (b,)) with the largest |g| of each example, over their number: (b, h,
    w, c) of unit l1 norm.

    Where several share the smallest |g| among them, all of those are in.
    """
    size = jnp.abs(_flat(gradient))[..., None]
    smallest = kth_largest(size, jnp.broadcast_to(jnp.asarray(count), gradient.shape[:1])[:, None])
    sign = jnp.sign(gradient) * (size >= smallest[:, None]).reshape(gradient.shape)
    return sign / (jnp.abs(sign).sum(AXES, keepdims=True) + 1e-10)


def hyperplane_linf(points: Array, w: Array, b: Array) -> Array:
    """The step d (b, h, w, c) of smallest max |d_i| with <w, points + d> = b and points + d in [0, 1] (Croce & Hein
    2020, arXiv 1907.02044).

    points in [0, 1] and w (b, h, w, c), b (b,). Every coordinate goes the way that helps, by min(t, its room). Where
    the box does not reach the hyperplane: the corner that is nearest to it.
    """

    def lengths(slope, room, gap):
        return jnp.minimum(_level(slope, room, gap)[:, None], room)

    return _to_hyperplane(lengths, points, w, b)


def hyperplane_l2(points: Array, w: Array, b: Array) -> Array:
    """As `hyperplane_linf` for the Euclidean length: every coordinate moves by min(t |w_i|, its room)."""

    def lengths(slope, room, gap):
        slope = jnp.where(slope < 1e-8, 0.0, slope)  # the quotient below would be too large for float32
        bounds = jnp.where(slope > 0, room / jnp.where(slope > 0, slope, 1.0), 0.0)
        return jnp.minimum(_level(slope * slope, bounds, gap)[:, None] * slope, room)

    return _to_hyperplane(lengths, points, w, b)


def hyperplane_l1(points: Array, w: Array, b: Array) -> Array:
    """As `hyperplane_linf` for the sum of |d_i|: the whole room of the largest |w_i|, a share of it at the last.

    Equal |w_i| share evenly; every other way of sharing is as long.
    """

    def lengths(slope, room, gap):
        enough = lambda t: (slope * room * (slope >= t[:, None])).sum(1) >= gap
        last = largest_float(enough, slope.max(1))[:, None]
        whole, shared = slope > last, (slope == last) & (slope > 0)
        rest = gap - (slope * room * whole).sum(1)
        reach = (slope * room * shared).sum(1)
        share = jnp.clip(rest / jnp.where(reach > 0, reach, 1.0), 0.0, 1.0)
        return room * (whole + share[:, None] * shared)

    return _to_hyperplane(lengths, points, w, b)


def _to_hyperplane(lengths, points, w, b):
    """The step of lengths(slope = |w|, room up to the box, gap <w, points> - b >= 0) against w, or along it where the
    gap is negative.

    w and b by the largest |w_i|, which leaves the hyperplane: products of a confident image's gradient are 0 in
    float32.
    """
    # Flat rows, over which XLA's CPU reduces faster than over three axes.
    x, w, shape = _flat(points), _flat(w), points.shape
    largest = jnp.abs(w).max(1)
    largest = jnp.where(largest > 0, largest, 1.0)
    w = w / largest[:, None]
    gap = (w * x).sum(1) - b / largest
    way = jnp.where(gap[:, None] < 0, jnp.sign(w), -jnp.sign(w))
    room = jnp.maximum(jnp.where(way < 0, x, 1 - x), 0.0) * jnp.abs(way)
    return (way * lengths(jnp.abs(w), room, jnp.abs(gap))).reshape(shape)


def _level(weights, bounds, total):
    """The t (b,) with sum of weights * min(t, bounds) = total (b,); the largest bound where no t is large enough."""
    top = bounds.max(1)
    t = largest_float(lambda t: (weights * jnp.minimum(t[:, None], bounds)).sum(1) <= total, top)
    free = bounds > t[:, None]
    slope = (weights * free).sum(1)
    # Linear from here to the next bound.
    exact = (total - jnp.where(free, 0.0, weights * bounds).sum(1)) / jnp.where(slope > 0, slope, 1.0)
    return jnp.where(slope > 0, exact, top)


def radius_text(eps: float) -> str:
    """A radius as people write it: 8/255, 0.5/255, 0.5."""
    levels = round(4 * 255 * eps) / 4
    fraction = 0 < levels < 255 and abs(eps * 255 - levels) < 1e-6 and float(f"{eps:.2g}") != eps
    return f"{levels:g}/255" if fraction else f"{eps:.4g}"


def _box(images, delta):
    return jnp.clip(images + delta, 0.0, 1.0) - images


def _flat(values):
    return values.reshape(values.shape[0], -1)


def _norm(values):
    return jnp.sqrt((values * values).sum(AXES, keepdims=True))


def _wide(eps):
    return eps[:, None, None, None]


TABLE = table(linf, l2, l1)
