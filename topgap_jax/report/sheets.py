"""Contact sheets: what the network saw, what it said and where it looked, as PNG files.

Drawn with Pillow on whole pixels, so that a 32 x 32 image is enlarged without blur and box lines stay crisp; the
colours and the font come with matplotlib.
"""

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import chex
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 208  # wanted side of a picture, pixels; small images get the nearest whole multiple of their own size
LARGEST = 384  # larger images are made smaller
GAP, MARGIN = 6, 14
PAPER, INK, MUTED = "#ffffff", "#1a1d21", "#5b6470"
RIGHT, WRONG = "#0b7a3e", "#c3221f"
TRUE_BOX, MAP_BOX, OUTLINE, HALO = "#22e0ff", "#ffffff", "#ffd21f", "#10141a"


def sheet(
    path: str | os.PathLike,
    images: np.ndarray,
    *,
    names: Sequence[tuple[str, str]],
    maps: Mapping[str, np.ndarray],
    boxes: np.ndarray | None = None,
    regions: np.ndarray | None = None,
    map_boxes: Mapping[str, np.ndarray] | None = None,
    title: str = "",
) -> Path:
    """Write one row per image: the image, then every method's map laid over it; returns `path`.

    images (n, h, w, 3) in [0, 1]; names n pairs (true, predicted), empty where one is not known; maps
    {method: (n, h', w')}, resized bilinearly (half-pixel) and then scaled to [0, 1] by their own minimum and maximum;
    boxes (n, 4) as (ymin, xmin, ymax, xmax) in [0, 1]; regions (n, h, w), 1 inside; map_boxes {method: (n, 4)}.
    A box without area is not drawn.
    """
    images = np.asarray(images, np.float32)
    chex.assert_shape(images, (len(names), None, None, 3))
    chex.assert_shape([np.asarray(values) for values in maps.values()], (len(images), None, None))
    size = cell_size(images.shape[1], images.shape[2])
    height, width = size
    columns = 1 + len(maps)
    inner = columns * width + (columns - 1) * GAP
    top = MARGIN + 30 * bool(title) + 24
    row_height = 24 + height + 8
    lines = legend(inner, any(true for true, _ in names), boxes is not None, regions is not None, bool(map_boxes))
    canvas = Image.new("RGB", (inner + 2 * MARGIN, top + len(images) * row_height + 18 * len(lines) + 8), PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        write(draw, (MARGIN, MARGIN - 2), title, inner, points=19, bold=True)
    for column, name in enumerate(["image", *maps]):
        write(draw, (MARGIN + column * (width + GAP), top - 20), name, width, points=13, colour=MUTED)
    for row, image in enumerate(images):
        y = top + row * row_height
        caption(draw, (MARGIN, y + 3), *names[row], inner)
        box = None if boxes is None else boxes[row]
        region = None if regions is None else np.asarray(regions[row]) == 1
        canvas.paste(marked(enlarge(image, size), box=box, region=region), (MARGIN, y + 24))
        for column, (name, values) in enumerate(maps.items(), start=1):
            map_box = None if map_boxes is None or name not in map_boxes else map_boxes[name][row]
            picture = marked(overlay(image, values[row], size), box=box, map_box=map_box, thin=True)
            canvas.paste(picture, (MARGIN + column * (width + GAP), y + 24))
    for i, line in enumerate(lines):
        for x, colour, text in line:
            y = top + len(images) * row_height + 18 * i
            if colour:
                draw.rectangle((MARGIN + x, y + 3, MARGIN + x + 10, y + 11), fill=colour, outline=HALO)
            write(draw, (MARGIN + x + 15 * bool(colour), y), text, inner, points=12, colour=MUTED)
    return save(canvas, path)


def field_figure(path: str | os.PathLike, fields: Mapping[str, np.ndarray], *, title: str = "") -> Path:
    """Write effective receptive fields {name: (h, w) >= 0} side by side, shown as sqrt(E / max E); returns `path`."""
    sizes = {name: cell_size(*np.shape(values)) for name, values in fields.items()}
    height, width = (max(size[axis] for size in sizes.values()) for axis in (0, 1))
    columns = min(4, len(fields))
    rows = -(-len(fields) // columns)
    inner = columns * width + (columns - 1) * GAP
    top = MARGIN + 30 * bool(title)
    canvas = Image.new("RGB", (inner + 2 * MARGIN, top + rows * (height + 30) + 22), PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        write(draw, (MARGIN, MARGIN - 2), title, inner, points=19, bold=True)
    for i, (name, values) in enumerate(fields.items()):
        x, y = MARGIN + i % columns * (width + GAP), top + i // columns * (height + 30)
        write(draw, (x, y), name, width, points=13)
        canvas.paste(field_picture(np.asarray(values, np.float32), sizes[name]), (x, y + 20))
    note = "Influence of each pixel on one position of the class map; "
    note += "brightness is the square root of the share of the maximum."
    write(draw, (MARGIN, canvas.height - 26), note, inner, points=12, colour=MUTED)
    return save(canvas, path)


def cell_size(height: int, width: int) -> tuple[int, int]:
    """Pixels (height, width) at which an image is shown: a whole multiple near CELL, the longer side <= LARGEST."""
    longest = max(height, width)
    if longest > LARGEST:
        return max(1, round(height * LARGEST / longest)), max(1, round(width * LARGEST / longest))
    factor = max(1, round(CELL / longest))
    return height * factor, width * factor


def enlarge(image: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Image (h, w, 3) in [0, 1] at `size` (height, width): square pixels when larger, averaged when smaller."""
    picture = Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))
    shrinks = size[0] < picture.height
    return picture.resize(size[::-1], Image.Resampling.BOX if shrinks else Image.Resampling.NEAREST)


def overlay(image: np.ndarray, values: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Map (h', w') over the greyscale image (h, w, 3); a map that is not finite is a grey cell that says so."""
    values = np.asarray(values, np.float32)
    if not np.isfinite(values).all():
        return message("map is not finite", size)
    heat = np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.BILINEAR))
    heat = heat - heat.min()
    heat = heat / heat.max() if heat.max() > 0 else heat
    grey = np.asarray(enlarge(image, size).convert("L"), np.float32)[..., None] / 255
    # low values keep more of the image, so that dark parts of the map do not hide what stands there
    alpha = (0.45 + 0.35 * heat)[..., None]
    mixed = (0.15 + 0.85 * grey) * (1 - alpha) + matplotlib.colormaps["inferno"](heat)[..., :3] * alpha
    return Image.fromarray((np.clip(mixed, 0, 1) * 255).round().astype(np.uint8))


def field_picture(values: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Effective receptive field (h, w) as sqrt(E / max E) in colour."""
    if not np.isfinite(values).all():
        return message("field is not finite", size)
    shown = np.sqrt(np.clip(values, 0, None) / max(float(values.max()), np.finfo(np.float32).tiny))
    return enlarge(matplotlib.colormaps["inferno"](shown)[..., :3], size)


def marked(
    picture: Image.Image,
    *,
    box: np.ndarray | None = None,
    region: np.ndarray | None = None,
    map_box: np.ndarray | None = None,
    thin: bool = False,
) -> Image.Image:
    """The picture with the outline of `region` (h, w) bool and the boxes; a dark halo makes every line stand out."""
    if region is not None:
        inside = np.asarray(Image.fromarray(region).resize(picture.size, Image.Resampling.NEAREST))
        pixels = np.array(picture)
        pixels[rim(inside, 3)] = Image.new("RGB", (1, 1), HALO).getpixel((0, 0))
        pixels[rim(inside, 2)] = Image.new("RGB", (1, 1), OUTLINE).getpixel((0, 0))
        picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    if box is not None:
        rectangle(draw, picture.size, box, TRUE_BOX, width=1 if thin else 2)
    if map_box is not None:
        rectangle(draw, picture.size, map_box, MAP_BOX, width=2, dashed=True)
    return picture


def rim(inside: np.ndarray, width: int) -> np.ndarray:
    """The pixels of `inside` (h, w) within `width` of its border."""
    core = np.pad(inside, width)
    h, w = inside.shape
    shifts = [(0, width), (2 * width, width), (width, 0), (width, 2 * width)]
    return inside & ~np.logical_and.reduce([core[y : y + h, x : x + w] for y, x in shifts])


def rectangle(draw: ImageDraw.ImageDraw, size, box, colour: str, *, width: int, dashed: bool = False) -> None:
    """Draw (ymin, xmin, ymax, xmax) in [0, 1] on a picture of `size` (width, height)."""
    ymin, xmin, ymax, xmax = (float(value) for value in box)
    if not (ymax > ymin and xmax > xmin):  # also a box of NaN: this image has none
        return
    left, right = round(xmin * size[0]), max(round(xmax * size[0]) - 1, 0)
    top, bottom = round(ymin * size[1]), max(round(ymax * size[1]) - 1, 0)
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=HALO)
    if right - left > 2 * width and bottom - top > 2 * width:
        draw.rectangle((left + width, top + width, right - width, bottom - width), outline=HALO)
    if not dashed:
        draw.rectangle((left, top, right, bottom), outline=colour, width=width)
        return
    for x in range(left, right, 10):
        end = min(x + 5, right)
        draw.rectangle((x, top, end, top + width - 1), fill=colour)
        draw.rectangle((x, max(bottom - width + 1, top), end, bottom), fill=colour)
    for y in range(top, bottom, 10):
        end = min(y + 5, bottom)
        draw.rectangle((left, y, left + width - 1, end), fill=colour)
        draw.rectangle((max(right - width + 1, left), y, right, end), fill=colour)


def caption(draw: ImageDraw.ImageDraw, at: tuple[int, int], true: str, predicted: str, width: int) -> None:
    """The predicted name, green with a tick where right, red with a cross and the true one where wrong; else plain."""
    if not true or not predicted:
        write(draw, at, predicted or true, width, bold=True)
    elif predicted == true:
        write(draw, at, f"✓ {predicted}", width, bold=True, colour=RIGHT)
    else:
        used = write(draw, at, f"✗ {predicted}", 0.6 * width, bold=True, colour=WRONG) + 8
        write(draw, (at[0] + used, at[1]), f"true: {true}", width - used, colour=MUTED)


def legend(width: int, truth: bool, box: bool, region: bool, map_box: bool) -> list[list[tuple[int, str, str]]]:
    """What the colours mean, broken into lines of at most `width` pixels: (x, colour, text) each."""
    entries = [(RIGHT, "right"), (WRONG, "wrong")] * truth
    entries += (
        [(TRUE_BOX, "true box")] * box + [(OUTLINE, "true region")] * region + [(MAP_BOX, "box of the map")] * map_box
    )
    entries += [("", "maps: dark low, bright high, each on its own scale")]
    lines, x = [[]], 0
    for colour, text in entries:
        needed = 15 * bool(colour) + int(font(12).getlength(text))
        if lines[-1] and x + needed > width:
            lines, x = [*lines, []], 0
        lines[-1].append((x, colour, text))
        x += needed + 14
    return lines


def write(draw, at, text: str, width: float, *, points: int = 14, bold: bool = False, colour: str = INK) -> int:
    """Draw one line of text, cut with an ellipsis to `width` pixels; returns the width used."""
    face = font(points, bold)
    text = " ".join(str(text).split())
    shown = text
    while shown and face.getlength(shown + "…" * (shown != text)) > width:
        shown = shown[:-1]
    shown += "…" * (shown != text)
    draw.text(at, shown, fill=colour, font=face)
    return int(face.getlength(shown))


@cache
def font(points: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib carries: the same letters on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name), points)


def message(text: str, size: tuple[int, int]) -> Image.Image:
    """A grey cell with a word in it."""
    picture = Image.new("RGB", size[::-1], "#c9ced6")
    write(ImageDraw.Draw(picture), (8, size[0] // 2 - 8), text, size[1] - 12, points=13)
    return picture


def save(canvas: Image.Image, path: str | os.PathLike) -> Path:
    """Write the PNG, making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, optimize=True)
    return path
