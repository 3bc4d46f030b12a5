"""The operators between products: their definitions against plain modules, their registration, their FLOPs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import relative
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dinov3_infer import Preprocess
from dinov3_infer.model.fused import OPERATORS, count_flops, layer_norm, residual_norm, swiglu, unfold

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def norm_inputs(dtype: torch.dtype, width: int = 48) -> Any:
    """Stream, branch, LayerScale, weight and bias of the norm."""
    return torch.randn(2, 5, width) * 3, torch.randn(2, 5, width).to(dtype), *torch.randn(3, width)


@DTYPES
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
def test_residual_and_norm_are_those_of_a_block(dtype: torch.dtype, scaled: bool) -> None:
    """The stream and its norm have the bits of the separate steps."""
    x, branch, scale, weight, bias = norm_inputs(dtype)
    after, normed = residual_norm(x, branch, scale if scaled else None, weight, bias, 1e-5, dtype)
    expected = x + (branch.float() * scale if scaled else branch.float())
    assert after.dtype == torch.float32 and torch.equal(after, expected)
    assert normed.dtype == dtype and torch.equal(normed, F.layer_norm(expected, (48,), weight, bias, 1e-5).to(dtype))
    assert torch.equal(layer_norm(expected, weight, bias, 1e-5, dtype), normed)


@DTYPES
def test_swiglu_rounds_once(dtype: torch.dtype) -> None:
    """So its error is at most that of two steps."""
    gate_up = (torch.randn(3, 7, 96) * 4).to(dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    exact = F.silu(gate.double()) * up.double()
    found = swiglu(gate_up)
    assert found.dtype == dtype
    assert relative(found, exact) <= relative(F.silu(gate) * up, exact) + 1e-7


@pytest.mark.parametrize("value", [-200.0, -90.0, 90.0, 200.0])
def test_swiglu_far_from_zero(value: float) -> None:
    """No NaN where the exponential overflows."""
    found = swiglu(torch.tensor([[value, 1.5]]))
    assert found.item() == pytest.approx(max(value, 0.0) * 1.5)


@pytest.mark.parametrize(("patch", "height", "width"), [(16, 32, 48), (14, 14, 42), (8, 24, 8)])
def test_a_product_of_unfolded_patches_is_the_patch_embedding(patch: int, height: int, width: int) -> None:
    """Of the pixels that preprocessing normalises, to the bit; the product is the convolution's."""
    images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    pixels = torch.stack([Preprocess(MEAN, STD, patch, fit="native", size=None)(image) for image in images])
    columns = unfold(images, MEAN, STD, patch, torch.float32)
    assert torch.equal(columns, F.unfold(pixels, patch, stride=patch).transpose(1, 2))
    conv = nn.Conv2d(3, 10, patch, patch).double()
    expected = conv(pixels.double()).flatten(2).transpose(1, 2)
    torch.testing.assert_close(F.linear(columns.double(), conv.weight.flatten(1), conv.bias), expected)
    assert torch.equal(unfold(pixels, (0.0,) * 3, (1.0,) * 3, patch, torch.float32), columns)
    half = unfold(images, MEAN, STD, patch, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half, columns.bfloat16())


# --- gradients -----------------------------------------------------------------------------------------------------


def leaves(width: int = 12) -> list[Tensor]:
    """Stream, branch, LayerScale, weight and bias in float64, to be differentiated."""
    return [t.double().requires_grad_() for t in norm_inputs(torch.float64, width)]


@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
def test_gradients_of_residual_and_norm(scaled: bool) -> None:
    """Against differences in float64: of stream, branch, LayerScale, weight and bias, through both results."""
    x, branch, scale, weight, bias = leaves()

    def call(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, *scales: Tensor) -> Any:
        return residual_norm(x, branch, scales[0] if scales else None, weight, bias, 1e-5, torch.float64)

    assert torch.autograd.gradcheck(call, (x, branch, weight, bias, *([scale] if scaled else [])))


def test_gradients_of_a_norm() -> None:
    x, _, _, weight, bias = leaves()
    call = lambda x, weight, bias: layer_norm(x, weight, bias, 1e-5, torch.float64)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, weight, bias))


