"""The Triton kernels in Triton's interpreter: the launchers themselves, with the configurations that are shipped.

Judge: an error against float64 of at most twice that of torch's own attention in the same dtype.  bfloat16 is wrong in
the interpreter by itself; see bf16_interpreter.py.
"""

import importlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bf16_interpreter
import pytest
import torch
from oracles import SMALL, randomise, tokens
from qkv import GRIDS, PREFIX, angles, grid_table, offsets, poison, rms  # noqa: F401  (a fixture)
from repository import ROOT
from torch import Tensor

from dinov3_infer import VisionTransformer
from dinov3_infer.model.attention import sdpa_attention

pytest.importorskip("triton", minversion="3.6")
from dinov3_infer_kernels import gpu as shipped  # after the check
from dinov3_infer_kernels.gpu.short import segments

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter, which is off beside a GPU"
)

WIDTHS = pytest.mark.parametrize("width", [64, 128], ids=["D64", "D128"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])


@pytest.fixture(autouse=True)
def _right_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    bf16_interpreter.install(monkeypatch)


def judge(
    kernels: Any,
    qkv: Tensor,
    table: tuple[Tensor, Tensor] | tuple[None, None],
    cu_seqlens: Tensor | None = None,
    gradient: bool = True,
    scale: float | None = None,
) -> None:
    """Output and gradient of the launchers, against float64."""
    longest = qkv.shape[1] if cu_seqlens is None else int(cu_seqlens.diff().max())
    factor = qkv.shape[-1] ** -0.5 if scale is None else scale
    exact, own = qkv.detach().double().requires_grad_(), qkv.detach().clone().requires_grad_()
    expected, torchs = (sdpa_attention(x, *table, cu_seqlens=cu_seqlens, scale=factor) for x in (exact, own))
    out, lse = kernels.forward(qkv, *table, cu_seqlens, longest, factor)
    close(out, expected, torchs)
    if not gradient:
        return
    grad = torch.randn_like(torchs)
    expected.backward(grad.double())
    torchs.backward(grad)
    close(kernels.backward(grad, qkv, *table, cu_seqlens, longest, factor, out, lse), exact.grad, own.grad)


def close(ours: Tensor, expected: Any, torchs: Any) -> None:
    assert ours.shape == expected.shape and ours.isfinite().all()
    allowed = 2 * rms(torchs - expected) + 1e-7 * rms(expected)
    assert rms(ours - expected) <= allowed, f"error {rms(ours - expected):.3g}, allowed {allowed:.3g}"


@WIDTHS
@DTYPES
@pytest.mark.parametrize("tokens", GRIDS)
def test_pictures_of_one_size(tokens: int, dtype: torch.dtype, width: int) -> None:
    """Forward and backward; the longest has many tiles of keys, all but none has a masked tail."""
    pictures, heads = (1, 1) if tokens > 300 else (2, 2)
    judge(shipped, torch.randn(pictures, tokens, 3, heads, width).to(dtype), grid_table([GRIDS[tokens]], width))


