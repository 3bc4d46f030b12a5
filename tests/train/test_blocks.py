"""The blocks in training: products and attention against their definitions, and whole backbones."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_infer import Backbone, ViTConfig
from dinov3_infer.model import fused
from dinov3_infer.model.attention import eager_attention, sdpa_attention
from dinov3_infer.model.packing import Packing
from dinov3_infer.train import blocks, cpu_attention
from dinov3_infer.train.adapters import add_adapters
from dinov3_infer.train.blocks import linear, wrap_blocks
from dinov3_infer.train.cpu_attention import attend

# --- linear layers -----------------------------------------------------------------------------------------------


def gradients(found: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    return list(torch.autograd.grad(found, wanted, upstream.to(found.dtype)))


@pytest.mark.parametrize("shape", [(3, 5), (70, 96), (2, 7, 96), (1, 1, 96), (600, 192)])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_value_and_gradients(shape: tuple[int, ...], biased: bool, scaled: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    drawn = [torch.randn(s, generator=draw) for s in (shape, (33, shape[-1]), (33,), (33,))]
    used = [True, True, biased, scaled]

    def of(inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
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
    """Gradients of each input alone, and of all inputs, are right."""
    inputs = [torch.randn(s, dtype=torch.float64) for s in ((2, 3, 5), (4, 5), (4,), (4,))]
    inputs[learning].requires_grad_()
    assert torch.autograd.gradcheck(linear, inputs)
    assert torch.autograd.gradcheck(linear, [t.requires_grad_() for t in inputs])


def test_bfloat16_keeps_no_cast_of_the_weights() -> None:
    drawn = [torch.randn(s).requires_grad_() for s in ((40, 64), (48, 64), (48,), (48,))]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
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


# --- attention ---------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("entries", [1, 300, 2**20], ids=["image by image", "some", "all at once"])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("mix", MIXES)
def test_attention_is_the_definition(mix: str, turned: bool, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "_ENTRIES", entries)
    qkv, rest = case(mix, turned, torch.float64)
    for scale in (None, 0.3):
        found, meant = attend(qkv, **rest, scale=scale), sdpa_attention(qkv, **rest, scale=scale)
        upstream = torch.randn_like(meant)
        assert found.shape == meant.shape
        assert torch.allclose(found, meant, rtol=0, atol=1e-12)
        (a,), (b,) = (torch.autograd.grad(out, qkv, upstream) for out in (found, meant))
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("turned", [True, False])
def test_gradients_of_attention_are_those_of_the_values(turned: bool) -> None:
    qkv, rest = case("packed", turned, torch.float64)
    assert torch.autograd.gradcheck(lambda x: attend(x, **rest), qkv)


def test_bfloat16_attention_rounds_as_the_eager_form_does() -> None:
    qkv, rest = case("packed", True, torch.bfloat16)
    found, meant = attend(qkv, **rest), eager_attention(qkv, **rest)
    upstream = torch.randn_like(meant)
    (a,), (b,) = (torch.autograd.grad(out, qkv, upstream) for out in (found, meant))
    assert found.dtype == a.dtype == torch.bfloat16
    for x, y in ((found, meant), (a, b)):  # two roundings of 2^-8, three in torch 2.8
        assert (x - y).abs().max() <= 3 * 2**-8 * y.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_keeps_no_matrix_and_no_branch(dtype: torch.dtype) -> None:
    """A block keeps two streams, qkv, the attention result and the hidden layer: 2 + 3 + 1 + 4 token widths."""
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


# --- whole backbones ---------------------------------------------------------------------------------------------


def taught(backbone: Backbone) -> tuple[Tensor, list[Tensor | None]]:
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


@pytest.mark.parametrize("recompute", ["none", "cheap", "all"])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("adapters", [False, True])
def test_norms_of_one_kernel_give_what_a_plain_backbone_gives(
    recompute: str, adapters: bool, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; here by their definitions, and unrounded, so that the numbers can be compared."""
    plain = Backbone.from_config(ViTConfig(48, 2, 2, 96, layerscale=scaled), seed=0)
    plain.init_weights(layerscale=0.5)
    if adapters:
        add_adapters(plain, 3)
    wrapped = copy.deepcopy(plain)
    wrap_blocks(wrapped, False, recompute)  # type: ignore[arg-type]
    called: list[str] = []
    for name in ("layer_norm", "residual_norm"):
        function = getattr(blocks, name)
        monkeypatch.setattr(blocks, name, lambda *a, n=name, f=function: called.append(n) or f(*a))
    monkeypatch.setattr(blocks, "kernel_dtype", lambda x, norm: torch.float32)
    (a, found), (b, meant) = taught(wrapped), taught(plain.double())
    assert set(called) == ({"layer_norm", "residual_norm"} if recompute == "none" else {"layer_norm"})
    assert (a - b).abs().max() < 1e-5 * b.abs().max()
    for x, y in zip(found, meant, strict=True):
        assert (x is None) == (y is None)
        assert x is None or (x - y).abs().max() < 2e-5 * y.abs().max() + 1e-9


