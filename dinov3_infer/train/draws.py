"""Random draws that depend only on seed, step and purpose.

A run draws the same numbers with any number of processes, workers and accumulation steps, and after a resume, because
each draw has a fresh generator.
"""

import hashlib

import torch

__all__ = ["generator"]


def generator(seed: int, step: int, purpose: str, index: int = 0) -> torch.Generator:
    """A fresh CPU generator that depends only on the arguments.

    Args:
        seed: of the run.
        step: number of the step, from 0.
        purpose: name of the draw, such as "views".
        index: number of the draw within the step, such as the position of an image in the batch of all processes.
    """
    key = hashlib.blake2b(f"{seed}/{step}/{purpose}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little"))
