"""Whether a plan can compute a model, and whether the model is still the one that its plan was made of."""

from collections.abc import Iterator
from operator import is_

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as _all_modules

from .attention import rope_attention
from .convnext import ConvBlock, ConvNeXt, Depthwise, Patches
from .layers import Attention, Block, GatedMlp, LayerNorm, MaskedKeyLinear, Mlp, PatchEmbed, Residual
from .network import Network
from .vit import VisionTransformer

__all__ = ["Snapshot", "checksums", "modules_of", "tensors_of", "why_unknown"]

_PACKAGE = __name__.split(".")[0]  # plans know the methods of this package
# The classes that a plan can compute.  A model with a module of any other class, such as an adapter, has no plan.
_KNOWN = {
    nn.ModuleList, nn.Conv2d, nn.Linear, MaskedKeyLinear, Attention, Block, GatedMlp, LayerNorm, Mlp, PatchEmbed,
    Residual, nn.Sequential, ConvBlock, Depthwise, Patches,
}  # fmt: skip
# The methods of a network that its plan replaces.
_OWN: dict[type[Network], set[str]] = {
    ConvNeXt: {"forward", "run_stages", "output", "tokens"},
    VisionTransformer: {
        "forward",
        "forward_packed",
        "run_blocks",
        "embed_tokens",
        "with_prefix",
        "positions",
        "rope",
        "normed",
        "split",
    },
}
_ROW = 8 * 1021  # bytes
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_HELD = ("_modules", "_parameters", "_buffers")


def why_unknown(model: Network, dtypes: set[torch.dtype]) -> str | None:
    """Why a plan cannot compute this model, or None if it can.

    `dtypes`: those that its linears may have; all other tensors may be float32 too.
    """
    if not isinstance(model, tuple(_OWN)):
        return "plans are made for vision transformers and ConvNeXts, and this network is another one"
    if _root_is_changed(model):
        return "a method of the model is replaced, or every module has a hook"
    device = model.device
    for name, module in model.named_modules():
        if module is not model and type(module) not in _KNOWN:
            return f"'{name}' is a {type(module).__name__}, which no plan can compute"
        if any(getattr(module, hooks) for hooks in _HOOKS):
            return f"'{name or 'the model'}' has a hook"
        if "forward" in module.__dict__:
            return f"the forward of '{name or 'the model'}' is replaced"
        if type(module) is Attention and module.attend is not rope_attention:
            return "attn_implementation is not 'auto'"
        for tensor in tensors_of(module):
            if tensor.dtype not in dtypes | {torch.float32} or tensor.device != device:
                return f"'{name}' holds {tensor.dtype} on '{tensor.device}'"
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_inference():
                return f"'{name}' holds a tensor that is quantised, sparse or made in inference mode"
    return None


class Snapshot:
    """The state of a model, without a reference to the model itself.

    Modules, their attributes and tensors are compared by identity, tensors by memory and version too.  Aliases keep the
    memory of the tensors from being given to others.  Writing to `.data` shows in none of these; it shows in
    `checksums`.
    """

    def __init__(self, model: Network) -> None:
        self.config = model.config
        # of the model itself the attributes are left out, and its hooks are looked at in `_root_is_changed`
        self.dicts = [model.__dict__[kind] for kind in _HELD]
        for module in modules_of(model):
            if module is not model:
                own = module.__dict__
                self.dicts += (own, *(own[kind] for kind in (*_HELD, *_HOOKS)))
        self.values = [value for held in self.dicts for value in held.values()]
        self.tensors = [tensor for module in modules_of(model) for tensor in tensors_of(module)]
        self.aliases = [tensor.detach() for tensor in self.tensors]
        self.versions, self.pointers = self._now()
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors)

    def holds(self, model: Network) -> bool:
        """Whether the model is unchanged, as far as this shows without reading its tensors."""
        if _root_is_changed(model) or model.config != self.config:
            return False
        if any(model.__dict__[kind] is not held for kind, held in zip(_HELD, self.dicts, strict=False)):
            return False
        found = [value for held in self.dicts for value in held.values()]
        if len(found) != len(self.values) or not all(map(is_, found, self.values)):
            return False
        return self._now() == (self.versions, self.pointers)

    def _now(self) -> tuple[list[int], list[int]]:
        return [t._version for t in self.tensors], [t.data_ptr() for t in self.tensors]


def checksums(model: nn.Module) -> list[bytes]:
    """A checksum of each tensor on a CPU, which any change alters unless it is contrived.

    The bits are summed by column of a table of a prime width, so that swapped rows or heads alter it too.
    """
    found = []
    for module in modules_of(model):
        for tensor in tensors_of(module):
            bits = tensor.detach().contiguous().view(torch.uint8).numpy().reshape(-1)
            rows = len(bits) // _ROW * _ROW
            sums = bits[:rows].view(np.uint64).reshape(-1, _ROW // 8).sum(axis=0, dtype=np.uint64)
            found.append(sums.tobytes() + bits[rows:].tobytes())
    return found


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    waiting = [model]
    while waiting:
        yield (module := waiting.pop())
        waiting += (child for child in module._modules.values() if child is not None)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    return (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)


def _root_is_changed(model: Network) -> bool:
    if _all_modules._global_forward_hooks or _all_modules._global_forward_pre_hooks:
        return True
    own = next(names for kind, names in _OWN.items() if isinstance(model, kind))
    if not own.isdisjoint(model.__dict__) or model._forward_hooks or model._forward_pre_hooks:
        return True
    return any(getattr(type(model), name).__module__.split(".")[0] != _PACKAGE for name in own)
