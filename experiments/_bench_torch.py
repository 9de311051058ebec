"""The PyTorch process of bench_core.py and bench_networks.py: the same network and the same steps, written as PyTorch
users write them, channels_last. Any other network than the first one's is timm's of that name.

Runs in the peers' own environment (torch, numpy, safetensors, timm), started by the driver.
"""

import os
import time

import numpy as np
import torch
from _bench_worker import serve
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPS = 8 / 255


class Block(nn.Module):
    """Basic block; shortcut "pad" as in akamaster/pytorch_resnet_cifar10 (option A), or "project" (1x1 convolution)."""

    def __init__(self, inputs, width, stride, shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()  # modules, or captum finds no ReLU to guide
        self.changes = stride != 1 or inputs != width
        self.width = width
        if self.changes and shortcut == "project":
            self.downsample = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        else:
            self.downsample = None

    def forward(self, x):
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.changes:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.width // 4, self.width // 4))
        return self.relu2(y + x)


class ResNet(nn.Module):
    """ResNet-20 (CIFAR) or ResNet-18 with the CIFAR stem; `k` pools the k largest positions of the class maps."""

    def __init__(self, widths, blocks, shortcut, dense, k=None):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        inputs, self.stages = widths[0], len(widths)
        for stage, width in enumerate(widths):
            layers = []
            for block in range(blocks):
                layers.append(Block(inputs, width, 2 if stage and block == 0 else 1, shortcut))
                inputs = width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.dense, self.k = dense, k
        setattr(self, dense, nn.Linear(widths[-1], 10))
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1((x - self.mean) / self.std)))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        dense = getattr(self, self.dense)
        if self.k is None:
            return dense(x.mean((2, 3)))
        maps = functional.conv2d(x, dense.weight[:, :, None, None], dense.bias)
        return maps.flatten(2).topk(self.k, 2, sorted=False).values.mean(2)


def build(network, k):
    if network == "resnet20":
        return ResNet((16, 32, 64), 3, "pad", "linear", k)
    if network == "resnet18":
        return ResNet((64, 128, 256, 512), 2, "project", "fc")
    import _torchvision_cpu  # noqa: F401, before timm
    import timm

    model, (mean, std) = timm.create_model(network), (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    model.register_forward_pre_hook(lambda module, inputs: ((inputs[0] - mean) / std,))
    return model


def pgd(model, images, labels, steps, eps=EPS):
    """PGD in the linf ball from a random start; gradients of the input alone; the last iterate."""
    size = 2.5 * eps / steps
    delta = torch.empty_like(images).uniform_(-eps, eps)
    x = (images + delta).clamp_(0, 1)
    for _ in range(steps):
        x.requires_grad_()
        gradient = torch.autograd.grad(functional.cross_entropy(model(x), labels, reduction="sum"), x)[0]
        with torch.no_grad():
            x = x + size * gradient.sign_()
            x = torch.minimum(torch.maximum(x, images - eps), images + eps).clamp_(0, 1)
    return x


def prepare(path, network, images, labels, weights, k):
    """`weights` is read; if the file is not there, random ones are written to it, for the other processes."""
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = build(network, k)
    if not os.path.exists(weights):
        randomise_statistics(model)
        save_file({name: value for name, value in model.state_dict().items() if "num_batches" not in name}, weights)
    model.load_state_dict(load_file(weights), strict=False)  # not strict: the files hold no num_batches_tracked
    model = model.to(memory_format=torch.channels_last).eval()
    x = (
        (torch.from_numpy(np.load(images)).float() / 255)
        .permute(0, 3, 1, 2)
        .contiguous(memory_format=torch.channels_last)
    )
    y = torch.from_numpy(np.load(labels)).long()
    compiled = "BENCH_COMPILE" in os.environ
    call = torch.compile(model) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)

    def forward():
        with torch.inference_mode():
            return call(x)

    def input_gradient():
        z = x.clone().requires_grad_()
        return torch.autograd.grad(functional.cross_entropy(call(z), y, reduction="sum"), z)[0]

    def update(inputs):
        model.train()
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(call(inputs), y)
        loss.backward()
        optimizer.step()
        model.eval()
        return loss.detach()

    with torch.inference_mode():
        logits = model(x).numpy()
    runs = {
        "forward": forward,
        "input_gradient": input_gradient,
        "pgd": lambda: pgd(call, x, y, 20),
        "adversarial": lambda: update(pgd(call, x, y, 10)),
        "train": lambda: update(x),
    }
    run = runs[path]
    start = time.perf_counter()
    first = run()
    first_seconds = time.perf_counter() - start
    info = {"framework": f"PyTorch {torch.__version__}", "threads": torch.get_num_threads(), "logits": logits.tolist()}
    if compiled:
        info["compile_seconds"] = first_seconds
    if path == "input_gradient":
        info["gradients"] = first.flatten(1).norm(dim=1).tolist()
    if path in ("train", "adversarial"):
        info["loss"] = first.item()
    if path == "pgd":
        with torch.inference_mode():
            info["loss"] = functional.cross_entropy(model(first), y).item()
    return (lambda: pgd(call, x, y, 1)) if path == "pgd" else run, run, info


def randomise_statistics(model):
    """Fresh batch statistics are 0 and 1, which would hide a mistake in reading them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)


if __name__ == "__main__":
    serve(prepare)
