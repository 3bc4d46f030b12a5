"""What this machine has, asked of the machine alone: a part of the package that fails here fails its tests, too."""

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

# why a mode of the CPU plan cannot be had, or None if it has to work
WHY_NOT = {
    "exact": _reason(_ONEDNN, "oneDNN"),
    "fast": _reason(_ONEDNN and (_has("avx512_bf16") or _has("amx_tile")), "products in bfloat16"),
    "int8": _reason(_ONEDNN and _has("vnni"), "products in 8 bits"),
}
# the same of the compiled passes
WHY_NOT_COMPILED = _reason(
    shutil.which("cc") is not None and "DINOV3_INFER_COMPILE" not in os.environ, "C compiler, or is not to use it"
)