@pytest.mark.parametrize("needs", range(5), ids=["stream", "branch", "scale", "weight", "bias"])
def test_one_gradient_alone(needs: int) -> None:
    """As where the rest is frozen, or the stream begins here."""
    given = leaves()
    for i, leaf in enumerate(given):
        leaf.requires_grad_(i == needs)
    x, branch, scale, weight, bias = given
    outputs = residual_norm(x, branch, scale, weight, bias, 1e-5, torch.float64)
    sum(out.square().sum() for out in outputs).backward()  # type: ignore[union-attr]
    assert [leaf.grad is not None for leaf in given] == [i == needs for i in range(5)]


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alone", [False, True], ids=["branch", "alone"])
def test_the_error_of_gradients_is_at_most_that_of_the_steps(alone: bool, half: torch.dtype) -> None:
    """Against float64, summed over seeds; dtypes are those of the leaves.  Sums in another order cost 1 % at most."""
    squares = torch.zeros(2, 5, dtype=torch.float64)
    for seed in range(8):
        torch.manual_seed(seed)
        exact = leaves(width=48)
        exact[1] = exact[1].detach().to(half).double().requires_grad_()
        weights = torch.randn(2, *exact[0].shape, dtype=torch.float64).to(half).double()
        found = [[t.detach().to(half if i == 1 else torch.float32).requires_grad_() for i, t in enumerate(exact)]]
        found.append([t.detach().clone().requires_grad_() for t in found[0]])
        for j, (x, branch, scale, weight, bias) in enumerate((*found, exact)):
            out = half if j < 2 else torch.float64
            if alone:
                given = x, layer_norm(x, weight, bias, 1e-5, out)
            elif j == 0:
                given = residual_norm(x, branch, scale, weight, bias, 1e-5, out)
            if j > 0:
                total = x if alone else x + branch.to(x.dtype) * scale
                given = total, F.layer_norm(total, (48,), weight, bias, 1e-5).to(out)
            torch.autograd.backward(given, [w.to(t.dtype) for w, t in zip(weights, given, strict=True)])
        for j, leaves_ in enumerate(found):
            for i, (leaf, true) in enumerate(zip(leaves_, exact, strict=True)):
                if leaf.grad is not None and true.grad is not None:
                    assert leaf.grad.dtype == leaf.dtype
                    squares[j, i] += relative(leaf.grad, true.grad) ** 2
    ours, steps = squares.sqrt()
    assert (ours <= 1.01 * steps + 1e-6).all(), (ours, steps)
    assert ours[0] > 0 and (ours > 0).sum() >= (2 if alone else 4)  # a sum of few numbers may be exact


def test_a_branch_without_layerscale_is_not_kept() -> None:
    """Its gradient is that of the stream, so its numbers are not needed."""
    x, branch, _, weight, bias = leaves()
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        residual_norm(x, branch, None, weight, bias, 1e-5, torch.float64)
    assert sum(t.numel() for t in kept) == x.numel() + weight.numel()


def test_gradients_have_no_gradient() -> None:
    """An error, and not a wrong number."""
    x, _, _, weight, bias = leaves()
    (grad,) = torch.autograd.grad(layer_norm(x, weight, bias, 1e-5, torch.float64).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# --- registration --------------------------------------------------------------------------------------------------


def calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator."""
    x, branch, scale, weight, bias = norm_inputs(torch.bfloat16)
    images = torch.randint(0, 256, (2, 3, 28, 42), dtype=torch.uint8)
    return {
        "layer_norm": (x, weight, bias, 1e-5, torch.bfloat16),
        "residual_norm": (x, branch, scale, weight, bias, 1e-5, torch.float16),
        "norm_backward": (torch.randn(x.shape), branch, x, branch.clone(), scale, weight, 1e-5),
        "swiglu": (branch,),
        "unfold": (images, list(MEAN), list(STD), 14, torch.bfloat16),
    }


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    """torch's own checks of schema, fake implementation and tracing, dynamic shapes too."""
    torch.library.opcheck(getattr(torch.ops.dinov3_infer, name), calls()[name])


def test_opcheck_of_a_norm_alone() -> None:
    """And of a branch without LayerScale, of which the dtype is given."""
    grad, _, x, branch, _, weight, eps = calls()["norm_backward"]
    for given in ((None, grad, x, None, None, weight, eps), (grad, grad, x, branch[:0], None, weight, eps)):
        torch.library.opcheck(torch.ops.dinov3_infer.norm_backward, given)


@pytest.mark.parametrize("name", OPERATORS)
def test_flops_are_those_of_the_steps(name: str) -> None:
    """torch counts products; what stands between them has none, in one step or in many."""
    count_flops()
    operator = getattr(torch.ops.dinov3_infer, name)
    linear = nn.Linear(8, 4)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        operator(*calls()[name])
        linear(torch.randn(3, 8))
    assert counter.get_total_flops() == 2 * 3 * 8 * 4
    assert counter.get_flop_counts()["Global"].get(operator) == 0


@pytest.mark.parametrize("name", OPERATORS)
def test_one_node_of_a_graph(name: str) -> None:
    """Opaque to export, which keeps its place for the kernel."""

    class Module(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return getattr(torch.ops.dinov3_infer, name)(x, *calls()[name][1:])

    program = torch.export.export(Module(), calls()[name][:1])
    assert sum(name in str(node.target) for node in program.graph.nodes) == 1
