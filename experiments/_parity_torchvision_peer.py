"""PyTorch's half of parity_torchvision.py: writes <model>.safetensors and <model>_<size>.npz (images, logits)."""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

# torchvision's published wheel is a CUDA build: without CUDA only the shape rules of its own operators complain at
# import.
register = torch.library.register_fake
torch.library.register_fake = lambda op, *rest, **words: (
    (lambda f: f) if str(op).startswith("torchvision::") else register(op, *rest, **words)
)
import torchvision  # noqa: E402

torch.library.register_fake = register


def main(folder: Path, models: list[str]):
    torch.manual_seed(0)
    for text in models:
        name, *sizes = text.split(":")
        network = torchvision.models.get_model(name, weights=None).eval()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.normal_(module.running_mean, 0, 0.1)
                torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.normal_(module.bias, 0, 0.1)
        save_file(network.state_dict(), folder / f"{name}.safetensors")
        mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
        for size in sizes:
            images = torch.rand(2, int(size), int(size), 3)
            with torch.no_grad():
                logits = network(((images - mean) / std).permute(0, 3, 1, 2))
            np.savez(folder / f"{name}_{size}.npz", images=images.numpy(), logits=logits.numpy())
    print(f"{torch.__version__} {torchvision.__version__}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
