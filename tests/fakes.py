"""Networks that mislead an attack, one function a fake: `Model` -> `Model`, and attacks that lose what they find.

Each is a defence that was published or a slip that is made: what an audit must notice.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from topgap_jax.attacks.state import BROKEN, RUNNING, misclassified
from topgap_jax.types import Array, Attack, Model


def on_images(model: Model, change: Callable[[Array], Array]) -> Model:
    """The network behind a change of its images (b, h, w, c)."""
    apply = lambda variables, images, **options: model.apply(variables, change(images), **options)
    return model._replace(apply=apply)


def on_logits(model: Model, change: Callable[[Array], Array]) -> Model:
    """The network before a change of its logits (b, k)."""

    def apply(variables, images, **options):
        output = model.apply(variables, images, **options)
        return output._replace(logits=change(output.logits))

    return model._replace(apply=apply)


def large_logits(model: Model) -> Model:
    """Logits x 1e4: cross-entropy and its gradient are 0 in float32."""
    return on_logits(model, lambda logits: 1e4 * logits)


def saturated_logits(model: Model) -> Model:
    """20 tanh(logits): where tanh is 1, no gradient is left."""
    return on_logits(model, lambda logits: 20 * jnp.tanh(logits))


def probabilities(model: Model) -> Model:
    """The softmax in the network."""
    return on_logits(model, jax.nn.softmax)


def quantised(model: Model, levels: int = 8) -> Model:
    """Pixels rounded to `levels` + 1 values."""
    return on_images(model, lambda images: jnp.round(levels * images) / levels)


def mean_centred_threshold(model: Model, threshold: float = 0.1) -> Model:
    """Pixels near the image's mean become the mean (the kind of MeanSparse, arXiv 2406.05927)."""

    def change(images):
        mean = images.mean((1, 2), keepdims=True)
        return jnp.where(jnp.abs(images - mean) <= threshold, mean, images)

    return on_images(model, change)


def noise_layer(model: Model, size: float = 0.05) -> Model:
    """Noise on every image, anew in each pass that has keys."""

    def apply(variables, images, *, keys=None, **options):
        if keys is not None:
            images += size * jax.vmap(lambda key, image: jax.random.normal(key, image.shape))(keys, images)
        return model.apply(variables, images, keys=keys, **options)

    return model._replace(apply=apply)


def batch_statistics(model: Model) -> Model:
    """Images normalised by mean and spread of their batch."""
    change = lambda images: 0.5 + 0.2 * (images - images.mean((0, 1, 2))) / (images.std((0, 1, 2)) + 1e-3)
    return on_images(model, change)


def wave(model: Model, size: float = 0.01, frequency: float = 1e4) -> Model:
    """size sin(frequency x sum of pixels) on the first logit: a gradient that says nothing of the network."""

    def apply(variables, images, **options):
        output = model.apply(variables, images, **options)
        ripple = size * jnp.sin(frequency * images.sum((1, 2, 3)))
        return output._replace(logits=output.logits.at[:, 0].add(ripple))

    return model._replace(apply=apply)


def noise_gradient(model: Model) -> Model:
    """A backward pass that returns noise."""

    @jax.custom_vjp
    def unchanged(images):
        return images

    def backward(images, gradient):
        return (jax.random.normal(jax.random.key(0), gradient.shape) * jnp.abs(gradient).mean(),)

    unchanged.defvjp(lambda images: (images, images), backward)
    return on_images(model, unchanged)


def last_iterate(attack: Attack) -> Attack:
    """The attack, which looks at its last iterate only."""

    def step(predict, state):
        after = attack.step(predict, state)
        status = jnp.where(misclassified(state.clean, state.labels), BROKEN, RUNNING)
        return after._replace(status=status, best=state.images)

    return attack._replace(step=step, name=f"last of {attack.name}")
