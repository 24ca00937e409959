"""Whether float32 products run in TF32 on CUDA: factors rounded to 10 bits of mantissa, by 5e-4 at most.

PyTorch has two interfaces to that switch. `torch.set_float32_matmul_precision` and `allow_tf32` are the old
one; `torch.backends.fp32_precision`, the new one, is a tree: what `cuda.matmul` leaves open ("none") its
backend decides, and what that leaves open the root. The old getters raise RuntimeError once the new interface
switched TF32 on, as `TrainingArguments(tf32=True)` does. The new getter knows what either has set, resolves
the tree, and is what the products ask.
"""

from __future__ import annotations

import torch

__all__ = ["cuda_products_in_tf32"]


def cuda_products_in_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
