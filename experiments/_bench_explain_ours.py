"""Our process of bench_explain.py, as `topgap explain` computes: the engine's convolutions, fused, one program."""

import os
import time

import flax
import jax
import jax.numpy as jnp
import numpy as np
from _bench_worker import peak_megabytes, serve

import topgap_jax as tg
from topgap_jax import setup
from topgap_jax.explain import ablation, masking
from topgap_jax.explain.cam import FAMILY
from topgap_jax.grids import scaled
from topgap_jax.keys import example_keys
from topgap_jax.rewrite import fused
from topgap_jax.rules import guided_backprop
from topgap_jax.run.cpu import configure_cpu


def prepare(path, config, images, labels, weights, layer, shallow, steps, window, stride):
    import_mb = peak_megabytes()
    loaded = setup.from_config(config, [("init", weights)])
    pixels, y = np.load(images), jnp.asarray(np.load(labels))
    x, variables = jnp.asarray(pixels, jnp.float32) / 255, loaded.variables
    keys = example_keys(jax.random.key(0), jnp.arange(len(y)))
    if jax.device_count() > 1:
        mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
        over = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        x, y, keys = jax.device_put((x, y, keys), over("batch"))
        variables = jax.device_put(variables, over())
    for module, name in ((masking, "BATCH"), (ablation, "IMAGES")):  # what is evaluated together: at least one batch
        if "BENCH_TOGETHER" in os.environ:
            setattr(module, name, int(os.environ["BENCH_TOGETHER"]) * len(y))
    compile_seconds, planned, slices = 0.0, 0, int(os.environ.get("BENCH_SLICES", "1"))

    def compiled(explain, channels=False, enlarged=False):
        """explain of all images as one program: values of every channel, or maps at the image's size in [0, 1]."""
        nonlocal compile_seconds, planned

        def maps(variables, keys, x, y):
            predict = tg.models.bind(loaded.experiment.model, variables)
            values = (explain.pixels if channels else explain.maps)(keys, predict, x, y)
            return jax.tree.map(lambda m: scaled(m, x.shape[1:3]), values) if enlarged else values

        def sliced(variables, keys, x, y):
            parts = [maps(variables, *part) for part in zip(*(jnp.split(a, slices) for a in (keys, x, y)))]
            return jax.tree.map(lambda *values: jnp.concatenate(values), *parts)

        start = time.perf_counter()
        program = jax.jit(fused(sliced if slices > 1 else maps)).lower(variables, keys, x, y).compile()
        compile_seconds += time.perf_counter() - start
        planned = max(planned, program.memory_analysis().temp_size_in_bytes)
        return lambda: jax.block_until_ready(program(variables, keys, x, y))

    family = tuple(FAMILY)
    singles = lambda: [
        compiled(getattr(tg.explain, method)(layer), enlarged=True) for method in family
    ]  # one call a method

    def eight():
        runs = singles()
        return lambda: [run() for run in runs]

    run = {
        "saliency": lambda: compiled(tg.explain.gradient(), channels=True),
        "input_x_gradient": lambda: compiled(tg.explain.input_x_gradient(), channels=True),
        "integrated": lambda: compiled(tg.explain.integrated(steps=steps), channels=True),
        "guided_backprop": lambda: compiled(tg.explain.gradient(rules=guided_backprop), channels=True),
        "occlusion": lambda: compiled(tg.explain.occlusion(window=window, stride=stride)),
        "grad_cam": lambda: compiled(tg.explain.grad_cam(layer), enlarged=True),
        "score_cam": lambda: compiled(tg.explain.score_cam(shallow), enlarged=True),
        "family": lambda: compiled(tg.explain.family(layer=layer), enlarged=True),
        "eight calls": eight,
        "field": lambda: compiled(tg.explain.field(layer, channel="sum")),
    }[path]()
    first = run()
    values = np.abs(np.stack(jax.tree.leaves(first)) if path in ("family", "eight calls") else np.asarray(first))
    info = {
        "framework": f"topgap_jax {tg.__version__}, JAX {jax.__version__}, Flax {flax.__version__}",
        "import_mb": import_mb,
        "compile_seconds": compile_seconds,
        "planned_mb": planned / 1e6,
        "maps": values.reshape(len(values), -1).sum(1).tolist(),
    }
    return run, run, info


if __name__ == "__main__":
    configure_cpu(devices=int(os.environ.get("BENCH_DEVICES", "1")))
    serve(prepare)