@WIDTHS
@DTYPES
@pytest.mark.parametrize("lengths", [[6, 41, 68, 6], [201, 1, 3, 261], [600, 21]], ids=str)
def test_pictures_of_many_sizes(lengths: list[int], dtype: torch.dtype, width: int) -> None:
    """Packed, with sequences of a single token, and of more than one tile beside shorter ones."""
    angle = torch.rand(sum(lengths), width // 2) * 6 - 3
    heads = 1 if max(lengths) > 500 else 2
    judge(shipped, torch.randn(sum(lengths), 3, heads, width).to(dtype), (angle.cos(), angle.sin()), offsets(lengths))


@WIDTHS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("packed", [False, True], ids=["fixed", "packed"])
def test_float16_tables(packed: bool, dtype: torch.dtype, width: int) -> None:
    """Half of what the kernels read of a table; the judge has the table of float64, which float16 rounds."""
    lead, grids = ((76,), [(5, 13), (1, 1)]) if packed else ((2, 70), [(5, 13)])
    wide, cu_seqlens = grid_table(grids, width), offsets([70, 6]) if packed else None
    qkv, grad = torch.randn(*lead, 3, 2, width).to(dtype), torch.randn(*lead, 2 * width).to(dtype)
    exact, own = qkv.double().requires_grad_(), qkv.clone().requires_grad_()
    expected, torchs = (sdpa_attention(x, *wide, cu_seqlens=cu_seqlens) for x in (exact, own))
    expected.backward(grad.double())
    torchs.backward(grad)
    rest = (*(t.half() for t in wide), cu_seqlens, 70, width**-0.5)
    out, lse = shipped.forward(qkv, *rest)
    close(out, expected, torchs)
    close(shipped.backward(grad, qkv, *rest, out, lse), exact.grad, own.grad)


@pytest.mark.parametrize(
    ("dtype", "table_dtype"),
    [(torch.float16, torch.float16), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16)],
    ids=["fp16", "bf16", "bf16_tables_fp16"],
)
@pytest.mark.parametrize("tokens", [129, 201, 255, 256, 272])
def test_one_program_a_head(tokens: int, dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    """Every way to split the keys, strided input, another scale; result and sums of weights."""
    table, factor = angles(tokens, 64, PREFIX), 0.2
    qkv = torch.randn(1, tokens, 3 * 2 * 64 + 40)[..., 8 : 8 + 384].unflatten(-1, (3, 2, 64)).to(dtype)
    exact, torchs = (sdpa_attention(x, *table, scale=factor) for x in (qkv.double(), qkv))
    config = next(c for limit, c in shipped.configs.SHORT["sm90"] if tokens <= limit)
    given = (*(t.to(table_dtype) for t in table), None, tokens, factor)
    out, lse = shipped.forward(qkv, *given, config=config)
    close(out, exact, torchs)
    torch.testing.assert_close(lse, torch.ops.dinov3_infer.rope_attention(qkv.float(), *given)[1], rtol=0, atol=0.03)


def test_segments_cover_the_keys() -> None:
    """Parts without a mask hold only keys, and the last one reaches the end; none is longer than there is room for."""
    for count in range(1, 289):
        keys, middle, rest = segments(count)
        assert keys + middle <= count <= keys + middle + rest <= 288
        assert rest in (0, 16, 32, 64) and middle in (0, 64) and keys & (keys - 1) == 0


@WIDTHS
@pytest.mark.parametrize("packed", [False, True], ids=["fixed", "packed"])
def test_without_rotation(width: int, packed: bool) -> None:
    """DINOv2 and DINO have no RoPE; another scale than that of the width."""
    qkv = torch.randn(*((70,) if packed else (2, 70)), 3, 2, width)
    judge(shipped, qkv, (None, None), offsets([50, 20]) if packed else None, scale=0.2)


def test_lengths_that_fill_their_tiles() -> None:
    """No tail at all, and one that is a whole tile but for one key."""
    for count in (64, 128, 127):
        angle = torch.rand(count, 32) * 6
        judge(shipped, torch.randn(1, count, 3, 1, 64), (angle.cos(), angle.sin()))


@pytest.mark.parametrize("packed", [False, True], ids=["fixed", "packed"])
def test_strided_views(packed: bool) -> None:
    """Channels of a wider buffer, heads before tokens: read where they lie."""
    lead = (70,) if packed else (2, 70)
    table, cu_seqlens = grid_table([(5, 13)], 64), offsets([69, 1]) if packed else None
    wide = torch.randn(*lead, 3 * 2 * 64 + 40)[..., 8 : 8 + 384].unflatten(-1, (3, 2, 64))
    swapped = torch.randn(2, 3, *lead, 64).permute(*range(2, 2 + len(lead)), 1, 0, -1)
    for view in (wide, swapped):
        assert not view.is_contiguous()
        judge(shipped, view, table, cu_seqlens)


def test_large_scores() -> None:
    """Scores of thousands, all far below zero for some queries: weights stay finite, in the backward pass too."""
    qkv = torch.randn(1, 70, 3, 1, 64)
    qkv[:, :, 0] *= 60
    qkv[:, :, 1] = qkv[:, :1, 1] * 30 + qkv[:, :, 1]
    judge(shipped, qkv, (None, None))
    out, lse = shipped.forward(qkv, None, None, None, 70, 0.125)
    assert lse.min() < -1000  # 2^1000 is infinite in float32


def test_the_input_stays_and_runs_are_equal() -> None:
    """Bit for bit, forward and backward."""
    qkv, table = torch.randn(1, 70, 3, 2, 64), grid_table([(5, 13)], 64)
    before, grad, results = qkv.clone(), torch.randn(1, 70, 128), []
    for _ in range(2):
        out, lse = shipped.forward(qkv, *table, None, 70, 0.125)
        results.append((out, lse, shipped.backward(grad, qkv, *table, None, 70, 0.125, out, lse)))
    assert torch.equal(qkv, before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bfloat16_rounds_as_torch_does() -> None:
    """Every pattern of the upper 16 bits, with the lower ones around a tie; NaN stays NaN."""
    upper = torch.arange(2**16, dtype=torch.int64).repeat_interleave(5) << 16
    bits = upper + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001]).repeat(2**16)
    x = bits.to(torch.int32).view(torch.float32)
    found = torch.from_numpy(bf16_interpreter.rounded(x.numpy()).view("int16")).view(torch.bfloat16)
    torch.testing.assert_close(found, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@WIDTHS
@DTYPES
@pytest.mark.parametrize("packed", [False, True], ids=["fixed", "packed"])
def test_rotation_alone(dtype: torch.dtype, width: int, packed: bool) -> None:
    """Equals the definition bit for bit: one rounding of a float32 product."""
    from dinov3_infer.model.rope import apply_rope

    qkv = torch.randn(*((70,) if packed else (2, 70)), 3, 2, width).to(dtype)
    table = grid_table([(5, 13)], width)
    turned = shipped.rotate(qkv, *table)
    for part in (0, 1):
        expected = apply_rope(qkv.select(-3, part), *table)
        # a fused multiply-add may round once less
        torch.testing.assert_close(turned.select(-3, part), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 10, 3, 2, 64), (2, 0, 3, 2, 64), (0, 3, 2, 64)], ids=str)
