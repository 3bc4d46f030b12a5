"""The linear layers of a step against torch's in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F

from dinov3_infer import Backbone, ViTConfig
from dinov3_infer.train.adapters import add_adapters, wrap_blocks
from dinov3_infer.train.products import linear


def gradients(found: torch.Tensor, wanted: list[torch.Tensor]) -> list[torch.Tensor]:
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    return list(torch.autograd.grad(found, wanted, upstream.to(found.dtype)))


@pytest.mark.parametrize("shape", [(3, 5), (70, 96), (2, 7, 96), (1, 1, 96), (600, 192)])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_value_and_gradients(shape: tuple[int, ...], biased: bool, scaled: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    drawn = [torch.randn(s, generator=draw) for s in (shape, (33, shape[-1]), (33,), (33,))]
    used = [True, True, biased, scaled]

    def of(inputs: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        wanted = [t for t, use in zip(inputs, used, strict=True) if use]
        return wanted, [t.requires_grad_() if use else None for t, use in zip(inputs, used, strict=True)]

    inputs, (x, weight, bias, gamma) = of(drawn)
    found = linear(x, weight, bias, gamma)
    exact, (x, weight, bias, gamma) = of([t.detach().double() for t in drawn])
    meant = F.linear(x, weight, bias) * (1.0 if gamma is None else gamma)
    assert "_Linear" in str(found.grad_fn)
    for a, b in zip([found, *gradients(found, inputs)], [meant, *gradients(meant, exact)], strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize("learning", range(4))
def test_gradients_are_those_of_the_values(learning: int) -> None:
    """Of one input alone, and of all."""
    inputs = [torch.randn(s, dtype=torch.float64) for s in ((2, 3, 5), (4, 5), (4,), (4,))]
    inputs[learning].requires_grad_()
    assert torch.autograd.gradcheck(linear, inputs)
    assert torch.autograd.gradcheck(linear, [t.requires_grad_() for t in inputs])


def test_bfloat16_keeps_no_cast_of_the_weights() -> None:
    drawn = [torch.randn(s).requires_grad_() for s in ((40, 64), (48, 64), (48,), (48,))]
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = linear(*drawn)
        assert linear(*drawn[:3]).dtype == torch.bfloat16
    assert {t.data_ptr() for t in kept if t.dtype == torch.float32} == {t.data_ptr() for t in drawn[1:]}
    assert {t.shape for t in kept if t.dtype == torch.bfloat16} == {(40, 64)}
    x, weight, bias, gamma = drawn
    meant = F.linear(x, weight, bias) * gamma
    assert found.dtype == torch.float32
    for a, b in zip([found, *gradients(found, drawn)], [meant, *gradients(meant, drawn)], strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() < 2e-2 * b.abs().max()


def test_nothing_is_nothing() -> None:
    assert linear(torch.randn(0, 6), torch.randn(4, 6, requires_grad=True)).shape == (0, 4)


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
