"""Fewer than four classes: DLR gives way to a difference of logits, and terminal, row and report say so."""

import jax.numpy as jnp
import numpy as np
import pytest

from topgap_jax.attacks import apgd_t, autoattack, mim, pgd
from topgap_jax.balls import linf
from topgap_jax.evaluators import curve, robust
from topgap_jax.measure import results
from topgap_jax.measure.evaluate import evaluate
from topgap_jax.measure.robust import for_classes
from topgap_jax.measure.splits import resident_split
from topgap_jax.report.page import report
from topgap_jax.scores import dlr, margin
from topgap_jax.types import Model, Output

BALL = linf(8 / 255)
IMAGES = np.random.default_rng(0).integers(64, 192, (8, 8, 8, 3)).astype(np.uint8)
REPLACED = {  # version, classes -> how often each score is replaced
    ("standard", 2): (0, 1), ("standard", 3): (0, 1), ("standard", 4): (0, 0),
    ("plus", 2): (1, 1), ("plus", 3): (0, 1), ("plus", 4): (0, 0),
    ("rand", 2): (1, 0), ("rand", 3): (0, 0), ("rand", 4): (0, 0),
}  # fmt: skip


@pytest.mark.parametrize("version, classes", REPLACED)
def test_which_attacks_of_autoattack_raise_another_score(version, classes):
    fitted, lines = for_classes(robust(autoattack(BALL, version=version)), classes)
    names = [attack.name for attack in fitted.runs]
    untargeted, targeted = REPLACED[version, classes]
    assert sum(f"(max z_k - z_y for dlr: {classes} classes)" in name for name in names) == untargeted
    assert sum(f"(z_t - z_y for targeted_dlr: {classes} classes)" in name for name in names) == targeted
    assert len(lines) == untargeted + targeted
    assert all(f": {classes} classes are too few for " in line for line in lines)


def test_any_attack_with_the_score_says_so_and_no_other_does():
    attacks = (pgd(BALL, score=dlr), mim(BALL, score=dlr), pgd(BALL, score=margin), pgd(BALL))
    fitted, lines = for_classes(curve(*attacks, eps=(0.1,)), 2)
    assert ["z_k" in attack.name for attack in fitted.runs] == [True, True, False, False] and len(lines) == 2
    assert fitted.eps == (0.1,)


def model(classes):
    """A linear one, and its variables."""
    weights = jnp.asarray(np.random.default_rng(classes).normal(size=(IMAGES[0].size, classes)) / 8, jnp.float32)

    def apply(variables, images, *, train=False, keys=None, targets=None, step=None):
        return Output(images.reshape(len(images), -1) @ variables["params"], {}, {})

    return Model(None, apply), {"params": weights, "batch_stats": {}}


def logits_of(classes):
    network, variables = model(classes)
    return np.asarray(network.apply(variables, IMAGES / np.float32(255)).logits)


def measured(classes, evaluators, workdir=None):
    network, variables = model(classes)
    labels = logits_of(classes).argmax(1).astype(np.int32)
    data = resident_split({"image": IMAGES, "label": labels}, classes=classes, batch=8)
    return evaluate(
        network, variables, data, evaluators, split="test", classes=classes, workdir=workdir, progress=False
    )


def test_terminal_row_and_report_say_it_once(tmp_path, capsys):
    attack = apgd_t(BALL, steps=2)
    (row, _) = measured(3, {"robust(twice)": robust(attack, attack), "robust(once)": robust(attack)}, tmp_path)
    line = "topgap: apgd-t-2 x 9, linf(8/255): 3 classes are too few for targeted_dlr; it raises z_t - z_y instead\n"
    assert capsys.readouterr().err == line, "for both rows together"
    name = "apgd-t-2 x 9, linf(8/255) (z_t - z_y for targeted_dlr: 3 classes)"
    assert row.measures["robust_accuracy"].label == f"accuracy under {name}, {name}"
    assert row.measures["after_2"].label == f"accuracy after {name}"
    assert results.read(tmp_path / results.FILE).rows[0] == row
    (tmp_path / "config.json").write_text('{"config": {"train": "train", "seed": 0, "evaluators": ""}, "file": null}')
    assert name in report([tmp_path], tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("version", ["standard", "plus"])
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_autoattack_breaks_what_can_be_broken(classes, version):
    """Of the linear network the radius is known: the margin over the l1 norm of the difference of weights."""
    logits, weights = logits_of(classes), np.asarray(model(classes)[1]["params"])
    labels = logits.argmax(1)
    margins = logits[np.arange(8), labels][:, None] - logits
    lengths = np.abs(weights[:, labels].T[:, :, None] - weights).sum(1)
    radii = np.sort(np.min(margins / np.where(lengths > 0, lengths, np.nan), 1, where=lengths > 0, initial=np.inf))
    eps = float(radii[3:5].mean())
    assert eps < 64 / 255, "the pixel box is out of reach"
    (row,) = measured(classes, {"robust": robust(autoattack(linf(eps), version=version))})
    assert row.measures["robust_accuracy"].value == 0.5
