"""Does the memory of an explanation grow with its steps, its masks or its pictures? It should not.

    TOPGAP_DATA=FOLDER python experiments/bench_explain_memory.py

Two of each: integrated gradients at 16 and 512 steps, RISE at 100 and 4,000 masks, `topgap explain` of 12 and 500
pictures. Planned: temporary buffers of the compiled program, as XLA lays them out, the same every time. Peak: the
largest resident memory of a process of its own, after one call, as the system counts it; it holds JAX, the compiler and
what malloc keeps, and differs by some MB from run to run. Writes results/bench_explain_memory.json on a tree without
changes.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import _bench_driver as driver

HERE = Path(__file__).parent
NETWORKS = {  # config, weights, pictures of a batch
    "resnet20": ("cifar10.py", "resnet20_cifar10", 8),
    "efficientnet_lite0": ("imagenet.py", "efficientnet_lite0_imagenet", 2),
}
PAIRS = {
    "integrated": ("integrated(steps=16)", "integrated(steps=512)"),
    "rise": ("rise(masks=100)", "rise(masks=4000)"),
}
COUNTS = (12, 500)


def main():
    if not os.environ.get("TOPGAP_DATA"):
        raise SystemExit("TOPGAP_DATA is the folder with tfds/ and weights/")
    rows, machine = {}, driver.machine()
    for network in NETWORKS:
        for name, pair in PAIRS.items():
            # Only ResNet-20 runs: that RISE of 4,000 masks takes minutes with the other one tells nothing more.
            rows[f"{network} {name}"] = said(f"{network} {name}", [one(network, text) for text in pair])
    with tempfile.TemporaryDirectory() as folder:
        rows["topgap explain"] = said("topgap explain", [explained(count, Path(folder)) for count in COUNTS])
    about = {"machine": machine, "load_average_after": driver.load_average(), "rows": rows}
    if machine["commit"].endswith("+"):
        print("not written: that is for a tree without changes")
    else:
        driver.write("bench_explain_memory", about)


def said(name, pair):
    cells = [", ".join(f"{key} {value:.1f}" for key, value in one.items() if key != "what") for one in pair]
    print(f"{name:32} " + "   ".join(f"{one['what']}: {cell}" for one, cell in zip(pair, cells)), flush=True)
    return pair


def one(network, text):
    """{"what", "planned_mb", "peak_mb"} of one explanation in a process of its own."""
    call = [sys.executable, __file__, network, text, "run" if network == "resnet20" else "plan"]
    answer, peak = run(call, driver.NO_CACHE)
    row = {"what": text, **json.loads(answer.splitlines()[-1])}
    return row | ({"peak_mb": peak} if network == "resnet20" else {})


def explained(count, folder):
    """{"what", "peak_mb"} of `topgap explain` with the sheet and the file of maps that it writes."""
    config, weights, _ = NETWORKS["resnet20"]
    call = [sys.executable, "-m", "topgap_jax", "explain", "--config", HERE.parent / "configs" / config, "--weights"]
    call += [Path(os.environ["TOPGAP_DATA"], f"weights/{weights}.safetensors"), "--count", str(count)]
    call += ["--methods", "grad_cam(), integrated(steps=16)", "--channels"]
    call += ["--save", folder / f"{count}.npz", "--out", folder / f"sheets{count}"]
    return {"what": f"{count} pictures", "peak_mb": run(call, driver.NO_CACHE)[1]}


def run(call, environment):
    """What a process writes, and its largest resident memory in 10^6 bytes."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(call, stdout=output, stderr=errors, text=True, env=os.environ | environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        text = output.read()
        if status:
            raise SystemExit(f"{call} ended with {process.returncode}:\n{errors.read()[-2000:]}")
    return text, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def child(network, text, what):
    """Compile the explanation and, where it is asked for, call it."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from topgap_jax import setup
    from topgap_jax.keys import example_keys
    from topgap_jax.models import bind
    from topgap_jax.rewrite import fused
    from topgap_jax.run.cpu import configure_cpu
    from topgap_jax.setup.commands import checked_explanations

    configure_cpu()
    config, weights, batch = NETWORKS[network]
    path = Path(os.environ["TOPGAP_DATA"], f"weights/{weights}.safetensors")
    loaded = setup.from_config(HERE.parent / "configs" / config, [("init", str(path))])
    (explain,) = checked_explanations(loaded.experiment, text).values()
    size = loaded.experiment.config.image_size
    images = np.random.default_rng(0).uniform(size=(batch, *size, 3)).astype(np.float32)
    labels, keys = np.arange(batch, dtype=np.int32), example_keys(jax.random.key(0), jnp.arange(batch))
    maps = lambda variables, keys, x, y: explain.maps(keys, bind(loaded.experiment.model, variables), x, y)
    program = jax.jit(fused(maps)).lower(loaded.variables, keys, images, labels).compile()
    if what == "run":
        jax.block_until_ready(program(loaded.variables, keys, images, labels))
    print(json.dumps({"planned_mb": program.memory_analysis().temp_size_in_bytes / 1e6}))


if __name__ == "__main__":
    child(*sys.argv[1:]) if len(sys.argv) == 4 else main()
