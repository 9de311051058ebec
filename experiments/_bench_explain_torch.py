"""The PyTorch process of bench_explain.py: captum's, pytorch-grad-cam's and openerf's explanations, channels_last. Also
the networks of parity_explain.py.

Runs in the peers' own environment, started by the driver.
"""

import os
import time
import types

import numpy as np
import torch
from _bench_torch import MEAN, STD, build
from _bench_worker import peak_megabytes, serve
from _parity_networks_peer import efficientnet_pytorch, timm  # imports torchvision without its operators
from captum import attr as captum
from captum._utils.models.linear_model import SkLearnRidge
from openerf import feature_ops as open_erf
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import pytorch_grad_cam as pgc  # isort: skip
from pytorch_grad_cam import finer_cam, shapley_cam  # noqa: F401
from pytorch_grad_cam.utils import model_targets

pgc.model_targets = model_targets
lime = types.SimpleNamespace(LimeBase=captum.LimeBase, SkLearnRidge=SkLearnRidge)
FAMILY = (
    pgc.GradCAM, pgc.GradCAMPlusPlus, pgc.XGradCAM, pgc.HiResCAM, pgc.GradCAMElementWise, pgc.LayerCAM, pgc.EigenCAM,
    pgc.EigenGradCAM,
)  # fmt: skip


class ReLU6(nn.ReLU):
    """A ReLU for captum, which guides none but `nn.ReLU`."""

    def forward(self, x):
        return functional.relu6(x)


def network(name, weights):
    """The network with its weights, for images in [0, 1]; `mean` is the colour that its normalisation maps to 0."""
    if name == "resnet20":
        model = build("resnet20", None)
        model.load_state_dict(load_file(weights), strict=False)  # the file has no num_batches_tracked
        model.constants = {"mean": MEAN, "std": STD}
        return model.eval()
    model = timm.create_model("tf_efficientnet_lite0").eval()
    tensors, names = load_file(weights), efficientnet_pytorch(model)
    model.load_state_dict(
        {key: tensors[names(key)] if "num_batches" not in key else value for key, value in model.state_dict().items()}
    )
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU6):
                setattr(parent, key, ReLU6())
    with safe_open(weights, "pt") as file:
        model.constants = {key: [float(x) for x in file.metadata()[key].split(",")] for key in ("mean", "std")}
    model.register_forward_pre_hook(lambda module, inputs: ((inputs[0] - module.mean) / module.std,))
    return model


def choose(model, dtype):
    """The model in this precision, the constants of its normalisation too, which are no float32 in it."""
    model.to(dtype)
    for name, values in model.constants.items():
        setattr(model, name, torch.tensor(values, dtype=dtype).view(1, 3, 1, 1))
    return model


def prepare(path, network_name, images, labels, weights, layer, shallow, steps, window, stride, together):
    """layer, shallow: where class activation maps are made, and Score-CAM's; together: perturbed copies of a batch."""
    import_mb = peak_megabytes()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = choose(network(network_name, weights), torch.float32).to(memory_format=torch.channels_last)
    x = (
        (torch.from_numpy(np.load(images)).float() / 255)
        .permute(0, 3, 1, 2)
        .contiguous(memory_format=torch.channels_last)
    )
    y = torch.from_numpy(np.load(labels)).long()
    zero = model.mean.expand_as(x)
    targets = [model_targets.ClassifierOutputTarget(label) for label in y.tolist()]

    def cam(method, at):
        with method(model, [model.get_submodule(at)]) as made:
            made.batch_size = 16
            return made(x, targets=targets)

    def field():
        maps = []
        for image in x:
            points, features = image[None].clone().requires_grad_(), []
            hook = model.get_submodule(layer).register_forward_hook(lambda m, i, output: features.append(output))
            model(points)
            hook.remove()
            centre = open_erf.center_activation(features[0], "layer", model)
            maps.append(features[0].shape[1] * torch.autograd.grad(centre, points)[0][0].abs().sum(0))
        return torch.stack(maps)

    guided = captum.GuidedBackprop(model)
    runs = {
        "saliency": lambda: captum.Saliency(model).attribute(x, y),
        "input_x_gradient": lambda: captum.InputXGradient(model).attribute(x, y),
        "integrated": lambda: captum.IntegratedGradients(model).attribute(
            x, zero, y, n_steps=steps, internal_batch_size=len(x)
        ),
        "guided_backprop": lambda: guided.attribute(x, y),
        "occlusion": lambda: captum.Occlusion(model).attribute(
            x, (3, window, window), (3, stride, stride), zero, y, perturbations_per_eval=together
        )[:, :1],  # the same in every channel
        "grad_cam": lambda: cam(pgc.GradCAM, layer),
        "score_cam": lambda: cam(pgc.ScoreCAM, shallow),
        "family": lambda: [cam(method, layer) for method in FAMILY],
        "field": field,
    }
    run = runs[path]
    start = time.perf_counter()
    first = run()
    info = {
        "framework": f"PyTorch {torch.__version__}",
        "threads": torch.get_num_threads(),
        "import_mb": import_mb,
        "first_seconds": time.perf_counter() - start,
        "maps": summary(first),
    }
    return run, run, info


def summary(values):
    """The sum of |maps| of each image, by which the two sides are seen to do the same."""
    values = np.stack([np.asarray(value.detach() if hasattr(value, "detach") else value) for value in values])
    return np.abs(values).reshape(len(values), -1).sum(1).tolist()


if __name__ == "__main__":
    serve(prepare)
