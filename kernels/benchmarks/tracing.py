"""The operators that a forward pass calls on a GPU, traced without one: names, kernels, bytes and FLOPs.

Models run on fake tensors of device "cuda" (FakeTensorMode; no GPU and no CUDA build of torch), so that the counts are
those of the real code, autocast's casts included.  Torch's scaled dot product attention and each of our operators are
one node.  Nothing here is measured.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinov3_infer import Backbone
from dinov3_infer.features.extractor import Extractor
from dinov3_infer.images.preprocess import PixelBatch, Placement
from dinov3_infer.model import dispatch, watch
from dinov3_infer.model.cuda.graphs import Graphs
from dinov3_infer.model.layers import ViTConfig
from dinov3_infer.model.network import Outputs
from dinov3_infer_kernels.gpu import configs

__all__ = ["Op", "Trace", "faked", "launched", "ours", "plain"]

_VIEWS = {
    "_unsafe_view", "promote_types", "empty", "empty_like", "new_empty", "lift_fresh", "detach", "empty_strided",
    "scalar_tensor", "full",
}  # fmt: skip
_SMS = 132  # of an H200, for which crossover and tiles are looked up


@dataclass
class Op:
    """One call, and the kernels that it launches."""

    name: str
    kind: str  # elementwise, cast, cat, norm, product, conv, sdpa, ours, fused, view, copy, pinned, sync, ...
    kernels: int = 0
    bytes: float = 0.0  # read and written, each element once
    flops: float = 0.0
    shape: tuple[int, ...] = ()  # of a product (M, N, K), of attention (B, H, N, D)
    tile: tuple[int, int, bool, int] = (0, 0, False, 0)  # ours: queries, keys, a program has a whole head, table bytes
    replayed: bool = False  # from a graph: the host does nothing for it


def touched(t: Tensor) -> int:
    """Bytes of the elements of a tensor; those repeated by expand count once."""
    sides = zip(t.shape, t.stride(), strict=True)
    return math.prod(size for size, stride in sides if stride != 0) * t.element_size()


class Trace(TorchDispatchMode):
    """Records the operators below autocast and autograd."""

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.device = device  # whose operators count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        stem = str(func).removesuffix(".default").partition(".")[2].partition(".")[0]
        if stem == "_local_scalar_dense":
            self.ops.append(Op("read a number", "sync"))
            return 0.0
        out = func(*args, **kwargs)
        if func.namespace in ("prim", "profiler"):
            return out
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        found = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        moved = sum(map(touched, given)) + sum(map(touched, found))
        devices = {t.device.type for t in (*given, *found)}
        if self.device not in devices:
            return out  # the host's own
        if stem in _VIEWS or any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            self.ops.append(Op(stem, "view"))
        elif func.namespace == "dinov3_infer":
            self.ops.append(_ours(stem, given, moved))
        elif stem in ("addmm", "mm", "linear", "_addmm_activation"):
            a = given[1] if "addmm" in stem else given[0]
            m, k = math.prod(a.shape[:-1]), a.shape[-1]
            n = found[0].numel() // m
            self.ops.append(Op(f"{stem} {m}x{n}x{k}", "product", 1, moved, 2.0 * m * n * k, (m, n, k)))
        elif stem == "convolution":
            weight = given[1]
            m, k = found[0].numel() // weight.shape[0], weight.numel() // weight.shape[0]
            shape = (m, weight.shape[0], k)
            # the bias is another kernel; 16-bit kernels take channels last: input, weight and output are transposed
            self.ops.append(Op("conv", "conv", 5, moved * 2, 2.0 * math.prod(shape), shape))
        elif stem == "native_layer_norm":
            self.ops.append(Op("layer_norm", "norm", 1, moved))
        elif stem == "native_layer_norm_backward":  # of the stream; of weight and bias, reading all once more
            self.ops.append(Op(stem, "norm", 2, moved + touched(given[0]) + touched(given[1])))
        elif stem == "_to_copy" and len(devices) > 1:
            pinned = bool(kwargs.get("non_blocking")) or any(a is True for a in args)
            self.ops.append(Op("to the GPU", "pinned" if pinned else "copy", 1, moved / 2))
        elif stem == "_to_copy":
            self.ops.append(Op("cast", "cast", 1, moved))
        elif stem == "cat":
            self.ops.append(Op("cat", "cat", 1, moved))
        elif stem == "constant_pad_nd":
            self.ops.append(Op(stem, "elementwise", 2, moved + found[0].nbytes))
        elif kwargs.get("out") is not None:
            self.ops.append(Op(stem, "elementwise", 1, moved - touched(found[0])))
        else:
            self.ops.append(Op(stem, "elementwise", 1, moved))
        return out


def _ours(stem: str, given: list[Tensor], moved: float) -> Op:
    if stem != "rope_attention":
        return Op(stem, "fused", 2 if stem == "norm_backward" else 1, moved)  # the second adds the sums of programs
    *lead, _, heads, width = given[0].shape
    batch, length = lead if len(lead) == 2 else (1, lead[0])  # packed: as one image, which is too much
    whole = configs.whole_heads(given[0], length, batch * heads) if len(lead) == 2 else None
    rows = configs.TABLE["forward", width, given[0].element_size()]["sm90"]
    row = whole or next(config for limit, config in rows if length <= limit)
    table = given[1].element_size() if len(given) > 1 else 0
    flops = 4.0 * batch * heads * length**2 * width
    tile = (row.block_m, row.block_n, whole is not None, table)
    return Op(stem, "ours", 1, moved, flops, (batch, heads, length, width), tile)


class Nodes(TorchFunctionMode):
    """Attention of torch as one node; `arange`, `[]` and `copy_` without the device guard that a CPU build lacks."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            q, k, v = (*args, *(kwargs[x] for x in ("query", "key", "value") if x in kwargs))[:3]
            if torch.is_autocast_enabled("cuda"):
                q, k, v = (t.to(torch.bfloat16) for t in (q, k, v))
            moved = 2 * (touched(q) + touched(k))
            self.trace.ops.append(Op("SDPA", "sdpa", 1, moved, 4.0 * q.numel() * k.shape[2], tuple(q.shape)))
            b, h, n, d = q.shape
            return torch.empty(b, n, h, d, dtype=q.dtype, device=q.device).transpose(1, 2)
        if name == "arange":
            count = math.ceil(args[0] if len(args) == 1 else args[1] - args[0])
            found = torch.empty(count, dtype=kwargs.get("dtype") or torch.int64, device=kwargs.get("device") or "cpu")
            return found.fill_(0)
        if name == "copy_" and args[0].device.type == "cuda":
            into, source = args[:2]
            moved = touched(into) + touched(source)
            if source.device.type != "cuda":
                self.trace.ops.append(
                    Op("to the GPU", "pinned" if kwargs.get("non_blocking") else "copy", 1, moved / 2)
                )
            else:
                cast = into.dtype != source.dtype
                self.trace.ops.append(Op("copy and cast" if cast else "copy", "elementwise", 1, moved))
            return into
        if name == "__getitem__" and args[0].device.type == "cuda":
            return _taken(*args)
        return func(*args, **kwargs)


