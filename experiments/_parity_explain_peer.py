"""PyTorch's half of parity_explain.py: reads lines of JSON, explains by a public package, answers with a line.

{"folder", "network": "resnet20" or "efficientnet_lite0", "weights", "peer": a function of PEERS, "words": its words,
"indices": which images, "double": in float64}. The folder has images.npy (n, h, w, 3) in [0, 1], labels.npy (n,) and
what a row hands over (NAME.npy); theirs.npz is written there, one array a name, channels last, at the package's own
scale. What a package draws is handed over.
"""

import json
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from _bench_explain_torch import captum, choose, lime, network, open_erf, pgc
from captum.attr._utils import batching

APPROXIMATION = batching.approximation_parameters


def saliency(case, words):
    return images(captum.Saliency(case.model).attribute(case.x, case.y))


def input_x_gradient(case, words):
    return images(captum.InputXGradient(case.model).attribute(case.x, case.y))


def integrated(case, words):
    if case.dtype == torch.float64:  # or nodes that are rounded otherwise turn ReLUs
        ours = lambda rule: (APPROXIMATION(rule)[0], lambda n: words["nodes"])
        batching.approximation_parameters = ours
    else:
        batching.approximation_parameters = APPROXIMATION
    return images(
        captum.IntegratedGradients(case.model).attribute(
            case.x, mean(case), case.y, n_steps=words["steps"], method=words["rule"], internal_batch_size=len(case.x)
        )
    )


def guided_backprop(case, words):
    return images(captum.GuidedBackprop(case.model).attribute(case.x, case.y))


def deconvnet(case, words):
    return images(captum.Deconvolution(case.model).attribute(case.x, case.y))


def smoothgrad(case, words):
    """captum's NoiseTunnel of signed gradients, whose draws are the handed noise (n, samples, h, w, 3)."""
    noise = channels_first(case.array("noise"), case)
    draws, normal = iter(range(noise.shape[1])), torch.normal
    torch.normal = lambda mean, std: noise[:, next(draws)]
    tunnel = captum.NoiseTunnel(captum.Saliency(case.model))
    values = tunnel.attribute(
        case.x, nt_type=words["average"], nt_samples=noise.shape[1], nt_samples_batch_size=1, target=case.y, abs=False
    )
    torch.normal = normal
    return images(values)


