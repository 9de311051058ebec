"""The embedded data set `shapes`: 64x64, six classes on textures that agree with the class in 90 % of the images.

topgap train --config configs/shapes.py --workdir runs/shapes_gap
topgap train --config configs/shapes.py --config.pool='top_gap(fraction=.14)' --workdir runs/shapes_top_gap
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
    config.objective = "standard()"
    config.optimizer = "adamw(warmup(cosine(4e-3, 0, total_steps - 100), 100), weight_decay=.01)"
    config.ema = 0.0

    config.eps = 2 / 255
    config.evaluators = "accuracy(), robust(pgd(linf(eps), steps=20)), localisation(cam(), centre=centre, boxes=False), regions(bank, fill=mean), receptive_field()"
    config.explain = "cam(), grad_cam('stage2'), field(position='top')"

    config.log_every = 10
    config.checkpoint_every = 1
    return config
