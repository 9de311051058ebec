"""What makes a robust accuracy appear that is none? PGD-20 at 8/255 on an undefended network, right, and with one
mistake at a time.

    TOPGAP_DATA=FOLDER python experiments/mistakes.py [--images 1000]

ResNet-20 with its published weights, the first test images of CIFAR-10, 95 % intervals of Wilson. Every verdict but
that of the mistake itself is the exact network's. Writes results/mistakes.json.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax import setup
from topgap_jax.attacks import attack, pgd
from topgap_jax.attacks.state import BROKEN, misclassified
from topgap_jax.balls import linf
from topgap_jax.keys import example_keys
from topgap_jax.metrics.summaries import share
from topgap_jax.models import bind
from topgap_jax.progress import write_text
from topgap_jax.rewrite import fused
from topgap_jax.run.cpu import configure_cpu
from topgap_jax.run.provenance import provenance
from topgap_jax.scores import cross_entropy
from topgap_jax.types import Ball, Measure, Predict, Score

ROOT = Path(__file__).parent.parent
STD = (0.2470, 0.2435, 0.2616)
BATCH = 250


class Way(NamedTuple):
    """An evaluation. seen: the network as the attack sees it; judged: which of its images decides, "any" iterate or
    the "last"; wrong_counts: whether an image that is misclassified when clean is called robust."""

    words: str
    ball: Ball = linf(8 / 255)
    score: Score = cross_entropy
    seen: Callable[[Predict], Predict] = lambda predict: predict
    judged: str = "any"
    wrong_counts: bool = False


def textbook(logits, labels, clean=None, target=None):
    """-log softmax(z)_y as most programs compute it: its gradient p_y - 1 is 0 in float32 from a margin of 17 on."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), labels[:, None], 1)[:, 0]


def scaled(ball: Ball, factors: tuple[float, ...]) -> Ball:
    """The ball with the radius of every channel times its factor, and steps likewise."""
    wide = jnp.asarray(factors)
    radius = lambda eps: eps[:, None, None, None] * wide
    box = lambda images, delta: jnp.clip(images + delta, 0, 1) - images
    return ball._replace(
        start=lambda keys, images, eps: ball.start(keys, images, eps) * wide,
        project=lambda images, delta, eps: box(images, jnp.clip(delta, -radius(eps), radius(eps))),
        direction=lambda images, delta, gradient: wide * jnp.sign(gradient),
    )


def halved(predict: Predict) -> Predict:
    """Images and logits in bfloat16."""
    return lambda images, keys=None: predict(images.astype(jnp.bfloat16).astype(jnp.float32)).astype(jnp.bfloat16)


def times_100(predict: Predict) -> Predict:
    """Logits of a network that is a hundred times as confident."""
    return lambda images, keys=None: 100 * predict(images)


WAYS = (
    Way("as it should be"),
    Way("eps in the space of images normalised to [-1, 1]", ball=linf(4 / 255)),
    Way("eps in the space of images divided by their standard deviation", ball=scaled(linf(8 / 255), STD)),
    Way("attack in bfloat16", seen=halved),
    Way("logits x 100", seen=times_100),
    Way("logits x 100, textbook cross-entropy", seen=times_100, score=textbook),
    Way("textbook cross-entropy", score=textbook),
    Way("last iterate only", judged="last"),
    Way("images that are wrong when clean called robust", wrong_counts=True),
)


def robust(way: Way, loaded: setup.Loaded, images: np.ndarray, labels: np.ndarray) -> Measure:
    """The share of images (n, h, w, c) that the evaluation calls robust."""
    search = pgd(way.ball, score=way.score, steps=20)

    @jax.jit
    @fused
    def stands(variables, images, labels, ids):
        predict = bind(loaded.experiment.model, variables)
        wrong = misclassified(predict(images), labels)
        state = attack(search, example_keys(jax.random.key(0), ids), way.seen(predict), images, labels)
        last = state.images + state.delta
        first = jnp.where((state.status == BROKEN)[:, None, None, None], state.best, last)
        broken = misclassified(predict(last if way.judged == "last" else first), labels)
        return jnp.where(wrong, way.wrong_counts, ~broken)

    parts = [slice(i, i + BATCH) for i in range(0, len(labels), BATCH)]
    rows = [stands(loaded.variables, images[p], labels[p], np.arange(len(labels), dtype=np.int32)[p]) for p in parts]
    return share(np.concatenate(jax.device_get(rows)), Measure(better="higher", label=way.words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    options = parser.parse_args()
    if not os.environ.get("TOPGAP_DATA"):
        parser.error("set TOPGAP_DATA to the folder with tfds/ and weights/")
    print(configure_cpu(), file=sys.stderr)
    weights = Path(os.environ["TOPGAP_DATA"], "weights/resnet20_cifar10.safetensors")
    loaded = setup.from_config(ROOT / "configs" / "cifar10.py", [("init", str(weights))])
    arrays = setup.read(loaded.experiment, f"test[:{options.images}]")
    images, labels = arrays["image"].astype(np.float32) / 255, arrays["label"].astype(np.int32)
    rows = {}
    for way in WAYS:
        measure = robust(way, loaded, images, labels)
        rows[way.words] = {"value": measure.value, "low": measure.low, "high": measure.high}
        print(f"{way.words:65}{measure.value:.3f} [{measure.low:.3f}, {measure.high:.3f}]", flush=True)
    about = provenance()
    if options.images == 1000:
        text = json.dumps({**about, "network": weights.stem, "images": len(labels), "rows": rows}, indent=1)
        write_text(ROOT / "results" / "mistakes.json", text + "\n")


if __name__ == "__main__":
    main()
