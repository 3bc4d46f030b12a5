"""Triton kernels of attention with rotary positions: launchers and kernels, torch and triton only.

`forward`, `backward` and `rotate` take packed qkv tensors and know nothing of models.  Reading order: tiles, forward,
rotation, backward, configs, launch.
"""

from .backward import backward
from .configs import crossover
from .forward import forward
from .rotation import rotate

__all__ = ["backward", "crossover", "forward", "rotate"]
