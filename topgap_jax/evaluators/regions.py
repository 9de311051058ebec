"""`regions(bank)`: what the object's region decides, measured without a map by changing the image (foreground, background)."""

import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax.attacks import misclassified
from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.metrics.calibration import wilson
from topgap_jax.models import bind
from topgap_jax.types import Array, Cost, Evaluator

NORMS = (0.1, 0.2, 0.4)
MIDDLE = NORMS.index(0.2)


def regions(bank: Array | None = None, *, fill: float | tuple[float, ...] = 0.5) -> Evaluator:
    """Does the network look at the object? Accuracy after changing one side of the region; unsure pixels are on no side.

    - foreground_sensitivity: noise of norm r sqrt(h w c) on the object, then on the background: (a_bg - a_fg) / (2 min(a, 1 - a)),
      a the mean of the two accuracies, 0 where a is 0 or 1. Positive: the object matters more (Moayeri et al. 2022, arXiv
      2201.10766). The value is at r = .2, the curve at .1, .2, .4.
    - foreground_accuracy, background_accuracy: everything else has the colour `fill` (in [0, 1]; take the training mean).
    - background_gap: accuracy on backgrounds of the own class minus that on those of a random other class (Xiao et al. 2020,
      arXiv 2006.09994), from `bank` (classes, n, h, w, c) uint8, see `background_bank`; left out without one.

    Images whose region is empty or full are left out and counted as `left_out`. Needs data with regions.
    """
    colour = np.asarray(fill, np.float32)
    for part in np.ravel(colour):
        check_number("fill", float(part), 0, 1)
    if bank is not None and (np.ndim(bank) != 5 or len(bank) < 2):
        raise UserError(
            f"regions: bank must be (classes, n, h, w, c) of two or more classes, got shape {np.shape(bank)}"
        )

    def rows(keys, model, variables, batch):
        if "region" not in batch:
            raise UserError("regions needs a data set with 'region' (a mask of the object); this one offers none")
        predict, images, labels = bind(model, variables), batch["image"], batch["label"]
        right = lambda changed: ~misclassified(predict(changed), labels)
        inside, outside = ((batch["region"] == side)[..., None] for side in (1, 0))
        noise_keys, place_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(noise_keys)
        out = {
            "used": inside.any((1, 2, 3)) & outside.any((1, 2, 3)),
            "foreground": right(jnp.where(inside, images, colour)),
            "background": right(jnp.where(outside, images, colour)),
        }
        for name, side in (("foreground_noise", inside), ("background_noise", outside)):
            unit = _unit(noise * side)
            out[name] = jnp.stack([right(jnp.clip(images + r * unit, 0, 1)) for r in NORMS], 1)
        if bank is not None:
            own, other = _backgrounds(jnp.asarray(bank), place_keys, labels)
            for name, backgrounds in (("own_background", own), ("other_background", other)):
                out[name] = right(jnp.where(inside, images, backgrounds))
        return out

    def summary(rows):
        used = {name: rows[name][rows["used"]] for name in rows}
        n = int(rows["used"].sum())
        if n == 0:
            raise UserError(
                f"regions: all {len(rows['used'])} images have an empty or full region, so nothing can be measured"
            )
        shares = {name: used[name].mean(0, dtype=np.float64) for name in used}
        curve = [_sensitivity(f, b) for f, b in zip(shares["foreground_noise"], shares["background_noise"])]
        values = {"foreground_sensitivity": curve[MIDDLE]}
        for name in ("foreground", "background"):
            low, high = wilson(used[name].sum(), n)
            values |= {f"{name}_accuracy": float(shares[name]), f"{name}_low": low, f"{name}_high": high}
            values[f"{name}_noise_accuracy"] = float(shares[f"{name}_noise"][MIDDLE])
        if "own_background" in shares:
            own, other = float(shares["own_background"]), float(shares["other_background"])
            values |= {
                "own_background_accuracy": own,
                "other_background_accuracy": other,
                "background_gap": own - other,
            }
        return values | {"left_out": len(rows["used"]) - n, "sensitivity_curve": {"x": list(NORMS), "y": curve}}

    return Evaluator(rows, summary, Cost(2 + 2 * len(NORMS) + (2 if bank is not None else 0), 0))


def background_bank(
    images: np.ndarray, regions: np.ndarray, labels: np.ndarray, classes: int, n: int = 32
) -> np.ndarray:
    """Backgrounds (classes, n, h, w, c) uint8 of the first n images of each class, object and unsure pixels filled with their mean.

    images (m, h, w, c) uint8, regions (m, h, w), labels (m,) of the training split. A class with fewer images that have an
    object and a background repeats them; one with none is a UserError.
    """
    usable = (regions == 1).any((1, 2)) & (regions == 0).any((1, 2))
    bank = np.zeros((classes, n, *images.shape[1:]), np.uint8)
    for label in range(classes):
        found = np.flatnonzero((labels == label) & usable)
        if not len(found):
            raise UserError(f"background bank: class {label} has no training image with an object and a background")
        for place, index in enumerate(np.resize(found[:n], n)):
            background = regions[index] == 0
            colour = images[index][background].mean(0)
            bank[label, place] = np.where(background[..., None], images[index], np.round(colour)).astype(np.uint8)
    return bank


def _unit(noise):
    """Noise of l2 norm sqrt(h w c), so that a factor r is a change of r per value if spread evenly."""
    length = jnp.sqrt((noise**2).sum((1, 2, 3), keepdims=True))
    return noise / jnp.where(length > 0, length, 1) * float(np.sqrt(np.prod(noise.shape[1:])))


def _sensitivity(foreground, background):
    mean = (foreground + background) / 2
    least = min(mean, 1 - mean)
    return float((background - foreground) / (2 * least)) if least > 0 else 0.0


def _backgrounds(bank, keys, labels):
    """One background of the own class and one of a random other class per example, (b, h, w, c) float32 each."""
    classes, n = bank.shape[:2]

    def draw(key, label):
        own, other, step = jax.random.split(key, 3)
        elsewhere = (label + jax.random.randint(step, (), 1, classes)) % classes
        return bank[label, jax.random.randint(own, (), 0, n)], bank[elsewhere, jax.random.randint(other, (), 0, n)]

    own, other = jax.vmap(draw)(keys, labels)
    return own.astype(jnp.float32) / 255, other.astype(jnp.float32) / 255


TABLE = table(regions)
