"""Class activation maps: the label's class map, and a layer's features weighted by the gradient of a score with respect
to them.

A = features (b, h', w', c) of a layer, g = ds / dA of the same shape, s = score(logits, labels) (b,). Everywhere the
default layer is the last (b, h, w, c) value before the class maps and the pooling (`rewrite.default_layer`), which is
the one these methods were made for; tokens (b, n, c) of a transformer are features by `tokens(layer, grid)`. ReLU comes
last, as in Grad-CAM's paper; `relu=False` keeps what speaks against the class.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax.build import check_number, table
from topgap_jax.edges import check_logits
from topgap_jax.errors import UserError
from topgap_jax.explain.pixels import rectified
from topgap_jax.keys import fold_in, normal
from topgap_jax.rewrite import Tokens, feature_layer, features_and_head, read
from topgap_jax.rewrite.speed import loop, sum_over
from topgap_jax.scores import finer, logit, residual_softmax
from topgap_jax.types import Array, Cost, Explain, Score

AGAINST = "speaks against the class"


def cam() -> Explain:
    """The label's class map, the value named "maps" before pooling (Zhou et al. 2016, arXiv 1512.04150; native in
    Top-GAP).

    Signed, at the maps' own resolution (b, h', w'). Needs a head with class maps, or `rewrite.with_pool`.
    """

    def maps(keys, predict, images, labels):
        try:
            logits, values = read(predict, feature_layer(predict, "maps", images))(images)
        except UserError as error:
            raise UserError(
                "cam: the model has no class maps named 'maps' (use map_head, pyramid_head or rewrite.with_pool):"
                f" {error}"
            ) from None
        check_logits("cam", logits)
        if logits.shape[-1] != values.shape[-1]:
            raise UserError(
                f"cam: there are {values.shape[-1]} class maps and {logits.shape[-1]} output(s); a target that is a "
                "function of the outputs has no class map: take grad_cam()"
            )
        return jnp.take_along_axis(values.astype(jnp.float32), labels[:, None, None, None], -1)[..., 0]

    return Explain(maps, lambda predict, images: Cost(1, 0), signed=AGAINST)


def grad_cam(layer: str | Tokens | None = None, *, score: Score = logit, relu: bool = True) -> Explain:
    """relu(sum_k w_k A_k), w_k = mean over positions of g_k, maps (b, h', w') (Selvaraju et al. 2017, arXiv
    1610.02391)."""
    return _of_gradient(_grad_cam, layer, score, relu)


def grad_cam_plus_plus(
    layer: str | Tokens | None = None, *, score: Score = logit, normalised: bool = False, relu: bool = True
) -> Explain:
    """relu(sum_k w_k A_k), w_k = sum over positions of alpha_k relu(g_k), maps (b, h', w') (Grad-CAM++, Chattopadhyay
    et al. 2018, arXiv 1710.11063).

    alpha = g^2 / (2 g^2 + (sum over positions of A_k) g^3), 0 where the denominator is. The powers are of the first
    derivative: the paper's second and third derivatives are those of exp(s) above a piecewise linear network (eq. 19),
    whose factor exp(s), one for the whole map, is left out. normalised: alpha is divided by its sum over the positions
    where g_k > 0, as the authors' TensorFlow code does.
    """
    return _of_gradient(
        lambda features, gradients: _plus_plus(features, gradients, gradients, normalised), layer, score, relu
    )


def smooth_grad_cam_plus_plus(
    layer: str | Tokens | None = None,
    *,
    samples: int = 32,
    sigma: float = 0.15,
    score: Score = logit,
    relu: bool = True,
) -> Explain:
    """Grad-CAM++ whose g, g^2 and g^3 are means over images with Gaussian noise, maps (b, h', w') (Omeiza et al. 2019,
    arXiv 1908.01224).

    alpha = D2 / (2 D2 + (sum over positions of A_k) D3), w_k = sum over positions of alpha_k relu(D1), A of the clean
    image. sigma is in units of each image's own range, max - min; the noisy images are not clipped. The samples run one
    after another. Noise comes from the example's own key.
    """
    check_number("samples", samples, 1, whole=True)
    check_number("sigma", sigma, 0)

    def maps(keys, predict, images, labels):
        features, _ = features_and_head(predict, layer, images)
        spread = jnp.ptp(images, (1, 2, 3), keepdims=True)

        def powers(sample):
            noisy = images + sigma * spread * normal(fold_in(keys, sample), images)
            _, gradients = _features_and_gradients(predict, layer, score, noisy, labels)
            return gradients / samples, gradients**2 / samples, gradients**3 / samples

        first, second, third = sum_over(powers, (np.arange(samples),), images)
        return rectified(_plus_plus(features.astype(jnp.float32), first, _ratio(third, second, 0.0)), relu)

    return Explain(maps, lambda predict, images: Cost(1, samples), signed=None if relu else AGAINST)


def xgrad_cam(layer: str | Tokens | None = None, *, score: Score = logit, relu: bool = True) -> Explain:
    """relu(sum_k w_k A_k), w_k = (sum over positions of g_k A_k) / (sum over positions of A_k), maps (b, h', w')
    (XGrad-CAM, Fu et al. 2020, arXiv 2008.02312).

    w_k = 0 where |sum of A_k| < 1e-7; near that, on signed features, weights are as large as the axiom makes them.
    """
    return _of_gradient(_xgrad_cam, layer, score, relu)


def hires_cam(layer: str | Tokens | None = None, *, score: Score = logit, relu: bool = True) -> Explain:
    """relu(sum_k g_k A_k), position by position, maps (b, h', w') (HiResCAM, Draelos & Carin 2020, arXiv 2011.08891).

    The paper has no ReLU: `relu=False` is what adds up to s, up to the biases, above piecewise linear layers.
    """
    return _of_gradient(_hires_cam, layer, score, relu)


def elementwise_grad_cam(layer: str | Tokens | None = None, *, score: Score = logit) -> Explain:
    """sum_k relu(g_k A_k), position by position, maps (b, h', w'): element-wise Grad-CAM of pytorch-grad-cam, and what
    SGDrop thresholds, summed over channels.

    LayerCAM where no feature is negative.
    """
    return _of_gradient(_elementwise_grad_cam, layer, score, True)


def layer_cam(layer: str | Tokens | None = None, *, score: Score = logit, relu: bool = True) -> Explain:
    """relu(sum_k relu(g_k) A_k), position by position, maps (b, h', w') (LayerCAM, Jiang et al., IEEE TIP 2021)."""
    return _of_gradient(_layer_cam, layer, score, relu)


def eigen_cam(layer: str | Tokens | None = None, *, relu: bool = True) -> Explain:
    """relu(M v), M (h' w', c) the features of an image, not centred, v their first right singular vector, maps (b, h',
    w') (Eigen-CAM, Muhammad & Yeasin 2020, arXiv 2008.00299).

    The same for every class. Its sign, which a decomposition leaves open, is the one whose correlation with the sum of
    the channels is not negative.
    """

    def maps(keys, predict, images, labels):
        features, _ = features_and_head(predict, layer, images)
        return rectified(_first_component(features.astype(jnp.float32)), relu)

    signed = None if relu else "opposes the features' sum"
    return Explain(maps, lambda predict, images: Cost(1, 0), signed=signed)


def eigen_grad_cam(layer: str | Tokens | None = None, *, score: Score = logit, relu: bool = True) -> Explain:
    """Eigen-CAM of g A instead of A, maps (b, h', w'), which knows the class (pytorch-grad-cam's EigenGradCAM)."""
    return _of_gradient(_eigen_grad_cam, layer, score, relu)


def shapley_cam(layer: str | Tokens | None = None, *, score: Score = residual_softmax, relu: bool = True) -> Explain:
    """relu(sum_k w_k A_k), w_k = mean over positions of (g - H A / 2)_k, H = d2s / dA2, maps (b, h', w') (Shapley-CAM,
    2025, arXiv 2501.06261).

    s = z_y + log p_y, the paper's ReST. Of a plain logit the Hessian above A is 0 wherever the network is piecewise
    linear there, and this is Grad-CAM. H A is one Hessian-vector product.
    """

    def maps(keys, predict, images, labels):
        features, head = features_and_head(predict, layer, images)
        gradient = jax.grad(lambda z: score(head(z), labels).sum())
        gradients, curvature = jax.jvp(gradient, (features,), (features,))
        weights = (gradients.astype(jnp.float32) - curvature.astype(jnp.float32) / 2).mean((1, 2))
        return rectified(_weighted(features.astype(jnp.float32), weights), relu)

    return Explain(maps, lambda predict, images: Cost(0, 2), signed=None if relu else AGAINST)


def finer_cam(
    layer: str | Tokens | None = None,
    *,
    weights: str = "uniform",
    strength: float = 0.6,
    count: int = 3,
    stop_weights: bool = True,
    relu: bool = True,
) -> Explain:
    """Grad-CAM of z_y minus `strength` times the mean logit of the `count` classes most like it, maps (b, h', w')
    (Finer-CAM, 2025, arXiv 2501.11309).

    What tells the class from those it is taken for. The options are those of `scores.finer`, which any other class
    activation map takes as its score: `layer_cam(score=finer(count=1))`. strength=0 is Grad-CAM.
    """
    score = finer(weights=weights, strength=strength, count=count, stop_weights=stop_weights)
    return _of_gradient(_grad_cam, layer, score, relu)


def family(*methods: str, layer: str | Tokens | None = None, score: Score = logit, relu: bool = True) -> Explain:
    """Several class activation maps of one layer and one score from one forward and one backward pass: a tuple of maps
    (b, h', w'), in the order of `methods`, by default of all that can share them.

    `family("grad_cam", "hires_cam")` gives what `grad_cam()` and `hires_cam()` give. UserError for a method that needs
    a pass of its own.
    """
    methods = methods or tuple(FAMILY)
    for method in methods:
        if method not in FAMILY:
            raise UserError(
                f"family: {method!r} cannot share one forward and one backward pass; those that can are"
                f" {', '.join(FAMILY)}"
            )

    def maps(keys, predict, images, labels):
        features, gradients = _features_and_gradients(predict, layer, score, images, labels)
        return tuple(rectified(FAMILY[method](features, gradients), relu) for method in methods)

    return Explain(maps, lambda predict, images: Cost(0, 1), signed=None if relu else AGAINST, names=methods)


def _of_gradient(weigh: Callable, layer, score: Score, relu: bool) -> Explain:
    """The explanation relu(weigh(A, g)), weigh(features, gradients (b, h', w', c)) -> (b, h', w')."""

    def maps(keys, predict, images, labels):
        return rectified(weigh(*_features_and_gradients(predict, layer, score, images, labels)), relu)

    return Explain(maps, lambda predict, images: Cost(0, 1), signed=None if relu else AGAINST)


def _features_and_gradients(predict, layer, score, images, labels) -> tuple[Array, Array]:
    """A and g (b, h', w', c), float32 at least: one pass through the network below the layer, one forward and back
    above."""
    features, head = features_and_head(predict, layer, images)
    # The gradient of the sum holds each image's own.
    gradients = jax.grad(lambda z: score(head(z), labels).sum())(features)
    wide = jnp.promote_types(features.dtype, jnp.float32)
    return features.astype(wide), gradients.astype(wide)


def _weighted(features: Array, weights: Array) -> Array:
    return jnp.einsum("bhwc,bc->bhw", features, weights)


def _grad_cam(features, gradients):
    return _weighted(features, gradients.mean((1, 2)))


def _plus_plus(features, gradients, ratio, normalised=False):
    """Grad-CAM++ from the first derivative and the ratio of the third to the second: of one image that is g again.

    alpha = D2 / (2 D2 + S D3) = 1 / (2 + S D3 / D2), which needs no threshold in the unit of the gradient.
    """
    alpha = _ratio(jnp.ones_like(ratio), 2 + features.sum((1, 2), keepdims=True) * ratio)
    if normalised:
        positive = jnp.where(gradients > 0, alpha, 0).sum((1, 2), keepdims=True)
        alpha = alpha / jnp.where(positive == 0, 1, positive)
    return _weighted(features, (alpha * jax.nn.relu(gradients)).sum((1, 2)))


def _xgrad_cam(features, gradients):
    return _weighted(features, _ratio((gradients * features).sum((1, 2)), features.sum((1, 2)), 1e-7))


def _hires_cam(features, gradients):
    return (gradients * features).sum(-1)


def _elementwise_grad_cam(features, gradients):
    return jax.nn.relu(gradients * features).sum(-1)


def _layer_cam(features, gradients):
    return (jax.nn.relu(gradients) * features).sum(-1)


def _eigen_grad_cam(features, gradients):
    return _first_component(gradients * features)


def _first_component(values: Array) -> Array:
    """M v of the first right singular vector v (b, h', w'), M (h' w', c) of each image, by squaring the smaller of
    M M^T and M^T M 20 times: its power of 2^20 has no other direction left.

    Matrix products alone, which every device is fast at. LAPACK's `eigh`, twice in one program beside the engine's
    convolutions, did not return on a CPU of two cores (jaxlib 0.10.2, 128 images).
    """
    b, h, w, c = values.shape
    product = lambda equation, x, y: jnp.einsum(equation, x, y, precision="highest")
    unit = lambda x: x / jnp.where((x == 0).all((1, 2), keepdims=True), 1, jnp.abs(x).max((1, 2), keepdims=True))
    m = values.reshape(b, h * w, c)
    scaled = unit(m)
    square = product("bic,bjc->bij", scaled, scaled) if h * w <= c else product("bic,bid->bcd", scaled, scaled)
    power = loop(lambda x: unit(product("bij,bjk->bik", x, x)), 20, unit(square))
    # Every row is the vector, times one of its entries: the row of the largest one.
    row = jnp.argmax(jnp.diagonal(power, axis1=1, axis2=2), 1)
    vector = jnp.take_along_axis(power, row[:, None, None], 1)[:, 0]
    direction = product("bi,bic->bc", vector, scaled) if h * w <= c else vector
    length = (direction**2).sum(1, keepdims=True)
    projected = product("bic,bc->bi", m, direction / jnp.sqrt(jnp.where(length == 0, 1, length)))
    total = m.sum(-1)
    covariance = (projected * (total - total.mean(1, keepdims=True))).sum(1, keepdims=True)
    return jnp.where(covariance < 0, -projected, projected).reshape(b, h, w)


def _ratio(numerator: Array, denominator: Array, least: float = 1e-12) -> Array:
    """numerator / denominator, 0 where |denominator| <= least, with a finite derivative there."""
    small = jnp.abs(denominator) <= least
    return jnp.where(small, 0, numerator / jnp.where(small, 1, denominator))


FAMILY: dict[str, Callable[[Array, Array], Array]] = {
    "grad_cam": _grad_cam,
    "grad_cam_plus_plus": lambda features, gradients: _plus_plus(features, gradients, gradients),
    "xgrad_cam": _xgrad_cam,
    "hires_cam": _hires_cam,
    "elementwise_grad_cam": _elementwise_grad_cam,
    "layer_cam": _layer_cam,
    "eigen_cam": lambda features, gradients: _first_component(features),
    "eigen_grad_cam": _eigen_grad_cam,
}
"""Maps (b, h', w') that are functions of features and gradients (b, h', w', c) alone."""

TABLE = table(
    cam, grad_cam, grad_cam_plus_plus, smooth_grad_cam_plus_plus, xgrad_cam, hires_cam, elementwise_grad_cam, layer_cam,
    eigen_cam, eigen_grad_cam, shapley_cam, finer_cam, family,
)  # fmt: skip
