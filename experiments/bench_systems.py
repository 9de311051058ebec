"""What each system costs: its training step beside the plain one of the same network, against the limit that was set
for it.

    python experiments/bench_systems.py
    python experiments/bench_systems.py --only sgdrop --rounds 7

One process per arm, the two of a pair asked in turn; ratio = time of the arm over time of its control, median over the
rounds. The ratio of CPU times is the steadier one where other programs share the machine.
"""

import argparse
from typing import NamedTuple

import _bench_driver as driver


class Arm(NamedTuple):
    """A training step: model and objective as a config says them, and the decay of averaged weights."""

    model: str
    objective: str = "standard()"
    ema: float = 0.0


class Pair(NamedTuple):
    """A system and the plain training that it is compared with; limit: of the ratio of their times."""

    name: str
    control: Arm
    arm: Arm
    limit: float
    batch: int = 128
    size: int = 32


RESNET = "classifier(resnet20(), map_head(pool), classes=classes, mean=mean, std=std)"
HIDDEN = "classifier(resnet20(), vgg_head(width=512), classes=classes, mean=mean, std=std)"  # two hidden layers of 512

PAIRS = [
    Pair("sgdrop, GAP head", Arm(RESNET), Arm(f"with_drop({RESNET}, 'stage3', sgdrop())"), 1.05),
    Pair("sgdrop, MLP head", Arm(HIDDEN), Arm(f"with_drop({HIDDEN}, 'stage3', sgdrop())"), 1.15),
    Pair(
        "sgdrop, teacher",
        Arm(RESNET, ema=0.999),
        Arm(f"with_drop({RESNET}, 'stage3', sgdrop(teacher=True))", ema=0.999),
        1.5,
    ),
    Pair("norm-regularised, fast", Arm(RESNET), Arm(RESNET, "norm_regularised(l1_norm(8/255))"), 1.9),
    Pair("PGD-1", Arm(RESNET), Arm(RESNET, "adversarial(pgd(linf(8/255), steps=1))"), 0.8 * 1 + 1.3),
    Pair("PGD-7", Arm(RESNET), Arm(RESNET, "adversarial(pgd(linf(8/255), steps=7))"), 0.8 * 7 + 1.3),
    Pair("ART, 3 inner steps", Arm(RESNET), Arm(RESNET, "art(mean=mean, std=std)"), 18.0),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.6, help="length of one timed run of a step")
    parser.add_argument("--only", default="", help="pairs whose name holds this; then nothing is written")
    options = parser.parse_args()
    machine = driver.machine()
    rows = {pair.name: measure(pair, options) for pair in PAIRS if options.only in pair.name}
    print(
        driver.table(
            ["system", "system / plain, median [range]", "of minima", "of CPU time", "limit", "plain ms", "system ms"],
            [line(name, row) for name, row in rows.items()],
        )
    )
    if not options.only:
        driver.write(
            "bench_systems", {"machine": machine, "load_average_after": driver.load_average(), "systems": rows}
        )


def measure(pair, options):
    """Both steps, timed in turn."""
    arms = {"control": pair.control, "arm": pair.arm}
    processes = {name: driver.start("_bench_systems.py", environment=driver.NO_CACHE) for name in arms}
    row = {"limit": pair.limit, "batch": pair.batch, "size": pair.size}
    for name, arm in arms.items():
        info = driver.ask(processes[name], "prepare", batch=pair.batch, size=pair.size, **arm._asdict())
        row[name] = {**arm._asdict(), **info}
    times = driver.interleave(processes, options.rounds, options.seconds)
    for name, process in processes.items():
        row[name] |= driver.figures(times[name]) | driver.ask(process, "memory")
    driver.stop(processes)
    return row | {"ratio": driver.ratios(times["arm"], times["control"])}


def line(name, row):
    """A row of the printed table."""
    ratio = row["ratio"]
    return [
        name,
        f"{ratio['median']:.3f} [{ratio['range'][0]:.2f}-{ratio['range'][1]:.2f}]",
        f"{ratio['of_minima']:.3f}",
        f"{ratio['cpu_median']:.3f}",
        f"{row['limit']:.2f}",
        f"{row['control']['median_ms']:.0f}",
        f"{row['arm']['median_ms']:.0f}",
    ]


if __name__ == "__main__":
    main()
