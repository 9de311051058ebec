"""Square: a random search that changes square windows and sees nothing but logits (Andriushchenko et al. 2020, arXiv
1912.00049; in l1 as in AutoAttack, arXiv 2103.01208)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax.attacks import state as states
from topgap_jax.attacks.naming import options_in_name
from topgap_jax.attacks.state import book, check_ball, move, run_keys, step_keys, where
from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.keys import fold_in
from topgap_jax.scores import margin
from topgap_jax.types import Array, Attack, Ball, Cost

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Numbers of candidates after which the windows' share of the image is halved."""


class Search(NamedTuple):
    """What each example's next candidate is made from."""

    top: Array  # (b, h, w, c): the perturbation with the highest margin


@options_in_name("queries")
def square(ball: Ball, *, queries: int = 5000, p_init: float = 0.8) -> Attack:
    """Random search with windows, one forward pass a step and no gradient (Andriushchenko et al. 2020, arXiv
    1912.00049).

    linf: vertical stripes of +-eps; then in one window, for each channel, 2 eps are added or taken away, cut by ball
    and box. l2, l1: a grid of 5 x 5 tiles; then the mass in two windows and what is left of the radius moves into the
    first one, with a `pattern` added. A candidate that has a higher margin than the best one so far, or is
    misclassified, takes its place.

    The square of a window's side is `p_init` times the image's positions, halved after 10, 50, 200, 500, 1000, 2000,
    4000, ... candidates whatever `queries` is (as in AutoAttack). A window begins at floor(u (h - side)), so that the
    last row and column stay as they were at the start, as in the authors' code. Draws are each example's own. In l2 and
    l1 images have at least 5 x 5 pixels.
    """
    check_ball(ball)
    check_number("queries", queries, 1, whole=True)
    check_number("p_init", p_init, 0, 1)
    start, candidate = (_stripes, _recoloured) if ball.p == math.inf else (_tiles, _moved)

    def init(keys, predict, images, labels, logits, *, run=None, eps=None):
        state = states.start(keys, images, labels, logits, eps=ball.eps if eps is None else eps, run=run)
        delta = start(ball, fold_in(run_keys(state), 0), images, state.eps)
        return state._replace(delta=delta, search=Search(delta))

    def step(predict, state):
        logits = predict(state.images + state.delta)
        values = margin(logits, state.labels)
        better = (values > state.score) | (values >= 0)
        state, top = book(state, values, logits), where(better, state.delta, state.search.top)
        sides = window_sides(ball.p, p_init, *top.shape[1:3])
        return move(state, candidate(ball, step_keys(state), state, top, sides), Search(top))

    name = f"square-{queries}, {ball.name}"
    return Attack(init, step, queries, lambda predict, images: Cost(1, 0), name, norm=ball.norm)


def window_sides(p: float, p_init: float, height: int, width: int) -> list[int]:
    """The side of the windows before the first halving, after it, and so on."""
    sides = [round(math.sqrt(p_init / 2**i * height * width)) for i in range(len(HALVINGS) + 1)]
    if p != math.inf:  # odd: pyramids have a middle
        sides = [max(side, 3) + (max(side, 3) % 2 == 0) for side in sides]
    return [min(max(side, 1), height, width) for side in sides]


