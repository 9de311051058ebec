"""`cluster(explain)`: groups among the maps of each class, which show a shortcut that nobody has labelled."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from topgap_jax.build import check_number, table
from topgap_jax.evaluators.sanity import reduced, tile
from topgap_jax.grids import cell_numbers, resized, shrunk
from topgap_jax.metrics.localisation import object_masks
from topgap_jax.metrics.spectral import adjusted_rand_index, spectral_clusters
from topgap_jax.metrics.substrates import substrate_images
from topgap_jax.metrics.summaries import average, mean_interval
from topgap_jax.models import bind
from topgap_jax.types import Cost, Evaluator, Explain, Gallery, Measure

SIDE = 16  # of the maps that are compared
CELLS = 4  # a side, of which the hottest is blanked
BAND = 2  # cells of 16 at each edge, the background where the data have no objects
LEAST = 50  # images of a class
SMALL = 20  # images of a cluster, below which its accuracy says nothing
LARGEST = 2000  # images of a class that are clustered: n x n distances
SHARES = (0.02, 0.5)  # of a class, of a cluster that may be a shortcut
PICTURE = 48
SHOWN, LINES = 5, 12  # pictures of a cluster, clusters in the report


class Group(NamedTuple):
    """A cluster of a class: which images, its mean map (16, 16), share of the class, accuracy, the share of its map in
    the background, what blanking its hottest cell costs in accuracy here and in the others, and whether it is flagged.
    """

    label: int
    members: np.ndarray
    mean: np.ndarray
    share: float
    accuracy: float
    background: float
    drop: float
    others: float
    flagged: bool


def cluster(explain: Explain, *, least: int = LEAST) -> Evaluator:
    """Spectral clusters of the maps of each class, with accuracy and share, and those that look like a shortcut
    (Lapuschkin et al. 2019, arXiv 1902.10178).

    The maps (positive part of a signed one, else |map|) are averaged to 16x16 and divided by their sum; of a class of
    at least `least` images the clusters are `metrics.spectral.spectral_clusters`. One is flagged that has 2 to 50 % of
    its class and at least 20 images, whose mean map has more than half of its sum outside the objects (without objects
    in the data: within 2 of 16 cells of the edges), and where blanking each image's hottest of 4x4 cells with the mean
    colour costs more than twice the accuracy that it costs in the class's other clusters, by the lower end of its 95 %
    interval. Where the data have groups, `rand_index` is the mean over classes of the adjusted Rand index of clusters
    and groups. The pictures show flagged clusters first, then those of the lowest accuracy.
    """
    Explain.single("cluster", explain)
    check_number("least", least, 3, whole=True)

    def rows(keys, model, variables, batch, prepared):
        predict, images, labels = bind(model, variables), batch["image"], batch["label"]
        maps = explain.maps(keys, predict, images, labels).astype(jnp.float32)
        maps = jnp.maximum(maps, 0) if explain.signed else jnp.abs(maps)
        full = resized(maps, images.shape[1:3]) if min(maps.shape[1:]) < SIDE else maps
        small = shrunk(full, tuple(min(side, SIDE) for side in full.shape[1:]))
        total = small.sum((1, 2), keepdims=True)
        defined = (jnp.isfinite(maps).all((1, 2)) & (total[:, 0, 0] > 0))[:, None, None]
        small = jnp.where(defined, small / jnp.where(total > 0, total, 1), jnp.nan)
        cells = cell_numbers("cluster", CELLS, images.shape[1:3])
        sums = jnp.stack([(resized(maps, cells.shape) * (cells == cell)).sum((1, 2)) for cell in range(CELLS**2)], 1)
        hottest = (cells == jnp.argmax(sums, 1)[:, None, None])[..., None]
        blanked = jnp.where(hottest, substrate_images("cluster", "mean", predict, images), images)
        right = lambda points: jnp.argmax(predict(points), -1) == labels
        out = {"maps": small, "label": labels, "right": right(images), "blanked": right(blanked)}
        out["picture"] = jnp.round(255 * reduced(images, PICTURE)).astype(jnp.uint8)
        if {"region", "box"} & set(batch):
            inside, _ = object_masks(batch)
            outside = 1 - shrunk(inside, small.shape[1:])
        else:
            edge = np.ones(small.shape[1:])
            edge[BAND:-BAND, BAND:-BAND] = 0
            outside = jnp.broadcast_to(jnp.asarray(edge, jnp.float32), small.shape)
        out["background"] = (small * outside).sum((1, 2))
        out["tile"] = tile(maps if maps.shape[1] <= PICTURE else shrunk(maps, (PICTURE, PICTURE)))
        return out | ({"group": batch["group"]} if "group" in batch else {})

    def summary(rows):
        groups, indices, classes = [], [], 0
        for label in np.unique(rows["label"]):
            of_class = np.flatnonzero((rows["label"] == label) & np.isfinite(rows["maps"]).all((1, 2)))
            if len(of_class) < least:
                continue
            classes += 1
            of_class = of_class[np.linspace(0, len(of_class) - 1, min(len(of_class), LARGEST)).round().astype(int)]
            assigned = spectral_clusters(rows["maps"][of_class].reshape(len(of_class), -1))
            groups += _groups(rows, int(label), of_class, assigned)
            if "group" in rows and len(np.unique(rows["group"][of_class])) > 1:
                indices.append(adjusted_rand_index(assigned, rows["group"][of_class]))
        return _measures(rows, groups, np.float64(indices), classes, least)

    return Evaluator(rows, summary, lambda predict, images: explain.cost(predict, images) + Cost(2, 0))


def _groups(rows, label: int, of_class: np.ndarray, assigned: np.ndarray) -> list[Group]:
    lost = rows["right"].astype(np.float64) - rows["blanked"]
    groups = []
    for number in range(assigned.max() + 1):
        members, rest = of_class[assigned == number], of_class[assigned != number]
        share = len(members) / len(of_class)
        drop, low, _ = mean_interval(lost[members])
        others = float(lost[rest].mean()) if len(rest) else 0.0
        background = float(rows["background"][members].mean(dtype=np.float64))
        flagged = (
            SHARES[0] <= share <= SHARES[1] and len(members) >= SMALL and background > 0.5 and low > 2 * max(others, 0)
        )
        mean = rows["maps"][members].mean(0)
        accuracy = float(rows["right"][members].mean())
        groups.append(Group(label, members, mean, share, accuracy, background, drop, others, flagged))
    return groups


def _measures(rows, groups: list[Group], indices: np.ndarray, classes: int, least: int) -> dict[str, Any]:
    n = sum(len(group.members) for group in groups)
    few = f"no class has {least} images with a map"
    flagged = [group for group in groups if group.flagged]
    about = Measure(n=n, better="lower", label="clusters that look like a shortcut")
    if not groups:
        return {"flagged": about._replace(reason=few)}
    measures: dict[str, Any] = {
        "flagged": about._replace(value=len(flagged)),
        "clusters": Measure(len(groups), n=n, label="clusters", main=False),
        "classes": Measure(classes, n=n, label="classes that were clustered", main=False),
    }
    large = [group for group in groups if len(group.members) >= SMALL]
    worst = min(large, key=lambda group: group.accuracy, default=None)
    label = f"accuracy of the worst cluster of at least {SMALL} images"
    measures["worst_cluster_accuracy"] = (
        Measure(n=0, better="higher", label=label, reason=f"no cluster has {SMALL} images")
        if worst is None
        else Measure(worst.accuracy, n=len(worst.members), better="higher", label=label)
    )
    if "group" in rows:
        about = Measure(label="adjusted Rand index of clusters and groups")
        index = average(indices, about, "no class that was clustered has several groups")
        measures["rand_index"] = index._replace(low=None, high=None, n=n)
    shown = sorted(groups, key=lambda group: (not group.flagged, group.accuracy, -len(group.members)))
    return measures | {"pictures": _pictures(rows, shown[:LINES])}


def _pictures(rows, groups: list[Group]) -> Gallery:
    """Of each cluster its mean map, and the images whose maps are nearest to it with these maps under them."""
    tiles, captions = [], []
    for group in groups:
        distance = np.square(rows["maps"][group.members] - group.mean).sum((1, 2))
        nearest = group.members[np.argsort(distance, kind="stable")[:SHOWN]]
        empty = [np.full((1, 1, 3), 255, np.uint8)] * (SHOWN - len(nearest))
        mean = np.uint8(np.round(255 * group.mean / max(group.mean.max(), 1e-12)))
        words = f"class {group.label}: {len(group.members)} ({group.share:.0%})"
        pictures = [image if image.shape[-1] == 3 else image.mean(-1).astype(np.uint8) for image in rows["picture"]]
        tiles += [mean, *(pictures[i] for i in nearest), *empty]
        captions += [words, *("" for _ in nearest), *("" for _ in empty)]
        below = f"{'FLAGGED, ' if group.flagged else ''}accuracy {group.accuracy:.2f}"
        tiles += [np.full((1, 1, 3), 255, np.uint8), *(rows["tile"][i] for i in nearest), *empty]
        captions += [below, *("" for _ in nearest), *("" for _ in empty)]
    label = "clusters of maps: the mean map, the nearest images and their maps"
    return Gallery(tiles, captions, 1 + SHOWN, label)


TABLE = table(cluster)
