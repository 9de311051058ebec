"""What the training loop costs over the bare step: `run.fit.fit` beside the jitted step it calls, in one process.

    python experiments/bench_fit.py

Within a run of `fit`, in turn: the jitted step alone, again and again on one batch that is on the devices already, and
as many steps of the loop, which draws or reads the batch, places it, fetches metrics and writes them. A round is one
of each; ratio = time of the loop over time of the step alone, median over the rounds.

resident    ResNet-20 on CIFAR-10, batch 128 (configs/cifar10.py)
stream      ResNet-50 at 224 pixels, batch 8, JPEG files of imagenet500 read and decoded for each batch, as a large set
            is (configs/imagenet_resnet50.py, in float32: bfloat16 is slow on a CPU and would hide the loop). Decoding
            shares the cores with the step here; on an accelerator it does not.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _bench_driver as driver
import jax

from topgap_jax import setup
from topgap_jax.run import fit as fit_module
from topgap_jax.run.cpu import configure_cpu
from topgap_jax.setup import assembly

CONFIGS = Path(__file__).parent.parent / "configs"
HEAD = ["data", "loop / step, median [range]", "of minima", "of CPU time", "a step, ms"]
WARM = 5  # steps before the first round
SETTINGS = {  # config, arm, overrides, steps of a round, steps before them (a stream has batches waiting by then)
    "resident": ("cifar10.py", "", {"validation": ""}, 40, 0),
    "stream": (
        "imagenet_resnet50.py",
        "dry_run",
        {"train": "test", "image_size": "(224, 224)", "dtype": "float32", "batch": "8", "log_every": "5"},
        6,
        4,
    ),
}


class Enough(Exception):
    """All rounds are made."""


class Probe:
    """The jitted step as `fit` calls it, with a clock: `alone` and `loop` are (seconds, CPU seconds) of each round."""

    def __init__(self, step: Any, steps: int, lead: int, rounds: int):
        self.step, self.steps, self.lead, self.rounds = step, steps, lead, rounds
        self.calls, self.alone, self.loop = 0, [], []

    def __call__(self, state, held, rows):
        position = (self.calls - WARM) % (self.lead + self.steps) if self.calls >= WARM else -1
        if position == 0:
            if self.calls > WARM:
                self.loop.append(self.since(state))
            if len(self.loop) == self.rounds:
                raise Enough
            self.start(state)
            for _ in range(self.steps):
                state, *_ = self.step(state, held, rows)
            self.alone.append(self.since(state))
        if position == self.lead:
            self.start(state)
        self.calls += 1
        return self.step(state, held, rows)

    def start(self, state):
        jax.block_until_ready(state)
        self.before = time.perf_counter(), time.process_time()

    def since(self, state):
        jax.block_until_ready(state)
        return time.perf_counter() - self.before[0], time.process_time() - self.before[1]


def measure(name: str, rounds: int) -> dict:
    """All rounds of one setting."""
    config, arm, overrides, steps, lead = SETTINGS[name]
    total = WARM + rounds * (steps + lead) + 1
    setup_of = lambda epochs: setup.experiment(
        CONFIGS / config,
        [*overrides.items(), ("epochs", str(epochs)), ("checkpoint_every", "1000000"), ("test", "")],
        arm,
    )
    chosen = setup_of(1)
    if name == "stream":
        assembly.RESIDENT_BYTES = 0
    per_epoch = len(chosen.source(chosen.config.train)) // chosen.config.batch
    chosen = setup_of(-(-total // per_epoch))
    make_step, probes = fit_module.make_step, []

    def probed(parts, mesh):
        probes.append(Probe(make_step(parts, mesh), steps, lead, rounds))
        return probes[0]

    fit_module.make_step = probed
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough):
            fit_module.fit(chosen.config, Path(folder) / "run", setup.parts(chosen))
    finally:
        fit_module.make_step = make_step
    answers = lambda pairs: [{"seconds": [wall / steps], "cpu_seconds": cpu / steps} for wall, cpu in pairs]
    loop, alone = answers(probes[0].loop), answers(probes[0].alone)
    return {
        "steps a round": steps,
        "loop": driver.figures(loop),
        "step alone": driver.figures(alone),
        "ratio": driver.ratios(loop, alone),
    }


def line(name: str, row: dict) -> list[str]:
    """A row of the printed table."""
    ratio = row["ratio"]
    return [
        name,
        f"{ratio['median']:.3f} [{ratio['range'][0]:.3f}-{ratio['range'][1]:.3f}]",
        f"{ratio['of_minima']:.3f}",
        f"{ratio['cpu_median']:.3f}",
        f"{row['loop']['median_ms']:.1f} / {row['step alone']['median_ms']:.1f}",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    options = parser.parse_args()
    if not os.environ.get("TOPGAP_DATA"):
        parser.error("TOPGAP_DATA must name the folder with tfds/cifar10 and tfds/imagenet500")
    print(configure_cpu(1), file=sys.stderr)
    machine = driver.machine()
    rows = {name: measure(name, options.rounds) for name in options.settings}
    print(driver.table(HEAD, [line(name, row) for name, row in rows.items()]))
    driver.write("bench_fit", {"machine": machine, "load_average_after": driver.load_average(), "settings": rows})


if __name__ == "__main__":
    main()
