"""A network with overlapping max pooling on 5,000 images of CIFAR-10, and its explanations with guided non-linearity.

topgap train --config configs/guided.py --workdir runs/guided
topgap explain --workdir runs/guided
topgap explain --workdir runs/guided --methods 'integrated(rules=guided_upsampled)'

The control is the same map without the rules: `integrated()`. The arm `vgg11` is a VGG-11 on 20,000 images, where every
max pooling follows a ReLU and does not overlap, so that guided non-linearity is guided backprop
(experiments/explain_claims.py).

Measured on 10,000 test images, three seeds (results/guided.json): accuracy .653 ± .001; 100 CPU seconds a run.
"""

from ml_collections import ConfigDict

from topgap_jax.models.resnet import ResNet


def methods():
    """A small ResNet whose stem ends with ImageNet's 3x3 max pooling of stride 2: 6.5 MMAC at 32x32."""
    return {"pooled_resnet": lambda: ResNet((16, 32, 64), (2, 2, 2), (16, 3, 1, True))}


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.source = "tfds('cifar10')"
    config.train = "train[:5000]"
    config.image_size = (32, 32)
    config.mean = (0.4914, 0.4822, 0.4465)
    config.std = (0.2470, 0.2435, 0.2616)

    config.backbone = "pooled_resnet()"
    config.epochs = 20
    config.augment = "crop_flip()"
    config.optimizer = "sgd(cosine(0.1, 0, total_steps, warmup=0.1), weight_decay=5e-4)"

    config.eps = 2 / 255
    config.evaluators = "accuracy(), measures(integrated(rules=guided), deletion(), insertion(), labels='predicted')"
    config.explain = "gradient(), integrated(), integrated(rules=guided)"
    config.checkpoint_every = 5
    return config


def arms():
    return {"vgg11": {"backbone": "vgg11()", "train": "train[:20000]", "epochs": "8"}}
