"""Do gradients of smoother pools break what a network with Top-GAP stands? results/pool_surrogates.json.

    TOPGAP_DATA=FOLDER python experiments/pool_surrogates.py

The adversarially trained Top-GAP arm of `study.py cifar10_adversarial`, as results/weights keeps it, at 8/255 in linf
on the 250 images that AutoAttack is made on there. Its gradient sees only the k largest positions of a class map, which
may mislead an attack. So APGD on cross-entropy and on DLR, 100 steps each, goes through it once more with another pool
on the backward pass alone (BPDA, Athalye et al. 2018, arXiv 1802.00420): global average pooling, log-mean-exp, Top-GAP
of more positions. Counted are the images that each attack leaves, and how many it breaks of those that AutoAttack on
the network itself leaves.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _studies import STUDIES
from jax import lax
from study import KEPT

from topgap_jax import models, pool, pretrained, setup
from topgap_jax.attacks import apgd, autoattack
from topgap_jax.balls import linf
from topgap_jax.evaluators import robust
from topgap_jax.measure.robust import attack_split
from topgap_jax.metrics.summaries import wilson
from topgap_jax.models.heads import map_head
from topgap_jax.models.resnet import resnet20
from topgap_jax.progress import write_text
from topgap_jax.run.cpu import configure_cpu
from topgap_jax.run.provenance import provenance
from topgap_jax.scores import dlr
from topgap_jax.setup.assembly import open_split
from topgap_jax.types import Model, Pool

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "results" / "pool_surrogates.json"
WEIGHTS, SPLIT, BALL = "cifar10_adversarial_adversarial_top_gap_seed0", "test[:250]", linf(8 / 255)
K = 16  # of the arm
OWN = f"top_gap(k={K})"
SURROGATES: dict[str, Callable[[], Pool]] = {
    OWN: lambda: pool.top_gap(k=K),
    "top_gap(k=32)": lambda: pool.top_gap(k=2 * K),
    "top_gap(k=64)": lambda: pool.top_gap(k=4 * K),
    "gap()": pool.gap,
    "lse(.5)": lambda: pool.lse(0.5),
    "lse(2)": lambda: pool.lse(2.0),
}
HEAD = ["pool on the backward pass", "images that APGD leaves [95 %]", "broken of those that AutoAttack leaves"]


def main() -> None:
    if not os.environ.get("TOPGAP_DATA"):
        raise SystemExit("set TOPGAP_DATA to the folder with tfds/")
    print(configure_cpu(), file=sys.stderr)
    arm = STUDIES["cifar10_adversarial"].arms["adversarial top_gap"]
    chosen = setup.experiment(ROOT / "configs" / "cifar10.py", [], arm.of)
    assert chosen.config.pool == OWN
    model = network(chosen, SURROGATES[OWN]())
    variables = pretrained.load(KEPT / f"{WEIGHTS}.safetensors", model)
    data = open_split(chosen, SPLIT, chosen.config.batch)
    stands = lambda model, text, *runs: np.isinf(
        attack_split(model, variables, data, robust(*runs), text=text).examples.radius
    )
    left = stands(model, "AutoAttack", autoattack(BALL))
    rows = {}
    for name, make in SURROGATES.items():
        surrogate = network(chosen, through(SURROGATES[OWN](), make()))
        alone = stands(surrogate, name, apgd(BALL), apgd(BALL, score=dlr))
        rows[name] = {"left": int(alone.sum()), "beyond_autoattack": int((left & ~alone).sum())}
        print(f"{name}: {rows[name]}", flush=True)
    made = {"weights": WEIGHTS, "split": SPLIT, "images": len(left), "autoattack_left": int(left.sum()), "rows": rows}
    write_text(RESULT, json.dumps({**provenance(), **made}, indent=1) + "\n")


def network(chosen: setup.Experiment, head: Pool) -> Model:
    """The arm's network with another pool."""
    config = chosen.config
    options = {"classes": len(chosen.classes), "mean": tuple(config.mean), "std": tuple(config.std)}
    return models.fast(models.classifier(resnet20(), map_head(head), **options))


def through(exact: Pool, surrogate: Pool) -> Pool:
    """The logits of one pool, up to rounding, with the gradient of the other."""

    def both(maps, step=None):
        smooth = surrogate(maps, step)
        return smooth + lax.stop_gradient(exact(maps, step) - smooth)

    return both


def cells(stored: dict[str, Any], name: str) -> list[str]:
    """A row of the table."""
    row, n = stored["rows"][name], stored["images"]
    low, high = (100 * bound for bound in wilson(row["left"], n))
    share = f"{row['left']} of {n}, {100 * row['left'] / n:.1f} % [{low:.1f}, {high:.1f}]"
    return [
        f"`{name}`" + ", its own" * (name == OWN),
        share,
        f"{row['beyond_autoattack']} of {stored['autoattack_left']}",
    ]


if __name__ == "__main__":
    main()
