"""The compiled passes of a plan: found in the package of kernels, or not used for a reason."""

from functools import cache
from types import ModuleType

import torch

__all__ = ["passes", "start_compiler", "why_not_compiled"]


@cache
def passes() -> ModuleType | None:
    """The module of the kernels for CPUs; None where this package lies without them."""
    try:
        from dinov3_infer_kernels import cpu
    except ModuleNotFoundError:
        return None
    return cpu


def why_not_compiled(dtype: torch.dtype = torch.float32, head_dim: int = 64) -> str | None:
    """Why the compiled passes cannot be used here, or None if they can."""
    found = passes()
    if found is None:
        return "the package dinov3_infer_kernels is not installed"
    reason: str | None = found.why_not_fused(dtype, head_dim)
    return reason


def start_compiler() -> None:
    """Has the passes compiled while something else is done, where they are not there yet; nobody has to call this."""
    if (found := passes()) is not None:
        found.start_compiler()
