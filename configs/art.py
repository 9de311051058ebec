"""ART on shapes: input gradients of the true class that align with the image, under an attack on that alignment.

topgap train --config configs/art.py --workdir runs/art
topgap train --config configs/art.py --workdir runs/art_plain --config.objective='standard()'
topgap train --config configs/art.py --workdir runs/art_attack --config.objective='art(mean=mean, std=std, eps=eps, step_size=step_size, weight=0)'
topgap train --config configs/art.py --workdir runs/art_pgd --config.objective='adversarial(pgd(linf(eps), steps=7))'

The controls: plain training, the same attack without the alignment loss, and adversarial training. A step takes 15 times as long as
a plain one. A gradient that shows the image whatever the class is aligned too: look at cos_pos beside cos_neg in metrics.jsonl.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0

    config.source = "shapes(seed)"
    config.train = "train"
    config.validation = "validation"
    config.test = "test, test_shifted"
    config.image_size = (64, 64)
    config.resize = "stretch"
    config.mean = (0.5, 0.5, 0.5)
    config.std = (0.25, 0.25, 0.25)

    config.pool = "gap()"
    config.model = (
        "classifier(small_resnet(), pyramid_head(pool, width=32), classes=classes, mean=mean, std=std, dtype=dtype)"
    )
    config.dtype = "float32"

    config.batch = 100
    config.epochs = 8
    config.augment = ""
    config.eps = 2 / 255
    config.step_size = 1.25 / 255
    config.objective = "art(mean=mean, std=std, eps=eps, step_size=step_size)"
    config.optimizer = "adamw(warmup(cosine(4e-3, 0, total_steps - 100), 100), weight_decay=.01)"
    config.ema = 0.0

    config.evaluators = "accuracy(), robust(pgd(linf(eps), steps=20)), attributional_robustness(gradient(reduce='abs_sum'), topk_attack(gradient(reduce='abs_sum'), linf(eps), steps=20, restarts=1))"
    config.explain = "gradient(reduce='abs_sum')"

    config.log_every = 10
    config.checkpoint_every = 1
    return config
