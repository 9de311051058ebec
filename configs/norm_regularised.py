"""Norm-regularised training on shapes: which norm of the input gradient the loss carries, a sparse map's or a connected map's.

topgap train --config configs/norm_regularised.py --workdir runs/l1
topgap train --config configs/norm_regularised.py --workdir runs/group --config.objective='norm_regularised(group_norm(13.9*eps, 8))'
topgap train --config configs/norm_regularised.py --workdir runs/elastic --config.objective='norm_regularised(elastic(eps, 10*eps))'
topgap train --config configs/norm_regularised.py --workdir runs/plain --config.objective='standard()'
topgap train --config configs/norm_regularised.py --workdir runs/pgd --config.objective='adversarial(pgd(linf(eps), steps=7))'

Plain training and adversarial training of the same radius are the controls: any adversarial training makes maps sparser, and
l1_norm in one step is FGSM training. 13.9 is the square root of the 192 values in a tile of 8x8 pixels, which makes its penalty as
large as l1_norm's where a tile's gradients are equal. The official code's radius, .01 in normalised units, is .6/255; at 2/255
one of two seeds stayed at chance with every norm, and with R+FGSM (tried). In elastic the quadratic part is small: where |g| is .0018, its mean after 4
epochs with l1_norm, 280 would make both parts of the perturbation equal, but with 280, and hardly with 40, the net did not leave
chance in 4 epochs (tried). Logged: the penalty, the clean loss, and the perturbation's cost.
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
        "classifier(small_resnet(), pyramid_head(pool, width=30), classes=classes, mean=mean, std=std, dtype=dtype)"
    )
    config.dtype = "float32"

    config.batch = 100
    config.epochs = 8
    config.augment = ""
    config.objective = "norm_regularised(l1_norm(eps))"
    config.optimizer = "adamw(warmup(cosine(4e-3, 0, total_steps - 100), 100), weight_decay=.01)"
    config.ema = 0.0

    config.eps = 0.5 / 255
    config.evaluators = (
        "accuracy(), robust(pgd(linf(eps), steps=20)), measures(gradient(reduce='abs_sum'), gini(), energy())"
    )
    config.explain = "gradient(reduce='abs_sum')"

    config.log_every = 10
    config.checkpoint_every = 1
    return config
