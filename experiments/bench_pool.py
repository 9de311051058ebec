"""What Top-GAP costs: the whole training step with `top_gap` beside `gap`, and ways of top-k pooling alone.

    python experiments/bench_pool.py

The goals: at most 1.05x where ResNet-20 pools its 10 class maps (128, 8, 8, 10), at most 1.10x where it pools (128, 16,
16, 64) maps. One process per setting, asked in turn; ratio = time with top_gap over time with gap, median over the
rounds. The ratio of CPU times is the steadier one where other programs share the machine.
"""

import argparse
import tempfile
from pathlib import Path

import _bench_driver as driver
import numpy as np

STEPS = {  # the pooled maps: head, classes, k, the largest ratio allowed
    "(128, 8, 8, 10)": ("maps", 10, 16, 1.05),
    "(128, 16, 16, 64)": ("pyramid", 64, 64, 1.10),
}
SHAPES = {(128, 8, 8, 10): 16, (128, 8, 8, 64): 16, (128, 16, 16, 64): 64}
WAYS = [
    "gap",
    "top_gap (ours)",
    "bisection in 32 bits",
    "maximum, k times",
    "lax.top_k, own gradient",
    "lax.top_k, threshold",
    "sort, threshold",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.6, help="length of one timed run of a training step")
    options = parser.parse_args()
    machine = driver.machine()
    with tempfile.TemporaryDirectory() as folder:
        steps = {maps: training_step(maps, options, Path(folder)) for maps in STEPS}
    print(
        driver.table(
            ["maps", "top_gap / gap, median [range]", "of minima", "of CPU time", "limit", "gap ms", "top_gap ms"],
            [step_line(maps, row) for maps, row in steps.items()],
        )
    )
    ways = pooling_alone(options)
    print("\nForward and backward of one pooling, ms (median / min):\n")
    print(
        driver.table(
            ["way", *map(str, SHAPES)],
            [[way, *(f"{row['median_ms']:.2f} / {row['min_ms']:.2f}" for row in rows)] for way, rows in ways.items()],
        )
    )
    shapes = [{"maps": maps, "k": k} for maps, k in SHAPES.items()]
    driver.write(
        "bench_pool",
        {
            "machine": machine,
            "load_average_after": driver.load_average(),
            "steps": steps,
            "shapes": shapes,
            "ways": ways,
        },
    )


def training_step(maps, options, folder):
    """The step of `topgap train` with either pool."""
    head, classes, k, limit = STEPS[maps]
    generator = np.random.default_rng(0)
    np.save(folder / "images.npy", generator.integers(0, 256, (128, 32, 32, 3), np.uint8))
    np.save(folder / "labels.npy", generator.integers(0, classes, 128, np.int32))
    task = {"path": "train", "network": "resnet20", "head": head, "classes": classes}
    task |= {name: str(folder / f"{name}.npy") for name in ("images", "labels")}
    processes = {name: driver.start("_bench_ours.py", environment=driver.NO_CACHE) for name in ("gap", "top_gap")}
    for name, process in processes.items():
        driver.ask(process, "prepare", k=k if name == "top_gap" else None, **task)
    times = driver.interleave(processes, options.rounds, options.seconds)
    row = {name: driver.figures(times[name]) | driver.ask(process, "memory") for name, process in processes.items()}
    driver.stop(processes)
    return {"k": k, "limit": limit, "ratio": driver.ratios(times["top_gap"], times["gap"]), **row}


def pooling_alone(options):
    """Every way at every shape: {way: [figures of each shape]}."""
    processes = {way: driver.start("_bench_pools.py", environment=driver.NO_CACHE) for way in WAYS}
    rows = {way: [] for way in WAYS}
    for shape, k in SHAPES.items():
        answers = {way: driver.ask(process, "prepare", way=way, shape=shape, k=k) for way, process in processes.items()}
        for way in WAYS[1:]:
            for key in ("logits", "gradient"):
                assert np.isclose(answers[way][key], answers["top_gap (ours)"][key], rtol=1e-3), (way, shape, answers)
        times = driver.interleave(processes, min(options.rounds, 7), 0.02)
        for way in WAYS:
            rows[way].append(driver.figures(times[way]))
    driver.stop(processes)
    return rows


def step_line(maps, row):
    """A row of the printed table."""
    ratio, gap, top_gap = row["ratio"], row["gap"], row["top_gap"]
    return [
        maps,
        f"{ratio['median']:.3f} [{ratio['range'][0]:.2f}-{ratio['range'][1]:.2f}]",
        f"{ratio['of_minima']:.3f}",
        f"{ratio['cpu_median']:.3f}",
        f"{row['limit']:.2f}",
        f"{gap['median_ms']:.0f}",
        f"{top_gap['median_ms']:.0f}",
    ]


if __name__ == "__main__":
    main()
