"""The Triton kernels between products in Triton's interpreter, against their definitions in float64.

Judge: an error of at most that of torch's separate steps in the same dtypes, and a little for another order of sums.
"""

import os
from collections.abc import Callable
from typing import Any

import bf16_interpreter
import pytest
import torch
import torch.nn.functional as F
from qkv import poison, rms  # noqa: F401  (a fixture)
from torch import Tensor

from dinov3_infer.model.fused import OPERATORS

pytest.importorskip("triton", minversion="3.6")
from dinov3_infer_kernels import gpu as shipped  # after the check
from dinov3_infer_kernels.gpu import norms

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter, which is off beside a GPU"
)

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
definition = {name: row[1] for name, row in OPERATORS.items()}


@pytest.fixture(autouse=True)
def _right_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    bf16_interpreter.install(monkeypatch)


def close(ours: Tensor, exact: Tensor, torchs: Tensor) -> None:
    assert ours.shape == exact.shape and ours.dtype == torchs.dtype and ours.isfinite().all()
    allowed = rms(torchs - exact) * 1.01 + 2e-7 * rms(exact)
    assert rms(ours - exact) <= allowed, f"error {rms(ours - exact):.3g}, allowed {allowed:.3g}"


def norm_inputs(lead: tuple[int, ...], width: int, dtype: torch.dtype, offset: float = 0.0) -> tuple[Tensor, ...]:
    """Stream, branch, LayerScale, weight and bias."""
    x, branch = torch.randn(*lead, width) * 3 + offset, torch.randn(*lead, width).to(dtype)
    return x, branch, *(torch.randn(3, width) + torch.tensor([[0.1], [1.0], [0.0]]))


@DTYPES
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("width", [64, 384, 768, 1024, 1280, 1536, 4096])
def test_residual_norm(width: int, scaled: bool, dtype: torch.dtype) -> None:
    """Widths of all released models, rows that do not fill their tiles; the stream has torch's bits but for fusion."""
    x, branch, scale, weight, bias = norm_inputs((2, 5), width, dtype)
    given = scale if scaled else None
    total, out = shipped.residual_norm(x, branch, given, weight, bias, 1e-5, dtype)
    exact = definition["residual_norm"](x.double(), branch.double(), given, weight, bias, 1e-5, torch.float64)
    steps = definition["residual_norm"](x, branch, given, weight, bias, 1e-5, dtype)
    close(total, exact[0], steps[0])
    close(out, exact[1], steps[1])


@DTYPES
def test_layer_norm_alone(dtype: torch.dtype) -> None:
    """Nothing is added, and a mean far from zero costs no digits; a slice of the tokens may be given."""
    x, _, _, weight, bias = norm_inputs((3, 7), 384, dtype, offset=300.0)
    for stream in (x, x[:, :1], x[:, 2:]):
        before = stream.clone()
        out = shipped.layer_norm(stream, weight, bias, 1e-6, dtype)
        exact = definition["layer_norm"](stream.double(), weight, bias, 1e-6, torch.float64)
        close(out, exact, definition["layer_norm"](stream, weight, bias, 1e-6, dtype))
        assert torch.equal(stream, before)


def test_parameters_of_16_bits() -> None:
    """As those of a model that was loaded in bfloat16."""
    x, branch, *vectors = norm_inputs((9,), 128, BF16)
    vectors = [vector.bfloat16() for vector in vectors]
    _, out = shipped.residual_norm(x, branch, *vectors, 1e-5, BF16)
    exact = definition["residual_norm"](x.double(), branch, *vectors, 1e-5, torch.float64)[1]
    close(out, exact, definition["residual_norm"](x, branch, *vectors, 1e-5, BF16)[1])


def test_the_stream_keeps_what_16_bits_lose() -> None:
    """It is float32 on both sides, and the input is not overwritten."""
    x, branch, scale, weight, bias = norm_inputs((4,), 64, BF16)
    x, before = x * 1000, x * 1000
    total, _ = shipped.residual_norm(x, branch, scale, weight, bias, 1e-5, BF16)
    assert total.dtype == FP32 and torch.equal(x, before)
    torch.testing.assert_close(total - x, branch.float() * scale, rtol=0, atol=1e-3)


