"""Text in pictures: one line cut to a width, or several, in letters that every machine has."""

import os
from functools import cache

import matplotlib
from matplotlib import font_manager, ft2font
from PIL import ImageFont

INK = "#1a1d21"


def write(draw, at, text: str, width: float, *, points: int = 14, bold: bool = False, colour: str = INK) -> int:
    """Draw one line of text, cut with an ellipsis to `width` pixels; returns the width used.

    Letters that DejaVu Sans lacks, such as Chinese ones, come from any font of this machine that has them; where none
    has, U+6F22 stands in a letter's place.
    """
    text = " ".join(str(text).split())
    shown = text[: int(width)]  # no letter is narrower than a pixel, and a name may be of any length
    while shown and length(shown + "…" * (shown != text), points, bold) > width:
        shown = shown[:-1]
    shown += "…" * (shown != text)
    x = at[0]
    for part, face in _runs(shown, points, bold):
        draw.text((x, at[1]), part, fill=colour, font=face)
        x += face.getlength(part)
    return int(x - at[0])


def wrapped(text: str, width: float, points: int) -> list[str]:
    """The text in lines of at most `width` pixels, broken behind a space, comma or bracket where there is one."""
    lines, rest = [], " ".join(str(text).split())
    while rest:
        end = len(rest)
        while end > 1 and length(rest[:end], points) > width:
            end -= 1
        if end < len(rest):
            at = max((i + 1 for i in range(end) if rest[i] in " ,(|"), default=0)
            end = at or end
        lines.append(rest[:end].strip())
        rest = rest[end:].lstrip()
    return lines or [""]


def length(text: str, points: int, bold: bool = False) -> float:
    """The width in pixels of a line of text."""
    return sum(face.getlength(part) for part, face in _runs(text, points, bold))


def font(points: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib carries: the same letters on every machine."""
    return _face(_dejavu(bold), points)


@cache
def _face(path, points):
    return ImageFont.truetype(path, points)


def _dejavu(bold):
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name)


def _runs(text, points, bold):
    """(part, font) of a line: neighbours of one font together, a letter that no font has as U+6F22."""
    runs = []
    for letter in text:
        path = _font_of(letter, bold)
        shown, path = (letter, path) if path else (f"U+{ord(letter):04X}", _dejavu(bold))
        if runs and runs[-1][1] == path:
            runs[-1][0] += shown
        else:
            runs.append([shown, path])
    return [(part, _face(path, points)) for part, path in runs]


@cache
def _font_of(letter, bold):
    """The file of a font that has the letter, DejaVu's before others; None where there is none."""
    fonts = font_manager.fontManager.ttflist if ord(letter) > 0x7F else []
    # Last Resort, which matplotlib brings too, has every letter as a box that says only of which script it is.
    others = sorted({entry.fname for entry in fonts if not entry.name.startswith("Last Resort")})
    return next((path for path in (_dejavu(bold), *others) if ord(letter) in _letters(path)), None)


@cache
def _letters(path):
    """The code points that a font file has."""
    try:
        return frozenset(ft2font.FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
