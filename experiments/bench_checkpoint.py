"""What a checkpoint's manifest costs: its time in that of a save, and that of comparing it with the files.

    python experiments/bench_checkpoint.py

Trees of 6 and 300 MB (float32, arrays of 1 MB), saved in turn to the disk of the temporary folder; shares are medians
over the rounds. The file system's cache holds the files when they are read again.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import _bench_driver as driver
import jax.numpy as jnp
import numpy as np

from topgap_jax.run import checkpoint, manifest

MEGABYTES = (6, 300)
HEAD = ["tree", "save, ms", "manifest, ms", "comparison, ms", "manifest / save, %"]


def measure(megabytes: int, rounds: int) -> dict:
    """Seconds of every round's save, of the manifest in it, and of the comparison."""
    draws = np.random.default_rng(0).standard_normal((megabytes, 250_000), np.float32)  # what compresses as weights do
    arrays = {f"array{i}": jnp.asarray(draw) for i, draw in enumerate(draws)}
    saves, manifests, checks = [], [], []
    with tempfile.TemporaryDirectory() as folder, checkpoint.opened(Path(folder)) as folders:
        for step in range(1, rounds + 2):  # the first opens and imports what the others find open
            before = time.perf_counter()
            checkpoint.save(folders.last, step, {"variables": arrays}, {"step": step})
            saves.append(time.perf_counter() - before)
            path = Path(folder, "checkpoints", "last", str(step))
            before = time.perf_counter()
            manifest.write(path)
            manifests.append(time.perf_counter() - before)
            before = time.perf_counter()
            assert manifest.damage(path) == ""
            checks.append(time.perf_counter() - before)
    shares = [part / whole for part, whole in zip(manifests[1:], saves[1:])]
    return {
        "save_seconds": statistics.median(saves[1:]),
        "manifest_seconds": statistics.median(manifests[1:]),
        "check_seconds": statistics.median(checks[1:]),
        "share": {"median": statistics.median(shares), "range": [min(shares), max(shares)]},
    }


def line(name: str, row: dict) -> list[str]:
    """A row of the printed table."""
    times = [f"{1e3 * row[key]:.1f}" for key in ("save_seconds", "manifest_seconds", "check_seconds")]
    return [name, *times, f"{100 * row['share']['median']:.1f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    machine = driver.machine()
    sizes = {f"{size} MB": measure(size, options.rounds) for size in MEGABYTES}
    print(driver.table(HEAD, [line(name, row) for name, row in sizes.items()]))
    driver.write("bench_checkpoint", {"machine": machine, "sizes": sizes})


if __name__ == "__main__":
    main()
