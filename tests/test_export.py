"""Programs for accelerators, lowered on this machine: nothing of the CPU engine is in them, and no convolution more
than plain JAX has."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

import topgap_jax as tg
from tests.tiny_fit import parts
from topgap_jax.mesh import data_mesh
from topgap_jax.run.fit import State, make_step

CLASSES, BATCH = 10, 2
IMAGES = jax.ShapeDtypeStruct((BATCH, 64, 64, 3), jnp.float32)
LABELS = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
KEYS = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), BATCH))
BACKBONES = {
    "resnet50": lambda: tg.models.resnet50(stem="imagenet"),
    "efficientnet_lite0": lambda: tg.models.efficientnet_lite0(),
}


def network(name, dtype):
    head = tg.models.map_head(tg.pool.top_gap(k=2))
    return tg.models.classifier(BACKBONES[name](), head, classes=CLASSES, mean=(0.5,) * 3, std=(0.25,) * 3, dtype=dtype)


def attack(model, variables, keys, images, labels):
    predict = tg.models.bind(model, variables)
    return tg.attacks.attack(tg.attacks.pgd(tg.balls.linf(8 / 255), steps=3), keys, predict, images, labels).best


def explanation(model, variables, keys, images, labels):
    return tg.explain.grad_cam("stage3")(keys, tg.models.bind(model, variables), images, labels)


def evaluation(model, variables, keys, images, labels):
    evaluator = tg.evaluators.measures(tg.explain.gradient(), tg.metrics.gini())
    return evaluator.rows(keys, model, variables, {"image": images, "label": labels}, {})


def training(model, variables):
    """The step of `fit`, and shapes of what it takes."""
    pieces = parts(model=model, augments=(), classes=CLASSES, batch=BATCH, ema=0.0)
    optimizer = jax.eval_shape(pieces.optimizer.init, variables["params"])
    state = State(jax.ShapeDtypeStruct((), jnp.int32), variables, optimizer)
    rows = {
        "id": LABELS,
        "mask": jax.ShapeDtypeStruct((BATCH,), bool),
        "image": jax.ShapeDtypeStruct(IMAGES.shape, jnp.uint8),
        "label": LABELS,
    }
    return make_step(pieces, data_mesh(jax.devices()[:1])), (state, {}, rows)


def lowered(work, model, variables, platform):
    """(types of its convolutions' results with their number, names of its custom calls) of the program."""
    if work is training:
        f, arguments = training(model, variables)
    else:
        f = jax.jit(lambda *given: work(model, *given))
        arguments = variables, KEYS, IMAGES, LABELS
    text = jax.export.export(f, platforms=[platform])(*arguments).mlir_module()
    convolutions = re.findall(r"stablehlo\.convolution\(.*-> tensor<[^>]*x(\w+)>", text)
    return Counter(convolutions), set(re.findall(r"custom_call @(\w+)", text))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(
    "work, name",
    [
        pytest.param(work, name, marks=[] if (work, name) == (evaluation, "resnet50") else pytest.mark.slow)
        for work in (evaluation, training, attack, explanation)
        for name in BACKBONES
    ],
)
def test_programs_for_accelerators(name, work, platform):
    for dtype, letters in (("float32", "f32"), ("bfloat16", "bf16")):
        plain = network(name, dtype)
        variables = jax.eval_shape(plain.init, jax.random.key(0), IMAGES)
        convolutions, calls = lowered(work, tg.models.fast(plain), variables, platform)
        written, calls_written = lowered(work, plain, variables, platform)
        assert set(convolutions) == {letters}, convolutions
        assert convolutions.total() <= written.total()
        assert calls == calls_written
