"""Class activation maps of several layers in one map: the detail of the shallow, what the deep ones are sure of."""

import functools

import jax
import jax.numpy as jnp

from topgap_jax.build import table
from topgap_jax.errors import UserError
from topgap_jax.grids import same_size, scaled
from topgap_jax.rewrite import Tokens, feature_layer, read, tap
from topgap_jax.scores import logit
from topgap_jax.types import Array, Cost, Explain, Score

SIZES = ("largest", "image")


def zoom_cam(*layers: str | Tokens, score: Score = logit) -> Explain:
    """max over layers l of up(minmax(relu(sum_k g_k A_k))), A = features of l, g = ds / dA, at the size of the largest,
    maps (b, h', w') (Zoom-CAM, Shi et al. 2020, arXiv 2010.08644).

    HiResCAMs of all the layers from one forward and one backward pass. No default is right for every network: the
    paper takes each ReLU of a VGG-16, and of residual networks we take each stage, `zoom_cam("stage1", "stage2",
    "stage3")`. Each map is scaled to [0, 1] before the maximum, so that shallow layers count as much as deep ones. The
    paper enlarges to the image and from layer to layer; here every map is enlarged once, bilinearly.
    """
    if len(layers) < 2:
        raise UserError("zoom_cam: name two or more layers, such as zoom_cam('stage2', 'stage3'); see `topgap layers`")

    def maps(keys, predict, images, labels):
        full = [feature_layer(predict, layer, images) for layer in layers]

        def with_changes(changes):
            f = predict
            for layer, change in zip(full, changes):
                f = read(tap(f, layer, lambda value, change=change: value + change), layer)
            nested, values = f(images), []
            for _ in full:
                nested, value = nested
                values.insert(0, value)
            return score(nested, labels).sum(), tuple(values)

        read_all = lambda images: functools.reduce(read, full, predict)(images)
        nested, zeros = jax.eval_shape(read_all, images), []
        for _ in full:
            nested, value = nested
            zeros.insert(0, jnp.zeros(value.shape, value.dtype))
        for layer, value in zip(layers, zeros):
            if value.ndim != 4:
                raise UserError(f"zoom_cam: layer '{layer}' has shape {value.shape}; features (b, h, w, c) are needed")
        gradients, values = jax.grad(with_changes, has_aux=True)(tuple(zeros))
        products = [(g.astype(jnp.float32) * value.astype(jnp.float32)).sum(-1) for g, value in zip(gradients, values)]
        return functools.reduce(jnp.maximum, same_size([_unit(jax.nn.relu(product)) for product in products]))

    return Explain(maps, lambda predict, images: Cost(0, 1))


def refine(*explains: Explain, size: str = "largest") -> Explain:
    """minmax(product over explanations of up(minmax(relu(map)))), maps (b, h', w') (RefineCAM 2026, arXiv 2605.14641).

    Bright is what every one of them finds bright: `refine(grad_cam_plus_plus("stage2"), grad_cam_plus_plus("stage3"))`
    is the paper's, with the layers of a ResNet. A map that is zero makes the product zero. Enlarged bilinearly to the
    largest of the maps; size="image": to the image, before the product. Under `jit` the passes they have in common are
    made once.
    """
    if len(explains) < 2:
        raise UserError(
            "refine: give two or more explanations, such as refine(grad_cam_plus_plus('stage2'),"
            " grad_cam_plus_plus('stage3'))"
        )
    for explain in explains:
        Explain.single("refine", explain)
    if size not in SIZES:
        raise UserError(f"refine: size must be one of {', '.join(map(repr, SIZES))}, got {size!r}")

    def maps(keys, predict, images, labels):
        values = [_unit(jax.nn.relu(explain.maps(keys, predict, images, labels))) for explain in explains]
        return _unit(functools.reduce(jnp.multiply, same_size(values, images.shape[1:3] if size == "image" else ())))

    return Explain(
        maps,
        lambda predict, images: sum((e.cost(predict, images) for e in explains), start=Cost()),
        rules=tuple(rule for explain in explains for rule in explain.rules),
    )


def _unit(maps: Array) -> Array:
    """Maps (b, h, w) in [0, 1] each, 0 where one is constant."""
    return scaled(maps, maps.shape[1:])


TABLE = table(zoom_cam, refine)