def pattern(side: int, p: float) -> np.ndarray:
    """(side, side): a pyramid in the upper half, one of the opposite sign below, each of the same norm, together 1.

    A pyramid of a x b entries is the sum over k up to side // 2 of 1 / (k + 1)^(4 / p) on the square of 2 k + 1 entries
    around (a // 2, b // 2), as far as it lies inside.
    """
    upper, lower = _scales(side, p)
    return np.concatenate([upper * _pyramid(side // 2, side, p), -lower * _pyramid(side - side // 2, side, p)])


def _pyramid(height, side, p):
    row, column = (np.abs(np.arange(n) - n // 2) for n in (height, side))
    levels = 1.0 / np.arange(1, side // 2 + 2) ** (4 // p)
    return levels[::-1].cumsum()[::-1][np.maximum(row[:, None], column)]


def _scales(side, p):
    """What makes the two pyramids of a pattern equal, and the pattern's norm 1."""
    norms = [(_pyramid(height, side, p) ** p).sum() ** (1 / p) for height in (side // 2, side - side // 2)]
    both = sum(norm > 0 for norm in norms) ** (1 / p)
    return [1 / (both * norm) if norm > 0 else 0.0 for norm in norms]


def _stripes(ball, keys, images, eps):
    """linf: +- eps, one sign for each column and channel."""
    signs = _signs(_bits(keys, images[0, 0].size)).reshape(-1, 1, *images.shape[2:])
    return ball.project(images, jnp.broadcast_to(_wide(eps) * signs, images.shape), eps)


def _recoloured(ball, keys, state, top, sides):
    """linf: 2 eps up or down in a window, for each channel."""
    bits, side = _bits(keys, 2 + top.shape[3]), _at(state.count, sides)
    inside = _mask(*_window(bits[:, :2], side, top.shape), side)
    change = 2 * _wide(state.eps) * _signs(bits[:, None, None, 2:]) * inside
    return ball.project(state.images, top + change, state.eps)


def _tiles(ball, keys, images, eps):
    """l2, l1: 5 x 5 patterns in the middle of the image, with a sign for each channel, half of them turned."""
    b, h, w, c = images.shape
    side = min(h, w) // 5
    if side == 0:
        raise UserError(f"square: {ball.name} needs images of at least 5 x 5 pixels, got {h} x {w}")
    bits = _bits(keys, 25 * (c + 1)).reshape(b, 5, 1, 5, 1, c + 1)
    tile = jnp.asarray(pattern(side, ball.p), jnp.float32)[None, None, :, None, :, None]
    tiles = jnp.where(_signs(bits[..., :1]) > 0, tile.swapaxes(2, 4), tile) * _signs(bits[..., 1:])
    top, left = (h - 5 * side) // 2, (w - 5 * side) // 2
    around = ((0, 0), (top, h - 5 * side - top), (left, w - 5 * side - left), (0, 0))
    return _onto(ball, images, jnp.pad(tiles.reshape(b, 5 * side, 5 * side, c), around), eps)


def _moved(ball, keys, state, top, sides):
    """l2, l1: the mass in two windows and what is left of the radius, in the first one, with the pattern added."""
    p, c = ball.p, top.shape[3]
    bits, side = _bits(keys, 5 + c), _at(state.count, sides)
    window = _window(bits[:, :2], side, top.shape)
    first, second = _mask(*window, side), _mask(*_window(bits[:, 2:4], side, top.shape), side)
    scales = [_at(state.count, np.float32(values)) for values in zip(*(_scales(side, p) for side in sides))]
    added = _pattern_in(*window, _signs(bits[:, 4]) > 0, side, scales, max(sides), p)
    powers = jnp.abs(top) ** p
    total = powers.sum((1, 2, 3), keepdims=True)
    in_first, in_both = ((powers * part).sum((1, 2), keepdims=True) for part in (first, first | second))
    new = added[..., None] * _signs(bits[:, None, None, 5:]) + first * top / (1e-12 + in_first ** (1 / p))
    length = (jnp.abs(new) ** p).sum((1, 2), keepdims=True) ** (1 / p)
    share = jnp.maximum(_wide(state.eps) ** p - total, 0) / c + in_both
    new = new / (1e-12 + length) * (jnp.sqrt(share) if p == 2 else c * share)
    return _onto(ball, state.images, jnp.where(first, new, jnp.where(second, 0.0, top)), state.eps)


def _onto(ball, images, delta, eps):
    """l2: scaled to the sphere, then cut by the box; l1: the projection, a little inside the radius."""
    if ball.p == 1:
        return ball.project(images, delta, eps * (1 - 1e-6))
    return ball.project(images, _wide(eps / (ball.size(delta) + 1e-12)) * delta, eps)


def _window(bits, side, shape):
    """Rows (b, h) and columns (b, w) counted from where a window begins that lies anywhere: 0 to side - 1 is inside."""

    def along(bits, n):
        begin = jnp.floor((bits >> 8) * 2.0**-24 * (n - side)).astype(jnp.int32)
        return jnp.arange(n) - begin[:, None]

    return along(bits[:, 0], shape[1]), along(bits[:, 1], shape[2])


def _mask(rows, columns, side):
    """(b, h, w, 1)."""
    return (_inside(rows, side)[:, :, None] & _inside(columns, side)[:, None, :])[..., None]


def _inside(place, side):
    return (place >= 0) & (place < side[:, None])


def _pattern_in(rows, columns, turned, side, scales, largest, p):
    """`pattern`, turned where `turned` (b,), in each example's window: (b, h, w), 0 outside.

    A level depends on the larger of the distances along both axes, so that it is the smaller of the levels at each: an
    outer minimum of two vectors.
    """
    half = side[:, None] // 2
    k = jnp.arange(largest // 2 + 1, dtype=jnp.float32)
    steps = jnp.where(k <= half[..., None], 1.0 / (k + 1.0) ** (4 // p), 0.0)

    def level(place, distance):
        return jnp.where(_inside(place, side), (steps * (k >= distance[..., None])).sum(-1), 0.0)

    def profiles(place):
        """Along an axis: levels around the middle; levels around the middle of each half; their sign and scale."""
        upper = place < half
        middle = jnp.where(upper, half // 2, half + (side[:, None] - half) // 2)
        scale = jnp.where(upper, scales[0][:, None], -scales[1][:, None])
        return level(place, jnp.abs(place - half)), level(place, jnp.abs(place - middle)), scale

    (whole_r, halves_r, scale_r), (whole_c, halves_c, scale_c) = profiles(rows), profiles(columns)
    turned = turned[:, None]
    levels = jnp.minimum(
        jnp.where(turned, whole_r, halves_r)[:, :, None], jnp.where(turned, halves_c, whole_c)[:, None, :]
    )
    return levels * jnp.where(turned, 1.0, scale_r)[:, :, None] * jnp.where(turned, scale_c, 1.0)[:, None, :]


def _at(count, values):
    """The one of the values (before each halving) that holds at count (b,): (b,)."""
    number = (count[:, None] > np.array(HALVINGS)).sum(1)
    # No index, which a mesh with Explicit axes could not split.
    return (jnp.asarray(values) * (number[:, None] == np.arange(len(values)))).sum(1)


def _bits(keys, n):
    """n random numbers of 32 bits of each key: (b, n)."""
    return jax.vmap(lambda key: jax.random.bits(key, (n,)))(keys)


def _signs(bits):
    return jnp.where(bits >> 31, 1.0, -1.0)


def _wide(values):
    return values[:, None, None, None]


TABLE = table(square)
