"""PyTorch's half of parity_explain_relevance.py: relevance by zennit, of a ResNet-20 with modules it can hook.

Arguments: a folder with images.npy (n, 3, 32, 32), normalised, labels.npy (n,), low.npy and high.npy (3,), the box, and
the file of weights. Writes <composite>.npy (n, 3, 32, 32), the relevance where 1 starts at the label, and logits.npy.
"""

import sys
from pathlib import Path

import _torchvision_cpu  # noqa: F401, before zennit
import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from zennit import composites
from zennit.attribution import Gradient
from zennit.layer import Sum


def folded(tensors, conv, norm):
    """The convolution with its batch norm inside, eps too (zennit's own canonizer leaves it out)."""
    weight = tensors[f"{conv}.weight"]
    scale = tensors[f"{norm}.weight"] / torch.sqrt(tensors[f"{norm}.running_var"] + 1e-5)
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
    layer.weight.data = weight * scale[:, None, None, None]
    layer.bias.data = tensors[f"{norm}.bias"] - tensors[f"{norm}.running_mean"] * scale
    return layer


class Block(nn.Module):
    def __init__(self, tensors, name, stride):
        super().__init__()
        self.conv1 = folded(tensors, f"{name}.conv1", f"{name}.bn1")
        self.conv2 = folded(tensors, f"{name}.conv2", f"{name}.bn2")
        self.conv1.stride, self.stride = (stride, stride), stride
        self.relu1, self.relu2, self.sum = nn.ReLU(), nn.ReLU(), Sum()

    def forward(self, x):
        y = self.conv2(self.relu1(self.conv1(x)))
        if self.stride == 2:
            pad = y.shape[1] // 4
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad))
        return self.relu2(self.sum(torch.stack([y, x], -1)))


def network(tensors):
    layers = [folded(tensors, "conv1", "bn1"), nn.ReLU()]
    layers += [
        Block(tensors, f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1)
        for stage in (1, 2, 3)
        for block in range(3)
    ]
    dense = nn.Linear(64, 10)
    dense.weight.data, dense.bias.data = tensors["linear.weight"], tensors["linear.bias"]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), dense).eval()


def main():
    folder, weights = Path(sys.argv[1]), sys.argv[2]
    read = lambda name: torch.from_numpy(np.load(folder / f"{name}.npy"))
    model, images, labels = network(load_file(weights)), read("images"), read("labels").long()
    low, high = (read(name)[None, :, None, None].expand_as(images).contiguous() for name in ("low", "high"))
    rows = {
        "epsilon_plus": composites.EpsilonPlus(),
        "epsilon_gamma_box": composites.EpsilonGammaBox(low=low, high=high),
        "epsilon_alpha2_beta1": composites.EpsilonAlpha2Beta1(),
        "epsilon_plus_flat": composites.EpsilonPlusFlat(),
        "epsilon_alpha2_beta1_flat": composites.EpsilonAlpha2Beta1Flat(),
        "deconvnet": composites.DeconvNet(),
        "guided_backprop": composites.GuidedBackprop(),
    }
    for name, composite in rows.items():
        with Gradient(model=model, composite=composite) as attributor:
            logits, relevance = attributor(images.clone(), torch.eye(10)[labels])
        np.save(folder / f"{name}.npy", relevance.detach().numpy())
    np.save(folder / "logits.npy", logits.detach().numpy())


if __name__ == "__main__":
    main()
