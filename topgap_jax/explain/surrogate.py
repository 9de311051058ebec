"""LIME: a linear model of the network's answers to segments that are hidden or shown."""

import jax
import jax.numpy as jnp

from topgap_jax.baselines import Baseline, baseline_images, check_baseline
from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.explain.masking import Segments, check_chunk, checked_segments, mixed, paint, segment_ids, sum_of
from topgap_jax.keys import fold_in
from topgap_jax.scores import probability
from topgap_jax.types import Array, Cost, Explain, Score


def lime(
    segments: Segments = 7,
    *,
    samples: int = 1000,
    width: float = 0.25,
    penalty: float = 1.0,
    baseline: Baseline = "segment",
    score: Score = probability,
    chunk: int | None = None,
) -> Explain:
    """Coefficients of a weighted ridge regression of p_y on which segments are shown, maps (b, h, w), signed.

    Ribeiro et al. 2016, arXiv 1602.04938, as its package has it for images. z is 1 for a segment that is shown, with
    probability 1/2, and all ones first; pi(z) = exp(-d^2 / (2 width^2)), d = 1 - sqrt(mean z) the cosine distance from
    all ones; beta solves (Z'PZ + penalty I) beta = Z'Py, z and y centred by their weighted means, so that the intercept
    is not penalised. Each pixel has its segment's coefficient; no features are selected.

    segments: as in `feature_ablation`. baseline: what a hidden segment shows, "segment" (its own mean colour), "mean",
    "blur", a colour or a picture. chunk: as in `rise`; the regression's sums are taken along, so that memory does not
    grow with the samples. One forward pass a sample.
    """
    check_number("samples", samples, 2, whole=True)
    check_number("width", width, 1e-3)
    check_number("penalty", penalty, 0)
    check_chunk(chunk)
    of_segments = isinstance(baseline, str) and baseline == "segment"
    if not of_segments:
        check_baseline("lime: baseline", baseline)
    segments, count = checked_segments("lime", segments)
    if penalty == 0 and samples <= count:
        raise UserError(
            f"lime: {samples} samples do not determine the coefficients of {count} segments without a penalty; give"
            " more samples, or a penalty"
        )

    def maps(keys, predict, images, labels):
        ids = segment_ids("lime", segments, images)
        if of_segments:
            other = _means(images, ids, count)
        else:
            other = baseline_images("lime: baseline", baseline, predict, images, keys)

        def one(index):
            drawn = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (count,)))(fold_in(keys, index))
            shown = drawn | (index == 0)
            values = score(predict(mixed(paint(shown, ids), images, other)), labels)
            return _sums(jnp.float32(shown), values, width)

        return paint(_coefficients(sum_of(one, samples, images, chunk), penalty), ids)

    return Explain(maps, lambda predict, images: Cost(samples, 0), signed="shown, it lowers the class's score")


def _sums(shown: Array, values: Array, width: float) -> tuple[Array, ...]:
    """What a sample z (b, k) with answer y (b,) adds to the weighted sums of 1, z, y, zz' and zy.

    z is taken from its mean 1/2, of which the sums of squares lose fewest digits when they are centred.
    """
    distance = 1 - jnp.sqrt(shown.mean(1))
    weight = jnp.exp(-((distance / width) ** 2) / 2)
    z = shown - 0.5
    weighted = weight[:, None] * z
    return weight, weighted, weight * values, weighted[:, :, None] * z[:, None, :], weighted * values[:, None]


def _coefficients(sums: tuple[Array, ...], penalty: float) -> Array:
    """beta (b, k) of the ridge regression with these sums."""
    weight, z, y, squares, products = sums
    mean = z / weight[:, None]
    matrix = squares - z[:, :, None] * mean[:, None, :] + penalty * jnp.eye(z.shape[1])
    right = products - mean * y[:, None]
    return jnp.linalg.solve(matrix, right[..., None])[..., 0]


def _means(images: Array, ids: Array, count: int) -> Array:
    """Each pixel's mean colour of its segment, (b, h, w, c)."""
    b, h, w, c = images.shape

    def one(image, numbers):
        total = jnp.zeros((count, c + 1)).at[numbers].add(jnp.concatenate([image, jnp.ones((h * w, 1))], 1))
        return (total[:, :-1] / total[:, -1:])[numbers]

    return jax.vmap(one)(images.reshape(b, h * w, c), jnp.broadcast_to(ids, (b, h, w)).reshape(b, -1)).reshape(
        images.shape
    )


TABLE = table(lime)
