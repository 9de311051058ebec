"""What is refused at the edge, where a user's arrays come in: one line that says what would be right.

Traced arrays are not looked at: inside `jit` code trusts its types. All is done in NumPy, so that it works while JAX
traces.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax.errors import UserError


def check_examples(
    where: str, keys: Any, predict: Callable, images: Any, labels: Any, *, any_outputs: bool = False
) -> None:
    """Raise a UserError unless images are float (b, h, w, c) in [0, 1], labels classes (b,) of `predict`, keys one an
    example.

    keys may be None, for what draws nothing. The number of classes is that of the logits. any_outputs: whether the
    network may return something else than logits, which has no classes.
    """
    if not all(map(_is_concrete, (keys, images, labels))):
        return
    check_images(where, images)
    b = images.shape[0]
    if not hasattr(labels, "dtype") or not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != (b,):
        advice = ""
        if isinstance(labels, (list, tuple)):
            advice = "; jnp.array(labels) is one"
        elif getattr(labels, "ndim", 0) == 2:
            advice = "; labels.argmax(-1) are the classes of one-hot rows"
        raise UserError(
            f"{where}: labels must be an int array ({b},), one class for each image, got {_what(labels)}{advice}"
        )
    typed = hasattr(keys, "dtype") and jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    if keys is not None and (not typed or keys.shape != (b,)):
        advice = f"jax.random.split(jax.random.key(0), {b}) gives them"
        raise UserError(f"{where}: keys must be {b} typed keys, one for each image, got {_what(keys)}; {advice}")
    low, high = int(np.asarray(labels).min()), int(np.asarray(labels).max())
    outputs = check_predict(where, predict, images)
    if any_outputs and getattr(outputs, "ndim", 0) != 2:
        return
    check_logits(where, outputs, b)
    classes = outputs.shape[-1]
    if low < 0 or high >= classes:
        raise UserError(f"{where}: label {low if low < 0 else high} is no class of a network with {classes} logits")


def check_predict(where: str, predict: Any, images: Any, *keys: Any) -> Any:
    """The shapes and types of predict(images, *keys), which is traced for them and not computed.

    UserError unless it is a function of these alone that JAX can trace.
    """
    called = "images and keys" if keys else "images"
    advice = "models.bind(model, variables) makes one, and so does lambda images: module.apply(variables, images)"
    if not callable(predict):
        raise UserError(f"{where}: predict must be a function of {called} alone, got {_what(predict)}; {advice}")
    try:
        inspect.signature(predict).bind(images, *keys)
    except TypeError as error:
        raise UserError(f"{where}: predict must be a function of {called} alone ({error}); {advice}") from None
    except ValueError:  # a function that tells no signature
        pass
    try:
        return jax.eval_shape(lambda *given: predict(*given), images, *keys)  # traced anew: a module has modes
    except UserError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:100] or "nothing more"
        raise UserError(
            f"{where}: predict must be a function of JAX arrays that can be traced, it raised {type(error).__name__}: "
            f"{said}"
        ) from error


def check_logits(where: str, logits: Any, b: int | None = None) -> None:
    """Raise a UserError unless `logits`, an array or its shape and type, are float (b, k)."""
    shape = getattr(logits, "shape", ())
    if len(shape) != 2 or shape[0] != (b or shape[0]) or not jnp.issubdtype(logits.dtype, jnp.floating):
        what = f"an array of shape {shape} and type {logits.dtype}" if hasattr(logits, "shape") else _what(logits)
        raise UserError(
            f"{where}: the network must return float logits ({b or 'b'}, k), one row for each image, and returns"
            f" {what}: give a function of these alone; `targeted` explains any number of what a network returns"
        )


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Which rows (n,) of what a network returns (n, k) are not negative and add up to 1."""
    logits = np.asarray(logits, np.float64)
    return (np.abs(logits.sum(1) - 1) < 1e-5) & (logits.min(1) > -1e-5) & (logits.max(1) < 1 + 1e-5)


def check_outputs(where: str, logits: Any, labels: Any) -> None:
    """Raise a UserError for logits (n, k) and labels (n,) of clean images that leave an attack without a meaning: one
    class, a label out of range, NaN, probabilities. Traced ones are not looked at."""
    if not (_is_concrete(logits) and _is_concrete(labels)):
        return
    logits, labels = np.asarray(logits, np.float32), np.asarray(labels)
    classes, wrong = logits.shape[1], np.flatnonzero(~np.isfinite(logits).all(1))
    no_class = np.flatnonzero((labels < 0) | (labels >= classes))
    if classes < 2:
        raise UserError(f"{where}: an attack makes another class win, and the network has {classes} logit")
    if len(no_class):
        which = f"label {labels[no_class[0]]} of image {no_class[0]}"
        raise UserError(f"{where}: {which} is no class of a network with {classes} logits")
    if len(wrong):
        which = f"{len(wrong)} of {len(logits)} images, first of image {wrong[0]},"
        raise UserError(
            f"{where}: the logits of {which} are not finite: nothing that is measured of them means anything"
        )
    if len(logits) and probabilities(logits).all():
        raise UserError(f"{where}: the network returns probabilities, attacks need logits: leave out the softmax")


