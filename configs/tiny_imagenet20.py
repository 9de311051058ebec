"""Twenty classes of Tiny ImageNet at 64x64, with one box an image.

topgap train --config configs/tiny_imagenet20.py --workdir runs/tiny_gap
topgap train --config configs/tiny_imagenet20.py --config.pool='top_gap(fraction=.25)' --workdir runs/tiny_top_gap
topgap explain --workdir runs/tiny_top_gap

Measured on 1,000 validation images, one seed, 2.6 CPU minutes an arm (results/tiny_imagenet20.json): accuracy 52.6 % with gap(),
51.0 % with top_gap(fraction=.25). MaxBoxAcc of the class map .509 and .505; a full-image box has .495, a centred one .346. At its best
threshold (.05) the map's IoU is .485 and .487, a full-image box's .489: neither arm localises better than the whole image.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0

    config.source = "tfds('tiny_imagenet20', box='bbox')"
    config.train = "train"
    config.validation = ""
    config.test = "validation"
    config.image_size = (64, 64)
    config.resize = "stretch"
    config.mean = (0.485, 0.456, 0.406)
    config.std = (0.229, 0.224, 0.225)

    config.pool = "gap()"
    config.model = (
        "classifier(small_resnet(), pyramid_head(pool, width=32), classes=classes, mean=mean, std=std, dtype=dtype)"
    )
    config.dtype = "float32"

    config.batch = 100
    config.epochs = 20
    config.augment = "crop_flip(padding=8), cutout(16)"
    config.objective = "standard()"
    config.optimizer = "adamw(warmup(cosine(4e-3, 0, total_steps - 100), 100), weight_decay=.02)"
    config.ema = 0.0

    config.eps = 1 / 255
    config.evaluators = "accuracy(), localisation(cam(), centre=centre), localisation(grad_cam('stage4'), centre=centre), receptive_field()"
    config.explain = "cam(), grad_cam('stage4')"

    config.log_every = 10
    config.checkpoint_every = 1
    return config
