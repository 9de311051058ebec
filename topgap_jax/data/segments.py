"""Superpixels, for the explanations that hide an image segment by segment (`explain.lime`, `mfpp`,
`feature_ablation`)."""

import numpy as np

from topgap_jax.edges import check_images
from topgap_jax.errors import UserError


def slic(images: np.ndarray, count: int = 50, *, compactness: float = 10.0, sigma: float = 1.0) -> np.ndarray:
    """SLIC superpixels (Achanta et al. 2012) by scikit-image: number of each pixel's segment, int32 (b, h, w), from 0.

    images (b, h, w, c) in [0, 1]; about `count` segments an image. The defaults are MFPP's (arXiv 2006.02659), whose
    five levels have 50, 100, 200, 400 and 800. Host code, one image at a time; needs the extra `[superpixels]`.
    """
    check_images("slic", images)
    try:
        from skimage.segmentation import slic as segment
    except ImportError:
        raise UserError(
            "slic: superpixels need scikit-image: pip install 'topgap-jax[superpixels]'; explanations take grids"
            " without it, such as lime(7)"
        ) from None
    options = {"n_segments": count, "compactness": compactness, "sigma": sigma, "start_label": 0, "channel_axis": -1}
    grey = images.shape[-1] != 3  # Lab colours are made of three channels only
    return np.stack(
        [segment(np.asarray(image, np.float64), convert2lab=not grey, **options) for image in images]
    ).astype(np.int32)
