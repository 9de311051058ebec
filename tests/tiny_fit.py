"""A tiny run for the tests of `fit`, also as a program of its own: python tiny_fit.py WORKDIR [option=value ...].

A convolution, batch norm and dropout on random arrays: what a resumed run must get exactly right is all there.
"""

import itertools
import os
import signal
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from topgap_jax.mesh import data_mesh
from topgap_jax.models import linen
from topgap_jax.run import fit as fit_module
from topgap_jax.run.fit import Parts, Stopped, fit
from topgap_jax.training.objectives import standard
from topgap_jax.training.optimizers import sgd
from topgap_jax.training.schedules import cosine

EXAMPLES, BATCH, EPOCHS, CLASSES = 44, 8, 3, 3
STEPS = EXAMPLES // BATCH * EPOCHS
CONFIG = {"seed": 3, "batch": BATCH, "log_every": 2, "sizes": (6, 6)}


class Net(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(4, (3, 3), use_bias=False)(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(0.2, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(CLASSES)(x)


def noise(keys, batch, predict):
    """An augmentation that draws from the keys and asks the network."""
    change = jax.vmap(lambda key: jax.random.normal(key, batch["image"].shape[1:]))(keys)
    return {
        **batch,
        "image": batch["image"] + 0.02 * change * jax.nn.sigmoid(predict(batch["image"])[:, :1, None, None]),
    }


def arrays(seed: int, n: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    label = random.integers(CLASSES, size=n).astype(np.int32)
    image = random.integers(0, 200, size=(n, 6, 6, 3)) + 25 * label[:, None, None, None]
    return {"image": image.astype(np.uint8), "label": label}


def parts(**changes) -> Parts:
    given = Parts(
        model=linen(Net()),
        objective=standard(label_smoothing=0.1),
        augments=(noise,),
        optimizer=sgd(cosine(0.05, 0, STEPS)),
        train=arrays(0, EXAMPLES),
        validation=arrays(1, 12),
        examples=EXAMPLES,
        batch=BATCH,
        epochs=EPOCHS,
        seed=3,
        ema=0.9,
        image_shape=(6, 6, 3),
        classes=CLASSES,
    )
    return given._replace(**changes)


def flat(variables) -> np.ndarray:
    """All numbers of a tree in one row."""
    return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(variables)])


def send_signal_at(step: int, number: int) -> None:
    """This process gets the signal when it is about to take that step (counted from this start)."""
    place, counts = fit_module._placed, itertools.count(1)

    def placed(arrays, sharding):
        if "mask" in arrays and next(counts) == step:  # a batch, not the resident arrays
            os.kill(os.getpid(), number)
        return place(arrays, sharding)

    fit_module._placed = placed


def main(workdir: str, *words: str) -> int:
    options = dict(word.split("=") for word in words)
    if "port" in options:  # one of two processes
        jax.distributed.initialize(f"localhost:{options['port']}", 2, int(options["process"]))
    if "kill_at" in options:
        send_signal_at(int(options["kill_at"]), signal.SIGKILL)
    if "stop_at" in options:
        send_signal_at(int(options["stop_at"]), signal.SIGTERM)
    try:
        variables = fit(CONFIG, workdir, parts(), mesh=data_mesh(jax.devices()[: int(options.get("devices", 8))]))
    except Stopped as stopped:
        print(stopped)
        return 143
    np.save(Path(options["out"]), flat(variables))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
