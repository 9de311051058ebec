"""`standard`: cross-entropy with the targets, and `adversarial`: the same where an attack leads."""

import jax.numpy as jnp
import optax
from jax import lax

from topgap_jax.attacks import attack as run
from topgap_jax.attacks.state import single
from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.models import bind
from topgap_jax.types import Attack, Objective, Schedule


def standard(*, label_smoothing: float = 0.0) -> Objective:
    """Softmax cross-entropy with the batch's targets (b, k), optionally smoothed: (1 - s) t + s / k.

    Label smoothing: Szegedy et al. 2016, arXiv 1512.00567.
    """
    check_number("label_smoothing", label_smoothing, 0, 1)

    def objective(keys, model, variables, batch, step):
        targets = batch["targets"]
        out = model.apply(variables, batch["image"], train=True, keys=keys, targets=targets, step=step)
        smooth = targets * (1 - label_smoothing) + label_smoothing / targets.shape[-1]
        loss = optax.softmax_cross_entropy(out.logits, smooth)
        return loss, {"accuracy": _right(out.logits, batch), **out.logs}, out.batch_stats

    return objective


def adversarial(attack: Attack, *, eps: Schedule | None = None, label_smoothing: float = 0.0) -> Objective:
    """Standard training on the attack's last iterate (Madry et al. 2018, arXiv 1706.06083).

    The attack sees the model in eval mode, with the pool as it is at this step. eps: the radius at each step where it
    is not the attack's own; adversarial(r_fgsm(linf(8/255)), eps=warmup(8/255, 1000)) begins on clean images.
    """
    inner = standard(label_smoothing=label_smoothing)
    attack = single(attack, "adversarial: ")
    if attack.source is not None or attack.aim == "norm":
        why = "needs another network" if attack.aim == "label" else "keeps to no ball"
        raise UserError(f"adversarial: '{attack.name}' {why}; give an attack such as pgd(linf(8/255), steps=10)")

    def objective(keys, model, variables, batch, step):
        predict = bind(model, lax.stop_gradient(variables), step=step)
        # The state's last iterate, not its first break: training wants the point of highest loss.
        radius = None if eps is None else eps(step)
        state = run(attack, keys, predict, batch["image"], batch["label"], eps=radius)
        return inner(keys, model, variables, {**batch, "image": lax.stop_gradient(state.images + state.delta)}, step)

    return objective


def _right(logits, batch):
    return (logits.argmax(-1) == batch["label"]).astype(jnp.float32)


TABLE = table(standard, adversarial)
