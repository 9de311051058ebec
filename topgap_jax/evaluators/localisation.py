"""`localisation(explain)`: do the maps find the object?"""

import jax.numpy as jnp
import numpy as np

from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.metrics import in_region, iou_curve
from topgap_jax.metrics.boxes import TAUS, box_accuracy, box_iou, centred_boxes, level_boxes, pixel_boxes, region_boxes
from topgap_jax.metrics.calibration import mean_interval
from topgap_jax.metrics.localisation import box_mask, mask_iou, object_masks, scaled
from topgap_jax.models import bind
from topgap_jax.types import Cost, Evaluator, Explain

GRID = tuple(round(0.05 * i, 2) for i in range(1, 20))
HALF = GRID.index(0.5)


def localisation(
    explain: Explain, *, labels: str = "true", boxes: bool = True, centre: float | tuple[float, float] = 0.7
) -> Evaluator:
    """IoU and box accuracy of the maps for the "true" or the "predicted" class, beside two baselines that look at nothing.

    IoU is against the region, or the box where there is none, at tau .5 and at the best tau of .05 ... .95 (`best_iou`:
    chosen on this very split). Box accuracy (MaxBoxAcc) is the largest share, over tau, of boxes with IoU >= .5 (also
    chosen on this split); `boxes=False` leaves it out, which saves some 10 ms of host time an image. `centre` is the centre box's (height, width) as shares of the image: take the training images'
    `metrics.boxes.mean_box_sides`; the default .7 has half the image's area. `boxes=False` leaves box accuracy out: finding
    the largest component at 255 levels takes some 20 ms of CPU an image, more than everything else here.
    """
    if not callable(explain):
        raise UserError(f"localisation: give an explanation such as cam(), got {explain!r}")
    if labels not in ("true", "predicted"):
        raise UserError(f"localisation: labels must be 'true' or 'predicted', got {labels!r}")
    sides = centre if isinstance(centre, tuple) else (centre, centre)
    for side in sides:
        check_number("centre", side, 0, 1)
    cost = getattr(explain, "cost", Cost(1, 0))

    def rows(keys, model, variables, batch):
        predict, images = bind(model, variables), batch["image"]
        chosen = batch["label"] if labels == "true" else jnp.argmax(predict(images), -1).astype(jnp.int32)
        maps = explain(keys, predict, images, chosen)
        inside, known = object_masks(batch)
        n, h, w = inside.shape
        centre_mask = box_mask(jnp.asarray(centred_boxes(sides, n), jnp.float32), (h, w))
        out = {
            "centre_iou": mask_iou(centre_mask, inside, known),
            "full_iou": mask_iou(jnp.ones_like(inside), inside, known),
        }
        out |= iou_curve(GRID)(keys, predict, maps, batch) | in_region()(keys, predict, maps, batch)
        if not boxes:
            return out
        out["map"] = jnp.floor(scaled(maps, (h, w)) * 255).astype(jnp.uint8)
        return out | ({"box": batch["box"]} if "box" in batch else {"region": batch["region"]})

    def host(rows):
        """Boxes in place of maps."""
        maps = rows["map"]
        n, size = len(maps), maps.shape[1:]
        true = pixel_boxes(rows["box"] if "box" in rows else region_boxes(rows["region"]), size)
        found = np.stack([level_boxes(values) for values in maps]) if n else np.zeros((0, 255, 4), int)
        kept = {name: rows[name] for name in rows if name not in ("map", "box", "region")}
        return kept | {
            "box_iou": box_iou(found, true[:, None]).astype(np.float32),
            "centre_box_iou": box_iou(pixel_boxes(centred_boxes(sides, n), size), true),
            "full_box_iou": box_iou(pixel_boxes(centred_boxes((1, 1), n), size), true),
        }

    def summary(rows):
        mean, low, high = mean_interval(rows["ious"][:, HALF])
        curve = rows["ious"].mean(0, dtype=np.float64)
        best = int(curve.argmax())
        values = {
            "iou": mean,
            "iou_low": low,
            "iou_high": high,
            "best_iou": float(curve[best]),
            "best_iou_tau": GRID[best],
        }
        means = ("centre_iou", "full_iou", "in_region", "lift")
        values |= {name: float(rows[name].mean(dtype=np.float64)) for name in means}
        values["iou_curve"] = {"x": list(GRID), "y": curve.tolist()}
        if not boxes:
            return values
        accuracies = box_accuracy(rows["box_iou"])
        values |= {"max_box_accuracy": float(accuracies.max()), "max_box_tau": float(TAUS[accuracies.argmax()])}
        for name in ("centre", "full"):
            values[f"{name}_box_accuracy"] = float((rows[f"{name}_box_iou"] >= 0.5).mean())
        return values | {"box_curve": {"x": TAUS[::10].tolist(), "y": accuracies[::10].tolist()}}

    more = 1 if labels == "predicted" else 0
    return Evaluator(rows, summary, cost._replace(forwards=cost.forwards + more), host if boxes else None)


TABLE = table(localisation)
