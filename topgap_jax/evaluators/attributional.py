"""`attributional_robustness(explain, attack)`: what is left of a map when the image is changed to move it."""

import jax.numpy as jnp

from topgap_jax.attacks import attack as run
from topgap_jax.attacks import misclassified
from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.metrics.ranks import cosine, kendall_tau_b, topk_intersection
from topgap_jax.metrics.summaries import average, share
from topgap_jax.models import bind
from topgap_jax.order import top_count
from topgap_jax.types import Attack, Cost, Evaluator, Explain, Measure

MEASURES = {
    "topk_intersection": "top-k intersection of the attacked map",
    "kendall_tau_b": "Kendall tau-b of the attacked map",
    "cosine": "cosine of the attacked map",
}


def attributional_robustness(explain: Explain, attack: Attack, *, k: int | None = None) -> Evaluator:
    """Agreement of the label's maps of the clean and the attacked image: means over the correctly classified images.

    After Ghorbani et al. 2019, arXiv 1710.10547, and Singh et al. 2020, arXiv 1911.13073. `attack` is one on maps, such
    as topk_attack(explain, linf(8/255)); with another explanation in it, the value says what carries over.
    topk_intersection is of the `k` highest positions, by default as many as `topk_attack` attacks by default; `chance`
    is that of two unrelated maps. Where no admissible point lowers the attack's aim, the image counts with (1, 1, 1);
    `success_rate` is the share where one does, and `..._where_moved` are the means over those alone. Networks of
    different accuracy are measured on different images. A robust map need not be right: one that shows the image
    itself, whatever the class, is robust.
    """
    Explain.single("attributional_robustness", explain)
    if not isinstance(attack, Attack) or attack.aim != "map":
        raise UserError(
            "attributional_robustness: give an attack on maps, such as topk_attack(gradient(), linf(8/255)), "
            f"got {attack!r}"
        )
    if k is not None:
        check_number("k", k, 1, whole=True)

    def rows(keys, model, variables, batch, prepared):
        predict, images, labels = bind(model, variables), batch["image"], batch["label"]
        attacked = run(attack, keys, predict, images, labels).best
        right = ~misclassified(predict(images), labels)
        moved = right & (attacked != images).any((1, 2, 3))
        clean, changed = (explain.maps(keys, predict, points, labels) for points in (images, attacked))
        count = top_count(k, clean[0].size)
        values = topk_intersection(clean, changed, count), kendall_tau_b(clean, changed), cosine(clean, changed)
        finite = jnp.isfinite(clean).all((1, 2))
        out = {name: jnp.where(finite, jnp.where(moved, v, 1.0), jnp.nan) for name, v in zip(MEASURES, values)}
        chance = jnp.full_like(out["cosine"], count / clean[0].size)
        return out | {"right": right, "moved": moved, "chance": chance}

    def summary(rows):
        right, moved = rows["right"], rows["moved"]
        measures = {}
        for name, label in MEASURES.items():
            about = Measure(better="higher", label=label, main=name != "cosine")
            measures[name] = average(rows[name][right], about, "no image is classified correctly")
        for name, label in MEASURES.items():
            about = Measure(better="higher", label=f"{label}, where it moved", main=False)
            measures[f"{name}_where_moved"] = average(rows[name][moved], about, "the attack moved no map")
        about = Measure(label="share of the maps that the attack moved", main=False)
        measures["success_rate"] = share(moved[right], about, "no image is classified correctly")
        measures["attacked"] = Measure(int(right.sum()), n=len(right), label="images attacked", main=False)
        chance = Measure(float(rows["chance"].mean()), n=len(right), label="top-k intersection of unrelated maps")
        return measures | {"chance": chance}

    def cost(predict, images):
        return Cost(1, 0) + 2 * explain.cost(predict, images) + attack.steps * attack.cost(predict, images)

    return Evaluator(rows, summary, cost)


TABLE = table(attributional_robustness)