def check_images(where: str, images: Any) -> None:
    """Raise a UserError unless `images`, where it is not traced, is a float array (b, h, w, c), b >= 1, in [0, 1]."""
    if not _is_concrete(images):
        return
    if not hasattr(images, "dtype") or getattr(images, "ndim", 0) != 4 or 0 in images.shape:
        advice = "; images[None] is a batch of one" if getattr(images, "ndim", 0) == 3 else ""
        raise UserError(
            f"{where}: images must be an array (b, h, w, c) of at least one image, got {_what(images)}{advice}"
        )
    low, high = float(np.asarray(images).min()), float(np.asarray(images).max())
    if np.isnan(low) or np.isnan(high):  # either is NaN if any pixel is
        raise UserError(f"{where}: images must be float in [0, 1], some pixels of these are NaN")
    if not jnp.issubdtype(images.dtype, jnp.floating) or high > 1.0 + 1e-6 or low < -1e-6:
        advice = "give images / 255" if high > 2 else "give (images + 1) / 2" if low >= -1 - 1e-6 and low < 0 else ""
        advice = advice or "give pixels from 0 to 1"
        raise UserError(
            f"{where}: images must be float in [0, 1], these are {images.dtype} from {low:.4g} to {high:.4g}; {advice};"
            " normalisation belongs inside the model"
        )


def check_radii(where: str, eps: Any, b: int, largest: float) -> None:
    """Raise a UserError unless `eps`, where it is not traced, is a number in [0, largest], or b of them."""
    if not _is_concrete(eps):
        return
    try:
        values = np.asarray(eps, np.float64)
    except (TypeError, ValueError):
        values = np.asarray(np.nan)
    if values.shape not in ((), (b,)) or not ((values >= 0) & (values <= largest)).all():
        said = " ".join(repr(eps).split())[:80]
        raise UserError(
            f"{where}: eps must be a number in [0, {largest:g}], or one for each of the {b} images, got {said}"
        )


def check_split(where: str, arrays: Mapping[str, Any], classes: int) -> None:
    """Raise a UserError unless a split's arrays are `image` (n, h, w, c) uint8 and `label` (n,) int, -1 to classes - 1.

    Bytes, because `as_batch` divides by 255: of pixels in [0, 1] it would make black pictures.
    """
    image, label = arrays.get("image"), arrays.get("label")
    if getattr(image, "dtype", None) != np.uint8 or image.ndim != 4 or 0 in image.shape:
        floats = hasattr(image, "dtype") and jnp.issubdtype(image.dtype, jnp.floating)
        advice = "; (255 * image).round().astype(np.uint8) makes bytes of pixels in [0, 1]" if floats else ""
        raise UserError(f"{where}: image must be a uint8 array (n, h, w, c), got {_what(image)}{advice}")
    n = len(image)
    if not hasattr(label, "dtype") or not jnp.issubdtype(label.dtype, jnp.integer) or label.shape != (n,):
        raise UserError(f"{where}: label must be an int array ({n},), one class for each image, got {_what(label)}")
    if _is_concrete(label):
        low, high = int(np.asarray(label).min()), int(np.asarray(label).max())
        if low < -1 or high >= classes:  # -1: a picture without a label
            raise UserError(f"{where}: label {low if low < -1 else high} is none of {classes} classes")


def check_maps(where: str, maps: Any, images: Any) -> None:
    """Raise a UserError unless `maps`, where it is not traced, is a float array (b, h', w'), a map for each image."""
    if not _is_concrete(maps) or not _is_concrete(images):
        return
    floats = hasattr(maps, "dtype") and jnp.issubdtype(maps.dtype, jnp.floating)
    if not floats or maps.ndim != 3 or (images is not None and len(images) != len(maps)):
        b = "b" if images is None else len(images)
        raise UserError(f"{where}: maps must be a float array ({b}, h', w'), one for each image, got {_what(maps)}")


def _is_concrete(array: Any) -> bool:
    """Whether the numbers are here: not traced, and not in part on another process's devices."""
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)


def _what(value: Any) -> str:
    if isinstance(value, (jax.Array, np.ndarray)):
        return f"an array of shape {value.shape} and type {value.dtype}"
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
