"""PyTorch's half of parity_networks.py: reads lines "publisher name size ..." and for each writes network.safetensors,
config.json where a hub has one, and <size>.npz (images, mean, std, logits, and the output of every layer with a
kernel); then prints a line."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import _torchvision_cpu  # noqa: F401, before timm and torchvision
import numpy as np
import timm
import torch
import torchvision
from safetensors.torch import save_file

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PLAIN = ((0.0,) * 3, (1.0,) * 3)

# Names of authors whose code is not at hand, written from timm's or torchvision's: (pattern, replacement) in turn.
STAGE = r"^stages\.(\d)\.blocks\.(\d+)\."
RENAMED = {
    "huggingface-convnext": (
        (r"^stem\.0\.", "convnext.embeddings.patch_embeddings."),
        (r"^stem\.1\.", "convnext.embeddings.layernorm."),
        (r"^stages\.(\d)\.downsample\.", r"convnext.encoder.stages.\1.downsampling_layer."),
        (STAGE + "gamma", r"convnext.encoder.stages.\1.layers.\2.layer_scale_parameter"),
        (STAGE + "conv_dw", r"convnext.encoder.stages.\1.layers.\2.dwconv"),
        (STAGE + "norm", r"convnext.encoder.stages.\1.layers.\2.layernorm"),
        (STAGE + r"mlp\.fc", r"convnext.encoder.stages.\1.layers.\2.pwconv"),
        (r"^head\.norm", "convnext.layernorm"),
        (r"^head\.fc", "classifier"),
    ),
    "huggingface-resnet": (
        (r"^conv1\.", "resnet.embedder.embedder.convolution."),
        (r"^bn1\.", "resnet.embedder.embedder.normalization."),
        *(
            (rf"^layer{s}\.(\d+)\.{theirs}", rf"resnet.encoder.stages.{s - 1}.layers.\1.{ours}")
            for s in (1, 2, 3, 4)
            for theirs, ours in (
                *((rf"conv{i}\.", f"layer.{i - 1}.convolution.") for i in (1, 2, 3)),
                *((rf"bn{i}\.", f"layer.{i - 1}.normalization.") for i in (1, 2, 3)),
                (r"downsample\.0\.", "shortcut.convolution."),
                (r"downsample\.1\.", "shortcut.normalization."),
            )
        ),
        (r"^fc\.", "classifier.1."),
    ),
    "torchvision-old": ((r"\.(norm|conv)([12])\.", r".\1.\2."),),
}


def main(folder: Path):
    for line in sys.stdin:
        publisher, name, *sizes = line.split()
        torch.manual_seed(0)
        network, (mean, std) = built(publisher, name)
        randomise(network)
        names = renamed(publisher, name, network)
        tensors = {names(key): tensor.contiguous() for key, tensor in network.state_dict().items()}
        save_file(tensors, folder / "network.safetensors")
        (folder / "config.json").unlink(missing_ok=True)
        if publisher == "timm":
            config = {"architecture": name, "num_classes": 1000, "pretrained_cfg": {"mean": mean, "std": std}}
            (folder / "config.json").write_text(json.dumps(config))
        for size in map(int, sizes):
            images = torch.rand(2, size, size, 3)
            outputs, hooks = {}, []
            for key, module in network.named_modules():
                if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                    hooks.append(module.register_forward_hook(kept(outputs, names(f"{key}.weight"))))
            with torch.no_grad():
                logits = network(((images - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2))
            for hook in hooks:
                hook.remove()
            arrays = {"images": images.numpy(), "logits": logits.numpy(), "mean": mean, "std": std}
            np.savez(folder / f"{size}.npz", **arrays, **{f"layer {key}": value for key, value in outputs.items()})
        print("done", flush=True)


def built(publisher, name):
    """The network in evaluation mode, and the mean and std that it is published with."""
    if publisher.startswith("torchvision"):
        return torchvision.models.get_model(name, weights=None).eval(), IMAGENET
    if publisher == "robustbench":
        if name == "trades":
            return architecture("wide_resnet").WideResNet(28, 10, 10, sub_block1=True).eval(), PLAIN
        module = architecture("dm_wide_resnet")
        network = module.DMWideResNet(activation_fn=module.Swish, mean=(0.0,) * 3, std=(1.0,) * 3).eval()
        return network, (module.CIFAR10_MEAN, module.CIFAR10_STD)
    network = timm.create_model(name, pretrained=False).eval()
    if publisher.startswith("huggingface"):
        return network, IMAGENET
    return network, (tuple(network.default_cfg["mean"]), tuple(network.default_cfg["std"]))


def architecture(name):
    """A file of RobustBench's definitions, without the package around it, which wants more packages than it needs."""
    folder = Path(importlib.util.find_spec("robustbench").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location(name, folder / "model_zoo" / "architectures" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def randomise(network):
    """Random parameters and random statistics, such that the signal neither dies nor explodes."""
    for parameter in network.parameters():
        if parameter.ndim >= 2 and parameter.shape[0] > 1 and parameter[0].numel() > 1:
            torch.nn.init.normal_(parameter, 0, (1.5 / parameter[0].numel()) ** 0.5)
        else:  # vectors: biases, scales of a layer; and tokens (1, n, c), scales (c, 1, 1)
            torch.nn.init.normal_(parameter, 0.1, 0.2)
    for module in network.modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.LayerNorm)):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, 0, 0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)


def renamed(publisher, name, network):
    """The function from the network's own names to those of the file."""
    if publisher == "efficientnet_pytorch":
        return efficientnet_pytorch(network)
    key = f"{publisher}-{name.split('_')[0].rstrip('0123456789')}" if publisher == "huggingface" else publisher
    rules = RENAMED.get(key, ())

    def rename(text):
        for pattern, replacement in rules:
            text = re.sub(pattern, replacement, text)
        return text

    return rename


def efficientnet_pytorch(network):
    """From timm's names to efficientnet_pytorch's, which numbers its blocks through."""
    numbers = [f"blocks.{g}.{i}" for g, group in enumerate(network.blocks) for i in range(len(group))]
    plain = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    expanding = {
        "conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
        "conv_pwl": "_project_conv", "bn3": "_bn2",
    }  # fmt: skip
    squeeze = {"conv_reduce": "_se_reduce", "conv_expand": "_se_expand"}
    ends = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}

    def rename(text):
        parts = text.split(".")
        if parts[0] != "blocks":
            return ".".join([ends[parts[0]], *parts[1:]])
        layers = expanding if hasattr(network.blocks[int(parts[1])][int(parts[2])], "conv_pwl") else plain
        rest = [squeeze[parts[4]], *parts[5:]] if parts[3] == "se" else [layers[parts[3]], *parts[4:]]
        return ".".join(["_blocks", str(numbers.index(".".join(parts[:3]))), *rest])

    return rename


def kept(outputs, name):
    """A hook that keeps a layer's output, channels last."""

    def hook(module, inputs, output):
        outputs[name] = (output.permute(0, 2, 3, 1) if output.ndim == 4 else output).numpy()

    return hook


if __name__ == "__main__":
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__}
    print(json.dumps(versions), flush=True)
    main(Path(sys.argv[1]))
