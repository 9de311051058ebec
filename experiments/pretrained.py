"""Do the pretrained weights give the errors that are known of them? CIFAR-10, 10,000 test images, and 500 of ImageNet:
results/pretrained.json.

    TOPGAP_DATA=FOLDER python experiments/pretrained.py

Reads weights/*.safetensors of TOPGAP_DATA, as `topgap evaluate --config configs/cifar10.py --weights FILE` does. The
errors on CIFAR-10 are those that the authors publish; that of EfficientNet-Lite0 is PyTorch's on the same pictures.
`columns`: that network untouched on tiny_imagenet20, enlarged to 128, with the logits of the 20 classes alone; what a
fine-tuned one is to be compared with.
"""

import json
import os
import sys
from pathlib import Path

import jax
import numpy as np

from topgap_jax import pretrained, setup
from topgap_jax.measure.results import to_json
from topgap_jax.metrics.summaries import share
from topgap_jax.models import bind
from topgap_jax.progress import write_text
from topgap_jax.run.cpu import configure_cpu
from topgap_jax.run.provenance import provenance
from topgap_jax.types import Measure

ROOT = Path(__file__).parent.parent
BATCH = 50
PUBLISHED = {  # config, error in %
    "resnet20": ("cifar10.py", 8.27),
    "resnet32": ("cifar10.py", 7.37),
    "resnet44": ("cifar10.py", 6.90),
    "resnet4b": ("cifar10.py", 22.80),
    "efficientnet_lite0": ("imagenet.py", 13.60),
}


def main() -> None:
    if not os.environ.get("TOPGAP_DATA"):
        raise SystemExit("set TOPGAP_DATA to the folder with tfds/ and weights/")
    print(configure_cpu(), file=sys.stderr)
    networks = {}
    for network, (config, published) in PUBLISHED.items():
        (path,) = Path(os.environ["TOPGAP_DATA"], "weights").glob(f"{network}_*.safetensors")
        loaded = setup.from_config(ROOT / "configs" / config, [("init", str(path))])
        (row,) = setup.evaluate(loaded, splits="test", evaluators="accuracy()")
        networks[path.stem] = {"published_error": published, "row": to_json(row._replace(measures=row.numbers))}
        print(f"{path.stem}: error {100 * (1 - row.measures['accuracy'].value):.2f} %, published {published:.2f} %")
    columns = own_columns()
    print(f"efficientnet_lite0 on tiny_imagenet20, its own 20 columns: {100 * columns['value']:.1f} %")
    text = json.dumps({**provenance(), "networks": networks, "columns": columns}, indent=1)
    write_text(ROOT / "results" / "pretrained.json", text + "\n")


def own_columns() -> dict[str, float]:
    """Accuracy of the ImageNet network on the validation split of tiny_imagenet20 among the 20 classes there."""
    chosen = setup.experiment(ROOT / "configs" / "tiny_imagenet20.py")
    arrays = setup.read(chosen, "validation")
    model, variables = pretrained.network("efficientnet_lite0")
    predict = jax.jit(lambda images: bind(model, variables)(images))
    images = np.split(arrays["image"], len(arrays["label"]) // BATCH)
    logits = np.concatenate([predict(part.astype(np.float32) / 255) for part in images])
    names = pretrained.imagenet_classes()
    predicted = logits[:, [names.index(name) for name in chosen.classes]].argmax(1)
    measure = share(predicted == arrays["label"], Measure())
    return {"value": measure.value, "low": measure.low, "high": measure.high, "n": measure.n}


if __name__ == "__main__":
    main()
