"""What `trust` asks of an explanation on the device: maps under parameters drawn anew, of another class, behind a wall;
and pictures small enough for a report."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jax.extend.core.primitives import name_p

from topgap_jax.errors import UserError
from topgap_jax.grids import resized, shrunk
from topgap_jax.keys import normal, root
from topgap_jax.metrics.substrates import substrate_images
from topgap_jax.models import bind
from topgap_jax.rewrite import default_layer, features_and_head, layers, naming
from topgap_jax.rewrite.interpreter import inline, trace
from topgap_jax.rewrite.speed import map_over
from topgap_jax.types import Array, Explain, Keys, Model, Predict, Variables

NOISE = 0.02  # standard deviation, the level of the same label


def cascade(
    explain: Explain,
    keys: Keys,
    model: Model,
    variables: Variables,
    images: Array,
    labels: Array,
    stages: int,
    of: Callable[[Array], Any],
) -> Any:
    """of(maps (b, h', w')) of the same labels, stacked over stages: the parameters are drawn anew from the head down to
    the image, all of them in the last stage (Adebayo et al. 2018, arXiv 1810.03292).

    The layers are divided into `stages` parts of equal number. New parameters are those of `model.init`; of a model
    whose `init` returns learnt weights, its values in a random order, array by array. Batch statistics stay.
    """
    params = variables["params"]
    fresh = drawn_anew(model, params, images)
    stage = stage_of_leaves(layer_of_leaves(model, variables, images), stages)
    places = jax.tree.unflatten(jax.tree.structure(params), [int(place) for place in stage])

    def one(last):
        mixed = jax.tree.map(lambda old, new, place: jnp.where(place <= last, new, old), params, fresh, places)
        return of(explain.maps(keys, bind(model, {**variables, "params": mixed}), images, labels))

    return map_over(one, (jnp.arange(stages),))


def drawn_anew(model: Model, params: Any, images: Array) -> Any:
    """Other parameters of the model's: of `init` with a key of their own, or the values in a random order."""
    key = root(0x74727573)
    if not model.has_weights:
        new = model.init(key, images[:1])["params"]
        return jax.tree.map(lambda old, new: jnp.asarray(new, old.dtype), params, new)
    leaves, tree = jax.tree.flatten(params)
    shuffled = [jax.random.permutation(k, x.ravel()).reshape(x.shape) for k, x in zip(_keys(key, leaves), leaves)]
    return jax.tree.unflatten(tree, shuffled)


def layer_of_leaves(model: Model, variables: Variables, images: Array) -> list[int]:
    """Number of the layer of each array of the parameters, in the order of computation.

    A layer begins with an array of two axes or more, in the order in which the network takes them up; biases and scales
    that follow belong to it.
    """
    logits = lambda params: model.apply({**variables, "params": params}, images[:1]).logits
    closed, arrays, _ = trace(logits, (variables["params"],), {})
    jaxpr = inline(closed, arrays, remat=True).jaxpr
    first: dict[Any, int] = {}
    for place, eqn in enumerate(jaxpr.eqns):
        for variable in eqn.invars:
            if not isinstance(variable, Literal):
                first.setdefault(variable, place)
    order = np.argsort([first.get(variable, len(jaxpr.eqns)) for variable in jaxpr.invars], kind="stable")
    numbers, layer = [0] * len(order), -1
    for leaf in order:
        layer += np.ndim(arrays[leaf]) >= 2
        numbers[leaf] = max(layer, 0)
    return numbers


