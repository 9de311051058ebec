"""Adversarial examples as a picture: clean image, perturbation magnified, adversarial image, and both labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from PIL import Image, ImageDraw

from topgap_jax.report.letters import write
from topgap_jax.report.overlays import MUTED, cell_size, enlarge
from topgap_jax.report.sheets import GAP, MARGIN, PAPER, RIGHT, WRONG

SHOWN = 6  # examples in a picture
MAGNIFIED = 10


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
    """The broken ones of the examples that `measure.evaluate` left in a file; None for a file that holds none."""
    try:
        with np.load(path) as stored:
            broken = stored["attack"] >= 0
            texts = [str(stored[name]) for name in ("split", "evaluator", "weights")]
            examples = Examples(*texts, *(stored[name][broken] for name in Examples._fields[3:]))
    except (OSError, ValueError, KeyError, BadZipFile, EOFError):
        return None
    return examples if len(examples.label) and examples.clean.ndim == 4 else None


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
    name = lambda label: classes[label] if label < len(classes) else f"class {label}"
    for row in range(shown):
        y, change = MARGIN + 20 + row * line, examples.adversarial[row] - examples.clean[row]
        write(draw, (left[0], y + 3), name(int(examples.label[row])), width, bold=True, colour=RIGHT)
        steps = int(examples.step[row])
        write(draw, (left[1], y + 3), f"after {steps} step{'s' * (steps != 1)}", width, points=13, colour=MUTED)
        write(draw, (left[2], y + 3), name(int(examples.predicted[row])), width, bold=True, colour=WRONG)
        for x, image in zip(left, (examples.clean[row], 0.5 + MAGNIFIED * change, examples.adversarial[row])):
            canvas.paste(enlarge(image, size), (x, y + 24))
    return canvas
