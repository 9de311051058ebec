"""SGDrop on 2,000 images of CIFAR-10: a net of 7 MMAC, the last features dropped where they speak for the label.

topgap train --config configs/sgdrop.py --workdir runs/sgdrop
topgap train --config configs/sgdrop.py --arm plain --workdir runs/sgdrop_plain
topgap train --config configs/sgdrop.py --arm random_matched --workdir runs/sgdrop_random

The second is plain training; the third, the control that decides, drops as many elements of every image, drawn at
random. The rate grows from 0: at .1 from the first step on, a small net on shapes did not leave chance in 6 epochs
(tried), since the label's logit loses most of what it has. With `sgdrop(.., teacher=True)` and --config.ema=.999 the
saliency comes from averaged weights, which are then evaluated too: its control needs the same --config.ema.

Measured on 10,000 test images, three seeds (results/sgdrop.json): accuracy .564 ± .011, plain .582 ± .016,
random_matched .586 ± .002; 115, 118 and 154 CPU seconds a run.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.source = "tfds('cifar10')"
    config.train = "train[:2000]"
    config.image_size = (32, 32)
    config.mean = (0.4914, 0.4822, 0.4465)
    config.std = (0.2470, 0.2435, 0.2616)

    config.backbone = "small_resnet(widths=(12, 24, 48), stem=12, stem_kernel=3, stem_stride=1)"
    config.rate = 0.1
    config.drop = "sgdrop(rate=linear(0, rate, total_steps))"
    config.model = "with_drop(network, 'stage3', drop)"
    config.epochs = 50
    config.augment = "crop_flip()"
    config.optimizer = "sgd(cosine(0.1, 0, total_steps, warmup=0.1), weight_decay=5e-4)"

    config.eps = 2 / 255
    config.explain = "cam(), grad_cam('stage3')"
    config.checkpoint_every = 10
    return config


def arms():
    return {
        "plain": {"drop": "None"},
        "sgdrop": {},
        "random_matched": {"drop": "random_matched(sgdrop(rate=linear(0, rate, total_steps)))"},
    }
