"""SGDrop on little data: 2,000 images of CIFAR-10, a net of 7 MMAC, the last features dropped where they speak for the label.

topgap train --config configs/sgdrop.py --workdir runs/sgdrop
topgap train --config configs/sgdrop.py --config.rate=0 --workdir runs/sgdrop_plain
topgap train --config configs/sgdrop.py --workdir runs/sgdrop_random --config.model="with_drop(classifier(small_resnet(
    widths=(12, 24, 48), stem=12, stem_kernel=3, stem_stride=1), map_head(pool), classes=classes, mean=mean, std=std, dtype=dtype),
    'stage3', random_matched(sgdrop(rate=linear(0, rate, total_steps))))"

The second is plain training; the third, the control that decides, drops as many elements of every image, drawn at random. The rate
grows from 0: at .1 from the first step on, a small net on shapes did not leave chance in 6 epochs (tried), since the label's
logit loses most of what it has. With `sgdrop(.., teacher=True)` and --config.ema=.999 the saliency comes from averaged weights,
which are then evaluated too: its control needs the same --config.ema.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0

    config.source = "tfds('cifar10')"
    config.train = "train[:2000]"
    config.validation = ""
    config.test = "test"
    config.image_size = (32, 32)
    config.resize = "stretch"
    config.mean = (0.4914, 0.4822, 0.4465)
    config.std = (0.2470, 0.2435, 0.2616)

    config.pool = "gap()"
    config.rate = 0.1
    config.model = (
        "with_drop(classifier(small_resnet(widths=(12, 24, 48), stem=12, stem_kernel=3, stem_stride=1), map_head(pool), "
        "classes=classes, mean=mean, std=std, dtype=dtype), 'stage3', sgdrop(rate=linear(0, rate, total_steps)))"
    )
    config.dtype = "float32"

    config.batch = 100
    config.epochs = 50
    config.augment = "crop_flip()"
    config.objective = "standard()"
    config.optimizer = "sgd(warmup(cosine(0.1, 0, total_steps - 100), 100), weight_decay=5e-4)"
    config.ema = 0.0

    config.eps = 2 / 255
    config.evaluators = "accuracy()"
    config.explain = "cam(), grad_cam('stage3')"

    config.log_every = 10
    config.checkpoint_every = 10
    return config
