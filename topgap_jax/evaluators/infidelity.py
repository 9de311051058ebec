"""`infidelity(explain)`: does a map, as weights of a linear model, say what changes of the image do to the score?"""

import jax
import jax.numpy as jnp

from topgap_jax.build import check_number, table
from topgap_jax.grids import resized
from topgap_jax.keys import fold_in, normal, split
from topgap_jax.metrics.summaries import average
from topgap_jax.models import bind
from topgap_jax.rewrite.speed import map_over
from topgap_jax.scores import logit
from topgap_jax.types import Array, Cost, Evaluator, Explain, Keys, Measure, Score

CHANGES = {"noise": "noise", "square": "squares removed"}
UNDEFINED = "no map is finite"


def infidelity(explain: Explain, *, samples: int = 256, sigma: float = 0.1, score: Score = logit) -> Evaluator:
    """mean over changes I of (I . a - (s(x) - s(x - I)))^2, in units of the score squared; 0 is exact (Yeh et al. 2019,
    arXiv 1901.09392).

    a are the values of every channel, before they become one map, of methods that have them, else the map, resized to
    the image, in every channel. Two kinds of I, `samples` of each: noise, N(0, sigma^2) on every value, and a random
    square, where I = x, so that it turns black: its side is uniform in 1 to a third of the image's shorter one, its
    place anywhere inside. infidelity_* scales a by the factor of least squares for each image, sum (I . a) D / sum
    (I . a)^2 with D the change of the score, since most maps have no unit (a map of the wrong sign gains a factor below
    0); unscaled_infidelity_* does not. Methods that
    multiply by the image, such as `integrated`, are no weights of a linear model, and lose by it.
    """
    Explain.single("infidelity", explain)
    check_number("samples", samples, 2, whole=True)  # the scale fits one alone exactly
    check_number("sigma", sigma, 0)

    def rows(keys, model, variables, batch, prepared):
        predict, images, labels = bind(model, variables), batch["image"], batch["label"]
        map_keys, noise_keys, square_keys = split(keys, 3)
        if explain.pixels is None:
            maps = explain.maps(map_keys, predict, images, labels)
            weights = jnp.broadcast_to(resized(maps, images.shape[1:3])[..., None], images.shape)
        else:
            weights = explain.pixels(map_keys, predict, images, labels)
        weights = weights.astype(jnp.float32)
        clean = score(predict(images), labels)

        def one(sample):
            noise = sigma * normal(fold_in(noise_keys, sample), images)
            squares = random_squares(fold_in(square_keys, sample), images.shape[1:3])[..., None] * images
            both = ((change * weights, clean - score(predict(images - change), labels)) for change in (noise, squares))
            return tuple((product.sum((1, 2, 3)), drop) for product, drop in both)

        sampled = map_over(one, (jnp.arange(samples),))
        out = {}
        for name, (products, drops) in zip(CHANGES, sampled):
            out[f"infidelity_{name}"], out[f"unscaled_infidelity_{name}"] = squared_errors(products, drops)
        return out

    def summary(rows):
        about = {
            f"{prefix}infidelity_{name}": Measure(
                better="lower", label=f"{words}infidelity, {change}", main=not prefix, across=False
            )
            for prefix, words in (("", ""), ("unscaled_", "unscaled "))
            for name, change in CHANGES.items()
        }
        return {name: average(rows[name], measure, UNDEFINED) for name, measure in about.items()}

    return Evaluator(rows, summary, lambda predict, images: explain.cost(predict, images) + Cost(2 * samples + 1, 0))


def squared_errors(products: Array, drops: Array) -> tuple[Array, Array]:
    """(scaled, unscaled) infidelity (b,) of I . a (samples, b) and of the drops of the score (samples, b).

    >>> products, drops = jnp.array([[.2], [-.2], [.3], [.05]]), jnp.array([[.3], [-.76], [.71], [-.0475]])
    >>> [round(float(value[0]), 6) for value in squared_errors(products, drops)]
    [0.034631, 0.125302]
    """
    power = jnp.square(products).sum(0)
    scale = jnp.where(power > 0, (products * drops).sum(0) / jnp.where(power > 0, power, 1), 0)
    return jnp.square(scale * products - drops).mean(0), jnp.square(products - drops).mean(0)


def random_squares(keys: Keys, size: tuple[int, int]) -> Array:
    """True (b, h, w) inside a random square of each example: side uniform in 1 to a third of the shorter side, inside
    the image."""

    def square(key):
        side_key, place_key = jax.random.split(key)
        side = jax.random.randint(side_key, (), 1, max(1, min(size) // 3) + 1)
        start = jax.random.randint(place_key, (2,), 0, jnp.array(size) - side + 1)
        inside = lambda i: (jnp.arange(size[i]) >= start[i]) & (jnp.arange(size[i]) < start[i] + side)
        return inside(0)[:, None] & inside(1)

    return jax.vmap(square)(keys)


TABLE = table(infidelity)
