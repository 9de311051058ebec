"""A config small enough for tests of the command line: 60 pictures, two epochs of three steps, a tiny net."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.source = "shapes(train=60, validation=20, test=20)"
    config.validation = "validation"
    config.image_size = (32, 32)
    config.backbone = "small_resnet(widths=(4,), stem=4, stem_kernel=3, stem_stride=4)"
    config.batch = 20
    config.epochs = 2
    config.optimizer = "sgd(cosine(0.01, 0, total_steps))"
    config.eps = 2 / 255
    config.evaluators = "accuracy(), regions(fill=mean)"
    config.explain = "cam(), grad_cam('stage1')"
    config.log_every = 1
    return config


def arms():
    return {"plain": {}, "dropped": {"model": "with_drop(network, 'stage1', dropout(.1))", "seed": "1"}}
