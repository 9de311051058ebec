"""ART on CIFAR-10: input gradients of the true class that align with the image, under an attack on that alignment.

topgap train --config configs/art.py --workdir runs/art
topgap train --config configs/art.py --arm standard --workdir runs/art_plain
topgap train --config configs/art.py --arm attack --workdir runs/art_attack
topgap train --config configs/art.py --arm pgd --workdir runs/art_pgd

The controls: plain training, the same attack without the alignment loss, and adversarial training. A net of 3 MMAC and
300 steps, since a step takes many times as long as a plain one (docs/speed.md). A gradient that shows the image
whatever the class is aligned too: look at cosine_true beside cosine_wrong in metrics.jsonl.

Measured on 10,000 test images, three seeds (results/art.json): accuracy .385 ± .006, plain .443 ± .002; 340 and 30
CPU seconds a run.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.source = "tfds('cifar10')"
    config.train = "train[:5000]"
    config.image_size = (32, 32)
    config.mean = (0.4914, 0.4822, 0.4465)
    config.std = (0.2470, 0.2435, 0.2616)

    config.backbone = "small_resnet(widths=(8, 16, 32), stem=8, stem_kernel=3, stem_stride=1)"
    config.epochs = 6
    config.augment = "crop_flip()"
    config.objective = "art(mean=mean, std=std)"
    config.optimizer = "sgd(cosine(0.1, 0, total_steps, warmup=1/3), weight_decay=2e-4)"

    config.eps = 8 / 255
    config.evaluators = "accuracy(), robust(pgd(linf(eps), steps=20))"
    config.explain = "gradient(reduce='abs_sum')"
    return config


def arms():
    return {
        "standard": {"objective": "standard()"},
        "art": {},
        "attack": {"objective": "art(mean=mean, std=std, weight=0)"},
        "pgd": {"objective": "adversarial(pgd(linf(eps), steps=7))"},
    }
