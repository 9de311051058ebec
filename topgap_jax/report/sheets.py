"""Contact sheets: what the network saw, what it said and where it looked, as PNG files."""

import contextlib
import io
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import chex
import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from topgap_jax.errors import UserError
from topgap_jax.progress import write_text
from topgap_jax.report.letters import font, wrapped, write
from topgap_jax.report.overlays import (
    BAR,
    HALO,
    MAP_BOX,
    MUTED,
    OUTLINE,
    TRUE_BOX,
    cell_size,
    colour_bar,
    enlarge,
    marked,
    message,
    overlay,
)

GAP, MARGIN, LINE = 6, 14, 17
PAPER = "#ffffff"
RIGHT, WRONG = "#0b7a3e", "#c3221f"
OTHER_FORMATS = (".jpg", ".jpeg", ".pdf", ".svg", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".html", ".npz")
"""Endings of a name that means a file, and no folder, of another kind than a sheet is."""


def sheet(
    path: str | os.PathLike,
    images: np.ndarray,
    *,
    names: Sequence[tuple[str, str]],
    maps: Mapping[str, np.ndarray],
    boxes: np.ndarray | None = None,
    regions: np.ndarray | None = None,
    map_boxes: Mapping[str, np.ndarray] | None = None,
    signed: Collection[str] = (),
    notes: Sequence[str] = (),
    title: str = "",
) -> Path:
    """Write one row per image: the image, then every method's map laid over it; returns `path`.

    images (n, h, w, 3) in [0, 1]; names n pairs (true, predicted), empty where one is not known; notes n texts behind
    the predicted name, such as its probability; maps {method: (n, h', w')}, as `overlays.overlay` draws them, with a
    colour bar each; signed: the methods whose maps have values below 0 that mean something; boxes (n, 4) as (ymin,
    xmin, ymax, xmax) in [0, 1]; regions (n, h, w), 1 inside; map_boxes {method: (n, 4)}. A box without area is not
    drawn.
    """
    images = np.asarray(images, np.float32)
    chex.assert_shape(images, (len(names), None, None, 3))
    chex.assert_shape([np.asarray(values) for values in maps.values()], (len(images), None, None))
    size = cell_size(images.shape[1], images.shape[2])
    height, width = size
    columns = 1 + len(maps)
    inner = columns * width + (columns - 1) * GAP
    headings = [wrapped(name, width, 13) for name in ["image", *maps]]
    top = MARGIN + 30 * bool(title) + LINE * max(map(len, headings)) + 7
    row_height = 24 + height + BAR
    truth, diverging = any(true for true, _ in names), bool(set(signed) & set(maps))
    lines = legend(inner, truth, boxes is not None, regions is not None, bool(map_boxes), diverging)
    canvas = Image.new("RGB", (inner + 2 * MARGIN, top + len(images) * row_height + 18 * len(lines) + 8), PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        write(draw, (MARGIN, MARGIN - 2), title, inner, points=19, bold=True)
    for column, heading in enumerate(headings):
        for i, text in enumerate(heading):
            at = (MARGIN + column * (width + GAP), top - 3 - LINE * (len(heading) - i))
            write(draw, at, text, width, points=13, colour=MUTED)
    for row, image in enumerate(images):
        y = top + row * row_height
        caption(draw, (MARGIN, y + 3), *names[row], inner, notes[row] if notes else "")
        box = None if boxes is None else boxes[row]
        region = None if regions is None else np.asarray(regions[row]) == 1
        canvas.paste(marked(enlarge(image, size), box=box, region=region), (MARGIN, y + 24))
        for column, (name, values) in enumerate(maps.items(), start=1):
            map_box = None if map_boxes is None or name not in map_boxes else map_boxes[name][row]
            shown = overlay(image, values[row], size, signed=name in signed)
            x = MARGIN + column * (width + GAP)
            canvas.paste(marked(shown, box=box, map_box=map_box, thin=True), (x, y + 24))
            colour_bar(draw, (x, y + 24 + height + 1), width, values[row], name in signed)
    for i, line in enumerate(lines):
        for x, colour, text in line:
            y = top + len(images) * row_height + 18 * i
            if colour:
                draw.rectangle((MARGIN + x, y + 3, MARGIN + x + 10, y + 11), fill=colour, outline=HALO)
            write(draw, (MARGIN + x + 15 * bool(colour), y), text, inner, points=12, colour=MUTED)
    return save(canvas, path)


def draw(out: Path, explained, pages, overlays: str | os.PathLike | None = None):
    """Write a sheet a page as the pages come; gives (path, page).

    explained, pages: of `setup.explain`. out: a folder, where a sheet has the title's name, or a .png file. A file that
    is there stays: a sheet in a folder gets the next free number, and a .png is refused. overlays: a folder that gets
    each map over its picture as a file too.
    """
    if out.suffix.lower() in OTHER_FORMATS and not out.is_dir():
        raise UserError(f"--out {out}: sheets are PNG files; name a folder, or {out.with_suffix('.png')}")
    single = out.suffix.lower() == ".png"
    if single and out.exists():
        raise UserError(f"{out} is there already: name another file, or a folder, where a sheet gets a free number")
    folder, stem = (out.parent, out.stem) if single else (out, explained.title)
    several = explained.count > explained.rows

    def drawn():
        # First, so that a folder that cannot be made ends the work before it begins.
        for each in [folder, *([Path(overlays)] if overlays is not None else [])]:
            with writing_in(each):
                each.mkdir(parents=True, exist_ok=True)
        for number, page in enumerate(pages, start=1):
            path = free(folder / f"{stem}{f'_{number:03d}' * several}.png")
            notes = [f"{share:.2f}" for share in page.probability]
            for i, wanted in enumerate(page.target):
                if wanted != page.predicted[i]:
                    notes[i] += f", {explained.classes[wanted]} {page.target_probability[i]:.2f}"
            with writing_in(folder):
                sheet(path, page.images, names=page.names, maps=page.maps, boxes=page.boxes, regions=page.regions,
                      signed=explained.signed, notes=notes, title=explained.heading)  # fmt: skip
                if overlays is not None:
                    _overlays(Path(overlays), explained, page)
            yield path, page

    return drawn()


@contextlib.contextmanager
def writing_in(folder: Path):
    """What the system says of a folder or a file in it, as a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write in '{error.filename or folder}': {error.strerror}") from None


def _overlays(folder: Path, explained, page) -> None:
    for row, image in enumerate(page.images):
        picture = Path(page.files[row]).stem or f"{explained.title}_{page.ids[row]}"
        for name, values in page.maps.items():
            shown = overlay(image, values[row], cell_size(*image.shape[:2]), signed=name in explained.signed)
            method = re.sub(r"[^\w.-]+", "_", name).strip("_")
            save(shown, free(folder / f"{picture}_{method}.png"))


def free(path: Path) -> Path:
    """The path, or with the least number behind its name that no file has: test.png, test-2.png."""
    number, tried = 2, path
    while tried.exists():
        tried, number = path.with_name(f"{path.stem}-{number}{path.suffix}"), number + 1
    return tried


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


def field_picture(values: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Effective receptive field (h, w) as sqrt(E / max E) in colour."""
    if not np.isfinite(values).all():
        return message("field is not finite", size)
    shown = np.sqrt(np.clip(values, 0, None) / max(float(values.max()), np.finfo(np.float32).tiny))
    return enlarge(matplotlib.colormaps["inferno"](shown)[..., :3], size)


def caption(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], true: str, predicted: str, width: int, note: str = ""
) -> None:
    """The predicted name, green with a tick where right, red with a cross and the true one where wrong; else plain;
    behind it the note."""
    if not true or not predicted:
        parts = [(predicted or true, {"bold": True})]
    elif predicted == true:
        parts = [(f"✓ {predicted}", {"bold": True, "colour": RIGHT})]
    else:
        parts = [(f"✗ {predicted}", {"bold": True, "colour": WRONG})]
    parts += [(note, {"colour": MUTED})] * bool(note)
    parts += [(f"true: {true}", {"colour": MUTED})] * (true not in ("", predicted) and bool(predicted))
    used = 0
    for i, (text, style) in enumerate(parts):
        last = i == len(parts) - 1
        room = width - used if last else 0.6 * (width - used)
        used += write(draw, (at[0] + used, at[1]), text, room, **style) + 8


def legend(
    width: int, truth: bool, box: bool, region: bool, map_box: bool, diverging: bool = False
) -> list[list[tuple[int, str, str]]]:
    """What the colours mean, broken into lines of at most `width` pixels: (x, colour, text) each."""
    entries = [(RIGHT, "right"), (WRONG, "wrong")] * truth
    entries += (
        [(TRUE_BOX, "true box")] * box + [(OUTLINE, "true region")] * region + [(MAP_BOX, "box of the map")] * map_box
    )
    entries += [("", "maps: dark low, bright high, each on its own scale, its top the .99 quantile")]
    entries += [("", "signed maps: red for the class, blue against it")] * diverging
    lines, x = [[]], 0
    for colour, text in entries:
        needed = 15 * bool(colour) + int(font(12).getlength(text))
        if lines[-1] and x + needed > width:
            lines, x = [*lines, []], 0
        lines[-1].append((x, colour, text))
        x += needed + 14
    return lines


def save(canvas: Image.Image, path: str | os.PathLike) -> Path:
    """Write the PNG, whole or not at all, making its folder."""
    path, content = Path(path), io.BytesIO()
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(content, "PNG", optimize=True)
    write_text(path, content.getvalue())
    return path
