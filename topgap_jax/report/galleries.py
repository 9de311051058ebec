"""Pictures that an evaluator made of a result, beside each other with their captions."""

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from topgap_jax.report.sheets import GAP, MARGIN, PAPER, enlarge, write
from topgap_jax.types import Gallery

SIDE = 144  # a tile is enlarged by whole factors up to this side


def picture(gallery: Gallery) -> Image.Image:
    """The tiles in lines of `columns`, each as large as the largest, maps in the colours of all maps."""
    tiles = [np.asarray(tile) for tile in gallery.tiles]
    sizes = [_size(*tile.shape[:2]) for tile in tiles]
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    lines = -(-len(tiles) // gallery.columns)
    columns = min(gallery.columns, len(tiles))
    inner = columns * width + (columns - 1) * GAP
    canvas = Image.new("RGB", (inner + 2 * MARGIN, 2 * MARGIN + lines * (height + 26)), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, (tile, caption, size) in enumerate(zip(tiles, gallery.captions, sizes)):
        x, y = MARGIN + i % columns * (width + GAP), MARGIN + i // columns * (height + 26)
        write(draw, (x, y), caption, width, points=12)
        colours = tile / 255 if tile.ndim == 3 else matplotlib.colormaps["inferno"](tile)[..., :3]
        canvas.paste(enlarge(colours, size), (x, y + 20))
    return canvas


def _size(height: int, width: int) -> tuple[int, int]:
    """Height and width at which a tile is shown: a whole multiple of its own up to SIDE, and never smaller."""
    factor = max(1, SIDE // max(height, width))
    return height * factor, width * factor