def _taken(t: Tensor, index: Any) -> Tensor:
    """Indexing by numbers, slices, None and ..., as views."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [p for p in parts if not isinstance(p, Tensor)]:
        at = next(i for i, p in enumerate(parts) if p is Ellipsis)
        have = sum(p is not None and p is not Ellipsis for p in parts)
        parts[at : at + 1] = [slice(None)] * (t.ndim - have)
    axis = 0
    for p in parts:
        if isinstance(p, int):
            t = t.select(axis, p)
            continue
        if p is None:
            t = t.unsqueeze(axis)
        elif not isinstance(p, slice):
            raise NotImplementedError(f"index {p!r}")
        elif p != slice(None):
            t = torch.ops.aten.slice(t, axis, p.start, p.stop, p.step or 1)
        axis += 1
    return t


def faked(
    module: nn.Module, dtype: torch.dtype | None = None, device: str = "cuda", trained: bool = False
) -> nn.Module:
    """Parameters and buffers of a model on "meta" become fake tensors of a device, inside of a FakeTensorMode."""
    for sub in module.modules():
        for store in (sub._parameters, sub._buffers):
            for name, t in store.items():
                if t is None:
                    continue
                kept = name in ("rope_periods", "inv_freq", "periods") or dtype is None or not t.is_floating_point()
                new: Any = torch.empty(t.shape, dtype=t.dtype if kept else dtype, device=device)
                store[name] = nn.Parameter(new, requires_grad=trained) if isinstance(t, nn.Parameter) else new
    return module


# --- traces --------------------------------------------------------------------------------------------------------


@contextmanager
def _chip() -> Iterator[None]:
    """Makes the package see a Hopper GPU; fake tensors have no memory that a snapshot could compare."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of torch, that there is no CUDA
        put = lambda where, what, value: stack.enter_context(mock.patch.object(where, what, value))  # noqa: E731
        put(configs, "chip_of", lambda device: "sm90")
        put(configs, "processors", lambda device: _SMS)
        put(watch.Snapshot, "holds", lambda self, model: True)
        put(watch.Snapshot, "__init__", lambda self, model: None)
        put(dispatch, "why_unknown", lambda model, dtypes: None)  # a fake tensor is none of the classes it knows
        put(dispatch, "_tried", lambda model, kept, request: kept)
        yield


