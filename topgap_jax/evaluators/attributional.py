"""`attributional_robustness(explain, attack)`: what is left of a map when the image is changed to move it."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from topgap_jax.attacks import misclassified
from topgap_jax.build import table
from topgap_jax.errors import UserError
from topgap_jax.metrics.calibration import mean_interval
from topgap_jax.metrics.ranks import cosine, kendall_tau_b, topk_intersection
from topgap_jax.models import bind
from topgap_jax.rewrite import canonical_convs
from topgap_jax.types import Attack, Cost, Evaluator, Explain

MEASURES = ("topk_intersection", "kendall_tau_b", "cosine")


def attributional_robustness(explain: Explain, attack: Attack) -> Evaluator:
    """Agreement of the label's maps of the clean and the attacked image: means over the correctly classified images.

    `attack` is one on maps, such as topk_attack(explain, linf(8/255)); with another explanation in it, the value says what
    carries over. topk_intersection has the attack's share of positions for its k; `chance` is that of two unrelated maps.
    Where no admissible point lowers the intersection, the image counts with (1, 1, 1); `success_rate` is the share where one
    does, and `..._where_moved` are the means over those alone. (`papers`: art 7 to 9.) Networks of different accuracy are
    measured on different images. A robust map need not be right: one that shows the image itself, whatever the class, is robust.
    """
    if not callable(explain):
        raise UserError(f"attributional_robustness: give an explanation such as gradient(), got {explain!r}")
    if not isinstance(attack, Attack) or attack.aim != "map":
        raise UserError(
            "attributional_robustness: give an attack on maps, such as topk_attack(gradient(), linf(8/255)), "
            f"got {attack.name if isinstance(attack, Attack) else attack!r}"
        )

    def rows(keys, model, variables, batch):
        predict, images, labels = bind(model, variables), batch["image"], batch["label"]
        logits = predict(images)
        used = ~misclassified(logits, labels)
        state = attack.init(keys, predict, images, labels, logits)
        step = canonical_convs(lambda state: attack.step(predict, state))
        # In a loop, since all the steps, each with second derivatives, would take minutes to compile.
        state = lax.fori_loop(0, attack.steps, lambda _, state: step(state), state)
        moved = used & (state.best != images).any((1, 2, 3))
        clean, changed = (explain(keys, predict, points, labels) for points in (images, state.best))
        positions = clean[0].size
        k = jnp.maximum(1, jnp.round(state.top.mean((1, 2)) * positions)).astype(jnp.int32)
        found = topk_intersection(clean, changed, k), kendall_tau_b(clean, changed), cosine(clean, changed)
        out = {name: jnp.where(moved, value, 1.0) for name, value in zip(MEASURES, found)}
        return out | {"used": used, "moved": moved, "chance": k / positions}

    def summary(rows):
        used, moved = rows["used"], rows["moved"]
        values = {}
        for name in MEASURES:
            # Without the maps that are constant: they have no order.
            found = rows[name][used & ~np.isnan(rows[name])]
            mean, low, high = mean_interval(found) if len(found) else (np.nan,) * 3
            values |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        for name in MEASURES:
            found = rows[name][moved & ~np.isnan(rows[name])]
            values[f"{name}_where_moved"] = float(found.mean(dtype=np.float64)) if len(found) else 1.0
        share = float(moved.sum() / used.sum()) if used.any() else 0.0
        return values | {"success_rate": share, "attacked": int(used.sum()), "chance": float(rows["chance"].mean())}

    own = getattr(explain, "cost", Cost(1, 0))
    cost = Cost(
        1 + 2 * own.forwards + attack.steps * attack.cost.forwards,
        2 * own.gradients + attack.steps * attack.cost.gradients,
    )
    return Evaluator(rows, summary, cost)


TABLE = table(attributional_robustness)
