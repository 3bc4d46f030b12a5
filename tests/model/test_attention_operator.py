"""The attention operator: its CPU definition, gradient, shapes and FLOPs, and which implementation runs."""

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracles import SMALL, relative
from qkv import angles, offsets
from recorder import FUSED, TURNED, Recorder
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dinov3_infer import Preprocess, VisionTransformer
from dinov3_infer.features.extractor import Extractor
from dinov3_infer.model import attention, chips, vit
from dinov3_infer.model.attention import count_flops, rope_attention, sdpa_attention, triton_attention, why_not_triton
from dinov3_infer.model.layers import narrowed
from dinov3_infer.train.loop import Run

OP = torch.ops.dinov3_infer.rope_attention
BACKWARD = torch.ops.dinov3_infer.rope_attention_backward
ROTATE = torch.ops.dinov3_infer.rope_rotate
FORMS = pytest.mark.parametrize("packed", [False, True], ids=["fixed", "packed"])
ROTATED = pytest.mark.parametrize("rotated", [True, False], ids=["rope", "no_rope"])
LENGTHS = [3, 1, 1, 2]


def arguments(packed: bool, rotated: bool, dtype: torch.dtype = torch.float32, heads: int = 2, width: int = 8) -> Any:
    """qkv with a gradient, and the other arguments of the operator."""
    total = sum(LENGTHS)
    lead = (total,) if packed else (3, total)
    qkv = torch.randn(*lead, 3, heads, width, dtype=dtype, requires_grad=True)
    cos, sin = angles(total, width, prefix=1) if rotated else (None, None)
    return qkv, (cos, sin, offsets(LENGTHS) if packed else None, max(LENGTHS) if packed else total, 0.4)


@FORMS
@ROTATED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_operator_equals_the_definition(packed: bool, rotated: bool, dtype: torch.dtype) -> None:
    """Output and gradient, against the definition in float64."""
    qkv, (cos, sin, cu_seqlens, longest, scale) = arguments(packed, rotated, dtype)
    wide = qkv.detach().double().requires_grad_()
    expected = sdpa_attention(wide, cos, sin, cu_seqlens=cu_seqlens, scale=scale)
    out, _ = OP(qkv, cos, sin, cu_seqlens, longest, scale)
    weights = torch.randn_like(out)
    out.backward(weights)
    expected.backward(weights.double())
    tolerance = 4 * torch.finfo(dtype).eps  # a few roundings, of unit numbers
    assert out.dtype == dtype and relative(out, expected) < tolerance
    assert relative(qkv.grad, wide.grad) < 2 * tolerance


