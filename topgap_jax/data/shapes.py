"""`shapes`: pictures with ground truth for "looks at the right pixels", drawn from a seed, needing no file.

A class is a shape; its background's texture goes with the class in 90 % of the images of train, validation and test,
and is drawn evenly in test_shifted. The texture's strength varies from image to image, so that some can only be told by
shape.
"""

import numpy as np

from topgap_jax.build import check_number, table
from topgap_jax.data.source import Record, Source, Splits, slice_split

CLASSES = ("disc", "square", "triangle", "cross", "ring", "star")
BACKGROUNDS = ("horizontal", "vertical", "rising", "falling", "checker", "dots")
SPLITS = ("train", "validation", "test", "test_shifted")
SIZE = 64
RADII = (10.0, 22.0)
# Distance of a shape's furthest point from its centre, in radii. Chosen so that an object covers .14 of an image on
# average.
EXTENT = {"disc": 1.0, "square": 0.8 * 2**0.5, "triangle": 1.25, "cross": 1.0, "ring": 1.0, "star": 1.2}


def shapes(
    seed: int = 0, *, train: int = 4000, validation: int = 500, test: int = 1000, correlation: float = 0.9
) -> Splits:
    """64x64 pictures of a disc, square, triangle, cross, ring or star; splits train, validation, test and test_shifted.

    Radius log-uniform in 10 to 22 pixels, rotation within .5 rad, object wholly inside; object colour = the
    background's base colour +- .4 U(.6, 1) per channel; texture amplitude (twice the standard deviation) log-uniform in
    .02 to .15; pixel noise .05. `correlation` is the share of images whose background is the class's own, the others
    have one of the other five. Records offer the exact region (1 inside, 0 outside), its box, and group (0 background
    agrees with the class, 1 conflicts). Image i of a split depends on seed, split and i only, not on the number of
    images. test_shifted is as long as test.
    """
    for name, number in (("train", train), ("validation", validation), ("test", test), ("seed", seed)):
        check_number(name, number, 0, whole=True)
    check_number("correlation", correlation, 0, 1)
    sizes = dict(zip(SPLITS, (train, validation, test, test)))
    shown = "shapes()" if seed == 0 else f"shapes({seed})"

    def source(split: str) -> Source:
        name, rows = slice_split(split, sizes, shown)
        agree = 1 / len(BACKGROUNDS) if name == "test_shifted" else correlation

        def read(index: int) -> Record:
            return draw(np.random.default_rng([seed, SPLITS.index(name), rows[index]]), agree)

        return Source(shown, split, CLASSES, len(rows), read, (SIZE, SIZE), ("box", "region", "group"))

    return source


def draw(random: np.random.Generator, agree: float) -> Record:
    """One picture; the background is the class's own with probability `agree`, else one of the other five."""
    label = int(random.integers(len(CLASSES)))
    conflict = bool(random.random() >= agree)
    background = (label + int(random.integers(1, len(BACKGROUNDS))) * conflict) % len(BACKGROUNDS)
    base = random.uniform(0.3, 0.7, 3)
    colour = base + 0.4 * random.uniform(0.6, 1, 3) * random.choice([-1, 1], 3)
    amplitude = _log_uniform(random, 0.02, 0.15)
    picture = base + amplitude * texture(random, BACKGROUNDS[background])[..., None]
    distance = outline(random, CLASSES[label])
    cover = np.clip(0.5 - distance, 0, 1)[..., None]  # of each pixel: edges are antialiased
    picture = picture + cover * (colour - picture) + 0.05 * random.standard_normal((SIZE, SIZE, 3), np.float32)
    region = (distance < 0).astype(np.uint8)
    return {
        "image": np.rint(255 * np.clip(picture, 0, 1)).astype(np.uint8),
        "label": label,
        "region": region,
        "box": box_of(region),
        "group": int(conflict),
    }


def texture(random: np.random.Generator, name: str) -> np.ndarray:
    """A periodic texture (h, w) of mean 0 and standard deviation 1/2, period 6 to 10 pixels, random phase."""
    y, x = np.mgrid[:SIZE, :SIZE]
    wave = 2 * np.pi / random.uniform(6, 10)
    a, b = random.uniform(0, 2 * np.pi, 2)
    diagonal = 0.5**0.5  # keeps the period of slanted stripes
    match name:
        case "horizontal":
            pattern = np.sin(wave * y + a)
        case "vertical":
            pattern = np.sin(wave * x + a)
        case "rising":
            pattern = np.sin(wave * diagonal * (x + y) + a)
        case "falling":
            pattern = np.sin(wave * diagonal * (x - y) + a)
        case "checker":
            pattern = np.clip(2 * np.sin(wave * x + a) * np.sin(wave * y + b), -1, 1)
        case "dots":
            pattern = np.clip(np.cos(wave * x + a) + np.cos(wave * y + b), 0, 1)
        case _:
            raise ValueError(name)
    # Equal power for all. With a standard deviation of .71 one of two GAP networks stayed near chance on test_shifted.
    return (pattern - pattern.mean()) / (2 * pattern.std())


def outline(random: np.random.Generator, name: str) -> np.ndarray:
    """Signed distance (h, w) in pixels to the outline of a shape of random size, place and rotation; negative
    inside."""
    radius = _log_uniform(random, *RADII)
    margin = radius * EXTENT[name] + 1
    centre_y, centre_x = random.uniform(margin, SIZE - margin, 2)
    turn = random.uniform(-0.5, 0.5)
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    y, x = (y - centre_y) / radius, (x - centre_x) / radius
    y, x = np.cos(turn) * y - np.sin(turn) * x, np.sin(turn) * y + np.cos(turn) * x
    match name:
        case "disc":
            distance = np.hypot(x, y) - 1
        case "square":
            distance = np.maximum(abs(x), abs(y)) - 0.8
        case "triangle":  # inradius half the circumradius, point up
            distance = np.maximum(y, abs(x) * 0.75**0.5 - y / 2) - EXTENT[name] / 2
        case "cross":
            arm, width = 0.925, 0.38
            distance = np.minimum(np.maximum(abs(x) - arm, abs(y) - width), np.maximum(abs(y) - arm, abs(x) - width))
        case "ring":
            distance = np.maximum(np.hypot(x, y) - 1, 0.5 - np.hypot(x, y))
        case "star":
            distance = _star(x, y, EXTENT[name])
        case _:
            raise ValueError(name)
    return distance * radius


def box_of(region: np.ndarray) -> np.ndarray:
    """The tight box (ymin, xmin, ymax, xmax) in [0, 1] round the pixels of region (h, w) that are inside."""
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    h, w = region.shape
    return np.array([rows[0] / h, columns[0] / w, (rows[-1] + 1) / h, (columns[-1] + 1) / w], np.float32)


def _star(x, y, outer):
    """Five points, the inner radius half the outer: fold the plane into half a point, then the distance to its one
    edge."""
    sector = 2 * np.pi / 5
    angle = abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    edge = outer / 2 * np.exp(1j * sector / 2) - outer  # from the tip to the inner corner
    return (edge.imag * (along - outer) - edge.real * across) / abs(edge)


def _log_uniform(random: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(random.uniform(np.log(low), np.log(high))))


TABLE = table(shapes)