def test_norms_of_one_kernel_with_stochastic_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same images skip the same branches; a norm runs on the rows that are left."""
    plain = Backbone.from_config(ViTConfig(48, 2, 2, 96), seed=0)
    plain.init_weights(layerscale=0.5)
    wrapped, pixels = copy.deepcopy(plain), torch.randn(5, 3, 48, 32)
    wrap_blocks(wrapped, False, "none")
    monkeypatch.setattr(blocks, "kernel_dtype", lambda x, norm: torch.float32)
    found, meant = (
        model.train().forward_packed([pixels], drop_path=0.4, generator=torch.Generator().manual_seed(1))[0]
        for model in (wrapped, plain)
    )
    torch.testing.assert_close(found.patch_tokens, meant.patch_tokens)


def test_the_error_of_norms_of_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all gradients together, under autocast, at most that of the separate steps: geometric mean over seeds."""
    ratios = []
    for seed in range(6):
        plain = Backbone.from_config(ViTConfig(64, 2, 2, 128), seed=seed)
        plain.init_weights(layerscale=0.5)
        exact = [g for g in taught(copy.deepcopy(plain).double())[1] if g is not None]
        errors = []
        for one in (True, False):
            model = copy.deepcopy(plain)
            wrap_blocks(model, False, "none")
            dtype = torch.bfloat16 if one else None
            monkeypatch.setattr(blocks, "kernel_dtype", lambda x, norm, dtype=dtype: dtype)
            with torch.autocast("cpu", torch.bfloat16):
                found = [g for g in taught(model)[1] if g is not None]
            pairs = [(a, b) for a, b in zip(found, exact, strict=True) if b.any()]
            squares = [((a - b).norm() / b.norm()).square() for a, b in pairs]
            errors.append(torch.stack(squares).mean().sqrt())
        ratios.append((errors[0] / errors[1]).log())
    assert torch.stack(ratios).mean().exp() <= 1.005, torch.stack(ratios).exp()


def test_where_norms_are_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast on a GPU with Triton, for plain parameters and a float32 stream."""
    norm = Backbone.from_config(ViTConfig(48, 1, 2, 96), seed=0).norm
    x = torch.randn(2, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert blocks.kernel_dtype(x, norm) is None

    class There:
        """A tensor on a GPU, as far as it is looked at."""

        device, dtype = torch.device("cuda", 0), torch.float32

    reasons: list[str | None] = [None]
    monkeypatch.setattr(fused, "why_not_triton", lambda *_: reasons[0])
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.float16)
    assert blocks.kernel_dtype(There(), norm) == torch.float16  # type: ignore[arg-type]
    reasons[0] = "Triton is not installed"
    assert blocks.kernel_dtype(There(), norm) is None  # type: ignore[arg-type]
    reasons[0], There.dtype = None, torch.float64
    assert blocks.kernel_dtype(There(), norm) is None  # type: ignore[arg-type]


def test_names_and_parameters_stay() -> None:
    """State-dict keys, adapters and optimiser parameters remain; no method of a module is replaced."""
    model = Backbone.from_config(ViTConfig(48, 2, 2, 96), seed=0)
    before, modules = list(model.named_parameters()), [name for name, _ in model.named_modules()]
    for _ in range(2):  # a model that was trained can be trained again
        wrap_blocks(model, False, "cheap")
        assert all(a == b and p is q for (a, p), (b, q) in zip(before, model.named_parameters(), strict=True))
        assert modules == [name for name, _ in model.named_modules()]
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_of_others_compute_for_themselves() -> None:
    """Layers that are no `nn.Linear`, such as peft's, keep their forward pass."""

    class Silent(torch.nn.Module):
        def __init__(self, layer: torch.nn.Linear) -> None:
            super().__init__()
            self.weight = layer.weight

        def forward(self, x: Tensor) -> Tensor:
            return 0 * x

    plain = Backbone.from_config(ViTConfig(48, 1, 2, 96), seed=0)
    plain.blocks[0].attn.proj = Silent(plain.blocks[0].attn.proj)
    wrapped = copy.deepcopy(plain)
    wrap_blocks(wrapped, False, "cheap")
    pixels = torch.randn(2, 3, 48, 32)
    assert torch.equal(wrapped(pixels).patch_tokens, plain(pixels).patch_tokens)
