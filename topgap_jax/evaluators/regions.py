"""`regions()`: what the object's region decides, measured without a map by changing the image (foreground,
background)."""

import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax.attacks import misclassified
from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.keys import normal, split
from topgap_jax.metrics.summaries import share
from topgap_jax.models import bind
from topgap_jax.types import Cost, Curve, Evaluator, Measure

NORMS = (0.1, 0.2, 0.4)
MIDDLE = NORMS.index(0.2)


NO_BACKGROUNDS = "backgrounds are taken from a training split with regions, and there is none to be had"


def regions(*, fill: float | tuple[float, ...] = 0.5) -> Evaluator:
    """Does the network look at the object? Accuracy after changing one side of the region; unsure pixels are on no
    side.

    - foreground_sensitivity: noise of norm r sqrt(h w c) on the object, then on the background:
      (a_bg - a_fg) / (2 min(a, 1 - a)), a the mean of the two accuracies; undefined where a is 0 or 1. Positive: the
      object matters more (Moayeri et al. 2022, arXiv 2201.10766). The value is at r = .2, the curve at .1, .2, .4.
    - foreground_accuracy, background_accuracy: everything else has the colour `fill` (in [0, 1]; the training mean).
    - background_gap: accuracy on backgrounds of the own class minus that on those of a random other class (Xiao et al.
      2020, arXiv 2006.09994), from the training split (`background_bank`); absent without one.

    Images whose region is empty or full are left out and counted as `left_out`. Needs data with regions.
    """
    colour = np.asarray(fill, np.float32)
    for part in np.ravel(colour):
        check_number("fill", float(part), 0, 1)

    def prepare(training, classes):
        if training is None or "region" not in training:
            return {}
        return {"bank": background_bank(training["image"], training["region"], training["label"], classes)}

    def rows(keys, model, variables, batch, prepared):
        if "region" not in batch:
            raise UserError("regions needs a data set with 'region' (a mask of the object); this one offers none")
        predict, images, labels = bind(model, variables), batch["image"], batch["label"]
        right = lambda changed: ~misclassified(predict(changed), labels)
        inside, outside = ((batch["region"] == side)[..., None] for side in (1, 0))
        noise_keys, place_keys = split(keys)
        noise = normal(noise_keys, images)
        out = {
            "used": inside.any((1, 2, 3)) & outside.any((1, 2, 3)),
            "foreground": right(jnp.where(inside, images, colour)),
            "background": right(jnp.where(outside, images, colour)),
        }
        for name, side in (("foreground_noise", inside), ("background_noise", outside)):
            unit = _unit(noise * side)
            out[name] = jnp.stack([right(jnp.clip(images + r * unit, 0, 1)) for r in NORMS], 1)
        if "bank" in prepared:
            same, other = _backgrounds(jnp.asarray(prepared["bank"]), place_keys, labels)
            for name, backgrounds in (("own_background", same), ("other_background", other)):
                out[name] = right(jnp.where(inside, images, backgrounds))
        return out

    def summary(rows):
        used = {name: rows[name][rows["used"]] for name in rows}
        n = int(rows["used"].sum())
        empty = "every region is empty or full"
        noise = {side: used[f"{side}_noise"] for side in ("foreground", "background")}
        curve = [_sensitivity(*(noise[side][:, r].mean() for side in noise)) if n else None for r in range(len(NORMS))]
        sensitivity = Measure(curve[MIDDLE], n=n, better="higher", label="foreground sensitivity")
        if curve[MIDDLE] is None:
            sensitivity = sensitivity._replace(reason="under noise every image is right, or none is" if n else empty)
        measures = {"foreground_sensitivity": sensitivity}
        for side, better, words in (("foreground", "higher", "object"), ("background", None, "background")):
            measures[f"{side}_accuracy"] = share(
                used[side], Measure(better=better, label=f"accuracy, {words} alone"), empty
            )
        for side, words in (("foreground", "object"), ("background", "background")):
            about = Measure(label=f"accuracy, noise on the {words}", main=False)
            measures[f"{side}_noise_accuracy"] = share(noise[side][:, MIDDLE], about, empty)
        gap = Measure(better="lower", label="background gap", n=0, reason=NO_BACKGROUNDS)
        if "own_background" in used:
            pair = {}
            for name, words in (("own_background", "own"), ("other_background", "other")):
                about = Measure(label=f"accuracy on backgrounds of the {words} class", main=False)
                pair[f"{name}_accuracy"] = share(used[name], about, empty)
            same, other = (measure.value for measure in pair.values())
            gap = gap._replace(n=n, reason="" if n else empty, value=same - other if n else None)
            measures |= pair
        measures["background_gap"] = gap
        measures["left_out"] = Measure(len(rows["used"]) - n, n=len(rows["used"]), label="images left out", main=False)
        axes = ("noise norm", "foreground sensitivity")
        return measures | {"sensitivity_curve": Curve(list(NORMS), curve, axes, "foreground sensitivity by noise")}

    # Two fills, noise on two sides, two backgrounds (where the training split has regions).
    return Evaluator(rows, summary, lambda predict, images: Cost(4 + 2 * len(NORMS), 0), prepare=prepare)


def background_bank(
    images: np.ndarray, regions: np.ndarray, labels: np.ndarray, classes: int, n: int = 32
) -> np.ndarray:
    """Backgrounds (classes, n, h, w, c) uint8 of the first n images of each class, object and unsure pixels filled with
    their mean.

    images (m, h, w, c) uint8, regions (m, h, w), labels (m,) of the training split. A class with fewer images that have
    an object and a background repeats them; one with none is a UserError.
    """
    usable = (regions == 1).any((1, 2)) & (regions == 0).any((1, 2))
    bank = np.zeros((classes, n, *images.shape[1:]), np.uint8)
    for label in range(classes):
        rows = np.flatnonzero((labels == label) & usable)
        if not len(rows):
            raise UserError(f"background bank: class {label} has no training image with an object and a background")
        for place, index in enumerate(np.resize(rows[:n], n)):
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
    return float((background - foreground) / (2 * least)) if least > 0 else None


def _backgrounds(bank, keys, labels):
    """One background of the own class and one of a random other class per example, (b, h, w, c) float32 each."""
    classes, n = bank.shape[:2]

    def draw(key, label):
        same, other, step = jax.random.split(key, 3)
        elsewhere = (label + jax.random.randint(step, (), 1, classes)) % classes
        return bank[label, jax.random.randint(same, (), 0, n)], bank[elsewhere, jax.random.randint(other, (), 0, n)]

    same, other = jax.vmap(draw)(keys, labels)
    return same.astype(jnp.float32) / 255, other.astype(jnp.float32) / 255


TABLE = table(regions)
