"""Attention against a naive float64 loop, for images of one size and for packed images of many sizes."""

from typing import Any

import numpy as np
import pytest
import torch
from oracles import SMALL, relative
from qkv import angles, offsets
from torch import Tensor

from dinov3_infer import InputError, VisionTransformer
from dinov3_infer.errors import UnsupportedError
from dinov3_infer.model.attention import (
    IMPLEMENTATIONS,
    eager_attention,
    resolve_attention,
    rope_attention,
    sdpa_attention,
    triton_attention,
)

LENGTHS = [7, 60, 1, 1, 13, 13, 2, 59, 7]  # not sorted; neighbours of one length, and the same length again later
BOTH = pytest.mark.parametrize("attend", [rope_attention, eager_attention], ids=["sdpa", "eager"])


def naive(
    qkv: Tensor,  # [N, 3, H, D], one image
    rope: tuple[Tensor, Tensor] | None,
    scale: float | None = None,
) -> np.ndarray:
    """Attention by its formula, one query of one head at a time, in float64, [N, H*D]."""
    x = qkv.detach().double().numpy()
    count, _, heads, width = x.shape
    turned = x.copy()
    if rope is not None:
        factor = rope[0].double().numpy() + 1j * rope[1].double().numpy()
        for part in (0, 1):
            for head in range(heads):
                pairs = (x[:, part, head, : width // 2] + 1j * x[:, part, head, width // 2 :]) * factor
                turned[:, part, head] = np.concatenate([pairs.real, pairs.imag], axis=-1)
    result = np.zeros((count, heads, width))
    for head in range(heads):
        for token in range(count):
            scores = [turned[token, 0, head] @ turned[other, 1, head] for other in range(count)]
            weights = np.exp(np.array(scores) * (width**-0.5 if scale is None else scale))
            result[token, head] = weights / weights.sum() @ turned[:, 2, head]
    return result.reshape(count, heads * width)


@BOTH
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("rotated", [True, False], ids=["rope", "no_rope"])
@pytest.mark.parametrize("scale", [None, 0.31], ids=["default_scale", "scale_given"])
def test_images_of_one_size(attend: Any, head_dim: int, rotated: bool, scale: float | None) -> None:
    """[B, N, 3, H, D] -> [B, N, H*D], each image separately."""
    qkv = torch.randn(2, 23, 3, 3, head_dim)
    rope = angles(23, head_dim, prefix=5) if rotated else None
    out = attend(qkv, *(rope or (None, None)), scale=scale)
    assert out.shape == (2, 23, 3 * head_dim)
    expected = torch.from_numpy(np.stack([naive(image, rope, scale) for image in qkv]))
    assert relative(out, expected) < 2e-6  # float32 sums of at most 128 products


@BOTH
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("rotated", [True, False], ids=["rope", "no_rope"])
def test_images_of_many_sizes(attend: Any, head_dim: int, rotated: bool) -> None:
    """[T, 3, H, D] with cu_seqlens: attention stays within each sequence, in any order of lengths."""
    total = sum(LENGTHS)
    qkv = torch.randn(total, 3, 2, head_dim)
    rope = angles(total, head_dim) if rotated else None
    out = attend(qkv, *(rope or (None, None)), cu_seqlens=offsets(LENGTHS), max_seqlen=max(LENGTHS))
    parts = [slice(end - n, end) for n, end in zip(LENGTHS, np.cumsum(LENGTHS), strict=True)]
    expected = [naive(qkv[part], (rope[0][part], rope[1][part]) if rope else None) for part in parts]
    assert out.shape == (total, 2 * head_dim)
    assert relative(out, torch.from_numpy(np.concatenate(expected))) < 2e-6  # as above


@BOTH
def test_packed_images_of_one_size_equal_a_batch(attend: Any) -> None:
    """Packed or stacked, the same images give the same numbers; `max_seqlen` is only a hint."""
    qkv = torch.randn(4, 10, 3, 2, 16)
    cos, sin = angles(10, 16)
    packed = attend(qkv.flatten(0, 1), cos.repeat(4, 1), sin.repeat(4, 1), cu_seqlens=offsets([10] * 4), scale=0.5)
    torch.testing.assert_close(packed.unflatten(0, (4, 10)), attend(qkv, cos, sin, scale=0.5), rtol=0, atol=0)


@BOTH
@pytest.mark.parametrize("packed", [False, True], ids=["fixed", "packed"])
def test_strided_views(attend: Any, packed: bool) -> None:
    """A view into a larger buffer, and one with swapped dimensions, give the results of their copies."""
    cos, sin = angles(20, 16)
    options: dict[str, Any] = dict(cu_seqlens=offsets([12, 8])) if packed else {}
    lead = (20,) if packed else (3, 20)
    wide = torch.randn(*lead, 3 * 2 * 16 + 40)[..., 8 : 8 + 96].unflatten(-1, (3, 2, 16))
    swapped = torch.randn(2, 3, *lead, 16).permute(*range(2, 2 + len(lead)), 1, 0, -1)
    for view in (wide, swapped):
        assert not view.is_contiguous()
        out = attend(view, cos, sin, **options)
        # another memory layout may take another summation order: float32 rounding
        torch.testing.assert_close(out, attend(view.contiguous(), cos, sin, **options), rtol=0, atol=2e-6)


@BOTH
@pytest.mark.parametrize("packed", [False, True], ids=["fixed", "packed"])
@pytest.mark.parametrize("rotated", [True, False], ids=["rope", "no_rope"])
def test_gradients(attend: Any, packed: bool, rotated: bool) -> None:
    """Derivatives equal finite differences in float64."""
    total = 7
    rope = angles(total, 4, prefix=1) if rotated else (None, None)
    cu_seqlens = offsets([3, 1, 1, 2]) if packed else None
    qkv = torch.randn(*(() if packed else (2,)), total, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attend(x, *rope, cu_seqlens=cu_seqlens), qkv)


def test_second_derivatives_of_eager() -> None:
    """The eager implementation can be differentiated twice."""
    rope = angles(4, 4)
    qkv = torch.randn(1, 4, 3, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: eager_attention(x, *rope), qkv)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["fixed", "packed"])
def test_eager_equals_sdpa(dtype: torch.dtype, packed: bool) -> None:
    """Both implementations agree within the rounding of the dtype, return it, and do not change their input."""
    cos, sin = angles(20, 64)
    qkv = torch.randn(*(() if packed else (2,)), 20, 3, 2, 64).to(dtype)
    before = qkv.clone()
    cu_seqlens = offsets([5, 15]) if packed else None
    a, b = (attend(qkv, cos, sin, cu_seqlens=cu_seqlens) for attend in (rope_attention, eager_attention))
    assert a.dtype == b.dtype == dtype
    assert torch.equal(qkv, before)
    assert relative(b, a) < 2 * torch.finfo(dtype).eps  # scores and weights are each rounded once more by eager


@BOTH
def test_large_scores_do_not_overflow(attend: Any) -> None:
    """Scores of thousands give weights of 0 and 1, not NaN."""
    qkv = torch.randn(1, 9, 3, 1, 16) * 100
    out = attend(qkv, None, None)
    scores = qkv[0, :, 0, 0] @ qkv[0, :, 1, 0].T
    assert out.isfinite().all()
    assert relative(out[0], qkv[0, scores.argmax(dim=1), 2, 0]) < 1e-3  # the second best score is far below


def test_the_names_of_implementations() -> None:
    """Each name has its function."""
    functions = [rope_attention, triton_attention, sdpa_attention, eager_attention]
    assert [resolve_attention(name) for name in ("auto", "triton", "sdpa", "eager")] == functions
    assert set(IMPLEMENTATIONS) == {"auto", "triton", "sdpa", "eager"}


def test_auto_on_a_cpu_is_sdpa() -> None:
    """The results have the same bits."""
    qkv, rope = torch.randn(2, 10, 3, 2, 64), angles(10, 64)
    assert torch.equal(rope_attention(qkv, *rope), sdpa_attention(qkv, *rope))


@pytest.mark.parametrize("name", ["flash", "", "SDPA"])
def test_unknown_implementation_is_refused(name: str) -> None:
    """The message lists the names."""
    with pytest.raises(InputError, match=f"{', '.join(IMPLEMENTATIONS)}; got {name!r}"):
        resolve_attention(name)


def test_set_attention_reaches_every_block() -> None:
    """All blocks use the new implementation, the result stays the same, and a wrong name changes nothing."""
    model = VisionTransformer(SMALL["dinov3"]).eval()
    pixels = torch.randn(1, 3, 32, 48)
    before = model(pixels).patch_tokens
    model.set_attention("eager")
    assert all(block.attn.attend is eager_attention for block in model.blocks)
    torch.testing.assert_close(model(pixels).patch_tokens, before, rtol=0, atol=1e-5)  # float32 rounding of unit tokens
    with pytest.raises(InputError):
        model.set_attention("fast")
    assert all(block.attn.attend is eager_attention for block in model.blocks)


def test_triton_on_a_cpu_is_refused_with_its_reason() -> None:
    """The error says why and what to use, and the model does not change."""
    model = VisionTransformer(SMALL["dinov3"])
    with pytest.raises(UnsupportedError, match=r"'triton' cannot run: it runs on GPUs, .* 'cpu'; use 'auto'") as caught:
        model.set_attention("triton")
    assert isinstance(caught.value, NotImplementedError)
    assert all(block.attn.attend is rope_attention for block in model.blocks)
    with pytest.raises(UnsupportedError, match=r"the Triton attention cannot run: .*; use"):
        triton_attention(torch.randn(1, 4, 3, 1, 64), None, None)
