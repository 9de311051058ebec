"""`art`, attributional robustness training: the true logit's gradient aligns with the image (Singh et al. 2020, arXiv
1911.13073)."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from topgap_jax.attacks.alignment import alignment, as_vectors, cosine, softened, triplet
from topgap_jax.balls import linf
from topgap_jax.build import check_number, table
from topgap_jax.models import bind
from topgap_jax.rewrite import fast_convs, in_float32
from topgap_jax.rewrite.speed import loop
from topgap_jax.training.standard import standard
from topgap_jax.types import Objective


def art(
    *,
    mean: Sequence[float],
    std: Sequence[float],
    weight: float = 0.5,
    beta: float | None = 50.0,
    eps: float = 8 / 255,
    steps: int = 3,
    step_size: float = 5 / 255,
    k: int | None = None,
    fraction: float = 0.3255,
    variant: str = "signed",
    remat: bool = False,
) -> Objective:
    """Cross-entropy at attacked images, plus weight * a triplet loss that draws input gradients to the image (arXiv
    1911.13073).

    With anchor a = (x - mean) / std (`mean` and `std` as the model normalises, one number per channel), positive p and
    negative n, the gradients with respect to a of the true logit and of the best wrong one, and cosine distances, the
    loss is log(1 + exp(dist(a, p) - dist(a, n))) over the clean and the attacked image, each with the pair's worst p
    and worst n. The attack maximises it on the entries of largest |p| at its start (`k` of h*w*c, by default the
    `fraction` of them), `steps` sign steps of `step_size` from a random start within `eps`; variant "abs_mean" compares
    means over channels of absolute values (k of h*w). Both see the network with softplus(beta x) / beta for relu
    (`beta=None`: as it is, for smooth networks), in float32 whatever the model computes in, with the batch's
    statistics, which only the cross-entropy's pass writes, and without dropout. remat: only results of convolutions and
    products are kept for the second differentiation.

    Logged beside the accuracy at the attacked images: `cross_entropy`, `alignment` (the triplet loss), and the cosines
    of image and gradient `cosine_true` (p) and `cosine_wrong` (n), means over the pair. Raises UserError for a model
    with one class.
    """
    check_number("weight", weight, 0)
    attack = alignment(
        linf(eps), mean=mean, std=std, steps=steps, step_size=step_size, k=k, fraction=fraction, variant=variant,
        beta=beta, remat=remat,
    )  # fmt: skip
    inner, vectors = standard(), as_vectors(mean, std, variant, remat)

    def objective(keys, model, variables, batch, step):
        images, labels, mask = batch["image"], batch["label"], batch["mask"].astype(jnp.float32)
        # Fast convolutions, since without them the loop of the attack would be slow on a CPU.
        bound = lambda variables: fast_convs(bind(model, variables, train=True, step=step))
        still = bound(lax.stop_gradient(variables))
        # No label decides anything in this attack, so it needs no clean logits; padding has radius 0.
        logits = jnp.zeros_like(batch["targets"])
        state = attack.init(keys, still, images, labels, logits, eps=jnp.where(batch["mask"], eps, 0.0))
        state = loop(lambda state: attack.step(still, state), steps, state)
        adversarial = lax.stop_gradient(images + state.delta)

        # Clean and attacked side by side, so that a pair stays on one device.
        both = jnp.stack([images, adversarial], 1).reshape(-1, *images.shape[1:])
        twice = lambda values: jnp.repeat(values, 2, 0)
        soft = in_float32(softened(bound(variables), beta))
        a, (p, n) = vectors.anchors(both), vectors.gradients(soft, both, twice(labels), twice(mask))
        a, p, n = (values.reshape(len(images), 2, -1) for values in (a, p, n))
        aligned = triplet(a, p, n)

        loss, metrics, batch_stats = inner(keys, model, variables, {**batch, "image": adversarial}, step)
        logs = {"cross_entropy": loss, "alignment": aligned}
        logs |= {"cosine_true": cosine(a, p).mean(1), "cosine_wrong": cosine(a, n).mean(1)}
        return loss + weight * aligned, {**metrics, **logs}, batch_stats

    return objective


TABLE = table(art)