def test_nothing_gives_nothing(shape: tuple[int, ...]) -> None:
    """Empty input has empty output and gradient."""
    qkv = torch.randn(shape)
    cu_seqlens = torch.zeros(1, dtype=torch.int32) if len(shape) == 4 else None
    out, lse = shipped.forward(qkv, None, None, cu_seqlens, 0, 0.125)
    assert out.shape == (*shape[:-3], 128) and lse.numel() == 0
    assert shipped.backward(out, qkv, None, None, cu_seqlens, 0, 0.125, out, lse).shape == shape
    table = torch.ones(shape[-4], 32)
    assert shipped.rotate(qkv, table, table).shape == (*shape[:-3], 2, 2, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(qkv=torch.zeros(2, 7, 3, 2, 32)), "D of"),
        (dict(qkv=torch.zeros(2, 7, 3, 2, 64).double()), "float64"),
        (dict(qkv=torch.zeros(2, 7, 2, 2, 64)), r"\[B, N, 3, H, D\]"),
        (dict(qkv=torch.zeros(7, 192)), r"\[B, N, 3, H, D\]"),
        (dict(qkv=torch.zeros(2, 7, 3, 2, 128)[..., ::2]), "stride 2"),
        (dict(cos=torch.ones(6, 32)), r"\[7, 32\] in float32, .* got \[6, 32\]"),
        (dict(cos=torch.ones(7, 32).half(), sin=torch.ones(7, 32).half()), "float32"),
        (dict(qkv=torch.zeros(2, 7, 3, 2, 64).half(), sin=torch.ones(7, 32).half()), "one dtype"),
        (dict(qkv=torch.zeros(2, 7, 3, 2, 64).half(), sin=torch.ones(7, 32).bfloat16()), "bfloat16"),
        (dict(cu_seqlens=offsets([7])), r"with cu_seqlens"),
        (dict(qkv=torch.zeros(7, 3, 2, 64), cu_seqlens=offsets([7]).long()), "int32"),
        (dict(sin=None), "come together"),
        (dict(qkv=torch.zeros(7, 3, 2, 64), cu_seqlens=offsets([3, 4, 0, 0])[::2]), "contiguous int32"),
        (dict(scale=-1.0), "above 0"),
    ],
)
def test_what_kernels_are_not_made_for(change: dict[str, Any], message: str) -> None:
    """Refused before a launch that would read past the end."""
    given = dict(qkv=torch.zeros(2, 7, 3, 2, 64), cos=torch.ones(7, 32), sin=torch.zeros(7, 32), cu_seqlens=None)
    given |= dict(max_seqlen=7, scale=0.125) | change
    with pytest.raises(ValueError, match=message):
        shipped.forward(**given)


# file, what stands there, what is put in its place; none of them leaves the memory of its tensors
FIRST, LAST = "tl.load(CU_SEQLENS + index)", "tl.load(CU_SEQLENS + index + 1) - first"
BREAKAGES = {
    "tail not masked": ("forward.py", 'scores = tl.where(keys[None, :] < count, scores, float("-inf"))', "pass"),
    "tail forgotten": ("launch.py", "return max(16, triton.next_power_of_2(rest)) if rest else 0", "return 0"),
    "tail too short": ("launch.py", "triton.next_power_of_2(rest)", "triton.next_power_of_2(rest) // 2"),
    "sign of the sine": ("tiles.py", "first * cos - second * sin", "first * cos + second * sin"),
    "values scaled": ("forward.py", "v = tl.load(v_at)\n", "v = tl.load(v_at) * 1.1\n"),
    "queries not rotated": ("forward.py", "turned_rows(q.to(tl.float32), cos, sin, BLOCK_M, D).to(q.dtype)", "q"),
    "prefix rotated": ("forward.py", "COS += table * (D // 2)", "COS += (table + 5) * (D // 2)"),
    "sequence starts early": ("tiles.py", f"first = {FIRST}\n", f"first = {FIRST} - index\n"),
    "sequence ends early": ("tiles.py", LAST, f"{LAST} - 1"),
    "running maximum": ("forward.py", "shrink = tl.exp2(top - higher)", "shrink = tl.exp2(top - top)"),
    "sum not shrunk": ("forward.py", "total * shrink + tl.sum", "total + tl.sum"),
    "sums of another head": ("forward.py", "(image * heads + head)", "(image * heads + heads - 1 - head)"),
    "gradient turned forwards": ("backward.py", "x, cos, -sin, BLOCK, D", "x, cos, sin, BLOCK, D"),
    "delta left out": ("backward.py", "dweights - delta[None, :]", "dweights"),
    "scale left out": ("backward.py", "1, dk * scale, keys", "1, dk, keys"),
    "keys past the end count": ("backward.py", "weights = tl.where(valid, weights, 0.0)", "pass"),
}


