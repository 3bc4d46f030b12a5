"""Random draws that depend on what they are for, and on nothing else.

A run draws the same numbers whatever the number of its processes, workers and accumulation steps, and after a resume:
no generator lives longer than the one thing that it draws.
"""

import hashlib

import torch

__all__ = ["generator"]


def generator(seed: int, step: int, purpose: str, index: int = 0) -> torch.Generator:
    """A fresh CPU generator, a pure function of its arguments.

    `index` numbers what the draw is for: the sample in the effective batch of all processes, the block of the model.
    """
    key = hashlib.blake2b(f"{seed}/{step}/{purpose}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little"))
