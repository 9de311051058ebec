"""Twenty classes of Tiny ImageNet at 64x64, with one box an image.

topgap train --config configs/tiny_imagenet20.py --workdir runs/tiny_gap
topgap train --config configs/tiny_imagenet20.py --config.pool='top_gap(fraction=.25)' --workdir runs/tiny_top_gap
topgap explain --workdir runs/tiny_top_gap

Measured on 1,000 validation images, one seed, 2.6 CPU minutes an arm (results/tiny_imagenet20.json): accuracy 52.6 %
with gap(), 51.0 % with top_gap(fraction=.25). MaxBoxAcc of the class map .509 and .505; a full-image box has .495, a
centred one .346. At its best threshold (.05) the map's IoU is .485 and .487, a full-image box's .489: neither arm
localises better than the whole image.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.source = "tfds('tiny_imagenet20', box='bbox')"
    config.test = "validation"
    config.image_size = (64, 64)
    config.mean = (0.485, 0.456, 0.406)
    config.std = (0.229, 0.224, 0.225)

    config.backbone = "small_resnet()"
    config.head = "pyramid_head(pool, width=32)"
    config.epochs = 20
    config.augment = "crop_flip(padding=8), cutout(16)"
    config.optimizer = "adamw(cosine(4e-3, 0, total_steps, warmup=0.1), weight_decay=.02)"

    config.eps = 1 / 255
    config.evaluators = "accuracy(), localisation(cam()), localisation(grad_cam('stage4')), receptive_field()"
    config.explain = "cam(), grad_cam('stage4')"
    return config
