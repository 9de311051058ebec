"""Imports torchvision beside a CPU's PyTorch, for the peers that need it: import this first.

torchvision's published wheel is a CUDA build. Without CUDA only the shape rules of its own operators complain, at
import; nothing that is compared needs them.
"""

import torch

_register = torch.library.register_fake
torch.library.register_fake = lambda op, *rest, **words: (
    (lambda f: f) if str(op).startswith("torchvision::") else _register(op, *rest, **words)
)
import torchvision  # noqa: E402, F401

torch.library.register_fake = _register
