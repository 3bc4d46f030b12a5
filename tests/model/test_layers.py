"""The parts of a transformer under autocast: which casts are made, and that none changes a bit."""

from typing import Any

import pytest
import torch
from oracles import SMALL, randomise
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dinov3_infer import VisionTransformer
from dinov3_infer.model import layers

FAMILIES = pytest.mark.parametrize("name", ["dinov3", "dinov3_gated", "dinov2_reg", "dino"])
NARROW = pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


class Widenings(TorchDispatchMode):
    """Counts casts of 16-bit activations to float32."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        cast = func.overloadpacket is torch.ops.aten._to_copy
        self.count += bool(cast and args[0].itemsize == 2 and out.dtype == torch.float32)
        return out


def widened_project(linear: nn.Module, x: Tensor) -> Tensor:
    """A linear layer whose input has the dtype of its weights, whatever autocast does then."""
    return linear(x.to(linear.weight.dtype))


def plain_attention(qkv: Tensor, *_: Any, **__: Any) -> Tensor:
    """Attention without a cast."""
    return qkv[..., 2, :, :].flatten(-2)


def case(name: str) -> tuple[VisionTransformer, Tensor]:
    """A model, and pixels of 4x5 patches: more rows than `project` pads."""
    model = randomise(VisionTransformer(SMALL[name]))
    assert isinstance(model, VisionTransformer)
    return model, torch.randn(2, 3, 4 * model.patch_size, 5 * model.patch_size)


@FAMILIES
@NARROW
def test_autocast_widens_only_what_joins_the_stream(name: str, narrow: torch.dtype, no_grad: None) -> None:
    """Only the two branches of a block are widened; activations between products keep the dtype of autocast."""
    model, pixels = case(name)
    model.set_attention(plain_attention)
    stream, _ = model.run_blocks(pixels)
    with torch.autocast("cpu", narrow), Widenings() as widenings:
        model.blocks[0](stream, None)
    assert widenings.count == 2


@FAMILIES
@NARROW
def test_autocast_has_the_bits_of_widened_activations(
    name: str, narrow: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output, and gradients of every parameter."""
    model, pixels = case(name)
    found = []
    for project in (layers.project, widened_project):
        monkeypatch.setattr(layers, "project", project)
        with torch.autocast("cpu", narrow):
            stream, _ = model.run_blocks(pixels)
        parameters = list(model.blocks.parameters())
        found.append([stream, *torch.autograd.grad(stream.sin().sum(), parameters)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_autocast_leaves_float64_weights_alone(no_grad: None) -> None:
    """torch's autocast does not narrow float64: a narrower activation is widened for a float64 layer."""
    linear = nn.Linear(8, 4).double()
    for x in (torch.randn(20, 8), torch.randn(20, 8).bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layers.project(linear, x), linear(x.double()))


def test_devices_without_autocast(no_grad: None) -> None:
    """Shapes on the meta device, for which torch has no autocast."""
    model, pixels = case("dinov3")
    assert model.to("meta").run_blocks(pixels.to("meta"))[0].is_meta
