"""`receptive_field()`: which pixels the class map listens to, at its centre, its corners and where it decides."""

import jax.numpy as jnp
import numpy as np

from topgap_jax.build import check_number, table
from topgap_jax.explain.field import fields, pixel, theoretical_fields
from topgap_jax.grids import shrunk
from topgap_jax.metrics import field as measures
from topgap_jax.metrics.localisation import object_masks
from topgap_jax.metrics.summaries import average
from topgap_jax.models import bind
from topgap_jax.rewrite import read
from topgap_jax.types import Cost, Evaluator, Gallery, Measure

MEANS = {
    "rms_radius": Measure(label="ERF radius", unit="pixels"),
    "luo_size": Measure(label="ERF size by Luo", unit="pixels", main=False),
    "effective_area": Measure(label="ERF effective area", unit="pixels", main=False),
    "gaussian_sigma": Measure(label="sigma of the Gaussian fitted to the ERF", unit="pixels", main=False),
    "gaussian_share": Measure(label="share of the ERF that its Gaussian explains", main=False),
    "theoretical_size": Measure(label="theoretical field inside the image", unit="pixels", main=False),
    "theoretical_ratio": Measure(label="ERF size / theoretical size", main=False),
    "share_inside": Measure(better="higher", label="share of the ERF in the object", main=False),
    "lift": Measure(better="higher", label="lift of the ERF in the object", unit="times chance", main=False),
    "top_share_inside": Measure(better="higher", label="share of the top position's ERF in the object", main=False),
    "top_lift": Measure(better="higher", label="lift of the top position's ERF", unit="times chance"),
}


PLACES = ("centre", "corners", "top position")
SIDE = 32  # of the pictures of mean fields at most, which every image's rows hold


def receptive_field(layer: str = "maps", *, channel: str | int = "label", k: int = 1) -> Evaluator:
    """Effective receptive fields E_p of the label's class map, or of any layer (`explain.field`), measured per image
    and averaged.

    Luo et al. 2016, arXiv 1701.04128.

    layer, channel: as of `explain.field`; of a layer that is no class map, channel="sum" or an index.
    rms_radius, luo_size (pixels) and effective_area (pixels) of the centre position's field; gaussian_sigma (pixels)
    and gaussian_share, Luo's Gaussian and how well it fits (`metrics.field.gaussian_fit`); theoretical_size = sqrt of
    the pixels of the image that the position can depend on at all (`explain.theoretical_fields`), theoretical_ratio =
    luo_size over it; centre_corner_ratio = sum of E at the centre / mean of the four corners' sums. With a region or
    box: the share of the field inside the object and its lift over the object's share of the area (chance is 1), for
    the centre and, as top_..., for the mean field of the `k` highest positions. Means with a 95 % interval; fields that
    are 0 everywhere are left out and counted as `empty_fields`.
    """
    check_number("k", k, 1, whole=True)

    def rows(keys, model, variables, batch, prepared):
        predict, images = bind(model, variables), batch["image"]
        _, value = read(predict, layer)(images[:1])
        maps = fields(predict, images, batch["label"], ["centre", "corner", "top"], layer=layer, channel=channel, k=k)
        centre, corners, top = maps[0], maps[1:5], maps[5:].mean(0)
        place = pixel("centre", value.shape[1:3], images.shape[1:3])
        reached = theoretical_fields(predict, images, ["centre"], layer=layer)
        size = jnp.sqrt(jnp.float32(reached.sum()))
        sigma, explained = measures.gaussian_fit(centre, place)
        out = {
            "centre": centre.sum((1, 2)),
            "corner": corners.sum((2, 3)).mean(0),
            "rms_radius": measures.rms_radius(centre, place),
            "luo_size": measures.luo_size(centre, place),
            "effective_area": measures.effective_area(centre),
            "gaussian_sigma": sigma,
            "gaussian_share": explained,
            "theoretical_size": jnp.broadcast_to(size, sigma.shape),
        }
        out["fields"] = jnp.stack([_small(each) for each in (centre, corners.mean(0), top)], 1)
        out["theoretical_field"] = jnp.broadcast_to(_small(reached), (len(sigma), *out["fields"].shape[2:]))
        out["theoretical_ratio"] = out["luo_size"] / size
        if "region" not in batch and "box" not in batch:
            return out
        inside, known = object_masks(batch)
        # An image without an object has no lift: its area is set to NaN, and it is left out like an empty field.
        area = jnp.where(inside.any((1, 2)), inside.sum((1, 2)) / jnp.maximum(known.sum((1, 2)), 1), jnp.nan)
        for name, maps in (("", centre), ("top_", top)):
            share = measures.share_inside(maps * known, inside)
            out |= {f"{name}share_inside": share, f"{name}lift": share / area}
        return out

    def summary(rows):
        empty = "every field is 0 everywhere"
        measures = {}
        for name, about in MEANS.items():
            if name in rows:
                values = np.where(np.isfinite(rows[name]), rows[name], np.nan)
                measures[name] = average(values, about, empty)
            elif name.endswith(("share_inside", "lift")):
                measures[name] = about._replace(n=0, reason="the data have neither regions nor boxes")
        # Of the sums, not the mean of ratios: one corner that is nearly 0 would decide the mean.
        centre, corner = (float(rows[name].mean(dtype=np.float64)) for name in ("centre", "corner"))
        ratio = Measure(label="ERF centre / corner", n=len(rows["centre"]))
        measures["centre_corner_ratio"] = (
            ratio._replace(value=centre / corner)
            if corner > 0
            else ratio._replace(n=0, reason="the corners' fields are 0")
        )
        count = int((rows["centre"] == 0).sum())
        measures["empty_fields"] = Measure(count, n=len(rows["centre"]), label="fields that are 0", main=False)
        finite = np.isfinite(rows["fields"]).all((1, 2, 3))
        return measures | ({"mean_fields": _pictures(rows, finite)} if finite.any() else {})

    return Evaluator(rows, summary, lambda predict, images: Cost(0, 5 + k))


def _small(maps):
    """Maps (b, h, w) at most SIDE pixels high and wide, by the mean over areas."""
    h, w = maps.shape[1:]
    shrink = max(1, max(h, w) / SIDE)
    return shrunk(maps, (max(1, round(h / shrink)), max(1, round(w / shrink))))


def _pictures(rows, finite):
    """The mean fields over the split as sqrt(E / max E), and what the centre can depend on at all."""
    means = rows["fields"][finite].mean(0, dtype=np.float64)
    largest = means.max((1, 2), keepdims=True)
    shown = np.sqrt(np.divide(means, largest, out=np.zeros_like(means), where=largest > 0))
    tiles = [*shown.clip(0, 1), rows["theoretical_field"][0].clip(0, 1)]
    captions = [*(f"ERF, {place}" for place in PLACES), "theoretical, centre"]
    label = "mean effective receptive fields, square root of the share of the largest"
    return Gallery([np.uint8(np.round(255 * tile)) for tile in tiles], captions, len(tiles), label)


TABLE = table(receptive_field)
