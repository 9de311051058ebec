"""Explanations from class maps and feature maps: `cam` and `grad_cam`."""

import jax
import jax.numpy as jnp

from topgap_jax.build import table
from topgap_jax.errors import UserError
from topgap_jax.rewrite import feature_layer, read, tap
from topgap_jax.scores import logit
from topgap_jax.types import Cost, Explain


def cam() -> Explain:
    """The label's class map, the value named "maps" before pooling (Zhou et al. 2016, arXiv 1512.04150; native in
    Top-GAP).

    Signed, at the maps' own resolution (b, h', w'). Needs a head with class maps, or `rewrite.with_pool`.
    """

    def maps(keys, predict, images, labels):
        try:
            _, values = read(predict, feature_layer(predict, "maps", images))(images)
        except UserError as error:
            raise UserError(
                "cam: the model has no class maps named 'maps' (use map_head, pyramid_head or rewrite.with_pool):"
                f" {error}"
            ) from None
        return jnp.take_along_axis(values.astype(jnp.float32), labels[:, None, None, None], -1)[..., 0]

    return Explain(maps, lambda predict, images: Cost(1, 0), signed="speaks against the class")


def grad_cam(layer: str | None = None) -> Explain:
    """ReLU of the layer's channels weighted by the mean gradient of the label's logit (Selvaraju et al. 2017, arXiv
    1610.02391).

    A_k = features (b, h', w', c), w_k = mean over positions of d z_y / d A_k; map = relu(sum_k w_k A_k), (b, h', w').
    The default layer is the last (b, h, w, c) value before the class maps and the pooling (`rewrite.default_layer`).
    """

    def maps(keys, predict, images, labels):
        full = feature_layer(predict, layer, images)
        _, features = read(predict, full)(images)
        score = lambda z: logit(tap(predict, full, lambda _: z)(images), labels).sum()
        weights = jax.grad(score)(features).astype(jnp.float32).mean((1, 2))
        return jax.nn.relu(jnp.einsum("bhwc,bc->bhw", features.astype(jnp.float32), weights))

    return Explain(maps, lambda predict, images: Cost(1, 1))


TABLE = table(cam, grad_cam)
