"""Class activation maps that ask the network instead of differentiating it: Score-CAM masks the image with a layer's
channels, Ablation-CAM and Recipro-CAM hide and keep parts of the features.

Evaluations are made a chunk at a time, so that memory is that of a few images more, however many channels or positions
the layer has. The network below the layer is computed once, and for the last two it is all that is: what is evaluated
again and again is the rest of the network.
"""

import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax.build import table
from topgap_jax.explain.pixels import rectified
from topgap_jax.grids import scaled
from topgap_jax.rewrite import Tokens, features_and_head
from topgap_jax.rewrite.speed import map_over
from topgap_jax.scores import logit, probability
from topgap_jax.types import Array, Cost, Explain, Score

IMAGES, FEATURES = 16, 64
"""How many masked images, and how many altered features, are evaluated at a time."""


def score_cam(
    layer: str | Tokens | None = None, *, score: Score = logit, softmax: bool = True, relu: bool = True
) -> Explain:
    """relu(sum_k w_k A_k), w = softmax over channels of s(x * H_k), H_k = A_k enlarged to the image and scaled to [0,
    1], maps (b, h', w') (Score-CAM, Wang et al. 2020, arXiv 1910.01279).

    A channel that is constant over positions masks nothing and has weight 0. Enlarged bilinearly, half-pixel centres.
    The softmax of raw logits over hundreds of channels is often nearly one-hot; `score_cam(score=probability,
    softmax=False)`, w_k = p_y(x * H_k), is what the authors' code does. As many forward passes as channels.
    """

    def maps(keys, predict, images, labels):
        features = features_and_head(predict, layer, images)[0].astype(jnp.float32)
        low, high = features.min((1, 2)), features.max((1, 2))
        masked = lambda channel: score(predict(images * scaled(channel, images.shape[1:3])[..., None]), labels)
        scores = map_over(masked, (jnp.moveaxis(features, -1, 0),), chunk=_chunk(IMAGES, images)).T
        weights = jax.nn.softmax(scores, where=high > low) if softmax else jnp.where(high > low, scores, 0)
        return rectified(jnp.einsum("bhwc,bc->bhw", features, weights), relu)

    cost = lambda predict, images: Cost(1 + _shape(predict, layer, images)[-1], 0)
    return Explain(maps, cost, signed=None if relu else "speaks against the class")


def ablation_cam(layer: str | Tokens | None = None, *, score: Score = logit, relu: bool = True) -> Explain:
    """relu(sum_k w_k A_k), w_k = (s - s without channel k) / |s|, maps (b, h', w') (Ablation-CAM, Desai & Ramaswamy,
    WACV 2020).

    A channel is taken away by setting it to 0. The paper divides by s, which turns the map round where a logit is
    negative; where s is 0 nothing is divided. The cost counts each evaluation of the head as a forward pass.
    """

    def maps(keys, predict, images, labels):
        features, head = features_and_head(predict, layer, images)
        channels = np.arange(features.shape[-1])
        without = lambda channel: score(head(jnp.where(channels == channel, 0, features)), labels)
        scores = map_over(without, (channels,), chunk=_chunk(FEATURES, images)).T
        whole = score(head(features), labels)[:, None]
        weights = (whole - scores) / jnp.where(whole == 0, 1, jnp.abs(whole))
        return rectified(jnp.einsum("bhwc,bc->bhw", features.astype(jnp.float32), weights), relu)

    cost = lambda predict, images: Cost(1 + _shape(predict, layer, images)[-1], 0)
    return Explain(maps, cost, signed=None if relu else "speaks against the class")


def recipro_cam(layer: str | Tokens | None = None, *, score: Score = probability) -> Explain:
    """The score when the features are kept at one position and 0 elsewhere, for every position, maps (b, h', w')
    (Recipro-CAM, Byun & Lee 2022, arXiv 2209.14074, without its Gaussian).

    The cost counts each evaluation of the head as a forward pass.
    """

    def maps(keys, predict, images, labels):
        features, head = features_and_head(predict, layer, images)
        b, h, w, _ = features.shape
        positions = np.arange(h * w)
        kept = lambda position: jnp.where((positions == position).reshape(h, w, 1), features, 0)
        scores = map_over(
            lambda position: score(head(kept(position)), labels), (positions,), chunk=_chunk(FEATURES, images)
        )
        return scores.T.reshape(b, h, w)

    cost = lambda predict, images: Cost(1 + np.prod(_shape(predict, layer, images)[1:3]).item(), 0)
    return Explain(maps, cost, signed="the score there is negative" if score is not probability else None)


def _chunk(at_a_time: int, images: Array) -> int:
    return max(1, at_a_time // images.shape[0])


def _shape(predict, layer, images) -> tuple[int, ...]:
    """(b, h', w', c) of the layer, from shapes alone."""
    return jax.eval_shape(lambda images: features_and_head(predict, layer, images)[0], images).shape


TABLE = table(score_cam, ablation_cam, recipro_cam)
