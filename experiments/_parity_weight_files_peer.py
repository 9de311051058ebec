"""PyTorch's half of parity_weight_files.py: writes .pth files into a folder, in both forms, and beside each an .npz of
what torch.load(weights_only=True) reads from it; then prints the names as JSON."""

import argparse
import json
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch


def trees():
    """What is saved: contiguous and other tensors, shared storages, types, wrappers, training state."""
    torch.manual_seed(0)
    base = torch.randn(6, 5, 4)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    net(torch.randn(2, 3, 10, 10)).sum().backward()
    optimizer.step()
    shared, noted = torch.randn(40), torch.randn(2, 2)
    noted.note = "a tensor with an attribute"
    square = shared[:36].view(6, 6)
    return {
        "state_dict": net.state_dict(),
        "not_contiguous": OrderedDict(
            a=base.transpose(0, 2), b=base[1:4, ::2], c=base.permute(2, 0, 1)[1:], d=base[..., -1], e=base[2, 3, 1],
            channels_last=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), empty=torch.zeros(0, 3),
            expanded=torch.randn(3, 1).expand(3, 7),
        ),
        "shared": {"whole": shared, "part": shared[5:15], "square": square, "turned": square.T},
        "types": {name: torch.arange(-6, 6).to(getattr(torch, name)) for name in ("float16", "bfloat16", "float64")},
        "parameters": {"p": torch.nn.Parameter(torch.randn(3, 2)), "frozen": torch.nn.Parameter(torch.randn(2), False)},
        "own_classes": {"buffer": torch.nn.Buffer(torch.randn(3)), "noted": noted},
        "nested": {"epoch": 3, "state_dict": {"encoder": {"w": base[0]}, "decoder": {"w": base[1]}}},
        "checkpoint": {
            "epoch": 7, "best": 0.5, "arch": "net", "size": torch.Size([3, 4]),
            "state_dict": {f"module.{name}": value for name, value in net.state_dict().items()},
            "optimizer": optimizer.state_dict(), "args": argparse.Namespace(lr=0.1, name="x"),
        },
    }  # fmt: skip


def flat(tree, prefix=""):
    if isinstance(tree, torch.Tensor):
        return {prefix: tree}
    return (
        {n: t for k, v in tree.items() for n, t in flat(v, f"{prefix}.{k}" if prefix else k).items()}
        if isinstance(tree, dict)
        else {}
    )


def main():
    folder, names = Path(sys.argv[1]), []
    for name, tree in trees().items():
        for form in ("zip", "legacy"):
            path = folder / f"{name}_{form}.pth"
            torch.save(tree, path, _use_new_zipfile_serialization=form == "zip")
            with torch.serialization.safe_globals([argparse.Namespace]):
                read = torch.load(path, weights_only=True)
            tensors = flat(read.get("state_dict", read))
            tensors = {n.removeprefix("module."): t for n, t in tensors.items() if "num_batches" not in n}
            np.savez(folder / f"{name}_{form}.npz", **{n: t.detach().double().numpy() for n, t in tensors.items()})
            types = {n: str(t.dtype).removeprefix("torch.") for n, t in tensors.items()}
            names.append([path.name, types])
    print(json.dumps({"versions": {"torch": torch.__version__}, "files": names}))


if __name__ == "__main__":
    main()