class _Recorder:
    """Replaces CUDA graphs: a replay records the same operators again, free for the host."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def stream(self) -> int:
        return 0

    def capture(self, call: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        start = len(self.trace.ops)
        found = call()
        recorded = [replace(op, replayed=True) for op in self.trace.ops[start:] if op.kernels]
        del self.trace.ops[start:]
        return lambda: self.trace.ops.extend([Op("replay", "replay"), *recorded]), found


def images_of(batch: int, size: tuple[int, int], dtype: torch.dtype = torch.uint8) -> PixelBatch:
    """The output of a transform for images of 8 bits that go to a GPU."""
    pixels = torch.zeros((batch, 3, *size), dtype=dtype)
    return PixelBatch(pixels, (Placement(size, size, (0, 0, *size)),) * batch, None)


def ours(
    config: ViTConfig,
    batch: int,
    sizes: Sequence[tuple[int, int]],  # (height, width) in pixels
    mode: Any = "exact",
    dtype: torch.dtype | None = None,
) -> list[Op]:
    """`extract_features` with a plan, from uint8 on the host to the check of the result, after the first calls.

    `dtype`: of the weights; None for "auto", which keeps float32.
    """
    return _warm(config, batch, sizes, mode, dtype, lambda extractor, batches: extractor.features(batches))


def launched(config: ViTConfig, batch: int, size: tuple[int, int], class_only: bool) -> list[Op]:
    """The operators that `embed` launches for a batch, without the copy of its result to the host."""
    return _warm(config, batch, [size], "exact", None, lambda e, batches: e.launched(batches, class_only=class_only))


def _warm(config: ViTConfig, batch: int, sizes: Any, mode: Any, dtype: Any, call: Callable[..., Any]) -> list[Op]:
    trace = Trace()
    with torch.device("meta"):
        model = Backbone.from_config(config)
    with FakeTensorMode(allow_non_fake_inputs=True), _chip():
        faked(model, dtype)
        extractor = Extractor(model, model.preprocess, mode, dtype is None)
        batches = [images_of(batch, size) for size in sizes]
        with trace, Nodes(trace):
            call(extractor, batches)  # makes the plan and its tables
            plan: Any = dispatch._PLANS[model].plan
            plan.graphs = Graphs(_Recorder(trace))
            for _ in range(3):
                trace.ops.clear()
                call(extractor, batches)
    return trace.ops


def plain(model: nn.Module, batch: int, size: tuple[int, int], autocast: bool, dtype: torch.dtype | None) -> list[Op]:
    """Any model, built on "meta", as its code is written, from normalised pixels on the host."""
    trace, calls = Trace(), 0

    def count(module: nn.Module, args: Any) -> None:
        nonlocal calls
        calls += 1

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), _chip():
        faked(model, dtype)
        hooks = [module.register_forward_pre_hook(count) for module in model.modules()]
        pixels = torch.empty((batch, 3, *size), dtype=torch.float32, device="cuda")
        with trace:
            trace.ops.append(Op("to the GPU", "copy", 1, float(pixels.nbytes)))
            pixels = pixels.to(dtype or torch.float32)
            torch.set_autocast_enabled("cuda", autocast)
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            try:
                with Nodes(trace):
                    model(pixels)
            finally:
                torch.set_autocast_enabled("cuda", False)
        for hook in hooks:
            hook.remove()
    return _mixed(trace.ops, calls)


def _mixed(ops: list[Op], calls: int) -> list[Op]:
    """The operators, with the calls of modules spread evenly between them."""
    every, found = max(1, len(ops) // max(1, calls)), []
    for i, op in enumerate(ops):
        if i % every == 0 and calls:
            found.append(Op("module", "module"))
            calls -= 1
        found.append(op)
    return found + [Op("module", "module")] * calls
