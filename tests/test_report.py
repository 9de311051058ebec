"""The report, the tables in the terminal, and the page in a real browser."""

import json
from pathlib import Path

import numpy as np
import pytest

from topgap_jax.report import sheet

EVIL = "<script>alert(1)</script>"
ROBUST = "robust(pgd(linf(eps), steps=20))"


def rows_of(seed, *, regions=True):
    """Rows as run/evaluate.py writes them."""
    random = np.random.default_rng(seed)
    cost = {"forward_passes": 1.0, "gradient_evaluations": 0.0, "seconds": 3.21, "device": "cpu"}
    rows = []
    for split, level in (("test", 0.91), ("test_shifted", 0.52)):
        level = level + random.normal() * 0.03
        near = lambda value, half=0.02: {"": value, "_low": value - half, "_high": value + half}
        interval = lambda name, value: {name + end: number for end, number in near(value).items()}
        x = np.linspace(0.2, 1, 9)

        def row(evaluator, values, curves=None, split=split, **more):
            rows.append({"split": split, "evaluator": evaluator, "examples": 1000, "complete": True, "values": values,
                         "curves": curves or {}, "cost": {**cost, **more}, "audit": None})  # fmt: skip

        calibration = {"x": x.tolist(), "y": (x - 0.1 * random.random(9)).tolist()}
        row("accuracy()", interval("accuracy", level) | {"nll": 0.3 / level, "calibration_error": 0.04,
            "worst_group_accuracy": level - 0.3, "group_0_accuracy": level - 0.3, "group_0_examples": 104},
            {"calibration": calibration})  # fmt: skip
        robust = {"clean_accuracy": level, "robust_accuracy": level / 2, "robust_low": level / 2 - 0.03,
                  "robust_high": level / 2 + 0.03, "attacked": 910, "mean_steps": 12.4, "unconfirmed": 0, "fragile": 2}  # fmt: skip
        row(
            ROBUST,
            robust,
            {"after_runs": {"x": [0, 1], "y": [level, level / 2]}},
            gradient_evaluations=20.0,
            seconds=81.7,
        )
        row("localisation(cam())", interval("iou", 0.41 + seed / 50) | {"best_iou": 0.47, "best_iou_tau": 0.35,
            "max_box_accuracy": 0.55, "centre_iou": 0.3, "full_iou": 0.14, "in_region": 0.6, "lift": None},
            {"iou_curve": {"x": x.tolist(), "y": (0.5 - (x - 0.4) ** 2).tolist()}})  # fmt: skip
        if regions:
            row("regions(bank)", {"foreground_sensitivity": 0.12 + seed / 100, "foreground_accuracy": 0.6, "foreground_low": 0.57,
                "foreground_high": 0.63, "background_accuracy": 0.3, "background_gap": 0.22, "left_out": 0},
                {"sensitivity_curve": {"x": [0.1, 0.2, 0.4], "y": [0.1, 0.12, 0.2]}}, forward_passes=10.0)  # fmt: skip
    return rows


def make_run(
    folder: Path, *, pool="gap()", seed=0, evaluated=True, trained=True, sheets=True, regions=True, **config
) -> Path:
    """A run folder as train, evaluate and explain leave it."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    model = "classifier(small_resnet(), pyramid_head(pool, width=32), classes=classes, mean=mean, std=std)"
    config = {"seed": 0, "source": "shapes()", "train": "train", "image_size": [64, 64], "pool": pool, "model": model,
              "batch": 100, "epochs": 8, "objective": "standard()", "eps": 2 / 255, **config}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"config": config, "file": "/home/me/configs/shapes.py"}))
    versions = {"command": f"topgap train --config.pool='{pool}'", "commit": "0a1b2c3d4e5f", "device": "cpu",
                "versions": {"python": "3.11.2", "jax": "0.10.2"}}  # fmt: skip
    (folder / "versions.json").write_text(json.dumps(versions))
    if trained:
        lines = []
        for step in range(10, 321, 10):
            loss = 1.8 * np.exp(-step / 120) + 0.1 * random.random()
            lines.append({"step": step, "epoch": step / 40, "kind": "train", "loss": loss, "accuracy": 1 - loss / 2})
            if step % 40 == 0:
                lines.append(
                    {"step": step, "epoch": step / 40, "kind": "validation", "accuracy": 0.95 - loss / 2, "nll": loss}
                )
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluated:
        stored = {"rows": rows_of(seed, regions=regions), "weights": "checkpoint best, step 320", "data": "shapes()"}
        (folder / "evaluation.json").write_text(json.dumps(stored))
    if sheets:
        y, x = np.mgrid[:64, :64] / 64
        for name in ("test", "test_shifted"):
            images = np.clip(random.random((3, 64, 64, 3)) * 0.2 + np.stack([x, y, 1 - x], -1)[None] * 0.8, 0, 1)
            maps = np.exp(-30 * ((y - 0.5) ** 2 + (x - random.random((3, 1, 1))) ** 2))
            sheet(folder / "sheets" / f"{name}.png", images, names=[("disc", "disc"), ("star", "ring"), ("cross", "cross")],
                  maps={"cam()": maps[:, ::4, ::4], "grad_cam()": maps}, boxes=np.array([[0.2, 0.3, 0.7, 0.8]] * 3),
                  regions=((y - 0.5) ** 2 + (x - 0.5) ** 2 < 0.05)[None].repeat(3, 0), title=f"{name}: {pool}")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / "gap"), make_run(folder / "top_gap", pool="top_gap(fraction=.14)", seed=1)]
