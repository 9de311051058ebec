"""`agreement(a, b)`: do two explanations of one network show the same?"""

import jax.numpy as jnp

from topgap_jax.build import check_number, table
from topgap_jax.grids import scaled, shrunk
from topgap_jax.keys import split
from topgap_jax.metrics.ranks import is_constant, kendall_tau_b, spearman, topk_intersection
from topgap_jax.metrics.structure import WINDOW, ssim
from topgap_jax.metrics.summaries import average, share
from topgap_jax.models import bind
from topgap_jax.order import top_count
from topgap_jax.types import Evaluator, Explain, Measure

MEASURES = {
    "spearman": "Spearman's correlation of the two maps",
    "kendall_tau_b": "Kendall tau-b of the two maps",
    "topk_intersection": "top-k intersection of the two maps",
    "ssim": "structural similarity of the two maps",
}
SIDE = 32  # Kendall compares all pairs of positions


def agreement(a: Explain, b: Explain, *, k: int | None = None) -> Evaluator:
    """Spearman's and Kendall's rank correlation, top-k intersection and SSIM of two explanations of the label, means
    over images.

    The maps are compared on the coarser grid of the two: enlarged maps agree with themselves. Kendall's is of at most
    32x32 positions. topk_intersection is of the `k` highest positions, by default 100, above 64x64 positions 1000, at
    most a tenth of them; `chance` is that of two unrelated maps. SSIM (11x11 Gaussian windows) is of the min-max scaled
    maps, and absent where a map has fewer positions. A correlation with a constant map is 0, and `constant` counts the
    images where one is. Two methods that agree may be wrong together.
    """
    Explain.single("agreement", a)
    Explain.single("agreement", b)
    if k is not None:
        check_number("k", k, 1, whole=True)

    def rows(keys, model, variables, batch, prepared):
        predict, images, labels = bind(model, variables), batch["image"], batch["label"]
        maps = [explain.maps(part, predict, images, labels) for explain, part in zip((a, b), split(keys))]
        size = tuple(min(sides) for sides in zip(*(values.shape[1:] for values in maps)))
        first, second = (shrunk(values, size) for values in maps)
        constant = is_constant(maps[0]) | is_constant(maps[1])  # averages of one value may differ by rounding
        small = [shrunk(values, tuple(min(side, SIDE) for side in size)) for values in (first, second)]
        count = top_count(k, first[0].size)
        out = {
            "spearman": jnp.where(constant, 0, spearman(first, second)),
            "kendall_tau_b": jnp.where(constant, 0, kendall_tau_b(*small)),
            "topk_intersection": topk_intersection(first, second, count),
        }
        if min(size) >= WINDOW:
            out["ssim"] = ssim(scaled(first, size), scaled(second, size))
        finite = jnp.isfinite(first).all((1, 2)) & jnp.isfinite(second).all((1, 2))
        out = {name: jnp.where(finite, row, jnp.nan) for name, row in out.items()}
        return out | {"constant": constant, "chance": jnp.full_like(out["spearman"], count / first[0].size)}

    def summary(rows):
        about = {name: Measure(label=label, main=name != "kendall_tau_b") for name, label in MEASURES.items()}
        measures = {
            name: average(rows[name], about[name], "no pair of maps is finite") for name in MEASURES if name in rows
        }
        if "ssim" not in rows:
            reason = f"a map has fewer than {WINDOW}x{WINDOW} positions"
            measures["ssim"] = about["ssim"]._replace(n=0, reason=reason)
        measures["constant"] = share(rows["constant"], Measure(label="share of pairs with a constant map", main=False))
        chance = Measure(
            float(rows["chance"].mean()), n=len(rows["chance"]), label="top-k intersection of unrelated maps"
        )
        return measures | {"chance": chance}

    return Evaluator(rows, summary, lambda predict, images: a.cost(predict, images) + b.cost(predict, images))


TABLE = table(agreement)