def expected_gradients(case, words):
    """captum's GradientShap, whose draws are the handed ones: which (n, samples) reference, and where on the path."""
    which, where = (case.array(name).reshape(-1) for name in ("which", "where"))
    choice, uniform = np.random.choice, np.random.uniform
    np.random.choice, np.random.uniform = (lambda *a, **k: which), (lambda *a, **k: where)
    references = channels_first(case.whole("references"), case)
    method = captum.GradientShap(case.model)
    values = method.attribute(case.x, references, n_samples=len(which) // len(case.x), stdevs=0.0, target=case.y)
    np.random.choice, np.random.uniform = choice, uniform
    return images(values)


def occlusion(case, words):
    window, stride = words["window"], words["stride"]
    method = captum.Occlusion(case.model)
    values = method.attribute(case.x, (3, window, window), (3, stride, stride), mean(case), case.y)
    return images(values)[..., 0]


def feature_ablation(case, words):
    segments = torch.from_numpy(case.whole("segments")).long()[None, None].expand(1, 3, -1, -1)
    return images(captum.FeatureAblation(case.model).attribute(case.x, mean(case), case.y, feature_mask=segments))[
        ..., 0
    ]


def lime_segments(case, words):
    """captum's LimeBase with the handed samples (n, samples, k), the cosine kernel and ridge regression."""
    segments, values = torch.from_numpy(case.whole("segments")).long(), []
    for x, y, samples in zip(case.x, case.y, torch.from_numpy(case.array("shown")).to(case.x.dtype)):
        base = mean(case)[:1]
        draws = iter(samples)
        method = lime.LimeBase(
            lambda points: case.model(points).softmax(1),
            lime.SkLearnRidge(alpha=words["penalty"]),
            lambda x, perturbed, z, **rest: torch.exp(-((1 - z.mean().sqrt()) ** 2) / (2 * words["width"] ** 2)),
            lambda x, draws=draws, **rest: next(draws)[None],
            True,
            lambda z, x, base=base, **rest: torch.where(z[0][segments] > 0, x, base),
            None,
        )
        values.append(method.attribute(x[None], target=int(y), n_samples=len(samples))[0][segments])
    return torch.stack(values).numpy()


def rise(case, words):
    """The two lines of the official code (eclique/RISE) for the handed masks (n, masks, h, w)."""
    values = []
    with torch.no_grad():
        for x, y, masks in zip(case.x, case.y, torch.from_numpy(case.array("masks")).to(case.x.dtype)):
            base = mean(case)[:1]
            points = base + masks[:, None] * (x - base)
            p = torch.cat([case.model(part).softmax(1) for part in points.split(32)])[:, y]
            values.append((p @ masks.flatten(1)).view(x.shape[1:]) / len(masks) / words["p"])
    return torch.stack(values).numpy()


def layer_grad_cam(case, words):
    return captum.LayerGradCam(case.model, case.layer(words)).attribute(case.x, case.y)[:, 0].detach().numpy()


class GradCAMPlusPlusWithoutEpsilon(pgc.GradCAMPlusPlus):
    """The package's formula without the 1e-6 in its denominator, which is as large as g^2 is."""

    def get_cam_weights(self, input_tensor, target_layers, target_category, activations, grads):
        g, total = grads.astype(np.float64), activations.sum((2, 3), keepdims=True, dtype=np.float64)
        denominator = 2 * g**2 + total * g**3
        alpha = np.where(denominator == 0, 0, g**2 / np.where(denominator == 0, 1, denominator))
        return (np.maximum(g, 0) * alpha).sum((2, 3))


class FinerTargetWithoutEpsilon(pgc.finer_cam.FinerWeightedTarget):
    """The package's score without the 1e-9 in its denominator, which a confident image's probabilities are below."""

    def __call__(self, output):
        others = output[..., self.comparison_categories]
        return output[..., self.main_category] - self.alpha * (torch.softmax(others, -1) * others).sum(-1)


CAMS = {
    "grad_cam": pgc.GradCAM,
    "grad_cam_plus_plus": GradCAMPlusPlusWithoutEpsilon,
    "xgrad_cam": pgc.XGradCAM,
    "hires_cam": pgc.HiResCAM,
    "elementwise_grad_cam": pgc.GradCAMElementWise,
    "layer_cam": pgc.LayerCAM,
    "eigen_cam": pgc.EigenCAM,
    "eigen_grad_cam": pgc.EigenGradCAM,
    "shapley_cam": pgc.shapley_cam.ShapleyCAM,
    "finer_cam": pgc.finer_cam.FinerCAM,
    "score_cam": pgc.ScoreCAM,
    "ablation_cam": pgc.AblationCAM,
}


def cam(case, words):
    """The raw maps of `get_cam_image`, before ReLU, scaling and resizing, one image at a time."""
    method, values = CAMS[words["method"]], []
    # Half-pixel centres, as ours are enlarged; the package aligns corners.
    torch.nn.UpsamplingBilinear2d = lambda size: torch.nn.Upsample(size=size, mode="bilinear", align_corners=False)
    for image, label in zip(case.x, case.y.tolist()):
        made = method(case.model, [case.layer(words)])
        base = getattr(made, "base_cam", made)
        inner = base.get_cam_image
        base.get_cam_image = lambda *args, inner=inner, **rest: values.append(inner(*args, **rest)) or values[-1]
        if method is pgc.finer_cam.FinerCAM:
            pgc.finer_cam.FinerWeightedTarget = FinerTargetWithoutEpsilon
            made(image[None], target_idx=label)
        else:
            softmax = words["method"] == "shapley_cam"
            target = pgc.model_targets.ClassifierOutputReST if softmax else pgc.model_targets.ClassifierOutputTarget
            made(image[None], targets=[target(label)])
        base.activations_and_grads.release()
    return np.concatenate([np.asarray(value) for value in values])


def field(case, words):
    """openerf's pass of one image, from the centre of the layer: the sum over channels instead of their mean, and of
    |.| over colours instead of the positive part of their mean; a map for each image instead of the sum of all."""
    values = []
    for x in case.x:
        points, features = x[None].clone().requires_grad_(), []
        hook = case.layer(words).register_forward_hook(lambda m, i, output, features=features: features.append(output))
        case.model(points)
        hook.remove()
        centre = open_erf.center_activation(open_erf.extract_feature_tensor(features[0]), "layer", case.model)
        values.append(features[0].shape[1] * torch.autograd.grad(centre, points)[0][0].abs().sum(0))
    return torch.stack(values).numpy()


def of_maps(case, words):
    """What needs no network: of maps a and b (n, h, w) in [0, 1] and masks (n, h, w)."""
    import quantus
    from scipy import stats
    from skimage.metrics import structural_similarity

    a, b, inside = (case.array(name) for name in ("a", "b", "inside"))
    flat = list(zip(a.reshape(len(a), -1), b.reshape(len(b), -1)))
    plain = {"abs": False, "normalise": False, "disable_warnings": True, "display_progressbar": False}
    measured = lambda metric: np.asarray(
        metric(model=None, x_batch=a[:, None], y_batch=case.y.numpy(), a_batch=a[:, None], s_batch=inside[:, None])
    )
    return {
        "spearman": np.array([stats.spearmanr(*pair).statistic for pair in flat]),
        "kendall_tau_b": np.array([stats.kendalltau(*pair).statistic for pair in flat]),
        "pearson": np.array([stats.pearsonr(*pair).statistic for pair in flat]),
        "ssim": np.array(
            [
                structural_similarity(
                    *pair, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1
                )
                for pair in zip(a.astype(np.float64), b.astype(np.float64))
            ]
        ),
        "gini": measured(quantus.Sparseness(**plain)),
        "entropy": measured(quantus.Complexity(**plain)),
        "energy": measured(quantus.RelevanceMassAccuracy(**plain)),
        "pointing": measured(quantus.PointingGame(**plain)).astype(np.float32),
    }


def of_network(case, words):
    """What asks the network about maps a (n, h, w) in [0, 1]: quantus's pixel flipping, the package's drop in
    confidence."""
    import quantus
    from pytorch_grad_cam.metrics.cam_mult_image import DropInConfidence

    a = case.array("a")
    # Its steps count channels, all of the pixel one after another, and must divide the number of pixels.
    step = a[0].size // words["steps"]
    flipping = quantus.PixelFlipping(
        features_in_step=step, perturb_baseline=0.0, abs=False, normalise=False, disable_warnings=True,
        display_progressbar=False,
    )  # fmt: skip
    x, y = case.x.numpy(), case.y.numpy()
    curve = flipping(model=case.model, x_batch=x, y_batch=y, a_batch=a[:, None], softmax=True, batch_size=len(x))
    targets = [pgc.model_targets.ClassifierOutputSoftmaxTarget(label) for label in y.tolist()]
    with torch.no_grad():
        before = case.model(case.x).softmax(1)[torch.arange(len(y)), case.y].numpy()
    drop = DropInConfidence()(case.x, a, targets, case.model)
    return {"deletion": np.asarray(curve)[:, 2::3], "average_drop": 100 * drop / before}


PEERS = {
    f.__name__: f
    for f in (
        saliency, input_x_gradient, integrated, guided_backprop, deconvnet, smoothgrad, expected_gradients, occlusion,
        feature_ablation, lime_segments, rise, layer_grad_cam, cam, field, of_maps, of_network,
    )
}  # fmt: skip


class Case:
    """The network, the images x (n, 3, h, w) and labels y (n,) of one request, and the arrays handed over with it."""

    def __init__(self, folder, model, indices, double):
        self.folder, self.model, self.indices = Path(folder), model, indices
        self.dtype = torch.float64 if double else torch.float32
        self.x = channels_first(self.array("images"), self)
        self.y = torch.from_numpy(self.array("labels")).long()

    def whole(self, name):
        return np.load(self.folder / f"{name}.npy")

    def array(self, name):
        return self.whole(name)[self.indices]

    def layer(self, words):
        return self.model.get_submodule(words["layer"])


def channels_first(array, case):
    return torch.from_numpy(np.moveaxis(array, -1, -3).copy()).to(case.dtype)


def images(values):
    return np.moveaxis(values.detach().numpy(), 1, -1)


def mean(case):
    """The colour that the network's normalisation maps to zero."""
    return case.model.mean.expand_as(case.x)


PACKAGES = (
    "torch", "captum", "grad-cam", "quantus", "openerf", "timm", "scipy", "scikit-image", "scikit-learn",
)  # fmt: skip


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # what a package prints must not get between the answers
    print(json.dumps({name: metadata.version(name) for name in PACKAGES}), file=answers, flush=True)
    models = {}
    for line in sys.stdin:
        words = json.loads(line)
        name = words["network"]
        model = models.setdefault(name, network(name, words["weights"]))
        choose(model, torch.float64 if words["double"] else torch.float32)
        case = Case(words["folder"], model, words["indices"], words["double"])
        start = time.perf_counter()
        values = PEERS[words["peer"]](case, words["words"])
        arrays = values if isinstance(values, dict) else {"maps": values}
        with torch.no_grad():
            arrays["logits"] = model(case.x).numpy()
        np.savez(case.folder / "theirs.npz", **arrays)
        print(json.dumps({"seconds": time.perf_counter() - start}), file=answers, flush=True)


if __name__ == "__main__":
    main()
