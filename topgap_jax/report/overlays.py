"""Pictures of maps: a map over its image, its colour bar, boxes and outlines, on whole pixels.

Drawn with Pillow, so that a 32 x 32 image is enlarged without blur and box lines stay crisp; the colours come with
matplotlib.
"""

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from topgap_jax.report.letters import length, write

CELL = 208  # wanted side of a picture, pixels; small images get the nearest whole multiple of their own size
LARGEST = 384  # larger images are made smaller
MUTED = "#5b6470"
TRUE_BOX, MAP_BOX, OUTLINE, HALO = "#22e0ff", "#ffffff", "#ffd21f", "#10141a"
BAR = 20  # pixels that a colour bar with its numbers needs
COLOURS, SIGNED_COLOURS = "inferno", "RdBu_r"


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


def overlay(image: np.ndarray, values: np.ndarray, size: tuple[int, int], *, signed: bool = False) -> Image.Image:
    """Map (h', w') over the greyscale image (h, w, 3), resized bilinearly (half-pixel).

    A map is scaled to [0, 1] by its own `limits`; a signed one is blue below 0, white at 0 and red above. A map that is
    zero everywhere, or not finite, is a grey cell that says so.
    """
    values = np.asarray(values, np.float32)
    if not np.isfinite(values).all():
        return message("map is not finite", size)
    if not values.any():
        return message("the map is zero", size)
    heat = np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.BILINEAR))
    low, high = limits(values, signed)
    heat = np.clip((heat - low) / (high - low), 0, 1) if high > low else np.zeros_like(heat)
    grey = np.asarray(enlarge(image, size).convert("L"), np.float32)[..., None] / 255
    # low values keep more of the image, so that dark parts of the map do not hide what stands there
    strength = np.abs(2 * heat - 1) if signed else heat
    alpha = (0.45 + 0.35 * strength)[..., None]
    colours = matplotlib.colormaps[SIGNED_COLOURS if signed else COLOURS](heat)[..., :3]
    mixed = (0.15 + 0.85 * grey) * (1 - alpha) + colours * alpha
    return Image.fromarray((np.clip(mixed, 0, 1) * 255).round().astype(np.uint8))


def limits(values: np.ndarray, signed: bool) -> tuple[float, float]:
    """The values that the two ends of the colours stand for: a map's minimum and its .99 quantile, of a signed one +-
    that of |value|; the largest instead where hardly any value differs. Few pixels of a gradient would else be all that
    is seen."""
    largest = np.abs(values) if signed else values
    low, high = float(largest.min()), float(np.quantile(largest, 0.99))
    high = high if high > low else float(largest.max())
    return (-high, high) if signed else (low, high)


def colour_bar(draw: ImageDraw.ImageDraw, at: tuple[int, int], width: int, values: np.ndarray, signed: bool) -> None:
    """The colours of a map (h', w') with the values at both ends, `width` pixels wide; none of a map without any."""
    values = np.asarray(values, np.float32)
    if not np.isfinite(values).all() or not values.any():
        return
    ends = [f"{end:.2g}" for end in limits(values, signed)]
    left, right = (int(length(text, 10)) + 4 for text in ends)
    colours = matplotlib.colormaps[SIGNED_COLOURS if signed else COLOURS]
    inner = width - left - right
    for x in range(max(inner, 0)):
        red, green, blue, _ = colours(x / max(inner - 1, 1), bytes=True)
        draw.line((at[0] + left + x, at[1] + 4, at[0] + left + x, at[1] + 10), fill=(int(red), int(green), int(blue)))
    write(draw, at, ends[0], left, points=10, colour=MUTED)
    write(draw, (at[0] + width - right + 4, at[1]), ends[1], right, points=10, colour=MUTED)


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


def message(text: str, size: tuple[int, int]) -> Image.Image:
    """A grey cell with a word in it."""
    picture = Image.new("RGB", size[::-1], "#c9ced6")
    write(ImageDraw.Draw(picture), (8, size[0] // 2 - 8), text, size[1] - 12, points=13)
    return picture
