"""Does the class depend on what the map marks? `deletion` and `insertion` of pixels in the map's order (RISE, arXiv
1806.07421).

Both reward what is adversarial: a few high-contrast pixels that upset the network score well without being the object.
"""

import jax
import jax.numpy as jnp

from topgap_jax.build import check_number, table
from topgap_jax.grids import resized
from topgap_jax.keys import required
from topgap_jax.metrics.substrates import Substrate, checked, substrate_images
from topgap_jax.rewrite.speed import map_over
from topgap_jax.scores import probability
from topgap_jax.types import Array, Cost, Curve, Keys, Measure, Metric


def deletion(*, steps: int = 64, substrate: Substrate = "mean") -> Metric:
    """{"deletion": (b,)}: area under the label's probability while pixels are replaced, most salient first; lower is
    better.

    Also {"deletion_curve": (b, steps + 1)}, that probability. `steps` equal steps, steps + 1 scores with both ends (224
    in RISE, Petsiuk et al. 2018, arXiv 1806.07421); area = (sum - first / 2 - last / 2) / steps. The pixels of the map,
    resized to the image, are ordered by value; equal ones are shuffled by the example's key, since reading order is not
    neutral. `substrate` is what takes their place: "mean" (what the network's normalisation maps to zero: the mean
    colour; `rewrite.zero_images`), "blur" (11x11 Gaussian, sigma 5), a colour in [0, 1], or a picture (h, w, c) in [0,
    1].
    """
    return _changed("deletion", steps, substrate, "lower", lambda image, other, rows: jnp.where(rows, other, image))


def insertion(*, steps: int = 64, substrate: Substrate = "blur") -> Metric:
    """{"insertion": (b,)}: the same area while pixels are put into the substrate, most salient first; higher is better.

    Also {"insertion_curve": (b, steps + 1)}; options as in `deletion`.
    """
    return _changed("insertion", steps, substrate, "higher", lambda image, other, rows: jnp.where(rows, image, other))


def area_under(scores: Array) -> Array:
    """Area under scores (steps + 1, ...) over [0, 1] by trapezoids.

    >>> round(float(area_under(jnp.array([0.9, 0.5, 0.2, 0.1, 0.0]))), 4)
    0.3125
    """
    return (scores.sum(0) - scores[0] / 2 - scores[-1] / 2) / (len(scores) - 1)


def pixel_ranks(keys: Keys, maps: Array, size: tuple[int, int]) -> Array:
    """Place (b, h, w) of each pixel in the descending order of the resized map, 0 the most salient; ties by the key."""
    full = resized(maps, size)

    def one(key, values):
        order = jnp.lexsort((jax.random.permutation(key, values.size), -values))
        return jnp.zeros(values.size, jnp.int32).at[order].set(jnp.arange(values.size, dtype=jnp.int32))

    return jax.vmap(one)(required(keys), full.reshape(len(full), -1)).reshape(full.shape)


def _changed(name, steps, substrate, better, change) -> Metric:
    check_number("steps", steps, 1, whole=True)
    substrate, words = checked(name, substrate)

    def rows(keys, predict, maps, batch):
        images, labels = batch["image"], batch["label"]
        ranks = pixel_ranks(keys, maps, images.shape[1:3])
        other = substrate_images(name, substrate, predict, images)
        counts = jnp.round(jnp.arange(steps + 1) * (ranks[0].size / steps)).astype(jnp.int32)

        def score(count):
            return probability(predict(change(images, other, (ranks < count)[..., None])), labels)

        scores = map_over(score, (counts,))  # one batch of images at a time
        return {name: area_under(scores), f"{name}_curve": scores.T}

    about = {
        name: Measure(better=better, label=f"{name} ({words})", across=False),
        f"{name}_curve": Curve(
            [i / steps for i in range(steps + 1)], axes=("share of pixels", "probability"), label=f"{name} ({words})"
        ),
    }
    return Metric(rows, about, lambda predict, images: Cost(steps + 1, 0))


TABLE = table(deletion, insertion)
