"""`localisation(explain)`: how well a map finds the object, beside a centred box and the whole image."""

import jax.numpy as jnp
import numpy as np

from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.metrics import in_region, iou_curve
from topgap_jax.metrics.boxes import (
    TAUS,
    box_accuracy,
    box_iou,
    centred_boxes,
    level_boxes,
    mean_box_sides,
    pixel_boxes,
    region_boxes,
)
from topgap_jax.metrics.localisation import box_mask, mask_iou, object_masks, scaled
from topgap_jax.metrics.summaries import average, average_curve, share
from topgap_jax.models import bind
from topgap_jax.types import Cost, Curve, Evaluator, Explain, Measure

GRID = tuple(round(0.05 * i, 2) for i in range(1, 20))
HALF = GRID.index(0.5)
NO_TRAINING = (
    "the centred box is the mean of the training split's, and there is none to be had; give centre=(height, width)"
)
MEANS = {
    "centre_iou": Measure(better=None, label="IoU of the centred box"),
    "full_iou": Measure(better=None, label="IoU of the full image"),
    "in_region": Measure(better="higher", label="share of the map in the object"),
    "lift": Measure(better="higher", label="lift of the map in the object", unit="times chance"),
}


def localisation(
    explain: Explain, *, labels: str = "true", boxes: bool = True, centre: float | tuple[float, float] | None = None
) -> Evaluator:
    """IoU and box accuracy of the maps for the "true" or the "predicted" class, beside two baselines that look at
    nothing.

    IoU is against the region, or the box where there is none, at tau .5 and at the best tau of .05 ... .95 (`best_iou`:
    chosen on this very split). Box accuracy (MaxBoxAcc, Choe et al. 2020, arXiv 2001.07437) is the largest share, over
    tau, of boxes with IoU >= .5 (also chosen on this split); `boxes=False` leaves it out: finding the largest component
    at 255 levels takes some 20 ms of CPU an image, more than everything else here. `centre` is the centred box's
    (height, width) as shares of the image; by default the mean of the boxes of the training split, without which the
    baseline is absent. An image whose map is not finite counts in no measure.
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
        boxes = training["box"] if "box" in training else region_boxes(training["region"])
        return {"centre": centred_boxes(mean_box_sides(boxes), 1)}

    def rows(keys, model, variables, batch, prepared):
        predict, images = bind(model, variables), batch["image"]
        classes = batch["label"] if labels == "true" else jnp.argmax(predict(images), -1).astype(jnp.int32)
        maps = explain.maps(keys, predict, images, classes)
        inside, known = object_masks(batch)
        n, h, w = inside.shape
        out = {"full_iou": mask_iou(jnp.ones_like(inside), inside, known)}
        if "centre" in prepared:
            box = jnp.broadcast_to(jnp.asarray(prepared["centre"], jnp.float32), (n, 4))
            out |= {"centre_iou": mask_iou(box_mask(box, (h, w)), inside, known), "centre_box": box}
        out |= iou_curve(GRID)(keys, predict, maps, batch) | in_region()(keys, predict, maps, batch)
        if not boxes:
            return out
        out["finite"] = jnp.isfinite(maps).all((1, 2))
        out["map"] = jnp.floor(scaled(jnp.where(out["finite"][:, None, None], maps, 0), (h, w)) * 255).astype(jnp.uint8)
        return out | ({"box": batch["box"]} if "box" in batch else {"region": batch["region"]})

    def host(rows):
        """Boxes in place of maps."""
        maps = rows["map"]
        n, size = len(maps), maps.shape[1:]
        true = pixel_boxes(rows["box"] if "box" in rows else region_boxes(rows["region"]), size)
        levels = np.stack([level_boxes(values) for values in maps]) if n else np.zeros((0, 255, 4), int)
        rest = {name: rows[name] for name in rows if name not in ("map", "box", "region", "finite")}
        ious = np.where(rows["finite"][:, None], box_iou(levels, true[:, None]), np.nan)
        out = {
            "box_iou": ious.astype(np.float32),
            "full_box_iou": box_iou(pixel_boxes(centred_boxes((1, 1), n), size), true),
        }
        if "centre_box" in rows:
            out["centre_box_iou"] = box_iou(pixel_boxes(rows["centre_box"], size), true)
        return rest | out

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
        measures["iou_curve"] = curve
        return measures | _box_measures(rows) if boxes else measures

    def cost(predict, images):
        return explain.cost(predict, images) + Cost(1 if labels == "predicted" else 0, 0)

    return Evaluator(rows, summary, cost, host if boxes else None, prepare)


def _box_measures(rows):
    ious = rows["box_iou"]
    defined = ious[~np.isnan(ious).any(1)]
    about = Measure(better="higher", label="MaxBoxAcc of the map")
    measures = {"max_box_accuracy": about._replace(n=0, reason="no image has a finite map")}
    if len(defined):
        accuracies = box_accuracy(defined)
        best = share(defined[:, 0] >= 0, about)._replace(value=float(accuracies.max()), low=None, high=None)
        tau = Measure(float(TAUS[accuracies.argmax()]), n=best.n, label="best threshold of MaxBoxAcc", main=False)
        measures = {"max_box_accuracy": best, "max_box_tau": tau}
        axes = ("threshold", "box accuracy")
        measures["box_curve"] = Curve(TAUS[::10].tolist(), accuracies[::10].tolist(), axes, "box accuracy by threshold")
    for name, words in (("centre", "centred box"), ("full", "full image")):
        about = Measure(label=f"box accuracy of the {words}")
        absent = about._replace(n=0, reason=NO_TRAINING)
        row = f"{name}_box_iou"
        measures[f"{name}_box_accuracy"] = share(rows[row] >= 0.5, about) if row in rows else absent
    return measures


TABLE = table(localisation)
