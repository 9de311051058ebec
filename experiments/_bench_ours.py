"""The JAX process of bench_core.py, bench_networks.py, bench_loops.py, bench_memory.py and bench_pool.py: the paths as
`topgap train` and `topgap evaluate` run them.

BENCH_DEVICES: over how many devices the batch is split; TOPGAP_ONEDNN=off: without the custom calls.
"""

import functools
import os
import time
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
from _bench_worker import serve

import topgap_jax as tg
from topgap_jax import pretrained
from topgap_jax.build import build
from topgap_jax.mesh import data_mesh, replicated, split
from topgap_jax.rewrite import fused
from topgap_jax.run.cpu import configure_cpu
from topgap_jax.run.fit import Parts, State, make_step
from topgap_jax.training import objectives, optimizers

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
BACKBONES = {"resnet20": tg.models.resnet20, "resnet18": lambda: tg.models.resnet18(stem="cifar")}
HEADS = {
    "maps": tg.models.map_head,
    "pyramid": lambda pool: tg.models.pyramid_head(pool, width=64, levels=2, finest="stage2"),
}
LINF = tg.balls.linf(8 / 255)


def prepare(path, network, k, images, labels, weights=None, head="maps", classes=10, engine=True):
    """k: of `top_gap`, None for `gap`. images, labels: .npy files, uint8 and int32. weights: random if there is no such
    file. engine: or plain JAX."""
    pool = tg.pool.gap() if k is None else tg.pool.top_gap(k=k)
    if network in BACKBONES:
        model = tg.models.classifier(BACKBONES[network](), HEADS[head](pool), classes=classes, **IMAGENET)
    else:  # what a peer's file of weights is
        values = {"classes": classes, "pool": pool, **IMAGENET}
        model = build(pretrained.describe(weights)["model"], tg.models.TABLE, values)
    pixels, labels = np.load(images), np.load(labels)
    x, y = jnp.asarray(pixels, jnp.float32) / 255, jnp.asarray(labels)
    known = weights and Path(weights).exists()  # peers, where there are any, have written it
    shape = pixels.shape[1:]
    variables = (
        pretrained.load(weights, model, image_shape=shape) if known else jax.jit(model.init)(jax.random.key(0), x[:1])
    )
    if engine:
        model = tg.models.fast(model)
    merged = fused if engine else lambda f: f
    mesh = data_mesh()
    if mesh.size > 1:
        x, y = jax.device_put((x, y), split(mesh))
        variables = jax.device_put(variables, replicated(mesh))
    logits = jax.jit(lambda variables, x: tg.models.bind(model, variables)(x))(variables, x)
    compile_seconds, planned = 0.0, 0

    def compiled(function, *arguments, jitted=jax.jit):
        """The function compiled for these arguments; tracing and compiling are booked apart."""
        nonlocal compile_seconds, planned
        start = time.perf_counter()
        executable = jitted(function).lower(*arguments).compile()
        compile_seconds += time.perf_counter() - start
        plan = executable.memory_analysis()
        outside = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
        planned = max(planned, outside + plan.temp_size_in_bytes)
        return executable

    def forward():
        predict = compiled(merged(lambda variables, x: tg.models.bind(model, variables)(x)), variables, x)
        run = lambda: jax.block_until_ready(predict(variables, x))
        return run, run

    def input_gradient():
        def summed(x, variables):
            return tg.scores.cross_entropy(tg.models.bind(model, variables)(x), y).sum()

        gradient = compiled(merged(jax.grad(summed)), x, variables)
        run = lambda: jax.block_until_ready(gradient(x, variables))
        return run, run

    def pgd():
        """One jitted step at a time, and the host asks each time whether any is unbroken: the most that the queue of
        `measure.robust`, with up to eight steps in a dispatch, can cost."""
        attack = tg.attacks.pgd(LINF, steps=20)
        keys = jax.random.split(jax.random.key(0), len(y))

        @merged
        def step(variables, state):
            state = attack.step(tg.models.bind(model, variables), state)
            return state, (state.status == 0).any()

        # A state is split like the images, before a step and after it.
        rows = functools.partial(jax.jit, out_shardings=split(mesh))
        start = compiled(lambda x, logits: attack.init(keys, None, x, y, logits), x, logits, jitted=rows)
        rows = functools.partial(jax.jit, out_shardings=(split(mesh), replicated(mesh)))
        step = compiled(step, variables, start(x, logits), jitted=rows)
        book = compiled(
            merged(lambda variables, state: tg.attacks.finish(tg.models.bind(model, variables), state)),
            variables,
            start(x, logits),
        )

        def attacked(steps):
            state = start(x, logits)
            for _ in range(steps):
                state, running = step(variables, state)
                bool(running)
            return jax.block_until_ready(book(variables, state))

        return lambda: attacked(1), lambda: attacked(attack.steps)

    def whole_attack(unrolled):
        """Ten steps in one compiled program: as a loop, or written out."""
        attack = tg.attacks.pgd(LINF, steps=10)
        keys = jax.random.split(jax.random.key(0), len(y))

        def attacked(variables, x):
            predict = tg.models.bind(model, variables)
            step = merged(lambda state: attack.step(predict, state))
            state = attack.init(keys, predict, x, y, predict(x))
            if not unrolled:
                return jax.lax.fori_loop(0, attack.steps, lambda _, state: step(state), state).delta
            for _ in range(attack.steps):
                state = step(state)
            return state.delta

        attacked = compiled(attacked, variables, x)
        run = lambda: jax.block_until_ready(attacked(variables, x))
        return run, run

    def train(objective):
        nonlocal variables
        parts = Parts(
            model=model,
            objective=objective,
            augments=(),
            optimizer=optimizers.sgd(0.1, nesterov=False, weight_decay=5e-4),
            train={},
            validation=None,
            examples=len(y),
            batch=len(y),
            epochs=1,
            seed=0,
            ema=0.0,
            image_shape=pixels.shape[1:],
            classes=classes,
        )
        state = State(jnp.int32(0), variables, parts.optimizer.init(variables["params"]))
        held = {"image": jnp.asarray(pixels), "label": labels}
        rows = {"id": jnp.arange(len(y)), "mask": jnp.ones(len(y), bool)}
        if mesh.size > 1:
            state, held = jax.device_put((state, held), replicated(mesh))
            rows = jax.device_put(rows, split(mesh))
        step = compiled(make_step(parts, mesh), state, held, rows, jitted=lambda step: step)

        def run():
            nonlocal state
            state, *metrics = step(state, held, rows)
            return jax.block_until_ready((state, metrics))[1]

        return run, run

    warm, run = {
        "forward": forward,
        "input_gradient": input_gradient,
        "pgd": pgd,
        "attack in a loop": lambda: whole_attack(unrolled=False),
        "attack unrolled": lambda: whole_attack(unrolled=True),
        "adversarial": lambda: train(objectives.adversarial(tg.attacks.pgd(LINF, steps=10))),
        "train": lambda: train(objectives.standard()),
    }[path]()
    info = {
        "framework": f"topgap_jax {tg.__version__}, JAX {jax.__version__}, Flax {flax.__version__}",
        "logits": np.asarray(logits).tolist(),
        "compile_seconds": compile_seconds,
        "planned_mb": planned / 1e6,
    }
    first = run()
    if path == "input_gradient":
        info["gradients"] = np.linalg.norm(np.asarray(first).reshape(len(y), -1), axis=1).tolist()
    if path in ("train", "adversarial"):
        info["loss"] = float(first["loss"])
    if path == "pgd":
        points = first.images + first.delta
        info["loss"] = float(tg.scores.cross_entropy(tg.models.bind(model, variables)(points), y).mean())
    return warm, run, info


if __name__ == "__main__":
    configure_cpu(devices=int(os.environ.get("BENCH_DEVICES", "1")))
    serve(prepare)