@DTYPES
@pytest.mark.parametrize("how", ["scaled", "unscaled", "alone"])
@pytest.mark.parametrize(("width", "rows"), [(64, 700), (384, 5), (1024, 9), (1280, 3), (4096, 2)])
def test_norm_backward(width: int, rows: int, how: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs with many tiles and with a part of one; parts of the sums are added in a fixed order."""
    monkeypatch.setattr(norms, "processors", lambda device: 4)
    x, branch, scale, weight, _ = norm_inputs((rows,), width, dtype)
    grad_sum, grad = torch.randn(rows, width), torch.randn(rows, width).to(dtype)
    given: tuple[Any, ...] = (grad_sum, grad, x, branch, scale if how == "scaled" else None, weight)
    given = (None, grad, x, None, None, weight) if how == "alone" else given
    found = shipped.norm_backward(*given, 1e-5)
    wide = [t if t is None else t.double() for t in given]
    exact, steps = definition["norm_backward"](*wide, 1e-5), definition["norm_backward"](*given, 1e-5)
    assert found[2].shape == ((3 if how == "scaled" else 2), width)
    for ours, true, torchs in zip(found, exact, steps, strict=True):
        assert ours.shape == torchs.shape and ours.dtype == torchs.dtype
        if ours.numel():
            close(ours, true, torchs)
    again = shipped.norm_backward(*given, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_a_branch_without_scale_is_its_dtype() -> None:
    """Its numbers are not kept for the gradient."""
    x, branch, _, weight, _ = norm_inputs((5,), 64, BF16)
    grad_sum, grad = torch.randn(5, 64), torch.randn(5, 64).bfloat16()
    whole, empty = (shipped.norm_backward(grad_sum, grad, x, b, None, weight, 1e-5) for b in (branch, branch[:0]))
    assert all(torch.equal(a, b) for a, b in zip(whole, empty, strict=True)) and empty[1].dtype == BF16


@DTYPES
@pytest.mark.parametrize("width", [6, 512, 1536, 1000])
def test_swiglu(width: int, dtype: torch.dtype) -> None:
    """Whole tiles and parts of one; gates far from zero."""
    gate_up = (torch.randn(3, 5, 2 * width) * 4).to(dtype)
    gate_up[0, 0, 0], gate_up[0, 0, 1] = -200.0, 200.0
    gate, up = gate_up.chunk(2, dim=-1)
    close(shipped.swiglu(gate_up), definition["swiglu"](gate_up.double()), F.silu(gate) * up)


@DTYPES
@pytest.mark.parametrize(("patch", "height", "width"), [(16, 32, 80), (14, 28, 42), (8, 40, 24)])
def test_unfold(patch: int, height: int, width: int, dtype: torch.dtype) -> None:
    """uint8 as a decoder and as a resizer leave it, and pixels that are normalised before: the definition's bits."""
    images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    expected = definition["unfold"](images, MEAN, STD, patch, dtype)
    last = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    wide = torch.nn.functional.pad(images, (8, 8))[..., 8:-8]
    for given in (images, last, wide):
        assert torch.equal(shipped.unfold(given, MEAN, STD, patch, dtype), expected)
    pixels = (images / 255.0 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.equal(shipped.unfold(pixels, (0.0,) * 3, (1.0,) * 3, patch, dtype), expected)


@pytest.mark.parametrize(
    "run",
    [
        lambda: shipped.swiglu(torch.zeros(0, 8)),
        lambda: shipped.layer_norm(torch.zeros(0, 8), torch.ones(8), torch.ones(8), 1e-5, BF16),
        lambda: shipped.unfold(torch.zeros(0, 3, 16, 16), MEAN, STD, 16, BF16),
        lambda: shipped.norm_backward(None, torch.zeros(0, 8), torch.zeros(0, 8), None, None, torch.ones(8), 1e-5)[0],
    ],
    ids=["swiglu", "layer_norm", "unfold", "norm_backward"],
)
def test_nothing_gives_nothing(run: Callable[[], Tensor]) -> None:
    """No program is started for empty input."""
    assert run().numel() == 0


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x: shipped.swiglu(x[..., 1:]), "7 for both"),
        (lambda x: shipped.layer_norm(x.half(), x[0], x[0], 1e-5, BF16), "float16"),
        (lambda x: shipped.layer_norm(x, x[0, 1:], x[0], 1e-5, BF16), r"\[8\], .* got \[7\]"),
        (lambda x: shipped.residual_norm(x, x[1:], None, x[0], x[0], 1e-5, BF16), r"\[2, 8\]; got \[1, 8\]"),
        (lambda x: shipped.norm_backward(x.half(), x, x, None, None, x[0], 1e-5), "float32"),
        (lambda x: shipped.norm_backward(x, x[1:], x, None, None, x[0], 1e-5), r"\[2, 8\]; got \[1, 8\]"),
        (lambda x: shipped.unfold(torch.zeros(1, 3, 17, 16), MEAN, STD, 16, BF16), "whole patches of 16"),
        (lambda x: shipped.unfold(torch.zeros(1, 4, 16, 16), MEAN, STD, 16, BF16), r"\[B, 3, H, W\]"),
        (lambda x: shipped.unfold(torch.zeros(1, 3, 16, 16).int(), MEAN, STD, 16, BF16), "int32"),
    ],
)
def test_what_kernels_are_not_made_for(run: Callable[[Tensor], Any], message: str) -> None:
    """Refused before a launch that would read past the end."""
    with pytest.raises(ValueError, match=message):
        run(torch.randn(2, 8))
