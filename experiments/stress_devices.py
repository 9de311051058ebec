"""Do several devices on one CPU survive a loaded machine? Training steps at 2 and at 8 devices, while busy loops load
every core.

    python experiments/stress_devices.py [--steps 5000] [--devices 2 8] [--out results/stress_devices.json]

A collective whose threads do not all arrive aborts the process; `configure_cpu` gives threads and time enough. This
starts the load and the training processes, ends both, and counts the steps taken and the processes that died.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax.mesh import data_mesh, replicated, split
from topgap_jax.models import fast, linen
from topgap_jax.progress import write_text
from topgap_jax.run.cpu import configure_cpu
from topgap_jax.run.fit import Parts, State, make_step
from topgap_jax.run.provenance import provenance
from topgap_jax.training.objectives import standard
from topgap_jax.training.optimizers import sgd

EXAMPLES, BATCH, SIZE, CLASSES = 256, 32, 8, 4
REPORT_EVERY = 10  # steps

# Loads one core until killed, or until the process that started it is gone.
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: sum(range(100_000))"


class Net(nn.Module):
    """Two convolutions with batch norm: every step has the collectives of a real one, and little else."""

    @nn.compact
    def __call__(self, images, train=False):
        x = images
        for width in (8, 16):
            x = nn.Conv(width, (3, 3), strides=(2, 2), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


def train(devices: int, steps: int) -> None:
    """Take the steps and print their number every few, so that the parent knows how far a process that died came."""
    print(configure_cpu(devices), file=sys.stderr)
    random = np.random.default_rng(0)
    label = random.integers(CLASSES, size=EXAMPLES).astype(np.int32)
    image = (random.integers(0, 100, (EXAMPLES, SIZE, SIZE, 3)) + 40 * label[:, None, None, None]).astype(np.uint8)
    model, optimizer = fast(linen(Net())), sgd(0.01)  # with the engine, as `topgap train` has it
    parts = Parts(
        model=model, objective=standard(), augments=(), optimizer=optimizer, train={"image": image, "label": label},
        validation=None, examples=EXAMPLES, batch=BATCH, epochs=1, seed=0, ema=0.0, image_shape=(SIZE, SIZE, 3),
        classes=CLASSES,
    )  # fmt: skip
    mesh = data_mesh()
    variables = model.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    state = State(jnp.int32(0), variables, optimizer.init(variables["params"]))
    state, held = jax.device_put((state, parts.train), replicated(mesh))
    step = make_step(parts, mesh)
    for number in range(1, steps + 1):
        rows = {"id": random.permutation(EXAMPLES)[:BATCH].astype(np.int32), "mask": np.ones(BATCH, bool)}
        state, _, finite = step(state, held, jax.device_put(rows, split(mesh)))
        if number % REPORT_EVERY == 0 or number == steps:
            if not finite.all():
                sys.exit(f"the loss is not finite at step {number}")
            print(number, flush=True)


def measure(devices: int, steps: int, seconds: float) -> dict:
    """One training process on a machine whose cores are all loaded."""
    load = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count())]
    start = time.perf_counter()
    try:
        command = [sys.executable, __file__, "--train", str(devices), "--steps", str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        code, output, error = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as expired:
        text = lambda stream: (stream or b"").decode()
        code, output, error = None, text(expired.stdout), text(expired.stderr)
    finally:
        for process in load:
            process.kill()
            process.wait()
    lines = output.split()
    return {
        "devices": devices,
        "steps_asked": steps,
        "steps_taken": int(lines[-1]) if lines else 0,
        "aborted": code != 0,
        "exit_code": code,  # None: stopped after the time limit
        "seconds": round(time.perf_counter() - start, 1),
        "setting": error.splitlines()[0].replace(str(Path.home()), "~") if error else "",
        "last_words": "" if code == 0 else error[-1500:],
        "busy_processes": len(load),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--seconds", type=float, default=1800, help="time limit of one process")
    parser.add_argument("--out", type=Path, default=Path("results/stress_devices.json"))
    parser.add_argument("--train", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.train, arguments.steps)
        return
    runs = []
    for devices in arguments.devices:
        runs.append(measure(devices, arguments.steps, arguments.seconds))
        print(
            "{devices} devices: {steps_taken} of {steps_asked} steps in {seconds} s, exit code {exit_code}".format(
                **runs[-1]
            )
        )
    result = {**provenance(), "aborts": sum(run["aborted"] for run in runs), "runs": runs}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
