"""Records the torch operators that are called."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["FUSED", "TURNED", "Recorder"]


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


FUSED, TURNED = "dinov3_infer.rope_attention", "dinov3_infer.rope_rotate"