@pytest.fixture
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """The package with one line changed."""
    file, old, new = BREAKAGES[request.param]
    name = f"broken_kernels_{list(BREAKAGES).index(request.param)}"
    shutil.copytree(ROOT / "kernels" / "dinov3_infer_kernels" / "gpu", tmp_path / name)
    source = (tmp_path / name / file).read_text(encoding="utf-8")
    assert old in source, f"{file} has changed: {old!r} is no longer there"
    (tmp_path / name / file).write_text(source.replace(old, new), encoding="utf-8")
    sys.path.insert(0, str(tmp_path))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(tmp_path))


@pytest.mark.parametrize("broken", BREAKAGES, indirect=True)
def test_breakages_are_noticed(broken: Any) -> None:
    """Each of them turns one of three small cases red: fixed, packed, and scores far below zero."""
    fixed, packed = grid_table([(4, 11), (1, 1)], 64), grid_table([(4, 16), (7, 9), (1, 1)], 64)
    low = torch.randn(1, 70, 3, 1, 64)
    low[:, :, 0] *= 60
    low[:, :, 1] = low[:, :1, 1] * 30 + low[:, :, 1]
    with pytest.raises(AssertionError):
        judge(broken, torch.randn(2, 49, 3, 2, 64), (fixed[0][:49], fixed[1][:49]))
        judge(broken, torch.randn(137, 3, 2, 64), (packed[0][:137], packed[1][:137]), offsets([69, 68]))
        judge(broken, low, (None, None))


class Interpreted(torch.autograd.Function):
    """The launchers as the operator calls them on a GPU."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Any, sin: Any, cu_seqlens: Any, longest: int, scale: float) -> Tensor:
        out, lse = shipped.forward(qkv, cos, sin, cu_seqlens, longest, scale)
        ctx.save_for_backward(qkv, cos, sin, cu_seqlens, out, lse)
        ctx.rest = longest, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        qkv, cos, sin, cu_seqlens, out, lse = ctx.saved_tensors
        return shipped.backward(grad, qkv, cos, sin, cu_seqlens, *ctx.rest, out, lse), None, None, None, None, None


def interpreted(qkv: Tensor, cos: Any, sin: Any, *, cu_seqlens: Any = None, max_seqlen: Any = None) -> Tensor:
    longest = qkv.shape[1] if cu_seqlens is None else max_seqlen
    return Interpreted.apply(qkv, cos, sin, cu_seqlens, longest, qkv.shape[-1] ** -0.5)


@pytest.mark.parametrize("name", ["dinov3", "dinov2_reg", "dino"])
def test_packed_pictures_through_a_whole_model(name: str) -> None:
    """Tokens and gradients of crops of three sizes in one pass of the kernels equal those of each image alone."""
    config = replace(SMALL[name], num_heads=SMALL[name].embed_dim // 64, depth=2)
    model = randomise(VisionTransformer(config))
    side = model.patch_size
    crops = [torch.randn(count, 3, h * side, w * side) for count, h, w in ((2, 4, 4), (1, 3, 7), (2, 1, 2))]
    expected = [torch.cat([tokens(model(image[None])) for image in crop]) for crop in crops]
    weights = [torch.randn_like(e) for e in expected]
    sum((e * w).sum() for e, w in zip(expected, weights, strict=True)).backward()
    alone = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_attention(interpreted)
    packed = [tokens(output) for output in model.forward_packed(crops)]
    for ours, theirs in zip(packed, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)  # unit tokens, float32
    sum((p * w).sum() for p, w in zip(packed, weights, strict=True)).backward()
    for key, p in model.named_parameters():
        if key in alone:
            assert rms(p.grad - alone[key]) <= 1e-4 * rms(alone[key]) + 1e-7, key
