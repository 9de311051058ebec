"""Published networks under AutoAttack, audited, each a JSON in the form of RobustBench: results/models/*.json.

    TOPGAP_DATA=FOLDER python experiments/models.py [PART OF A NAME ...] [--images N] [--out FOLDER]

Weights of TOPGAP_DATA on the first 2,000 test images of CIFAR-10 (--images: fewer), as `topgap evaluate --model-info`
writes them; `topgap verify FILE` measures 256 of the images again. AutoAttack takes a minute on an undefended network,
half an hour of CPU on one of 62 % (ResNet-4B). On a tree with changes only --out is written to.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from topgap_jax import setup
from topgap_jax.progress import write_text
from topgap_jax.run.cpu import configure_cpu
from topgap_jax.run.provenance import provenance

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "results" / "models"


class Published(NamedTuple):
    """A network: its weights in TOPGAP_DATA, the radius it is attacked at, and what RobustBench's form says of it."""

    weights: str
    eps: str
    about: dict[str, Any]


def cifar_resnet(depth: int) -> Published:
    """Trained by Yerlan Idelbayev, after He et al. (arXiv 1512.03385); no defence, and no robust accuracy reported."""
    link = "https://github.com/akamaster/pytorch_resnet_cifar10"
    return Published(
        f"weights/resnet{depth}_cifar10.safetensors",
        "8/255",
        {
            "link": link,
            "name": "Standardly trained model",
            "authors": "Yerlan Idelbayev",
            "additional_data": False,
            "venue": "N/A",
            "architecture": f"ResNet-{depth}",
            "reported": None,
            "weights_from": link,
        },
    )


NETWORKS = {
    "Idelbayev2018_R20": cifar_resnet(20),
    "Idelbayev2018_R32": cifar_resnet(32),
    "Idelbayev2018_R44": cifar_resnet(44),
    "Wang2021BetaCROWN_R4B": Published(
        "weights/resnet4b_adv2_cifar10.safetensors",
        "2/255",
        {
            "link": "https://arxiv.org/abs/2103.06624",
            "name": "Beta-CROWN: Efficient Bound Propagation with Per-neuron Split Constraints for Neural Network "
            "Robustness Verification",
            "authors": "Shiqi Wang, Huan Zhang, Kaidi Xu, Xue Lin, Suman Jana, Cho-Jui Hsieh, J. Zico Kolter",
            "additional_data": False,
            "venue": "NeurIPS 2021",
            "architecture": "ResNet-4B",
            "reported": "61.41",
            "weights_from": "https://github.com/Verified-Intelligence/alpha-beta-CROWN",
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only networks whose name contains one of these, such as R20")
    parser.add_argument("--images", type=int, default=2000, help="of the test split, from the first (default: 2000)")
    parser.add_argument("--out", type=Path, help="another folder than results/models")
    options = parser.parse_args()
    if not os.environ.get("TOPGAP_DATA"):
        parser.error("set TOPGAP_DATA to the folder with tfds/ and weights/")
    if options.out is None and (provenance()["commit"] or "+").endswith("+"):
        parser.error("results/models is written on a tree without changes; give --out FOLDER")
    print(configure_cpu(), file=sys.stderr)
    folder = options.out or FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, network in NETWORKS.items():
        if options.names and not any(part in name for part in options.names):
            continue
        path = folder / f"{name}.json"
        if not path.exists():
            write_text(path, json.dumps(network.about, indent=1) + "\n")
        loaded = setup.from_config(
            ROOT / "configs/cifar10.py",
            [("init", str(Path(os.environ["TOPGAP_DATA"], network.weights))), ("eps", network.eps)],
        )
        setup.evaluate(
            loaded,
            splits=f"test[:{options.images}]",
            evaluators="robust(autoattack(linf(eps))), audit(linf(eps))",
            model_info=path,
        )
        stored = json.loads(path.read_text(encoding="utf-8"))
        print(f"{path}: clean {stored['clean_acc']} %, AutoAttack at {stored['eps']} {stored['autoattack_acc']} %")


if __name__ == "__main__":
    main()
