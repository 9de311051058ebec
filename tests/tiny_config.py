"""A config small enough for the tests of the command line: 60 pictures, two epochs of three steps, a net of two convolutions."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.source = "shapes(train=60, validation=20, test=20)"
    config.train = "train"
    config.validation = "validation"
    config.test = "test"
    config.image_size = (32, 32)
    config.resize = "stretch"
    config.mean = (0.5, 0.5, 0.5)
    config.std = (0.25, 0.25, 0.25)
    config.pool = "gap()"
    config.model = (
        "classifier(small_resnet(widths=(4,), stem=4, stem_kernel=3, stem_stride=4), map_head(pool), "
        "classes=classes, mean=mean, std=std)"
    )
    config.batch = 20
    config.epochs = 2
    config.augment = ""
    config.objective = "standard()"
    config.optimizer = "sgd(cosine(0.01, 0, total_steps))"
    config.ema = 0.0
    config.eps = 2 / 255
    config.evaluators = "accuracy(), regions(bank, fill=mean)"
    config.explain = "cam(), grad_cam('stage1')"
    config.log_every = 1
    config.checkpoint_every = 1
    return config
