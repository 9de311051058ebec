"""`localisation(explain)`: how well a map finds the object, beside a centred box, a random one and the whole image."""

import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.keys import fold_in
from topgap_jax.metrics import in_region, iou_curve, pointing
from topgap_jax.metrics.boxes import (
    TAUS,
    box_accuracy,
    box_iou,
    centred_boxes,
    has_area,
    level_ious,
    mean_box_sides,
    pixel_boxes,
    region_boxes,
)
from topgap_jax.metrics.localisation import (
    POINTING,
    average_precision,
    box_mask,
    mask_iou,
    object_masks,
    pixel_counts,
    scaled,
)
from topgap_jax.metrics.summaries import average, average_curve, share
from topgap_jax.models import bind
from topgap_jax.types import Array, Cost, Curve, Evaluator, Explain, Keys, Measure

GRID = tuple(round(0.05 * i, 2) for i in range(1, 20))
HALF = GRID.index(0.5)
NO_TRAINING = (
    "the centred box is the mean of the training split's, and there is none to be had; give centre=(height, width)"
)
NO_REGION = "the data have no regions, only boxes"
NO_BOX = "no image has an object and a finite map"
LEAST = (0.3, 0.5, 0.7)
"""IoUs of which MaxBoxAccV2 is the mean."""
BASELINES = {"centre": "centred box", "full": "full image", "random": "random box"}
MEANS = {
    "centre_iou": Measure(label="IoU of the centred box"),
    "full_iou": Measure(label="IoU of the full image"),
    "random_iou": Measure(label="IoU of a random box", main=False),
    "in_region": Measure(better="higher", label="share of the map in the object"),
    "lift": Measure(better="higher", label="lift of the map in the object", unit="times chance"),
    **POINTING,
}


