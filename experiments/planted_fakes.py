"""Does the audit catch planted fakes, and does it let honest networks pass? results/planted_fakes.json.

    TOPGAP_DATA=FOLDER python experiments/planted_fakes.py [NAME ...] [--points 256]

CIFAR-10, at 8/255 in linf, `resnet4b_adv2` at the 2/255 that it was trained for; the twin of A9 is `resnet32`. Bounds
of the checks were set before, mostly on `resnet32`, and on none of these images. An audit that is done stands in
results/planted_fakes.json with its commit, and is not made again unless it is named; other --points write nothing.
"""

import argparse
import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from topgap_jax import setup
from topgap_jax.measure import results
from topgap_jax.progress import write_text
from topgap_jax.run.cpu import configure_cpu
from topgap_jax.run.provenance import provenance
from topgap_jax.types import Model

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "results" / "planted_fakes.json"
sys.path.append(str(ROOT))

from tests import fakes  # noqa: E402

SPLIT = "test[7000:9000]"
POINTS = 256
TWIN = "resnet32_cifar10"


def train_mode(model: Model) -> Model:
    """Batch norm with the statistics of the batch, as in training."""
    return model._replace(
        apply=lambda variables, images, **options: model.apply(variables, images, **{**options, "train": True})
    )


def mean_sparse(model: Model, tau: float = 0.25) -> Model:
    """MeanSparse (arXiv 2406.05927): behind every batch norm, what lies within tau deviations of its channel's mean is
    that mean. Both are known behind a batch norm: bias and scale."""

    def sparse(next_fun, args, kwargs, context):
        values = next_fun(*args, **kwargs)
        if not isinstance(context.module, nn.BatchNorm) or context.method_name != "__call__":
            return values
        mean, deviation = (context.module.variables["params"][name] for name in ("bias", "scale"))
        return jnp.where(jnp.abs(values - mean) <= tau * jnp.abs(deviation), mean, values)

    def apply(variables, images, **options):
        with nn.intercept_methods(sparse):
            return model.apply(variables, images, **options)

    return model._replace(apply=apply)


class Case(NamedTuple):
    """A network to audit: its weights in TOPGAP_DATA or results/weights, what is planted in it, and the checks of which
    one at least must fail; () for an honest one, of which none may."""

    weights: str
    planted: Callable[[Model], Model] = lambda model: model
    due: tuple[str, ...] = ()
    eps: str = "8/255"
    pool: str = "gap()"


ADVERSARIAL = "cifar10_adversarial_adversarial_{}_seed0"
CASES = {
    "resnet20": Case("resnet20_cifar10"),
    "resnet44": Case("resnet44_cifar10"),
    "resnet4b_adv2": Case("resnet4b_adv2_cifar10", eps="2/255"),
    "adversarial gap": Case(ADVERSARIAL.format("gap")),
    "adversarial top_gap": Case(ADVERSARIAL.format("top_gap"), pool="top_gap(k=16)"),
    "logits x 1e4": Case("resnet20_cifar10", fakes.large_logits, ("A5", "A8")),
    "input of 8 levels": Case("resnet20_cifar10", lambda model: fakes.quantised(model, 7), ("A5",)),
    "mean-centred threshold": Case("resnet20_cifar10", mean_sparse, ("A1", "A2", "A4", "A9", "A14", "A17")),
    "noise layer": Case("resnet20_cifar10", fakes.noise_layer, ("A11",)),
    "gradient of noise": Case("resnet20_cifar10", fakes.noise_gradient, ("A14",)),
    "probabilities": Case("resnet20_cifar10", fakes.probabilities, ("A10",)),
    "20 tanh of the logits": Case("resnet20_cifar10", fakes.saturated_logits, ("A5", "A8")),
    "train-mode batch norm": Case("resnet20_cifar10", train_mode, ("A12",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}; all if none is given")
    parser.add_argument("--points", type=int, default=POINTS)
    arguments = parser.parse_args()
    if not os.environ.get("TOPGAP_DATA"):
        raise SystemExit("set TOPGAP_DATA to the folder with tfds/ and weights/")
    unknown = sorted(set(arguments.names) - set(CASES))
    if unknown:
        raise SystemExit(f"there is no '{unknown[0]}'; choose from {', '.join(CASES)}")
    print(configure_cpu(), file=sys.stderr)
    for name in arguments.names or [name for name in CASES if name not in stored()]:
        row = audited(name, arguments.points)
        print(f"{name}: {row['audit']}; {verdict(row)}; {row['cpu_seconds']:.0f} CPU seconds", flush=True)
        if arguments.points == POINTS:
            # The file is read again: another process may have written its own meanwhile.
            rows = {**stored(), name: row}
            rows = {name: rows[name] for name in CASES if name in rows}
            about = {**provenance(), "command": "experiments/planted_fakes.py", "split": SPLIT}
            write_text(RESULT, json.dumps({**about, "networks": rows}, indent=1) + "\n")


def stored() -> dict[str, Any]:
    """The rows that are done."""
    return json.loads(RESULT.read_text(encoding="utf-8"))["networks"] if RESULT.is_file() else {}


def audited(name: str, points: int) -> dict[str, Any]:
    """The row of the network's audit, with what is due of it and the CPU seconds that it took."""
    case = CASES[name]
    folders = Path(os.environ["TOPGAP_DATA"], "weights"), ROOT / "results" / "weights"
    weights = lambda file: next((path for each in folders if (path := each / f"{file}.safetensors").is_file()), file)
    overrides = [("init", str(weights(case.weights))), ("pool", case.pool)]
    loaded = setup.from_config(ROOT / "configs" / "cifar10.py", overrides)
    planted = loaded.experiment._replace(model=case.planted(loaded.experiment.model))
    text = f"audit(linf({case.eps}), twin='{weights(TWIN)}', points={points})"
    before = cpu_seconds()
    (row,) = setup.evaluate(loaded._replace(experiment=planted), splits=SPLIT, evaluators=text, batch=64)
    kept = results.to_json(row._replace(measures=row.numbers, evaluator=text.replace(str(weights(TWIN)), TWIN)))
    about = {"weights": case.weights, "eps": case.eps, "due": case.due, "cpu_seconds": cpu_seconds() - before}
    return {"commit": provenance()["commit"], **kept, **about}


def verdict(row: dict[str, Any]) -> str:
    """Whether the audit says what it must."""
    failed = [check["id"] for check in row["checks"] if check["status"] == "fail"]
    if not row["due"]:
        return "wrongly failed" if failed else "passes, as it must"
    return "caught" if set(failed) & set(row["due"]) else "caught by others" if failed else "missed"


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
