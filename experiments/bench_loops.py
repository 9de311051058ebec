"""Whether an attack in a loop costs what it costs written out: PGD-10 in one compiled program, each way, on each path
of the engine.

    python experiments/bench_loops.py

ResNet-20 (pretrained where TOPGAP_DATA has it), batch 128, 32x32. One process per way, asked in turn; ratio = time of
the loop over time of the ten steps written out, median over the rounds. Plain JAX beside: in a loop, XLA's CPU has
naive loops for its gradients.
"""

import argparse
import tempfile
from pathlib import Path

import _bench_driver as driver
from bench_core import OURS, make_task

WAYS = ("attack in a loop", "attack unrolled")
SETTINGS = ("oneDNN", "XLA", "plain JAX")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    machine = driver.machine()
    with tempfile.TemporaryDirectory() as folder:
        rows = {name: measure(name, options, Path(folder)) for name in SETTINGS}
    lines = [line(name, row) for name, row in rows.items()]
    head = ["path", "loop / unrolled, median [range]", "of minima", "of CPU time", "a step, ms", "compile s"]
    print(driver.table(head, lines))
    driver.write("bench_loops", {"machine": machine, "load_average_after": driver.load_average(), "paths": rows})


def measure(name, options, folder):
    """Both ways in one setting, timed in turn."""
    environment, engine = driver.NO_CACHE | OURS[name][0], OURS[name][1]
    processes = {way: driver.start("_bench_ours.py", environment=environment) for way in WAYS}
    answers = {
        way: driver.ask(process, "prepare", engine=engine, **make_task(way, "resnet20", None, folder))
        for way, process in processes.items()
    }
    # A naive loop takes minutes for what the others do in seconds: once is enough to see it.
    times = driver.interleave(processes, options.rounds if engine else 1, 0)
    row = {way: {"compile_seconds": answers[way]["compile_seconds"], **driver.figures(times[way])} for way in WAYS}
    driver.stop(processes)
    return row | {"ratio": driver.ratios(*(times[way] for way in WAYS))}


def line(name, row):
    """A row of the printed table."""
    ratio, (loop, unrolled) = row["ratio"], (row[way] for way in WAYS)
    return [
        name,
        f"{ratio['median']:.2f} [{ratio['range'][0]:.2f}-{ratio['range'][1]:.2f}]",
        f"{ratio['of_minima']:.2f}",
        f"{ratio['cpu_median']:.2f}",
        f"{loop['median_ms'] / 10:.0f} / {unrolled['median_ms'] / 10:.0f}",
        f"{loop['compile_seconds']:.1f} / {unrolled['compile_seconds']:.1f}",
    ]


if __name__ == "__main__":
    main()
