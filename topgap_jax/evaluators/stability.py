"""`stability(explain)`: what is left of a map when noise changes the image, and not what the network says."""

import jax
import jax.numpy as jnp

from topgap_jax.build import check_number, table
from topgap_jax.keys import fold_in, split
from topgap_jax.metrics.summaries import average
from topgap_jax.models import bind
from topgap_jax.norms import direction_and_length
from topgap_jax.rewrite.speed import map_over
from topgap_jax.types import Array, Cost, Evaluator, Explain, Measure

MEASURES = {
    "max_sensitivity": Measure(better="lower", label="max-sensitivity of the map"),
    "mean_sensitivity": Measure(better="lower", label="mean sensitivity of the map", main=False),
    "output_stability": Measure(better="lower", label="change of the map by that of the logits"),
    "relative_output_stability": Measure(better="lower", label="relative output stability", main=False),
}
UNDEFINED = "every map is 0 or not finite, or noise changes every class"


def stability(explain: Explain, *, radius: float = 0.02, samples: int = 32) -> Evaluator:
    """Relative change |e' - e| / |e| of the label's map e under noise uniform in +-radius on every value of the image,
    cut to [0, 1].

    max_sensitivity is the largest over the samples (Yeh et al. 2019, arXiv 1901.09392), mean_sensitivity their mean.
    output_stability is the largest change of the map relative to that of the logits, (|e' - e| / |e|) / (|z' - z| /
    |z|): a map may move as far as the network does. relative_output_stability is Agarwal et al.'s (2022, arXiv
    2203.06877), max |(e' - e) / e| / |z' - z| value by value with 0 := 1e-6, which a single zero of a sparse map makes
    huge. Samples of another predicted class are left out, `left_out` is their share. The map's own randomness is the
    same in all samples. A map that is constant is stable: none of this says that it is right.
    """
    Explain.single("stability", explain)
    check_number("radius", radius, 0)
    check_number("samples", samples, 1, whole=True)

    def rows(keys, model, variables, batch, prepared):
        predict, images, labels = bind(model, variables), batch["image"], batch["label"]
        noise_keys, map_keys = split(keys)
        clean, logits = explain.maps(map_keys, predict, images, labels), predict(images)

        def one(sample):
            noise = jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:], minval=-radius, maxval=radius))
            noisy = jnp.clip(images + noise(fold_in(noise_keys, sample)), 0, 1)
            other, changed = explain.maps(map_keys, predict, noisy, labels), predict(noisy)
            return jnp.argmax(changed, -1) == jnp.argmax(logits, -1), *changes(clean, other, logits, changed)

        same, change, by_output, relative = map_over(one, (jnp.arange(samples),))
        defined = same.any(0) & jnp.isfinite(clean).all((1, 2))
        largest = lambda values: jnp.where(defined, jnp.where(same, values, -jnp.inf).max(0), jnp.nan)
        mean = jnp.where(same, change, 0).sum(0) / same.sum(0)
        return {
            "max_sensitivity": largest(change),
            "mean_sensitivity": jnp.where(defined, mean, jnp.nan),
            "output_stability": largest(by_output),
            "relative_output_stability": largest(relative),
            "left_out": 1 - same.mean(0),
        }

    def summary(rows):
        measures = {name: average(rows[name], about, UNDEFINED) for name, about in MEASURES.items()}
        about = Measure(label="share of samples of another class", main=False)
        return measures | {"left_out": average(rows["left_out"], about)}

    def cost(predict, images):
        return (samples + 1) * (explain.cost(predict, images) + Cost(1, 0))

    return Evaluator(rows, summary, cost)


def changes(maps: Array, others: Array, logits: Array, changed: Array) -> tuple[Array, Array, Array]:
    """Of maps e and e' (b, h, w) and logits z and z' (b, k): |e' - e| / |e|, that by |z' - z| / |z|, and relative
    output stability, (b,) each; NaN where e is 0."""
    e, other = (values.astype(jnp.float32).reshape(len(maps), -1) for values in (maps, others))
    size = _length(e)
    change = jnp.where(size > 0, _length(other - e) / jnp.where(size > 0, size, 1), jnp.nan)
    moved = _length(changed - logits)
    by_output = change * _length(logits) / jnp.where(moved == 0, 1e-6, moved)
    relative = _length((other - e) / jnp.where(e == 0, 1e-6, e)) / jnp.where(moved == 0, 1e-6, moved)
    return change, by_output, jnp.where(size > 0, relative, jnp.nan)


def _length(values):
    return direction_and_length(values.astype(jnp.float32), (1,))[1][:, 0]


TABLE = table(stability)
