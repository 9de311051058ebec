"""ResNet-50 on ImageNet, the recipe for a pod: bfloat16, batch 1,024, streamed, label smoothing, averaged weights.

topgap train --config configs/imagenet_resnet50.py --workdir runs/resnet50
topgap train --config configs/imagenet_resnet50.py --arm top_gap --workdir runs/resnet50_top_gap
topgap train --config configs/imagenet_resnet50.py --arm dry_run --workdir runs/resnet50_dry

`imagenet2012` is the TFDS set, prepared as ArrayRecord in $TOPGAP_DATA/tfds; every host reads its share of each batch.
The learning rate is .1 for each 256 images of the batch (Goyal et al. 2017, arXiv 1706.02677). Random crops are cut on
the device from pictures that are 224 pixels already; the usual recipe cuts them from the whole picture. `dry_run` is 4
steps of batch 16 on pictures of `imagenet500`, to see that everything is in place: its accuracy means nothing.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.source = "tfds('imagenet2012')"
    config.validation = "validation"
    config.test = "validation"
    config.image_size = (224, 224)
    config.resize = "crop"
    config.mean = (0.485, 0.456, 0.406)
    config.std = (0.229, 0.224, 0.225)
    config.dtype = "bfloat16"

    config.backbone = "resnet50()"
    config.batch = 1024
    config.epochs = 90
    config.augment = "random_resized_crop(scale=(.08, 1)), flip()"
    config.objective = "standard(label_smoothing=.1)"
    config.optimizer = "sgd(cosine(.4, 0, total_steps, warmup=5/90), weight_decay=5e-5)"
    config.ema = 0.9999

    config.eps = 1 / 255
    config.explain = "cam(), grad_cam('stage3')"
    config.log_every = 100
    return config


def arms():
    return {
        "gap": {},
        "top_gap": {"pool": "top_gap(fraction=.28)"},
        "dry_run": {
            "source": "tfds('imagenet500')",
            "train": "test[:64]",
            "validation": "",
            "test": "test[:16]",
            "image_size": "(64, 64)",
            "batch": "16",
            "epochs": "1",
            "optimizer": "sgd(.01)",
            "log_every": "1",
        },
    }
