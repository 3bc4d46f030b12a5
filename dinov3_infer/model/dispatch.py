"""Whether a plan computes the features of a model: when it is made, tried, dropped and refused.

A plan (see `cpu.plan`, `cuda.cuda_plan`) is made when a model first runs without gradients.  It holds a second copy of
the weights outside of the model.  A change of a parameter, or of what the model is made of, ends the plan.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from .attention import launch, rope_attention, triton_attention, why_not_triton
from .chips import distrust, lacks_bfloat16
from .convnext import ConvNeXt
from .cpu.linear import why_not_int8, why_not_packed
from .cpu.plan import CpuPlan, spans_of
from .network import BackboneOutput, Network, Scale, normalised
from .trial import Precision, Undecided, compare, twin, why_not_trusted
from .vit import VisionTransformer
from .watch import Snapshot, checksums, modules_of, tensors_of, why_unknown

__all__ = ["Mode", "Plan", "Precision", "Request", "compare", "drop_plan", "plan_of", "warm", "why_not_plan"]

log = logging.getLogger("dinov3_infer")

Mode = Literal["exact", "fast", "int8", "plain"]
Samples = Callable[..., Tensor]  # (size: (height, width) or None) -> images of the package, [3, 3, H_px, W_px]
_LEAST = (0.99, 0.98)  # cosines of int8 with float32: mean of class tokens, 1st percentile of patches
# Tokens of a call by one thread in which a checksum of the weights takes 2 % of the time, as measured; a quarter for
# weights that fit a cache.
_FEW_TOKENS = {"exact": 1024, "fast": 1536, "int8": 2560}
_IN_CACHE = 1 << 24  # bytes
_SMALL = 320  # pixels of the side of an image that int8 is tried with at twice its size, else at half
_MANY_TOKENS = 2048  # of an image; a trial takes one such image, else three


class Plan(Protocol):
    @property
    def mode(self) -> str:
        """The mode that it has, which may be another one than was asked for."""
        ...

    def __call__(
        self,
        model: Any,  # of which the plan was made
        pixels: Sequence[Tensor],  # [B_i, 3, H_i, W_i]: one tensor per size
        indices: Sequence[int] = (),  # blocks to keep
        scale: Scale = ...,  # of images that come as uint8
        class_only: bool = False,  # no other tokens are wanted
    ) -> Sequence[BackboneOutput]:
        """The outputs of the model for each tensor, with the blocks asked for as layers."""
        ...


class Request(NamedTuple):
    """The inputs of a plan, beside the model and the mode."""

    samples: Samples
    half: torch.dtype | None = None  # on CUDA: of the products; None for float32, for which there is no plan
    scale: Scale = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # of images that come as uint8
    sizes: tuple[tuple[int, int], ...] = ()  # (height, width) in pixels of the images to come; () for the default
    pixels: int = 0  # of all images to come


# --- the devices ---------------------------------------------------------------------------------------------------


class _Device(NamedTuple):
    """The plans of a type of device."""

    why_not: Callable[[Any, Request], str | None]
    make: Callable[[Any, Mode, Request], Plan]
    dtypes: Callable[[Request], set[torch.dtype]]  # of the weights that a plan can be made of
    reads_values: bool  # in each call, which is cheap on a CPU and makes the host wait for a GPU
    is_tried: bool  # before it is trusted; the parts of the CPU's plan are tried by themselves


def _why_not_cpu(model: Any, request: Request) -> str | None:
    return why_not_packed()


def _made_for_cpu(model: Any, mode: Mode, request: Request) -> Plan:
    """In the mode asked for; where this machine or model has no such plan in the next one, with a line in the log."""
    lacking = None if mode == "exact" else why_not_packed(torch.bfloat16)
    half = torch.float32 if mode == "exact" or lacking else torch.bfloat16
    if isinstance(model, ConvNeXt):
        from .cpu.convnext_plan import ConvNeXtPlan  # few models need this

        if mode == "int8":
            lacking = lacking or "8 bits are for vision transformers"
        if lacking is None:
            return ConvNeXtPlan(model, half)
    elif mode == "int8" and (lacking := why_not_int8()) is None:
        seen, unseen = _trial_images(request, model.config.patch_size)
        plan, plain = CpuPlan(model, half, spans_of(model, seen)), CpuPlan(model, torch.float32)
        found = [compare(a, b) for a, b in zip(plan(model, unseen), plain(model, unseen), strict=True)]
        cls, patches = min(f.cls_mean for f in found), min(f.patch_percentile for f in found)
        if cls >= _LEAST[0] and patches >= _LEAST[1]:
            return plan
        lacking = f"class tokens have a cosine of {cls:.3f} with float32, patches {patches:.3f}"
    elif lacking is None:
        return CpuPlan(model, half)
    other: Mode = "fast" if mode == "int8" else "exact"
    log.warning("mode='%s' is not available here: %s; using mode='%s'", mode, lacking, other)
    return _made_for_cpu(model, other, request)


def _trial_images(request: Request, patch: int) -> tuple[list[Tensor], list[Tensor]]:
    """Images that give the ranges of int8, and others that check it, both of two sizes, since ranges differ by size.

    The first are the images of the package, a quarter of each, and noise; the others are mirrored images and quarters
    that are not among the first.  This takes as long as about 30 images.
    """
    own = request.samples()
    h, w = own.shape[2:]
    half = [max(1, side // 2 // patch) * patch for side in (h, w)]
    size = (2 * h, 2 * w) if max(h, w) <= _SMALL else (half[0], half[1])
    other = request.samples(size)
    large, small = (other, own) if size[0] > h else (own, other)
    rows, columns = small.shape[2:]
    mean, std = (torch.tensor(v, dtype=torch.float32, device="cpu").view(3, 1, 1) for v in request.scale)
    draw = torch.Generator("cpu").manual_seed(0)
    noise = [
        (torch.rand(t.shape[1:], generator=draw, dtype=t.dtype, device="cpu") - mean) / std for t in (small, large)
    ]
    first, last = large[:, :, :rows, :columns], large[:, :, -rows:, -columns:]
    seen = [torch.cat((small, first, noise[0][None])), torch.cat((large, noise[1][None]))]
    return seen, [torch.cat((small[:1], last[1:2])).flip(-1), large[2:].flip(-1)]


def _why_not_cuda(model: Any, request: Request) -> str | None:
    if not isinstance(model, VisionTransformer):
        return "plans for CUDA are made for vision transformers, and this network is another one"
    if request.half is None and lacks_bfloat16(model.device):
        return "its products are in float32, since this GPU has none in bfloat16"
    if request.half is None:
        return "its products are in float32; load it with dtype='auto' or 'bfloat16' for products in 16 bits"
    if model.config.in_chans != 3:
        return f"images of {model.config.in_chans} channels, for which its kernels were never run"
    return why_not_triton(model.device, request.half, model.config.head_dim)


def _made_for_cuda(model: VisionTransformer, mode: Mode, request: Request) -> Plan:
    if mode == "int8":
        log.warning("mode='int8' is not available here: products in 8 bits are made for CPUs; using mode='fast'")
    assert request.half is not None
    from .cuda.cuda_plan import CudaPlan  # not above: a CPU needs neither this nor its operators

    return CudaPlan(model, request.half, tanh=mode != "exact")


_DEVICES = {
    "cpu": _Device(_why_not_cpu, _made_for_cpu, lambda request: {torch.float32}, reads_values=True, is_tried=False),
    "cuda": _Device(
        _why_not_cuda, _made_for_cuda, lambda request: {torch.float32, request.half or torch.float32},
        reads_values=False, is_tried=True,
    ),
}  # fmt: skip


# --- when there is one ---------------------------------------------------------------------------------------------


class _Kept(NamedTuple):
    """The plan of a model, or why there is none, and what it was made of."""

    mode: Mode
    half: torch.dtype | None
    snapshot: Snapshot
    values: list[Tensor]  # see `_values`
    bits: Tensor | None  # the same when the plan was made
    sums: list[bytes]  # see `checksums`; where values are read
    refused: str | None  # why its plan is not used
    plan: Any  # Plan | None


_PLANS: WeakKeyDictionary[Network, _Kept] = WeakKeyDictionary()
_TOLD: WeakSet[Network] = WeakSet()  # models whose refused plan was logged
_TRUSTED: set[tuple[Any, ...]] = set()  # kinds of plans, see `_tried`, whose first one was right


def plan_of(model: Network, mode: Mode, request: Request) -> Plan | None:
    """The plan of the model in its present state; None if the model has to run without one."""
    if mode == "plain" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if (kept := _current(model, mode, request)) is None:
        device = _DEVICES.get(model.device.type)
        reason = None if device is None else _why_none(model, device, request)
        if reason is not None or device is None:
            drop_plan(model)
            if mode != "exact" and device is not None and reason is not None:
                _tell(model, f"mode='{mode}' is not available here: {reason}; the model runs without a plan")
            return None
        drop_plan(model)
        values = _values(model) if device.reads_values else []
        bits = torch.cat(values) if values else None
        plan = device.make(model, mode, request)
        sums = checksums(model) if device.reads_values else []
        kept = _PLANS[model] = _Kept(mode, request.half, Snapshot(model), values, bits, sums, None, plan)
    if kept.plan is not None and _DEVICES[model.device.type].is_tried:
        kept = _tried(model, kept, request)
    return kept.plan  # type: ignore[no-any-return]


def why_not_plan(model: Network, mode: Mode, request: Request) -> str | None:
    """Why no plan computes the features of this model, or None if one does, which is made for the answer."""
    if mode == "plain":
        return "mode='plain' asks for no plan"
    if (device := _DEVICES.get(model.device.type)) is None:
        return f"plans are made for CPUs and CUDA, and the model is on '{model.device.type}'"
    if (reason := _why_none(model, device, request)) is not None:
        return reason
    with torch.no_grad():
        plan = plan_of(model, mode, request)
    if plan is None:
        return _PLANS[model].refused if model in _PLANS else "a compiler is tracing"
    return None


def drop_plan(model: Network) -> None:
    """Frees the plan; the next call that needs one makes it."""
    _PLANS.pop(model, None)


def warm(model: VisionTransformer, request: Request) -> None:
    """Compiles the attention of images of `request.sizes`, or of any size, so that no pass of a long run waits for it.

    A failure is left to the pass that needs the kernel, and to its trial.
    """
    dtype, width = request.half or torch.float32, model.config.head_dim
    if model.device.type != "cuda" or why_not_triton(model.device, dtype, width) is not None:
        return
    if model.blocks[0].attn.attend not in (rope_attention, triton_attention):  # type: ignore[operator, union-attr]
        return
    from .cuda.cuda_plan import TABLES

    tables = None if model.rope_periods is None else TABLES.get(dtype, torch.float32)
    prefix = model.config.num_prefix
    counts: list[int | None] = [prefix + _patches(model, size) for size in request.sizes]
    try:
        for count in counts or [None]:
            launch("warm", model.main_weight.new_empty(0, dtype=dtype), model.num_heads, width, tables, count)
    except Exception as error:
        log.info("the kernels were not compiled before they are needed: %s", error)


def _current(model: Network, mode: Mode, request: Request) -> _Kept | None:
    """The plan that was made before, if nothing has changed since."""
    kept = _PLANS.get(model)
    if kept is None or kept.mode != mode or kept.half != request.half or not kept.snapshot.holds(model):
        return None
    if kept.bits is not None and not torch.equal(torch.cat(kept.values), kept.bits):
        return None
    return None if _reads_all(model, kept, request) and checksums(model) != kept.sums else kept


def _reads_all(model: Network, kept: _Kept, request: Request) -> bool:
    """Whether a checksum of all values takes less than 2 % of the time of the call.

    Both times grow with the weights: their ratio depends on tokens, threads and whether the weights fit a cache.
    """
    if not kept.sums or not isinstance(model, VisionTransformer):
        return False
    few = _FEW_TOKENS[kept.plan.mode] * torch.get_num_threads()
    small = kept.snapshot.nbytes <= _IN_CACHE
    return request.pixels // model.config.patch_size**2 >= (few // 4 if small else few)


def _why_none(model: Network, device: _Device, request: Request) -> str | None:
    """Why no plan is made, or None if one can be."""
    if (reason := device.why_not(model, request)) is not None:
        return reason
    return why_unknown(model, device.dtypes(request))


def _tried(model: Network, kept: _Kept, request: Request) -> _Kept:
    """The plan, or its refusal: on each device the first plan of a kind is compared with the model before it is used.

    A kind is an architecture, dtype and mode, the order of the number of patches, one size or several, and whether
    large batches have an attention of their own, since each of these has different kernels.
    """
    assert isinstance(model, VisionTransformer)
    sizes: list[Any] = sorted(set(request.sizes)) or [None]
    kernels = (str(model.device), request.half, model.config, kept.plan.mode)
    if not request.sizes and any(kind[: len(kernels)] == kernels for kind in _TRUSTED):
        return kept
    images: list[Tensor] = []
    if not request.sizes:
        images.append(request.samples(None).to(model.device))
    longest = max(_patches(model, size) for size in request.sizes or [images[0].shape[2:]])
    many = 0 if len(sizes) > 1 else _large_batch(model, request, longest)
    if (kind := (*kernels, longest.bit_length(), len(sizes) > 1, many)) in _TRUSTED:
        return kept
    few = 1 if longest > _MANY_TOKENS else 3
    images = images or [request.samples(size)[:few].to(model.device) for size in {sizes[0]: 0, sizes[-1]: 0}]
    large = [images[0].repeat(-(-many // len(images[0])), 1, 1, 1)] if many > few else []
    judge = twin(model)

    def reason(run: Callable[[Sequence[Tensor]], Sequence[BackboneOutput]]) -> str | None:
        each = (why_not_trusted(run, judge, some, request.scale, kept.plan.mode) for some in (images, large) if some)
        return next((why for why in each if why is not None), None)

    try:
        refused = reason(lambda given: kept.plan(model, given, (), request.scale))
    except Undecided:
        return kept
    if refused is None:
        _TRUSTED.add(kind)
        return kept
    refused = f"the plan is not used on '{model.device}': {refused}"
    _tell(model, f"{refused}; the model runs without a plan, which is slower")
    found = _PLANS[model] = kept._replace(plan=None, refused=refused)
    if (fault := reason(lambda given: [model(normalised(t, request.scale)) for t in given])) is not None:
        distrust(model.device, f"the Triton kernel was tried on '{model.device}', and {fault}")
    return found


def _large_batch(model: VisionTransformer, request: Request, patches: int) -> int:
    """Images of one size from which attention is another kernel, one that needs many heads; 0: never."""
    if model.device.type != "cuda" or request.half is None or model.rope_periods is None:
        return 0
    tokens = patches + model.config.num_prefix
    return launch("large_batch", model.device, request.half, model.config.head_dim, tokens, model.num_heads)  # type: ignore[no-any-return]


def _patches(model: VisionTransformer, size: Sequence[int]) -> int:
    """Of an image of (height, width) pixels."""
    return (size[0] // model.config.patch_size) * (size[1] // model.config.patch_size)


def _tell(model: Network, line: str) -> None:
    """Once for each model."""
    if model not in _TOLD:
        _TOLD.add(model)
        log.warning("%s", line)


def _values(model: Network) -> list[Tensor]:
    """Views of a few values of each tensor, which change when `.data` is written to.

    They are compared as bits, since NaN is not equal to itself.
    """
    flat = [tensor.detach().flatten() for module in modules_of(model) for tensor in tensors_of(module)]
    return [values[len(values) // 2 :][:4].view(torch.int32) for values in flat]
