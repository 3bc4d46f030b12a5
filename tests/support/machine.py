"""Features of this machine, found without the package, so that a fault of the package cannot skip its tests."""

import os
import shutil
from typing import Any

import torch


def _has(what: str) -> bool:
    test: Any = getattr(torch.cpu, f"_is_{what}_supported", None)
    return test is not None and bool(test())


def _reason(has: bool, what: str) -> str | None:
    return None if has else f"this machine has no {what}"


_ONEDNN = torch.backends.mkldnn.is_available()

# the reason why a mode of the CPU plan is not available, or None if it must work
WHY_NOT = {
    "exact": _reason(_ONEDNN, "oneDNN"),
    "fast": _reason(_ONEDNN and (_has("avx512_bf16") or _has("amx_tile")), "products in bfloat16"),
    "int8": _reason(_ONEDNN and _has("vnni"), "products in 8 bits"),
}
# the same for the compiled C code
WHY_NOT_COMPILED = _reason(
    shutil.which("cc") is not None and "DINOV3_INFER_COMPILE" not in os.environ, "C compiler, or is not to use it"
)