def localisation(
    explain: Explain, *, labels: str = "true", boxes: bool = True, centre: float | tuple[float, float] | None = None
) -> Evaluator:
    """IoU, box and pixel accuracy of the maps for the "true" or the "predicted" class, beside baselines that look at
    nothing.

    IoU is against the region, or the box where there is none, at tau .5 and at the best tau of .05 ... .95 (`best_iou`:
    chosen on this very split, as are all thresholds here). Box accuracy (Choe et al. 2020, arXiv 2001.07437; MaxBoxAcc)
    is the largest share, over tau, of images whose largest component has a box of IoU >= .5; MaxBoxAccV2 takes the best
    box of all contours, at IoU .3, .5 and .7 each with its own best tau, and their mean. `boxes=False` leaves both out:
    finding components at 255 levels is on the host, and takes longer than all else here. PxAP is the area under
    precision over recall of the pixels of all images together, beside that of a map without information, and of the
    centred box; it needs regions. The pointing game is without tolerance. `centre` is the centred box's (height, width)
    as shares of the image; by default the mean of the boxes of the training split, without which the baseline is
    absent. The random box has two uniform corners. An image whose map is not finite counts in no measure, and one
    without an object in no IoU and no box accuracy.
    """
    Explain.single("localisation", explain)
    if labels not in ("true", "predicted"):
        raise UserError(f"localisation: labels must be 'true' or 'predicted', got {labels!r}")
    if centre is not None:
        centre = centre if isinstance(centre, tuple) else (centre, centre)
        for side in centre:
            check_number("centre", side, 0, 1)

    def prepare(training, classes):
        """The centred box (1, 4); {} where nothing says how large it is."""
        if centre is not None:
            return {"centre": centred_boxes(centre, 1)}
        if training is None or not {"box", "region"} & set(training):
            return {}
        boxes = np.asarray(training["box"] if "box" in training else region_boxes(training["region"]))
        boxes = boxes[has_area(boxes)]  # of images without an object there is no box
        return {"centre": centred_boxes(mean_box_sides(boxes), 1)} if len(boxes) else {}

    def rows(keys, model, variables, batch, prepared):
        predict, images = bind(model, variables), batch["image"]
        classes = batch["label"] if labels == "true" else jnp.argmax(predict(images), -1).astype(jnp.int32)
        maps = explain.maps(keys, predict, images, classes)
        inside, known = object_masks(batch)
        n, h, w = inside.shape
        finite = jnp.isfinite(maps).all((1, 2))
        placed = {"full": jnp.broadcast_to(jnp.array([0.0, 0, 1, 1]), (n, 4)), "random": random_boxes(keys)}
        if "centre" in prepared:
            placed["centre"] = jnp.broadcast_to(jnp.asarray(prepared["centre"], jnp.float32), (n, 4))
        masks = {name: box_mask(box, (h, w)) for name, box in placed.items()}
        out = {f"{name}_iou": mask_iou(mask, inside, known) for name, mask in masks.items()} | {"finite": finite}
        for metric in (iou_curve(GRID), in_region(), pointing()):
            out |= metric(keys, predict, maps, batch)
        if "region" in batch:
            counted = known & finite[:, None, None]
            small = jnp.uint16 if h * w < 2**16 else jnp.int32  # a kilobyte counts where a split has 50,000 images
            for name, counts in zip(("true", "false"), pixel_counts(maps, inside, counted)):
                out[f"{name}_pixels"] = counts.astype(small)
            if "centre" in prepared:
                within = masks["centre"] & counted
                out["centre_pixels"] = jnp.stack([(within & inside).sum((1, 2)), (within & ~inside).sum((1, 2))], 1)
        if not boxes:
            return out
        out |= {f"{name}_box": box for name, box in placed.items()}
        out["map"] = jnp.floor(scaled(jnp.where(finite[:, None, None], maps, 0), (h, w)) * 255).astype(jnp.uint8)
        return out | ({"box": batch["box"]} if "box" in batch else {"region": batch["region"]})

    def host(rows):
        """Boxes in place of maps."""
        maps = rows["map"]
        n, size = len(maps), maps.shape[1:]
        objects = np.asarray(rows["box"] if "box" in rows else region_boxes(rows["region"]))
        defined = rows["finite"] & has_area(objects)
        true = pixel_boxes(objects, size)
        ious = np.stack([level_ious(*pair) for pair in zip(maps, true)]) if n else np.zeros((0, 255, 2))
        ious = np.where(defined[:, None, None], ious, np.nan).astype(np.float32)
        taken = {f"{name}_box" for name in BASELINES} & set(rows)
        out = {name: rows[name] for name in rows if name not in {"map", "box", "region", *taken}}
        placed = lambda name: np.where(defined, box_iou(pixel_boxes(rows[name], size), true), np.nan)
        out |= {f"{name}_iou": placed(name).astype(np.float32) for name in taken}
        return out | {"box_iou": ious[..., 0], "best_box_iou": ious[..., 1]}

    def summary(rows):
        curve = average_curve(rows["ious"], Curve(list(GRID), axes=("threshold", "IoU"), label="IoU by threshold"))
        iou = average(rows["ious"][:, HALF], Measure(better="higher", label="IoU of the map"))
        measures = {"iou": iou}
        if iou.n:
            best = int(np.argmax(curve.y))
            about = Measure(n=iou.n, better="higher", label="IoU at its best threshold")
            measures["best_iou"] = about._replace(value=curve.y[best])
            measures["best_iou_tau"] = Measure(GRID[best], n=iou.n, label="best threshold of the IoU", main=False)
        for name, about in MEANS.items():
            absent = about._replace(n=0, reason=NO_TRAINING)
            measures[name] = average(rows[name], about) if name in rows else absent
        measures |= _pixel_measures(rows)
        measures["iou_curve"] = curve
        return measures | _box_measures(rows) if boxes else measures

    def cost(predict, images):
        return explain.cost(predict, images) + Cost(1 if labels == "predicted" else 0, 0)

    return Evaluator(rows, summary, cost, host if boxes else None, prepare)


