"""Triton kernels of a transformer's forward pass: launchers and kernels, torch and triton only.

Attention with rotary positions takes packed qkv tensors: `forward`, `backward`, `rotate`.  Between products stand
`layer_norm`, `residual_norm`, `swiglu` and `unfold`.  Reading order: tiles, forward, short, rotation,
backward, norms, pointwise, configs, launch.
"""

from .backward import backward
from .configs import crossover
from .forward import forward
from .norms import layer_norm, residual_norm
from .pointwise import swiglu, unfold
from .rotation import rotate

__all__ = ["backward", "crossover", "forward", "layer_norm", "residual_norm", "rotate", "swiglu", "unfold"]
