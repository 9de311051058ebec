"""The PyTorch process of parity_explain_cam.py: raw class activation maps of pytorch-grad-cam and captum.

Reads a folder with images.npy (n, h, w, 3) in [0, 1], labels.npy (n,) and the path of the weights, writes maps.npz with
"PACKAGE METHOD LAYER" -> (n, h', w') before ReLU, scaling and resizing. Runs in the peers' own environment.
"""

import sys
from pathlib import Path

import numpy as np
import torch

register = torch.library.register_fake
torch.library.register_fake = lambda op, *rest, **words: (
    (lambda f: f) if str(op).startswith("torchvision::") else register(op, *rest, **words)
)
import pytorch_grad_cam as pgc  # noqa: E402
from _bench_torch import build  # noqa: E402
from captum.attr import LayerGradCam  # noqa: E402
from pytorch_grad_cam import finer_cam, shapley_cam  # noqa: E402
from pytorch_grad_cam.utils.model_targets import ClassifierOutputReST, ClassifierOutputTarget  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

torch.library.register_fake = register


class GradCAMPlusPlusWithoutEpsilon(pgc.GradCAMPlusPlus):
    """The package's formula without the 1e-6 in its denominator, which is as large as g^2 is."""

    def get_cam_weights(self, input_tensor, target_layers, target_category, activations, grads):
        g, total = grads.astype(np.float64), activations.sum((2, 3), keepdims=True, dtype=np.float64)
        denominator = 2 * g**2 + total * g**3
        alpha = np.where(denominator == 0, 0, g**2 / np.where(denominator == 0, 1, denominator))
        return (np.maximum(g, 0) * alpha).sum((2, 3))


class FinerTargetWithoutEpsilon(finer_cam.FinerWeightedTarget):
    """The package's score without the 1e-9 in its denominator, which a confident image's probabilities are below."""

    def __call__(self, output):
        others = output[..., self.comparison_categories]
        return output[..., self.main_category] - self.alpha * (torch.softmax(others, -1) * others).sum(-1)


PACKAGE = {
    "grad_cam": pgc.GradCAM,
    "grad_cam_plus_plus": GradCAMPlusPlusWithoutEpsilon,
    "grad_cam_plus_plus as published": pgc.GradCAMPlusPlus,
    "xgrad_cam": pgc.XGradCAM,
    "hires_cam": pgc.HiResCAM,
    "elementwise_grad_cam": pgc.GradCAMElementWise,
    "layer_cam": pgc.LayerCAM,
    "eigen_cam": pgc.EigenCAM,
    "eigen_grad_cam": pgc.EigenGradCAM,
    "shapley_cam": shapley_cam.ShapleyCAM,
    "finer_cam": finer_cam.FinerCAM,
    "finer_cam as published": finer_cam.FinerCAM,
    "score_cam": pgc.ScoreCAM,
    "ablation_cam": pgc.AblationCAM,
}

PUBLISHED = finer_cam.FinerWeightedTarget


def main(folder: Path, weights: str):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    # Half-pixel centres, as we enlarge; the package aligns corners.
    torch.nn.UpsamplingBilinear2d = lambda size: torch.nn.Upsample(size=size, mode="bilinear", align_corners=False)
    model = build("resnet20", None)
    model.load_state_dict(load_file(weights), strict=False)
    model.eval()
    x = torch.from_numpy(np.load(folder / "images.npy")).permute(0, 3, 1, 2).contiguous()
    labels = np.load(folder / "labels.npy").tolist()
    maps = {"logits": model(x).detach().numpy()}
    for number in (2, 3):
        layer = getattr(model, f"layer{number}")
        for name, method in PACKAGE.items():
            maps[f"pgc {name} stage{number}"] = raw_maps(method, name, model, layer, x, labels)
        captum = LayerGradCam(model, layer).attribute(x, torch.tensor(labels))
        maps[f"captum grad_cam stage{number}"] = captum[:, 0].detach().numpy()
    np.savez(folder / "maps.npz", **maps)


def raw_maps(method, name, model, layer, x, labels):
    """The maps of `get_cam_image`, one image at a time."""
    rows = []
    for image, label in zip(x, labels):
        cam = method(model, [layer])
        base = getattr(cam, "base_cam", cam)
        inner = base.get_cam_image
        base.get_cam_image = lambda *args, inner=inner, **words: rows.append(inner(*args, **words)) or rows[-1]
        if method is finer_cam.FinerCAM:
            finer_cam.FinerWeightedTarget = PUBLISHED if "published" in name else FinerTargetWithoutEpsilon
            cam(image[None], target_idx=label)
        else:
            target = ClassifierOutputReST if name == "shapley_cam" else ClassifierOutputTarget
            cam(image[None], targets=[target(label)])
        base.activations_and_grads.release()
    return np.concatenate([np.asarray(row) for row in rows])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
