"""The linear layers of a step against torch's in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F

from dinov3_infer import Backbone, ViTConfig
from dinov3_infer.packed import why_not_packed
from dinov3_infer.train.backbones import add_adapters, wrap_blocks
from dinov3_infer.train.products import linear

needs_onednn = pytest.mark.skipif(why_not_packed() is not None, reason=str(why_not_packed()))


def gradients(found: torch.Tensor, wanted: list[torch.Tensor]) -> list[torch.Tensor]:
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    return list(torch.autograd.grad(found, wanted, upstream.to(found.dtype)))


@needs_onednn
@pytest.mark.parametrize("shape", [(3, 5), (70, 96), (2, 7, 96), (1, 1, 96), (600, 192)])
@pytest.mark.parametrize("biased", [True, False])
def test_value_and_gradients(shape: tuple[int, ...], biased: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    inputs = [torch.randn(s, generator=draw) for s in (shape, (33, shape[-1]), (33,))[: 2 + biased]]
    inputs = [t.requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    found, meant = linear(*inputs), F.linear(*exact)
    assert "_Linear" in str(found.grad_fn)
    for a, b in zip([found, *gradients(found, inputs)], [meant, *gradients(meant, exact)], strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_what_it_does_not_suit_is_torchs() -> None:
    weight = torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(5, 6), weight).dtype == torch.bfloat16
    assert linear(torch.randn(0, 6), weight).shape == (0, 4)
    assert "_Linear" not in str(linear(torch.randn(5, 6).double(), weight.double()).grad_fn)


def taught(backbone: Backbone) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    pixels = torch.randn(3, 3, 48, 32, generator=torch.Generator().manual_seed(4))
    found = backbone.train()(pixels.to(backbone.patch_embed.proj.weight.dtype)).patch_tokens
    (found * torch.linspace(-1, 1, found.numel()).view_as(found).sin()).sum().backward()
    return found.detach(), [p.grad for p in backbone.parameters()]


@pytest.mark.parametrize("recompute", ["none", "cheap", "all"])
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_a_wrapped_backbone_gives_what_a_plain_one_gives(recompute: str, adapters: bool, gated: bool) -> None:
    plain = Backbone.from_config(ViTConfig(48, 2, 2, 96, gated=gated), seed=0)
    plain.init_weights(layerscale=0.5)
    if adapters:
        add_adapters(plain, 3)
    wrapped = copy.deepcopy(plain)
    wrap_blocks(wrapped, False, recompute)  # type: ignore[arg-type]
    (a, found), (b, meant) = taught(wrapped), taught(plain.double())
    assert (a - b).abs().max() < 1e-5 * b.abs().max()
    for x, y in zip(found, meant, strict=True):
        assert (x is None) == (y is None)
        assert x is None or (x - y).abs().max() < 2e-5 * y.abs().max() + 1e-9
