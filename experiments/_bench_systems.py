"""The process of bench_systems.py: the training step of `topgap train`, its model and objective given as the texts of a
config."""

import jax
import jax.numpy as jnp
import numpy as np
from _bench_worker import serve

import topgap_jax as tg
from topgap_jax.build import build
from topgap_jax.mesh import data_mesh
from topgap_jax.run.cpu import configure_cpu
from topgap_jax.run.fit import Parts, State, make_step
from topgap_jax.setup.tables import TABLE, VALUES
from topgap_jax.training import optimizers

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def prepare(model, objective, ema, batch, size):
    """model, objective: texts that may name classes, mean and std. Random images (size, size, 3) of ten classes."""
    values = {**VALUES, **IMAGENET, "classes": 10, "pool": tg.pool.gap()}
    model = build(model, TABLE, values)
    random = np.random.default_rng(0)
    held = {
        "image": jnp.asarray(random.integers(0, 256, (batch, size, size, 3), np.uint8)),
        "label": jnp.asarray(random.integers(0, 10, batch, np.int32)),
    }
    model = tg.models.fast(model)
    variables = dict(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, size, size, 3))))
    if ema:
        variables["ema"] = jax.tree.map(jnp.copy, variables)
    parts = Parts(
        model=model,
        objective=build(objective, TABLE, values),
        augments=(),
        optimizer=optimizers.sgd(0.01, weight_decay=5e-4),
        train={},
        validation=None,
        examples=batch,
        batch=batch,
        epochs=1,
        seed=0,
        ema=ema,
        image_shape=(size, size, 3),
        classes=10,
    )
    state = State(jnp.int32(0), variables, parts.optimizer.init(variables["params"]))
    rows = {"id": jnp.arange(batch), "mask": jnp.ones(batch, bool)}
    step = make_step(parts, data_mesh()).lower(state, held, rows).compile()

    def run():
        nonlocal state
        state, metrics, _ = step(state, held, rows)
        return jax.block_until_ready((state, metrics))[1]

    metrics = {name: float(value) for name, value in run().items()}
    return run, run, {"metrics": metrics, "convolutions": step.as_text().count(" convolution(")}


if __name__ == "__main__":
    configure_cpu()
    serve(prepare)
