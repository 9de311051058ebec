"""Does the class depend on what the map marks? `deletion` and `insertion` of pixels in the map's order (RISE, arXiv 1806.07421).

Both reward what is adversarial: a few high-contrast pixels that upset the network score well without being the object.
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # scipy.ndimage is imported when it is first used
from jax import lax

from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.rewrite import zero_images
from topgap_jax.types import Array, Cost, Metric

BLUR, SIGMA = 11, 5.0


def deletion(*, steps: int = 64, substrate: str | float | tuple[float, ...] = "mean") -> Metric:
    """{"deletion": (b,)}: area under the label's probability while pixels are replaced, most salient first; lower is better.

    `steps` equal steps, steps + 1 scores with both ends (224 in RISE); area = (sum - first / 2 - last / 2) / steps. The
    pixels of the map, resized to the image, are ordered by value; equal ones are shuffled by the example's key, since reading
    order is not neutral. `substrate` is what takes their place: "mean" (what the network's normalisation maps to zero: the
    mean colour; `rewrite.zero_images`), "blur" (11x11 Gaussian, sigma 5), or a colour in [0, 1].
    """
    return _changed("deletion", steps, substrate, lambda image, other, changed: jnp.where(changed, other, image))


def insertion(*, steps: int = 64, substrate: str | float | tuple[float, ...] = "blur") -> Metric:
    """{"insertion": (b,)}: the same area while pixels are put into the substrate, most salient first; higher is better."""
    return _changed("insertion", steps, substrate, lambda image, other, changed: jnp.where(changed, image, other))


def area_under(scores: Array) -> Array:
    """Area under scores (steps + 1, ...) over [0, 1] by trapezoids.

    >>> round(float(area_under(np.array([0.9, 0.5, 0.2, 0.1, 0.0]))), 4)
    0.3125
    """
    return (scores.sum(0) - scores[0] / 2 - scores[-1] / 2) / (len(scores) - 1)


def blur_kernel() -> np.ndarray:
    """The 11 weights of the blur along one axis: a unit pulse under SciPy's Gaussian, whose reflecting border folds the tails
    back (RISE's kernel is their outer product: nearly flat, sum 1)."""
    pulse = np.zeros(BLUR)
    pulse[BLUR // 2] = 1
    return scipy.ndimage.gaussian_filter1d(pulse, SIGMA)


def blurred(images: Array, outside: float | Array = 0.0) -> Array:
    """Images (b, h, w, c) under the 11x11 blur, with the colour `outside` beyond their edges."""
    h, w = images.shape[1:3]
    # As two products of matrices: a grouped convolution is slow on a CPU.
    return outside + jnp.einsum("ih,bhwc,jw->bijc", _band(h), images - outside, _band(w))


def _changed(name, steps, substrate, change) -> Metric:
    check_number("steps", steps, 1, whole=True)
    if isinstance(substrate, str):
        if substrate not in ("mean", "blur"):
            raise UserError(f"{name}: substrate must be 'mean', 'blur' or a colour in [0, 1], got {substrate!r}")
    else:
        for part in np.ravel(substrate):
            check_number("substrate", float(part), 0, 1)

    def metric(keys, predict, maps, batch):
        images, labels = batch["image"], batch["label"]
        ranks, other = _ranks(keys, maps, images.shape[1:3]), _substrate(substrate, predict, images)
        counts = jnp.round(jnp.arange(steps + 1) * (ranks[0].size / steps)).astype(jnp.int32)

        def score(count):
            logits = predict(change(images, other, (ranks < count)[..., None]))
            return jnp.take_along_axis(jax.nn.softmax(logits.astype(jnp.float32)), labels[:, None], 1)[:, 0]

        # A loop holds one batch of images at a time. Forward convolutions are as fast in it as outside.
        return {name: area_under(lax.map(score, counts))}

    metric.cost = Cost(steps + 1, 0)
    return metric


def _ranks(keys, maps, size):
    """Place (b, h, w) of each pixel in the descending order of the map, 0 the most salient."""
    full = jax.image.resize(maps.astype(jnp.float32), (maps.shape[0], *size), "bilinear", antialias=False)

    def one(key, values):
        order = jnp.lexsort((jax.random.permutation(key, values.size), -values))
        return jnp.zeros(values.size, jnp.int32).at[order].set(jnp.arange(values.size, dtype=jnp.int32))

    return jax.vmap(one)(keys, full.reshape(len(full), -1)).reshape(full.shape)


def _substrate(substrate, predict, images):
    if not isinstance(substrate, str):
        return jnp.broadcast_to(jnp.asarray(substrate, images.dtype), images.shape)
    zero = zero_images(predict, images)
    return zero if substrate == "mean" else blurred(images, zero)


def _band(n):
    """(n, n): row i holds the kernel around i, cut at the ends."""
    kernel = blur_kernel()
    return jnp.asarray(sum(weight * np.eye(n, k=i - BLUR // 2) for i, weight in enumerate(kernel)), jnp.float32)


TABLE = table(deletion, insertion)
