"""The fast inference path on a CPU: a plan beside the module tree, made when a model first runs without gradients.

A plan (see `cpu.plan`) holds a second copy of the weights and is no part of the model: parameters stay what they are,
and whatever changes or replaces one ends the plan.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _all_modules

from .attention import rope_attention
from .convnext import ConvBlock, ConvNeXt, Depthwise, Patches
from .cpu.convnext_plan import ConvNeXtPlan
from .cpu.linear import why_not_int8, why_not_packed
from .cpu.plan import CpuPlan, spans_of
from .layers import Attention, Block, GatedMlp, LayerNorm, MaskedKeyLinear, Mlp, PatchEmbed, Residual
from .network import BackboneOutput, Network
from .vit import VisionTransformer

__all__ = ["Mode", "Precision", "compare", "drop_plan", "plan_of"]

log = logging.getLogger("dinov3_infer")

_PACKAGE = __name__.split(".")[0]  # whose methods a plan knows

Mode = Literal["exact", "fast", "int8", "plain"]
Plan = CpuPlan | ConvNeXtPlan
_LEAST = (0.99, 0.98)  # cosines of int8 with float32: mean of class tokens, 1st percentile of patches


class Precision(NamedTuple):
    """Cosine similarity with the features of plain float32."""

    cls_mean: float
    cls_worst: float
    patch_percentile: float  # 99 % of the patches are nearer
    patch_worst: float


def compare(found: BackboneOutput, plain: BackboneOutput) -> Precision:
    """How near tokens are to others."""
    pairs = ((found.cls_token, plain.cls_token), (found.patch_tokens, plain.patch_tokens))
    cls, patches = (F.cosine_similarity(a.double(), b.double(), dim=-1).flatten().sort().values for a, b in pairs)
    return Precision(cls.mean().item(), cls[0].item(), patches[len(patches) // 100].item(), patches[0].item())


# --- when there is one ---------------------------------------------------------------------------------------------

# Of each model the mode asked for, its state, a few values of each of its tensors (see `_values`), and the plan.
_PLANS: WeakKeyDictionary[Network, tuple[Mode, tuple[int, ...], list[Tensor], Tensor, Plan]] = WeakKeyDictionary()
_TOLD: WeakSet[Network] = WeakSet()  # models whose mode cannot be had, which the log says once
# What a plan knows how to compute.  A module of any other class, such as an adapter, runs as it is written.
_KNOWN = {
    nn.ModuleList, nn.Conv2d, nn.Linear, MaskedKeyLinear, Attention, Block, GatedMlp, LayerNorm, Mlp, PatchEmbed,
    Residual, nn.Sequential, ConvBlock, Depthwise, Patches,
}  # fmt: skip
# The methods of a network that its plan takes the place of.
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


def plan_of(model: Network, mode: Mode, pictures: Callable[[], Tensor]) -> Plan | None:
    """The plan of a model as it is now; None where it has to run as it is written.

    `pictures`: normalised pixels [B, 3, H_px, W_px] to find the ranges of int8 with.
    """
    if mode == "plain" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    state = _state(model)
    if state is None:
        drop_plan(model)
        if mode != "exact" and model.device.type == "cpu" and model not in _TOLD:
            _TOLD.add(model)
            reason = why_not_packed() or "it has modules, hooks or tensors that the fast path does not know"
            log.warning("mode='%s' gives way to the model as it is written: %s", mode, reason)
        return None
    kept = _PLANS.get(model)
    if kept is None or kept[:2] != (mode, state) or not torch.equal(torch.cat(kept[2]), kept[3]):
        drop_plan(model)
        values = _values(model)
        kept = _PLANS[model] = (mode, state, values, torch.cat(values), _made(model, mode, pictures))
    return kept[4]


def drop_plan(model: Network) -> None:
    """Frees the memory of a plan; the next one is made when it is needed."""
    _PLANS.pop(model, None)


def _made(model: Network, mode: Mode, pictures: Callable[[], Tensor]) -> Plan:
    """In the mode asked for, or with a line in the log the next one that this machine and this model are good for."""
    lacking = None if mode == "exact" else why_not_packed(torch.bfloat16)
    half = torch.float32 if mode == "exact" or lacking else torch.bfloat16
    if isinstance(model, ConvNeXt):
        lacking = lacking or ("8 bits are for vision transformers" if mode == "int8" else None)
    elif mode == "int8" and (lacking := why_not_int8()) is None:
        assert isinstance(model, VisionTransformer)
        pixels = pictures()
        plan, unseen = CpuPlan(model, half, spans_of(model, pixels)), pixels.flip(-1)
        found = compare(plan(model, [unseen])[0], CpuPlan(model, torch.float32)(model, [unseen])[0])
        if found.cls_mean >= _LEAST[0] and found.patch_percentile >= _LEAST[1]:
            return plan
        lacking = (
            f"class tokens have a cosine of {found.cls_mean:.3f} with float32, patches {found.patch_percentile:.3f}"
        )
    if lacking is None:
        return ConvNeXtPlan(model, half) if isinstance(model, ConvNeXt) else CpuPlan(model, half)  # type: ignore[arg-type]
    other: Mode = "fast" if mode == "int8" else "exact"
    log.warning("mode='%s' gives way to '%s': %s", mode, other, lacking)
    return _made(model, other, pictures)


def _state(model: Network) -> tuple[int, ...] | None:
    """Changes with the parameters and buffers; None for a model that the plan does not know how to compute."""
    own = next((names for kind, names in _OWN.items() if isinstance(model, kind)), None)
    if own is None or why_not_packed() is not None or not own.isdisjoint(model.__dict__):
        return None
    if _all_modules._global_forward_hooks or _all_modules._global_forward_pre_hooks:
        return None
    if any(getattr(type(model), name).__module__.split(".")[0] != _PACKAGE for name in own):
        return None
    found: list[int] = []
    for module in _modules(model):
        if module is not model and type(module) not in _KNOWN or module._forward_hooks or module._forward_pre_hooks:
            return None
        if "forward" in module.__dict__ or type(module) is Attention and module.attend is not rope_attention:
            return None
        for tensor in _tensors(module):
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or tensor.is_inference():
                return None
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
                return None  # such as quantised ones, which say that they are float32
            found += (tensor.data_ptr(), tensor._version)
    return tuple(found)


def _values(model: Network) -> list[Tensor]:
    """Views of a few values of each tensor.

    They show what versions do not, writing to `.data`, and keep the memory from being given to another tensor.  Bits
    are compared, since NaN is not equal to itself.
    """
    flat = [tensor.detach().flatten() for module in _modules(model) for tensor in _tensors(module)]
    return [values[len(values) // 2 :][:4].view(torch.int32) for values in flat]


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    waiting = [model]
    while waiting:
        yield (module := waiting.pop())
        waiting += (child for child in module._modules.values() if child is not None)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)
