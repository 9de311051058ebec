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
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of a TIFF, and a value of the second
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
    _scale_transparent(image)
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if image.mode in ("I", "F") and not sixteen:
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise UserError(f"{name} holds {kind} values, which have no stated white; save it with 8 or 16 bits a channel")
    ends = _ends(image) if sixteen else None
    (w, h), rows = image.size, max(1, BAND // image.size[0])
    if h <= rows:
        return _whole(image, ends)
    pixels = np.empty((h, w, 3), np.uint8)
    for top in range(0, h, rows):  # or what lies between would take several times the memory of the picture
        bottom = min(top + rows, h)
        pixels[top:bottom] = _whole(image.crop((0, top, w, bottom)), ends)
    return pixels


def _ends(image: ImageFile.ImageFile) -> tuple[int, int]:
    """The values of black and of white of a grey picture of more than 8 bits: a TIFF may have 12, and white as 0."""
    tags = getattr(image, "tag_v2", {})
    largest = 2 ** tags.get(BITS, (16,))[0] - 1
    return (largest, 0) if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else (0, largest)


def _scale_transparent(image: ImageFile.ImageFile) -> None:
    """The transparent value of a PNG in 8 bits: Pillow makes its pixels so, of 2, 4 and three times 16 bits."""
    value, stored = image.info.get("transparency"), image.tile[0].args if image.tile else ""
    if value is None or image.format != "PNG":
        return
    if stored in ("L;2", "L;4"):
        image.info["transparency"] = value * (85 if stored == "L;2" else 17)
    elif stored == "RGB;16B":
        image.info["transparency"] = tuple(each >> 8 for each in value)


def _whole(image: Image.Image, ends: tuple[int, int] | None) -> np.ndarray:
    """RGB of an image; ends: black and white of one of more than 8 bits."""
    if ends:
        return _scaled(np.asarray(image), ends, image.info.get("transparency"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _scaled(values: np.ndarray, ends: tuple[int, int], transparent: int | None) -> np.ndarray:
    """Grey (h, w) of more than 8 bits as RGB of 8, rounded."""
    black, white = ends
    largest = max(ends)
    above = np.minimum(values.astype(np.uint32), largest) if white else largest - np.minimum(values, largest)
    grey = ((above.astype(np.uint32) * 255 + largest // 2) // largest).astype(np.uint8)
    grey = grey if transparent is None else np.where(values == transparent, np.uint8(255), grey)
    return np.repeat(grey[..., None], 3, -1)
