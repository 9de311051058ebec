"""Relevance of pixels by rules on the backward pass: `lrp` and `excitation_backprop`."""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp

from topgap_jax.build import table
from topgap_jax.errors import UserError
from topgap_jax.explain.pixels import pixel_explanation
from topgap_jax.rewrite import feature_layer, read, tap, with_rules
from topgap_jax.rewrite.normalisation import normalisation
from topgap_jax.rewrite.rules import checked
from topgap_jax.rules import epsilon_plus, excitation
from topgap_jax.rules.composites import contrast
from topgap_jax.rules.relevance import nonzero, stabilised
from topgap_jax.scores import logit
from topgap_jax.types import Cost, Explain, Rules, Score


def lrp(composite: Rules | Callable[..., Rules] = epsilon_plus, *, score: Score = logit) -> Explain:
    """Layer-wise relevance propagation: sum over channels of R = x g, maps (b, h, w), signed (Bach et al. 2015).

    g is the gradient of the score under the composite's backward rules, x the image as it enters the first layer,
    behind the network's normalisation. The relevance that starts is the label's logit. Batch norm in eval mode is part
    of the convolution or dense layer before it; activations, gates and attention have the rules of AttnLRP.
    composite: `epsilon_plus`, `epsilon_gamma_box`, `epsilon_alpha2_beta1`, the two with `_flat`, `attn_lrp` and
    `cp_lrp` for transformers, or rules such as by_layer(first=flat, otherwise=gamma(0.5)); a function of (low, high)
    is called with what black and white images are behind the normalisation. What is conserved: sum R = score for rules
    without eps, but for what biases take; z+, alpha-beta, gamma, box and flat give a layer's bias its part.
    """
    try:
        given = inspect.signature(composite).bind(0.0, 1.0) if callable(composite) else None
    except TypeError:
        name = getattr(composite, "__name__", repr(composite))
        raise UserError(f"lrp: '{name}' is no function of (low, high); give the rules it makes: {name}()") from None
    rules = composite(*given.args) if given else composite
    checked(rules)

    def pixels(keys, predict, images, labels):
        layers = rules
        if callable(composite):
            normalise, _ = normalisation(predict, images)
            layers = composite(normalise(jnp.zeros_like(images)), normalise(jnp.ones_like(images)))
        normalise, rest = normalisation(with_rules(predict, **layers), images)
        x = normalise(images)
        gradient = jax.grad(lambda x: score(rest(x), labels).sum())(x)
        return (nonzero(x) * gradient).astype(jnp.float32)

    return pixel_explanation(pixels, "sum", Cost(0, 1), rules)


def excitation_backprop(layer: str | None = None, *, contrastive: bool = False) -> Explain:
    """Probability that a walk from the label down through excitatory weights comes to a position of the layer, maps (b,
    h', w') that add up to 1 (Zhang et al. 2016, arXiv 1608.00507).

    Sum over the layer's channels. Inputs and weights below 0 pass nothing, biases count for nothing; batch norm in eval
    mode is part of its convolution. contrastive: less the map of the dual class, the label with the last layer's
    weights turned, and 0 where that is more. The default layer is the last (b, h, w, c) value before the class maps and
    the pooling (`rewrite.default_layer`). Where no weight to the label is positive, the map is 0.
    """

    def maps(keys, predict, images, labels):
        full = feature_layer(predict, layer, images)
        _, features = read(predict, full)(images)
        if features.ndim != 4:
            raise UserError(
                f"excitation_backprop: layer '{layer or full}' has shape {features.shape}; "
                "features (b, h, w, c) are needed"
            )

        def probabilities(rules, sign):
            above = with_rules(lambda z: tap(predict, full, lambda _: z)(images), **rules)

            def start(z):
                value = logit(above(z), labels)
                return sign * (value / jax.lax.stop_gradient(stabilised(value))).sum()

            probability = (features * jax.grad(start)(features)).astype(jnp.float32).sum(-1)
            total = probability.sum((1, 2), keepdims=True)
            return jnp.where(total > 0, probability / jnp.where(total > 0, total, 1), 0)

        maps = probabilities(excitation, 1)
        return jax.nn.relu(maps - probabilities(contrast, -1)) if contrastive else maps

    cost = lambda predict, images: Cost(1, 2 if contrastive else 1)
    return Explain(maps, cost, rules=tuple(excitation.items()))


TABLE = table(excitation_backprop, lrp)