@FORMS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float16_tables_are_widened_first(packed: bool, dtype: torch.dtype) -> None:
    """Output and gradient have the bits of the same table in float32, for any dtype of the tokens."""
    qkv, (cos, sin, *rest) = arguments(packed, True, dtype)
    halves, weights, results = (cos.half(), sin.half()), torch.randn_like(qkv[..., 0, :, :]).flatten(-2), []
    for table in (halves, [t.float() for t in halves]):
        qkv.grad = None
        out, _ = OP(qkv, *table, *rest)
        out.backward(weights)
        turned = ROTATE(qkv.detach(), *table)
        results.append((out, qkv.grad, turned, sdpa_attention(qkv.detach(), *table, cu_seqlens=rest[0])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@FORMS
@ROTATED
def test_the_gradient_equals_finite_differences(packed: bool, rotated: bool) -> None:
    """Checked in float64."""
    qkv, rest = arguments(packed, rotated, torch.float64, width=4)
    assert torch.autograd.gradcheck(lambda x: OP(x, *rest)[0], qkv)


@FORMS
def test_the_second_result_is_the_logarithm_of_the_sum_of_weights(packed: bool) -> None:
    """To base 2, [B, H, N] or [H, T], of scaled scores."""
    qkv, (cos, sin, cu_seqlens, longest, scale) = arguments(packed, False, torch.float64)
    _, lse = OP(qkv, cos, sin, cu_seqlens, longest, scale)
    part = qkv[4:5] if packed else qkv[:1, 2:3]  # an image of a single token, or the third query of the first image
    if packed:
        scores = (part[:, 0] * part[:, 1]).sum(-1) * scale
        assert lse.shape == (2, 7)
        torch.testing.assert_close(lse[:, 4], scores[0] / torch.log(torch.tensor(2.0).double()))
    else:
        scores = torch.einsum("hd, nhd -> hn", part[0, 0, 0], qkv[0, :, 1]) * scale
        assert lse.shape == (3, 2, 7)
        torch.testing.assert_close(torch.exp2(lse[0, :, 2]), scores.exp().sum(1))


@FORMS
@ROTATED
def test_opcheck(packed: bool, rotated: bool) -> None:
    """torch's checks of schema, autograd registration, fake implementation and tracing, with dynamic shapes."""
    qkv, rest = arguments(packed, rotated)
    torch.library.opcheck(OP, (qkv, *rest))
    out, lse = OP(qkv.detach(), *rest)
    torch.library.opcheck(BACKWARD, (torch.randn_like(out), qkv.detach(), *rest, out, lse))


def test_opcheck_of_the_rotation() -> None:
    """The rotation alone has no gradient; all other checks pass, and the result equals the definition."""
    qkv, (cos, sin, *_) = arguments(False, True)
    torch.library.opcheck(ROTATE, (qkv.detach(), cos, sin))
    turned = ROTATE(qkv.detach(), cos, sin)
    q, k, _ = attention._rotated(qkv.detach(), cos, sin)
    assert torch.equal(turned, torch.stack((q, k), dim=2))


@FORMS
def test_compile_and_export_keep_it_as_one_node(packed: bool) -> None:
    """The whole function is one graph with one operator, with the same result."""
    qkv, rest = arguments(packed, True)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return OP(x, *rest)[0] * 2

    expected = OP(qkv, *rest)[0] * 2
    torch._dynamo.reset()
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    out = compiled(qkv)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert qkv.grad is not None
    program = torch.export.export(Module(), (qkv.detach(),))
    assert sum("rope_attention" in str(node.target) for node in program.graph.nodes) == 1
    torch.testing.assert_close(program.module()(qkv.detach()), expected)


def test_flops_are_counted_like_those_of_sdpa() -> None:
    """Forward 4 N^2 H D for each image, backward 2.5 times that; packed images by their own lengths."""
    count_flops()
    qkv, rest = arguments(False, True)
    with FlopCounterMode(display=False) as counter:
        OP(qkv, *rest)[0].sum().backward()
    assert counter.get_total_flops() == 3.5 * 4 * 3 * 7**2 * 2 * 8
    qkv, rest = arguments(True, True)
    with FlopCounterMode(display=False) as counter:
        OP(qkv.detach(), *rest)
    assert counter.get_total_flops() == 4 * (9 + 1 + 1 + 4) * 2 * 8


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "reason"),
    [
        ("cpu", torch.bfloat16, 64, "the model is on 'cpu'"),
        ("mps", torch.bfloat16, 64, "the model is on 'mps'"),
        ("cuda", torch.float64, 64, "the tokens are torch.float64"),
        ("cuda", torch.bfloat16, 32, "heads of 64 and 128 channels, and these have 32"),
        ("cuda", torch.float32, 128, "float32 tiles of 128 channels"),
        ("cuda:1", torch.bfloat16, 64, None),
        ("cuda", torch.float16, 128, None),
        ("xpu", torch.float32, 64, None),
    ],
)
def test_why_not_triton(
    device: str, dtype: torch.dtype, head_dim: int, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pure function of device, dtype and head width; it needs no GPU."""
    monkeypatch.setattr(attention, "_not_installed", lambda: None)
    answer = why_not_triton(torch.device(device), dtype, head_dim)
    assert answer is None if reason is None else reason in str(answer)


@pytest.fixture
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A pretended GPU of this capability."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: request.param)
    monkeypatch.setattr(attention, "_not_installed", lambda: None)
    chips._capability.cache_clear()
    yield
    chips._capability.cache_clear()


OLD = [(7, 0), (7, 5), (6, 1)]
CHIPS = pytest.mark.parametrize(
    ("chip", "old"),
    [(c, True) for c in OLD] + [(c, False) for c in ((8, 0), (8, 6), (9, 0), (12, 0))],
    indirect=["chip"],
)


@CHIPS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gpus_before_ampere_get_no_kernel(chip: None, old: bool, dtype: torch.dtype) -> None:
    """Triton has no tensor cores for these GPUs."""
    answer = why_not_triton(torch.device("cuda"), dtype, 64)
    assert answer is not None and "8.0" in answer if old else answer is None


@CHIPS
def test_gpus_before_ampere_get_no_emulated_bfloat16(chip: None, old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither features nor training use bfloat16 there, though torch reports support."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    weight = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cuda"))
    network: Any = SimpleNamespace(main_weight=weight)
    assert Extractor(network, Preprocess((0.5,) * 3, (0.5,) * 3, 16), "exact", True)._autocasts() is not old
    run: Any = SimpleNamespace(device=torch.device("cuda"), config=SimpleNamespace(precision="auto"))
    autocast: Any = Run.autocast(run)
    assert autocast._enabled is not old


def test_a_missing_triton_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The import of the launchers is checked last."""
    for module in [name for name in sys.modules if name.startswith(("triton", "dinov3_infer_kernels"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "triton", None)
    attention._kernels.cache_clear()
    attention._import_error.cache_clear()
    try:
        answer = why_not_triton(torch.device("cuda"), torch.bfloat16, 64)
        assert answer == "'triton' is not installed; on Linux, pip install 'dinov3-infer[triton]'"
    finally:
        attention._kernels.cache_clear()
        attention._import_error.cache_clear()


def test_an_old_triton_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its compiler may leave out what makes a kernel right."""
    triton = pytest.importorskip("triton", minversion="3.6")
    for version, right in (("3.5.1", False), ("3.6.0", True), ("3.10.0", True), ("4.0.0+git1", True)):
        monkeypatch.setattr(triton, "__version__", version)
        attention._import_error.cache_clear()
        reason = why_not_triton(torch.device("cuda"), torch.bfloat16, 64)
        assert (reason is None) == right, version
        if not right:
            assert reason == "Triton 3.5.1 is older than 3.6, the oldest that its kernels were tested with"
    attention._import_error.cache_clear()


def test_the_dispatch_compiles_without_a_break() -> None:
    """Questions about installation and tables are evaluated while tracing, and not traced."""
    pytest.importorskip("triton", minversion="3.6")
    torch._dynamo.reset()

    def chosen(x: Tensor) -> Tensor:
        installed = attention._not_installed() is None
        return x + 1 if installed and x.shape[1] > attention._crossover(x.device, x.dtype, 64) else x - 1

    compiled = torch.compile(chosen, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1, 10_000)).mean() == 1 and compiled(torch.zeros(1, 10)).mean() == -1


@pytest.mark.parametrize(
    ("tokens", "head_dim", "dtype", "packed", "rotated", "grad", "expected"),
    [
        (10, 64, torch.float32, False, True, False, FUSED),
        (10, 128, torch.bfloat16, False, True, False, FUSED),
        (10, 64, torch.float32, False, False, False, None),
        (30, 64, torch.float32, False, True, False, TURNED),
        (30, 64, torch.float32, False, True, True, FUSED),
        (30, 64, torch.float32, True, True, False, FUSED),
        (10, 64, torch.float32, True, False, False, FUSED),
        (10, 32, torch.float32, False, True, False, None),
        (10, 64, torch.float64, False, True, False, None),
    ],
    ids=["short", "wide", "unrotated", "long", "long_grad", "packed", "packed_unrotated", "narrow", "float64"],
)
def test_who_computes_on_a_gpu(
    tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    packed: bool,
    rotated: bool,
    grad: bool,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pretended GPU tokens show which operator is called (None: the definition), with the same result."""
    monkeypatch.setattr(attention, "_not_installed", lambda: None)
    monkeypatch.setattr(attention, "why_not_triton", lambda _, *rest: why_not_triton(torch.device("cuda"), *rest))
    monkeypatch.setattr(attention, "_crossover", lambda *_: 20)
    qkv = torch.randn(*((tokens,) if packed else (2, tokens)), 3, 2, head_dim, dtype=dtype, requires_grad=grad)
    cos, sin = angles(tokens, head_dim) if rotated else (None, None)
    cu_seqlens = offsets([tokens - 3, 3]) if packed else None
    with Recorder() as recorder:
        out = rope_attention(qkv, cos, sin, cu_seqlens=cu_seqlens)
    assert [name for name in recorder.called if name.startswith("dinov3_infer")] == ([expected] if expected else [])
    assert relative(out, sdpa_attention(qkv, cos, sin, cu_seqlens=cu_seqlens)) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("device", "dtype", "attend", "expected"),
    [
        ("cuda", torch.bfloat16, rope_attention, torch.float16),
        ("cuda", torch.bfloat16, triton_attention, torch.float16),
        ("cuda", torch.float16, triton_attention, torch.float32),  # whose rounding is that of the table
        ("cuda", torch.float32, rope_attention, torch.float32),
        ("cuda", torch.bfloat16, sdpa_attention, torch.float32),
        ("cpu", torch.bfloat16, rope_attention, torch.float32),
    ],
)
def test_tables_have_16_bits_where_a_kernel_reads_them(
    device: str, dtype: torch.dtype, attend: Any, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only beside bfloat16 tokens, by weights or autocast; a custom function gets float32 tables."""
    monkeypatch.setattr(attention, "_not_installed", lambda: None)
    autocasts = {(kind, d) for kind in [device] for d in (torch.bfloat16, torch.float16) if d == dtype}
    with FakeTensorMode():
        table = (torch.empty(9, 32, device=device), torch.empty(9, 32, device=device))
        weight = torch.empty(4, dtype=dtype, device=device)
        assert {t.dtype for t in narrowed(table, weight, attend)} == {expected}
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: (kind, dtype) in autocasts)
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: dtype)
        assert {t.dtype for t in narrowed(table, weight.float(), attend)} == {expected}


def test_a_model_on_a_gpu_narrows_its_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forward passes give the narrowed table to the attention."""
    model, seen = VisionTransformer(SMALL["dinov3"]), []

    def attend(qkv: Tensor, cos: Tensor, sin: Tensor, **rest: Any) -> Tensor:
        seen.append((cos.dtype, sin.dtype))
        return sdpa_attention(qkv, cos, sin, **rest)

    model.set_attention(attend)
    monkeypatch.setattr(vit, "narrowed", lambda table, *_: tuple(t.half() for t in table))
    pixels = torch.randn(1, 3, 2 * model.patch_size, 2 * model.patch_size)
    with torch.no_grad():
        model(pixels)
        model.forward_packed([pixels, pixels])
    assert set(seen) == {(torch.float16, torch.float16)} and len(seen) == 2 * len(model.blocks)
