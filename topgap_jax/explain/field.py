"""Effective receptive fields: which pixels a position of a layer listens to (Luo et al. 2016, arXiv 1701.04128)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from topgap_jax.build import check_number, table
from topgap_jax.edges import check_logits
from topgap_jax.errors import UserError
from topgap_jax.rewrite import feature_layer, read
from topgap_jax.rewrite.dependence import dependence
from topgap_jax.rewrite.speed import map_over
from topgap_jax.types import Array, Cost, Explain, Predict

COUNTS = {"centre": 1, "corner": 4}
BATCH = 64  # backward passes of one image in memory together, if no chunk is given


def field(
    layer: str = "maps", *, position: str | tuple[int, int] = "centre", channel: str | int = "label", k: int = 1
) -> Explain:
    """Influence of every pixel on one position p of a layer: E_p = sum_colour |d sum_t m_t Y[p, t] / d x|, maps (b, h,
    w).

    The effective receptive field (Luo et al. 2016, arXiv 1701.04128). Absolute value per image, gradient with respect
    to pixels in [0, 1]. `position` is "centre" (h' // 2, w' // 2), "corner" (mean of the four fields), (row, column),
    or "top": the mean over the `k` positions where the channel is largest, i.e. what top_gap(k) selects. `channel`
    gives m: "label" (the label's channel, for class maps), an index, or "sum".
    """
    check_position(position)
    check_number("k", k, 1, whole=True)

    def maps(keys, predict, images, labels):
        return fields(predict, images, labels, [position], layer=layer, channel=channel, k=k).mean(0)

    return Explain(maps, lambda predict, images: Cost(0, COUNTS.get(position, k if position == "top" else 1)))


def fields(
    predict: Predict,
    images: Array,
    labels: Array,
    positions: Sequence[str | tuple[int, int]],
    *,
    layer: str = "maps",
    channel: str | int = "label",
    k: int = 1,
    chunk: int | None = None,
) -> Array:
    """Fields (p, b, h, w) of many positions from one forward pass; "corner" counts for four and "top" for `k` of the p.

    The pullback is vmapped over one-hot cotangents, at most `chunk` at a time, whose backward passes are in memory
    together; by default so many that they are 64 of one image.
    """

    full = feature_layer(predict, layer, images)

    def forward(points):
        logits, value = read(predict, full)(points)
        return value, logits

    value, pull, logits = jax.vjp(forward, images, has_aux=True)
    b, h, w, c = _map_shape(value.shape, layer)
    weights = _channel_weights(channel, labels, c, logits, layer)
    scores = jnp.einsum("bhwc,bc->bhw", value.astype(jnp.float32), weights).reshape(b, h * w)
    indices = jnp.concatenate([_indices(position, scores, (h, w), k) for position in positions])

    def one(index):
        places = jax.nn.one_hot(index, h * w).reshape(b, h, w, 1)
        (gradient,) = pull((places * weights[:, None, None, :]).astype(value.dtype))
        return jnp.abs(gradient.astype(jnp.float32)).sum(-1)

    return map_over(one, (indices,), chunk=chunk or max(1, BATCH // b))


def theoretical_fields(
    predict: Predict, images: Array, positions: Sequence[str | tuple[int, int]], *, layer: str = "maps"
) -> Array:
    """Which pixels each position of the layer can depend on, whatever the weights are: bool (p, h, w), cut by the
    image's edges.

    From the shapes of the images and the network's equations alone (`rewrite.dependence`): its windows, strides and
    dilations, on every path; a mean over all positions, as in squeeze and excitation, makes it the whole image.
    positions: "centre", "corner" (four of the p) or (row, column).
    """
    full = feature_layer(predict, layer, images)
    pull, shape = dependence(lambda points: read(predict, full)(points)[1], jnp.zeros((1, *images.shape[1:])))
    h, w = _map_shape(shape, layer)[1:3]
    indices = jnp.concatenate([_indices(position, jnp.zeros((1, h * w)), (h, w), 1) for position in positions])[:, 0]
    one = lambda index: pull(jnp.ones(shape) * jax.nn.one_hot(index, h * w).reshape(1, h, w, 1))[0].any(-1)
    return jax.vmap(one)(indices)


def pixel(position: str | tuple[int, int], maps: tuple[int, int], image: tuple[int, int]) -> tuple[float, float]:
    """Where a position of (h', w') maps lies in an (h, w) image: (u + 1/2) stride - 1/2, in pixels (row, column)."""
    place = (maps[0] // 2, maps[1] // 2) if position == "centre" else position
    return tuple((u + 0.5) * size / cells - 0.5 for u, cells, size in zip(place, maps, image))


def check_position(position: Any) -> None:
    """Raise a UserError unless `position` is one that `field` knows."""
    pair = isinstance(position, tuple) and len(position) == 2 and all(type(u) is int and u >= 0 for u in position)
    if not pair and (not isinstance(position, str) or position not in ("centre", "corner", "top")):
        raise UserError(f"position must be 'centre', 'corner', 'top' or (row, column), got {position!r}")


def _map_shape(shape: tuple[int, ...], layer: str) -> tuple[int, ...]:
    if len(shape) != 4:
        raise UserError(f"field: layer '{layer}' has shape {shape}; a map (b, h, w, c) is needed")
    return shape


def _channel_weights(channel, labels, channels, logits, layer):
    # Made from the labels even where they do not matter: inside `shard_map` a cotangent must vary as the layer does.
    if channel == "sum":
        return jnp.ones_like(labels, jnp.float32)[:, None] * jnp.ones((1, channels))
    if channel == "label":
        check_logits("field", logits)
        if channels != logits.shape[-1]:
            raise UserError(
                f"field: layer '{layer}' has {channels} channels, not one for each of {logits.shape[-1]} classes; "
                "give channel='sum' or an index"
            )
        return jax.nn.one_hot(labels, channels, dtype=jnp.float32)
    if isinstance(channel, bool) or not isinstance(channel, int | np.integer) or not 0 <= channel < channels:
        raise UserError(f"field: channel must be 'label', 'sum' or an index below {channels}, got {channel!r}")
    return jax.nn.one_hot(jnp.full_like(labels, channel), channels, dtype=jnp.float32)


def _indices(position, scores, shape, k):
    """Flat indices (p, b) of a position in maps of `shape`."""
    (b, n), (h, w) = scores.shape, shape
    if position == "top":
        if k > n:
            raise UserError(f"field: k={k} is more than the {n} positions of {h}x{w} maps; give k <= {n}")
        return lax.top_k(scores, k)[1].T
    if position == "corner":
        places = [0, w - 1, n - w, n - 1]
    elif position == "centre":
        places = [(h // 2) * w + w // 2]
    else:
        row, column = position
        if row >= h or column >= w:
            raise UserError(f"field: position {position} lies outside the {h}x{w} maps")
        places = [row * w + column]
    return jnp.broadcast_to(jnp.asarray(places)[:, None], (len(places), b))


TABLE = table(field)
