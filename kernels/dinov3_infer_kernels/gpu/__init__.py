"""Triton kernels of a transformer's forward pass and their gradients: launchers and kernels, torch and triton only.

Attention with rotary positions takes packed qkv tensors: `forward`, `backward`, `rotate`.  Between products stand
`layer_norm`, `residual_norm`, `norm_backward`, `swiglu` and `unfold`.  `warm` compiles before a run.  Reading order:
tiles, forward, short, rotation, backward, norms, pointwise, configs, launch, warm.
"""

from .backward import backward
from .configs import crossover, large_batch, why_too_old
from .forward import forward
from .norms import layer_norm, norm_backward, residual_norm
from .pointwise import swiglu, unfold
from .rotation import rotate
from .warm import warm

__all__ = [
    "backward",
    "crossover",
    "forward",
    "large_batch",
    "layer_norm",
    "norm_backward",
    "residual_norm",
    "rotate",
    "swiglu",
    "unfold",
    "warm",
    "why_too_old",
]