def random_boxes(keys: Keys) -> Array:
    """A box (b, 4) of each example between two corners drawn uniformly from the image."""

    def one(key):
        (top, left), (bottom, right) = jnp.sort(jax.random.uniform(key, (2, 2)), 0)
        return jnp.stack([top, left, bottom, right])

    return jax.vmap(one)(fold_in(keys, 0x626F78))  # a stream of its own: the map may draw from the same key


def _pixel_measures(rows):
    """PxAP of all images together."""
    about = {
        "pxap": Measure(better="higher", label="PxAP of the map"),
        "centre_pxap": Measure(label="PxAP of the centred box"),
        "full_pxap": Measure(label="PxAP of the full image or a random map"),
    }
    absent = lambda reason: {name: one._replace(n=0, reason=reason) for name, one in about.items()}
    if "true_pixels" not in rows:
        return absent(NO_REGION)
    true, false = (rows[f"{side}_pixels"].sum(0, dtype=np.int64) for side in ("true", "false"))
    n = int(rows["finite"].sum())
    if not true.sum():
        return absent("no image with a finite map has an object")
    values = {"pxap": average_precision(true, false), "full_pxap": float(true.sum() / (true.sum() + false.sum()))}
    measures = {name: about[name]._replace(value=value, n=n) for name, value in values.items()}
    measures["centre_pxap"] = about["centre_pxap"]._replace(n=0, reason=NO_TRAINING)
    if "centre_pixels" in rows:
        inner = rows["centre_pixels"].sum(0, dtype=np.int64)
        pairs = [np.array([total.sum() - part, part]) for total, part in zip((true, false), inner)]
        measures["centre_pxap"] = about["centre_pxap"]._replace(value=average_precision(*pairs), n=n)
    return measures


def _box_measures(rows):
    ious = rows["box_iou"]
    defined = ~np.isnan(ious).any(1)
    n = int(defined.sum())
    best = {
        "max_box_accuracy": Measure(n=n, better="higher", label="MaxBoxAcc of the map"),
        "max_box_accuracy_v2": Measure(n=n, better="higher", label="MaxBoxAccV2 of the map"),
    }
    measures = {name: one._replace(reason=NO_BOX) for name, one in best.items()}
    if n:
        accuracies = box_accuracy(ious[defined])
        tau = Measure(float(TAUS[accuracies.argmax()]), n=n, label="best threshold of MaxBoxAcc", main=False)
        second = [float(box_accuracy(rows["best_box_iou"][defined], least).max()) for least in LEAST]
        values = {"max_box_accuracy": float(accuracies.max()), "max_box_accuracy_v2": float(np.mean(second))}
        measures = {name: best[name]._replace(value=value) for name, value in values.items()} | {"max_box_tau": tau}
        axes = ("threshold", "box accuracy")
        measures["box_curve"] = Curve(TAUS[::10].tolist(), accuracies[::10].tolist(), axes, "box accuracy by threshold")
    for name, words in BASELINES.items():
        row = f"{name}_box_iou"
        about = Measure(label=f"box accuracy of the {words}", main=name != "random")
        about_v2 = Measure(label=f"MaxBoxAccV2 of the {words}", main=name != "random")
        if row not in rows:
            measures[f"{name}_box_accuracy"] = about._replace(n=0, reason=NO_TRAINING)
            measures[f"{name}_box_accuracy_v2"] = about_v2._replace(n=0, reason=NO_TRAINING)
            continue
        if not n:
            measures[f"{name}_box_accuracy"] = about._replace(n=0, reason=NO_BOX)
            measures[f"{name}_box_accuracy_v2"] = about_v2._replace(n=0, reason=NO_BOX)
            continue
        placed = rows[row][defined]
        measures[f"{name}_box_accuracy"] = share(placed >= 0.5, about)
        value = float(np.mean([(placed >= least).mean(dtype=np.float64) for least in LEAST]))
        measures[f"{name}_box_accuracy_v2"] = about_v2._replace(value=value, n=n)
    return measures


TABLE = table(localisation)
