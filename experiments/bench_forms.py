"""What XLA's CPU takes for the engine's forms of a convolution and its gradients beside lax's own, layer by layer.

    python experiments/bench_forms.py

One process without oneDNN, the two forms of a layer called in turn; ratio = lax's time over ours, median over the
rounds (above 1 ours is faster). The layers are those of a ResNet-20 at batch 128, others with few channels, and
some in groups, of EfficientNet-Lite0, ConvNeXt and ResNeXt.
"""

import argparse
import functools
import os
import statistics
import time

os.environ["TOPGAP_ONEDNN"] = "off"  # before configure_cpu, which chooses XLA's flag by it

import _bench_driver as driver
import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax.engine import Geometry
from topgap_jax.engine.forms import BY_LAX, ON_CPU
from topgap_jax.engine.library import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from topgap_jax.run.cpu import configure_cpu

LAYERS = [  # batch, size, channels in, out, stride; and kernel and groups where they are not 3 and 1
    (128, 32, 3, 16, 1),
    (128, 32, 16, 16, 1),
    (128, 32, 16, 32, 2),
    (128, 16, 32, 32, 1),
    (128, 16, 32, 64, 2),
    (128, 8, 64, 64, 1),
    (128, 32, 3, 64, 1),
    (64, 64, 3, 32, 2),
    (64, 64, 8, 8, 1),
    (128, 32, 8, 16, 2),
    (8, 112, 32, 32, 1, 3, 32),
    (8, 112, 96, 96, 2, 3, 96),
    (8, 56, 144, 144, 2, 5, 144),
    (8, 28, 240, 240, 1, 3, 240),
    (8, 14, 672, 672, 1, 5, 672),
    (8, 14, 384, 384, 1, 7, 384),
    (8, 14, 512, 512, 1, 3, 32),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    print(configure_cpu())
    machine = driver.machine()
    rows = [row for layer in LAYERS for row in measure(layer, options.rounds)]
    cells = [
        [*map(str, row["layer"]), row["kind"], *(f"{row[key]:.2f}" for key in ("lax_ms", "ours_ms", "ratio"))]
        for row in rows
    ]
    print(driver.table(["batch", "size", "in", "out", "stride", "kind", "lax ms", "ours ms", "lax / ours"], cells))
    driver.write("bench_forms", {"machine": machine, "load_average_after": driver.load_average(), "rows": rows})


def measure(layer, rounds):
    """Forward, input gradient and, in depthwise convolutions, which alone have a form for it, weight gradient."""
    batch, size, c, o, stride, kernel, groups = (*layer, *(3, 1)[len(layer) - 5 :])
    pad = (kernel // 2, kernel // 2)
    geometry = Geometry((size, size), (kernel, kernel), (stride, stride), (pad, pad), groups)
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
    x, w, dy = draw(batch, size, size, c), draw(kernel, kernel, c // groups, o), draw(batch, *geometry.out, o)
    kinds = [("forward", FORWARD, (x, w)), ("input gradient", INPUT_GRADIENT, (dy, w))]
    for name, kind, operands in kinds + [("weight gradient", WEIGHT_GRADIENT, (x, dy))] * (groups == c):
        forms = [jax.jit(functools.partial(table[kind], geometry=geometry)) for table in (BY_LAX, ON_CPU)]
        times = [[], []]
        for number in range(rounds + 1):
            for form, found in zip(forms, times):
                start = time.perf_counter()
                form(*operands).block_until_ready()
                if number:  # the first one compiles
                    found.append(1e3 * (time.perf_counter() - start))
        ratio = statistics.median(a / b for a, b in zip(*times))
        lax_ms, ours_ms = map(statistics.median, times)
        name += f", {kernel}x{kernel} in {groups} groups" * (groups > 1)
        yield {"layer": layer[:5], "kind": name, "lax_ms": lax_ms, "ours_ms": ours_ms, "ratio": ratio}


if __name__ == "__main__":
    main()
