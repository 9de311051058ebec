"""What every law runs on: one tiny network, one batch of eight images, and the ways in which a function may be
transformed.

All families share the shapes, so that programs compile once and a new row costs one small compilation.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from topgap_jax import pool
from topgap_jax.build import build
from topgap_jax.errors import UserError
from topgap_jax.mesh import data_mesh, split
from topgap_jax.rewrite import name
from topgap_jax.setup.tables import TABLE, VALUES
from topgap_jax.types import Model, Output

B, SIZE, CLASSES = 8, 6, 4
random = np.random.default_rng(0)
IMAGES = jnp.asarray(random.uniform(size=(B, SIZE, SIZE, 3)), jnp.float32)
OTHERS = jnp.asarray(random.uniform(size=(B, SIZE, SIZE, 3)), jnp.float32)
KEYS = jax.random.split(jax.random.key(0), B)


def parameters(seed):
    draw = np.random.default_rng(seed).normal
    sizes = {"first": (3, 3, 3, 5), "bias": (5,), "last": (5, CLASSES), "last_bias": (CLASSES,)}
    values = {word: jnp.asarray(draw(size=size), jnp.float32) for word, size in sizes.items()}
    return values | {"first": values["first"] / 4, "bias": values["bias"] / 4}


def network(params, pooling=pool.top_gap(k=3)):  # noqa: B008
    """A strided convolution, ReLU, a 1x1 convolution to class maps (b, 3, 3, 4), a pool."""

    def predict(images, keys=None):
        options = {"window_strides": (2, 2), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        convolved = lax.conv_general_dilated(images, params["first"], **options)
        features = name(jax.nn.relu(convolved + params["bias"]), "features")
        return pooling(name(features @ params["last"] + params["last_bias"], "maps"))

    return predict


PARAMS = parameters(1)
PREDICT = network(PARAMS)
# The last two are misclassified from the start.
LABELS = jnp.argmax(PREDICT(IMAGES), -1).at[-2:].add(1).astype(jnp.int32) % CLASSES


def apply(variables, images, *, train=False, keys=None, targets=None, step=None):
    return Output(network(variables["params"])(images), variables["batch_stats"], {})


MODEL = Model(lambda key, images: {"params": PARAMS, "batch_stats": {}}, apply)
VARIABLES = {"params": PARAMS, "batch_stats": {}}
REGION = jnp.zeros((B, SIZE, SIZE), jnp.uint8).at[:, 1:4, 2:5].set(1).at[:, 0, 0].set(2)
BATCH = {
    "image": IMAGES,
    "label": LABELS,
    "targets": jax.nn.one_hot(LABELS, CLASSES),
    "id": jnp.arange(B, dtype=jnp.int32),
    "mask": jnp.ones(B, bool),
    "region": REGION,
    "group": jnp.arange(B, dtype=jnp.int32) % 2,
}


def make(call):
    """The value of a text, with every name that a config has."""
    return build(call, TABLE, VALUES | {"references": OTHERS})


def message(f, *args, **kwargs):
    """The one line of the UserError that the call ends in."""
    with pytest.raises(UserError) as raised:
        f(*args, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def transformed(f):
    """(name, g) for g that does f(keys, images, labels) another way: split over devices, one example at a time,
    eagerly."""
    mesh, spec = data_mesh(), PartitionSpec("data")
    one = lambda key, image, label: jax.tree.map(lambda x: x[0], f(key[None], image[None], label[None]))
    yield "eager", f
    yield "shard_map", jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec))
    yield "split batch", jax.jit(f, in_shardings=split(mesh))
    yield "vmap", jax.jit(jax.vmap(one))
    yield "pmap", jax.pmap(one)


def assert_transformed(f, keys, images, labels, atol=1e-5, exact=()):
    """f gives the same tree under every transformation, numbers to `atol`, the fields of `exact` (b,) bit for bit."""
    leaves = lambda tree: [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    expected = leaves(jax.jit(f)(keys, images, labels))
    for way, g in transformed(f):
        for a, b in itertools.zip_longest(leaves(g(keys, images, labels)), expected):
            np.testing.assert_allclose(a, b, atol=atol, err_msg=way)
