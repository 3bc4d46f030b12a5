"""Attention of a training step on a CPU against its definition."""

import pytest
import torch
from torch import Tensor

from dinov3_infer import Backbone, ViTConfig
from dinov3_infer.model.attention import eager_attention, sdpa_attention
from dinov3_infer.model.packing import Packing
from dinov3_infer.train import attending
from dinov3_infer.train.adapters import wrap_blocks
from dinov3_infer.train.attending import attend

MIXES = {"one size": None, "packed": ((3, 7), (2, 12)), "a size again": ((2, 5), (1, 9), (2, 5))}


def case(mix: str, turned: bool, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor | None]]:
    draw = torch.Generator().manual_seed(0)
    groups = MIXES[mix]
    packing = Packing(groups or ((3, 7),), torch.device("cpu"))
    tokens = sum(count * length for count, length in packing.groups)
    qkv = torch.randn(tokens, 3, 2, 8, generator=draw, dtype=torch.float64).to(dtype)
    angles = torch.randn(tokens if groups else 7, 4, generator=draw)  # of each token its own
    cos, sin = (angles.cos(), angles.sin()) if turned else (None, None)
    where = packing.cu_seqlens() if groups else None
    return (qkv if groups else qkv.unflatten(0, (3, 7))).requires_grad_(), {"cos": cos, "sin": sin, "cu_seqlens": where}


@pytest.mark.parametrize("entries", [1, 300, 2**20], ids=["picture by picture", "some", "all at once"])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("mix", MIXES)
def test_is_the_definition(mix: str, turned: bool, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attending, "_ENTRIES", entries)
    qkv, rest = case(mix, turned, torch.float64)
    for scale in (None, 0.3):
        found, meant = attend(qkv, **rest, scale=scale), sdpa_attention(qkv, **rest, scale=scale)
        upstream = torch.randn_like(meant)
        assert found.shape == meant.shape
        assert torch.allclose(found, meant, rtol=0, atol=1e-12)
        (a,), (b,) = (torch.autograd.grad(out, qkv, upstream) for out in (found, meant))
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("turned", [True, False])
def test_gradients_are_those_of_the_values(turned: bool) -> None:
    qkv, rest = case("packed", turned, torch.float64)
    assert torch.autograd.gradcheck(lambda x: attend(x, **rest), qkv)


def test_bfloat16_rounds_as_the_eager_form_does() -> None:
    qkv, rest = case("packed", True, torch.bfloat16)
    found, meant = attend(qkv, **rest), eager_attention(qkv, **rest)
    upstream = torch.randn_like(meant)
    (a,), (b,) = (torch.autograd.grad(out, qkv, upstream) for out in (found, meant))
    assert found.dtype == a.dtype == torch.bfloat16
    for x, y in ((found, meant), (a, b)):  # a rounding of 2^-8 or two
        assert (x - y).abs().max() <= 2**-7 * y.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_keeps_no_matrix_and_no_branch(dtype: torch.dtype) -> None:
    """Two streams, qkv, the result of attention and the hidden layer: 2 + 3 + 1 + 4 times the width of a token."""
    model = Backbone.from_config(ViTConfig(64, 1, 2, 256), seed=0).train()
    wrap_blocks(model, False, "cheap")
    x = torch.randn(2, 205, 64, requires_grad=True)
    rope = model.rope((20, 10))
    fixed = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in fixed:
            kept[place] = tensor.untyped_storage().nbytes()
        return tensor

    half = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with half, torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        out = model.blocks[0](x, rope)
    meant = x[..., 0].numel() * 64 * (2 * 4 + 8 * dtype.itemsize)
    small = 2 * rope[0].nbytes * len(x) + x[..., 0].numel() * 16 + 4 * 192 * 2  # tables, norms' moments, a bias
    assert out.requires_grad
    assert meant <= sum(kept.values()) <= meant + small