def stage_of_leaves(numbers: Sequence[int], stages: int) -> list[int]:
    """In which stage each array is drawn anew: 0 that of the last layers, stages - 1 that of the first.

    >>> stage_of_leaves([0, 0, 1, 2, 3], 2)
    [1, 1, 1, 0, 0]
    """
    count = max(numbers) + 1
    return [(count - 1 - number) * stages // count for number in numbers]


def other_maps(
    explain: Explain, keys: Keys, noise_keys: Keys, predict: Predict, images: Array, labels: Array
) -> tuple[Array, ...]:
    """Maps (b, h', w') of the labels, of the labels in the image mirrored left to right, of the two classes of the
    largest logits, and of the first of these when the image has normal noise of sigma .02."""
    logits = predict(images)
    first, second = jax.lax.top_k(logits, min(2, logits.shape[-1]))[1][:, [0, -1]].T.astype(jnp.int32)
    noisy = jnp.clip(images + NOISE * normal(noise_keys, images), 0, 1)
    points = jnp.stack([images, images[:, :, ::-1], images, images, noisy])
    rows = (points, jnp.stack([labels, labels, first, second, first]))
    return tuple(map_over(lambda x, y: explain.maps(keys, predict, x, y), rows))


def leak_behind_wall(explain: Explain, keys: Keys, predict: Predict, images: Array, labels: Array) -> tuple[Array, ...]:
    """(share of |map| where the network behind a wall cannot see (b,), the share of the area that this is, the map).

    Of a map on the grid of a layer the wall hides the lower half of that layer's features A from what follows, F(x) =
    head(A * M) (as Magamed et al. 2024, arXiv 2404.01964, do with weights); of any other the lower half of the image,
    which takes the mean colour, F(x) = f(x M + c (1 - M)). NaN for a map that is 0.
    """
    size = jax.eval_shape(lambda images: explain.maps(keys, predict, images, labels), images).shape[1:]
    layer = layer_on_grid(predict, images, size)
    shown = jnp.arange(size[0] if layer else images.shape[1]) < (size[0] if layer else images.shape[1]) // 2
    shown = shown[:, None, None]
    if layer:

        def walled(images, keys=None):
            features, head = features_and_head(predict, layer, images)
            return head(features * shown)

    else:
        mean = substrate_images("trust", "mean", predict, images[:1])

        def walled(images, keys=None):
            return predict(jnp.where(shown, images, mean))

    maps = explain.maps(keys, walled, images, labels)
    values = jnp.abs(maps.astype(jnp.float32))
    hidden = jnp.broadcast_to(~shown[..., 0], (len(shown), maps.shape[2] if layer else images.shape[2]))
    if not layer and size != images.shape[1:3]:
        values = resized(values, images.shape[1:3])
        cell = -(-images.shape[1] // size[0])  # resizing carries values one cell across the wall
        hidden = hidden & (jnp.arange(len(shown)) >= len(shown) // 2 + cell)[:, None]
    total = values.sum((1, 2))
    leak = jnp.where(total > 0, (values * hidden).sum((1, 2)) / jnp.where(total > 0, total, 1), jnp.nan)
    return leak, jnp.full_like(leak, hidden.mean()), maps


def layer_on_grid(predict: Predict, images: Array, size: tuple[int, int]) -> str | None:
    """The layer whose features (b, *size, c) a map of this size stands for: the default one, or the last such; None
    where the size is the image's or no layer's. Of several names of one value the last, behind which none is left."""
    if tuple(size) == tuple(images.shape[1:3]):
        return None
    fitting = [x for x in layers(predict, images) if len(x.shape) == 4 and x.shape[1:3] == tuple(size)]
    fitting = [x.name for x in fitting if x.reachable and x.calls == 1]
    if not fitting:
        return None
    try:
        default = default_layer(predict, images)
    except UserError:
        default = ""
    label = default if default in fitting else fitting[-1]
    with naming():
        closed, arrays, _ = trace(predict, (images,), {})
        named = [eqn for eqn in inline(closed, arrays, remat=True).jaxpr.eqns if eqn.primitive is name_p]
    same = {eqn.outvars[0] for eqn in named if eqn.params["name"] == label}
    for eqn in named:
        if eqn.invars[0] in same:
            same.add(eqn.outvars[0])
            label = eqn.params["name"] if eqn.params["name"] in fitting else label
    return label


def reduced(images: Array, side: int) -> Array:
    """Images (b, h, w, c) at most `side` pixels high and wide, by the mean over areas."""
    size = tuple(min(length, side) for length in images.shape[1:3])
    return jnp.stack([shrunk(images[..., c], size) for c in range(images.shape[3])], -1)


def tile(maps: Array) -> Array:
    """Maps (b, h, w) that are not negative as uint8, the .99 quantile and above 255."""
    high = jnp.quantile(maps, 0.99, (1, 2), keepdims=True)
    high = jnp.where(high > 0, high, maps.max((1, 2), keepdims=True))
    return jnp.round(255 * jnp.clip(maps / jnp.where(high > 0, high, 1), 0, 1)).astype(jnp.uint8)


def _keys(key, leaves):
    return jax.random.split(key, max(len(leaves), 1))
