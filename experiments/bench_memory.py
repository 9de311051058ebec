"""How much memory the paths of bench_core.py take with the engine, and without it.

    python experiments/bench_memory.py

Planned: arguments, results and temporary buffers of the largest compiled program, as XLA lays them out. That is the
same every time. Peak: the largest resident memory of a process, one per measurement, after ten calls (three of the
slower paths). It holds JAX, the compiler and what malloc keeps; how often malloc finds a freed block again is a matter
of luck (a step more is a whole temporary buffer), hence the range.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import _bench_driver as driver
from bench_core import OURS, PATHS, make_task

SETTINGS = ("oneDNN", "XLA", "plain JAX")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--name", default="bench_memory", help="of the file in results/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = {title: measure(title, options.processes, Path(folder)) for title in PATHS}
    print(
        driver.table(["path, MB planned; peak [range]", *SETTINGS], [line(title, row) for title, row in rows.items()])
    )
    driver.write(options.name, {"machine": driver.machine(), "batch": 128, "paths": rows})


def measure(title, count, folder):
    """{setting: {"planned_mb", "peaks_mb"}} of one path."""
    task, row = make_task(*PATHS[title], folder), {}
    for name in SETTINGS:
        environment, engine = OURS[name]
        peaks = []
        for _ in range(count):
            process = driver.start("_bench_ours.py", environment=driver.NO_CACHE | environment)
            answer = driver.ask(process, "prepare", **task, engine=engine)
            driver.ask(process, "time", calls=10 if task["path"] == "forward" else 3)
            peaks.append(driver.ask(process, "memory")["peak_mb"])
            driver.stop({name: process})
        row[name] = {"planned_mb": answer["planned_mb"], "peaks_mb": peaks}
    return row


def line(title, row):
    """A row of the printed table."""
    cells = [
        f"{r['planned_mb']:.0f}; {statistics.median(r['peaks_mb']):.0f}"
        f" [{min(r['peaks_mb']):.0f}-{max(r['peaks_mb']):.0f}]"
        for r in row.values()
    ]
    return [title, *cells]


if __name__ == "__main__":
    main()
