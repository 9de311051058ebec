"""Adversarial examples as a picture: clean image, perturbation magnified, adversarial image, and both labels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from topgap_jax.progress import say
from topgap_jax.report.letters import write
from topgap_jax.report.overlays import MUTED, cell_size, enlarge
from topgap_jax.report.sheets import GAP, MARGIN, PAPER, RIGHT, WRONG
from topgap_jax.stored import opened_npz

SHOWN = 6  # examples in a picture
MAGNIFIED = 10
TEXTS = ("split", "evaluator", "weights")


class Examples(NamedTuple):
    """Examples (m,) that attacks broke, of one evaluator on one split, clean and adversarial (m, h, w, c)."""

    split: str
    evaluator: str
    weights: str
    clean: np.ndarray
    adversarial: np.ndarray
    label: np.ndarray
    predicted: np.ndarray
    step: np.ndarray


def read(path: Path) -> Examples | None:
    """The broken ones of the examples that `measure.evaluate` left in a file; None where none broke, and, with a line,
    for a file that is another."""
    try:
        with opened_npz(path) as arrays:
            if wrong := _mismatch(arrays.about):
                raise ValueError(wrong)
            stored = {name: arrays.read(name) for name in ("attack", *Examples._fields)}
            if not all(((stored[name] >= 0) & (stored[name] <= 1)).all() for name in ("clean", "adversarial")):
                raise ValueError("values outside [0, 1]")
    except Exception as error:  # zipfile, zlib and NumPy raise of every kind on damaged bytes
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        say(f"{path} holds no adversarial images that can be shown: {reason}; evaluate again")
        return None
    broken = stored.pop("attack") >= 0
    rows = {name: values[broken] for name, values in stored.items() if name not in TEXTS}
    if not broken.any():
        return None
    return Examples(**{name: str(stored[name]) for name in TEXTS}, **rows)


def _mismatch(about: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> str:
    """What of an archive's arrays, by shape and type, is not as `measure.adversarial.save` writes it, "" if all is."""
    if missing := [name for name in ("attack", *Examples._fields) if name not in about]:
        return f"it has no '{missing[0]}'"
    images, _ = about["adversarial"]
    expected = {name: (images, "f") for name in ("adversarial", "clean")}
    expected |= {name: (images[:1], "i") for name in ("attack", "label", "predicted", "step")}
    expected |= {name: ((), "U") for name in TEXTS}
    for name, (shape, kind) in expected.items():
        if about[name][0] != shape or about[name][1].kind != kind:
            return f"'{name}' is {about[name][1]} of shape {about[name][0]}"
    return "" if len(images) == 4 and images[3] == 3 and min(images[1:]) > 0 else f"images of shape {images}"


def picture(examples: Examples, classes: Sequence[str]) -> Image.Image:
    """A row for each of the first examples: clean, grey + 10 x perturbation, adversarial, with the names of their
    classes."""
    height, width = size = cell_size(*examples.clean.shape[1:3])
    shown, line = min(SHOWN, len(examples.label)), height + 24 + 8
    canvas = Image.new("RGB", (3 * width + 2 * GAP + 2 * MARGIN, MARGIN + 22 + shown * line), PAPER)
    draw = ImageDraw.Draw(canvas)
    left = [MARGIN + column * (width + GAP) for column in range(3)]
    for x, text in zip(left, ("clean", f"perturbation x {MAGNIFIED}, 0 is grey", "adversarial")):
        write(draw, (x, MARGIN - 4), text, width, points=13, colour=MUTED)
    name = lambda label: classes[label] if 0 <= label < len(classes) else f"class {label}"
    for row in range(shown):
        y, change = MARGIN + 20 + row * line, examples.adversarial[row] - examples.clean[row]
        write(draw, (left[0], y + 3), name(int(examples.label[row])), width, bold=True, colour=RIGHT)
        steps = int(examples.step[row])
        write(draw, (left[1], y + 3), f"after {steps} step{'s' * (steps != 1)}", width, points=13, colour=MUTED)
        write(draw, (left[2], y + 3), name(int(examples.predicted[row])), width, bold=True, colour=WRONG)
        for x, image in zip(left, (examples.clean[row], 0.5 + MAGNIFIED * change, examples.adversarial[row])):
            canvas.paste(enlarge(image, size), (x, y + 24))
    return canvas
