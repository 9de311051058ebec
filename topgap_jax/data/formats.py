"""The formats of pictures that are opened, and how a file of one becomes RGB."""

import contextlib
import importlib
import os
import stat
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, features

from topgap_jax.errors import UserError

for name in ("Avif", "Bmp", "Gif", "Jpeg", "Png", "Tiff", "WebP"):
    with contextlib.suppress(ImportError):  # AVIF is younger than the Pillow that may be here
        importlib.import_module(f"PIL.{name}ImagePlugin")
FORMATS = tuple(
    name
    for name in ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
    if name in Image.OPEN and (name not in ("AVIF", "WEBP") or features.check(name.lower()))
)
"""What is opened. Pillow knows forty more, and some of them start programs: Ghostscript for an EPS called a.png."""
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff") + tuple(
    f".{name.lower()}" for name in ("AVIF", "WEBP") if name in FORMATS
)
PIXELS, COLOURED = 180_000_000, 120_000_000
"""The largest picture that is decoded, asked from its header: a 13,400-pixel square of one channel of 8 bits, a 10,900-
pixel square of any other. It takes 1 GB at most."""
BAND = 4_000_000  # pixels that are made RGB at a time


def open_picture(file: Path, name: str = "") -> np.ndarray:
    """A picture as (h, w, 3) uint8 RGB, turned as its EXIF orientation says, transparency laid on white.

    16 bits a channel are scaled to 8; of an animation or of many pages the first is taken. name: what an error calls
    the file. Raises UserError for what is no ordinary file (a pipe is never opened: that could wait for ever), in
    none of `FORMATS`, larger than `PIXELS`, broken, or of numbers without a white (floating point, 32 bits).
    """
    name = name or str(file)
    check_ordinary(file, name)
    try:
        with file.open("rb") as stream, _opened(stream, name) as image:
            w, h = image.size
            limit = PIXELS if image.mode in ("1", "L", "P") else COLOURED
            if w * h > limit:
                raise UserError(f"{name} has {w} x {h} pixels, and the limit is {limit / 1e6:.0f} million; scale it")
            return _rgb(image, name)
    except UserError:
        raise
    except Exception as error:  # of a broken file Pillow raises nearly every kind there is
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{name} cannot be decoded: {reason}") from error


def check_ordinary(file: Path, name: str = "") -> None:
    """Raise a UserError for what cannot be read like a file: a pipe, a socket, a device, a link that leads nowhere."""
    try:
        mode = os.stat(file).st_mode
    except OSError as error:
        raise UserError(f"{name or file} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        raise UserError(f"{name or file} is {kinds.get(stat.S_IFMT(mode), 'a device')}, no file of a picture")


def _opened(stream, name: str) -> ImageFile.ImageFile:
    """`Image.open(stream, formats=FORMATS)`, without its warning of a large picture: that limit is `PIXELS`."""
    prefix = stream.read(16)
    for form in FORMATS:
        opener, accepts = Image.OPEN[form]
        if accepts(prefix):
            stream.seek(0)
            return opener(stream, "")
    if not prefix:
        raise UserError(f"{name} is empty")
    raise UserError(f"{name} is no picture of the formats that are read: {', '.join(FORMATS)}")


def _rgb(image: ImageFile.ImageFile, name: str) -> np.ndarray:
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if image.mode in ("I", "F") and not sixteen:
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise UserError(f"{name} holds {kind} values, which have no stated white; save it with 8 or 16 bits a channel")
    (w, h), rows = image.size, max(1, BAND // image.size[0])
    if h <= rows:
        return _whole(image, sixteen)
    pixels = np.empty((h, w, 3), np.uint8)
    for top in range(0, h, rows):  # or what lies between would take several times the memory of the picture
        bottom = min(top + rows, h)
        pixels[top:bottom] = _whole(image.crop((0, top, w, bottom)), sixteen)
    return pixels


def _whole(image: Image.Image, sixteen: bool) -> np.ndarray:
    if sixteen:
        return _scaled(np.asarray(image), image.info.get("transparency"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _scaled(values: np.ndarray, transparent: int | None) -> np.ndarray:
    """16-bit grey (h, w) as RGB of 8 bits: v / 257, rounded."""
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    grey = grey if transparent is None else np.where(values == transparent, np.uint8(255), grey)
    return np.repeat(grey[..., None], 3, -1)
