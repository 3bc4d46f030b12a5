"""The compiled passes of the CPU plan, from the kernel package, or the reason why they are not used."""

from functools import cache
from types import ModuleType

import torch

__all__ = ["passes", "start_compiler", "why_not_compiled"]


@cache
def passes() -> ModuleType | None:
    """The CPU kernel module; None if the kernel package is not installed."""
    try:
        from dinov3_infer_kernels import cpu
    except ModuleNotFoundError:
        return None
    return cpu


def why_not_compiled(dtype: torch.dtype = torch.float32, head_dim: int = 64) -> str | None:
    """Why the compiled passes cannot be used here; None if they can."""
    found = passes()
    if found is None:
        return "the package dinov3_infer_kernels is not installed"
    reason: str | None = found.why_not_fused(dtype, head_dim)
    return reason


def start_compiler() -> None:
    """Compile the passes in the background if needed; calling this is optional."""
    if (found := passes()) is not None:
        found.start_compiler()
