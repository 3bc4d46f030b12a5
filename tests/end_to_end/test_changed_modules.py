"""Wrapped and changed models: DDP, quantised layers, other numbers of blocks, torch.fx, forks."""

import copy
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.fx
import torch.nn.functional as F
from oracles import SMALL, randomise
from pictures import complaint, photo
from torch import Tensor, nn

from dinov3_infer import Backbone
from dinov3_infer.errors import InputError

PICTURE = photo(40, 60)


@pytest.fixture(scope="module")
def nano() -> Backbone:
    return Backbone.from_pretrained("nano", device="cpu")


def small(name: str = "dinov3") -> Backbone:
    return randomise(Backbone.from_config(SMALL[name]))  # type: ignore[return-value]


# --- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient_with_and_without_masks(name: str, masked: bool, training: bool) -> None:
    """Without masks the gradient of the mask token is zero."""
    model = small(name).train(training)
    pixels = torch.rand(2, 3, 4 * model.patch_size, 4 * model.patch_size)
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[:, 0] = True
    masked = masked and model.config.mask_token
    out = model(pixels, masks=masks if masked else None)
    sum(t.square().mean() for t in (out.cls_token, out.patch_tokens, out.register_tokens) if t.numel()).backward()
    without = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without <= {n for n in without if n.startswith("local_cls_norm")}
    if model.mask_token is not None:
        assert bool(model.mask_token.grad.any()) == masked  # type: ignore[union-attr]


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", ["plain", "masks now and then", "frozen mask token"])
def test_distributed_data_parallel(kind: str) -> None:
    model = small().train()
    if kind == "frozen mask token":
        model.mask_token.requires_grad_(False)  # type: ignore[union-attr]
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimiser = torch.optim.SGD(model.parameters(), 1e-3)
    masks = torch.rand(2, 16) < 0.5
    for step in range(4):
        optimiser.zero_grad()
        out = wrapped(torch.rand(2, 3, 64, 64), masks=masks if kind.startswith("masks") and step % 2 else None)
        (out.cls_token.square().mean() + out.patch_tokens.square().mean()).backward()
        optimiser.step()


def test_the_mask_token_changes_no_number_without_masks() -> None:
    model = small().train()
    with torch.no_grad():
        model.mask_token.fill_(torch.nan)  # type: ignore[union-attr]
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        plain = model(pixels).patch_tokens
    assert torch.equal(model(pixels).patch_tokens, plain)


# --- quantised linears --------------------------------------------------------------------------------------------


class Int8(nn.Module):
    """A linear layer with 8-bit weights; input and output keep their dtype."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias.to(x.dtype))


class Packed(Int8):
    """A linear layer whose weight is bytes, such as two weights per byte."""

    def __init__(self, linear: Any) -> None:
        super().__init__(linear)
        self.kept = self.weight
        self.weight = nn.Parameter(self.weight.view(torch.uint8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.kept.to(x.dtype) * self.scale.to(x.dtype), self.bias.to(x.dtype))


def dynamic(model: Backbone) -> Backbone:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)  # type: ignore[no-any-return]


def replaced(kind: type[nn.Module], *names: str) -> Any:
    def make(model: Backbone) -> Backbone:
        for block in model.blocks:
            for name in names:
                owner = block.get_submodule(name.rpartition(".")[0])
                setattr(owner, name.rpartition(".")[2], kind(getattr(owner, name.rpartition(".")[2])))
        return model

    return make


QUANTISED: dict[str, Any] = {
    "dynamic": dynamic,
    "int8 mlp": replaced(Int8, "mlp.fc1", "mlp.fc2"),
    "int8 attention": replaced(Int8, "attn.qkv", "attn.proj"),
    "bytes": replaced(Packed, "attn.proj", "mlp.fc1"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_linears_get_their_input_as_it_is(nano: Backbone, name: str, dtype: torch.dtype) -> None:
    if name == "dynamic" and dtype == torch.bfloat16:
        pytest.skip("torch's dynamic linears take float32")
    base = copy.deepcopy(nano).to(dtype)
    model = QUANTISED[name](base)
    truth = nano.extract_features(PICTURE, size=64)
    found = model.extract_features([PICTURE] * 2, size=64, layers=[-1], pooling="cls_mean")
    assert F.cosine_similarity(found.cls_token[:1], truth.cls_token) > 0.97
    facet = model.extract_features(PICTURE, size=64, layers=[1], facet="value").layers[0].patch_tokens
    want = nano.extract_features(PICTURE, size=64, layers=[1], facet="value").layers[0].patch_tokens
    assert F.cosine_similarity(facet, want, dim=-1).mean() > 0.95
    assert model.attention_maps(PICTURE, size=64).isfinite().all()


# --- blocks -------------------------------------------------------------------------------------------------------


def shorter(model: Backbone) -> Backbone:
    del model.blocks[-2]
    return model


def cut(model: Backbone) -> Backbone:
    model.blocks = model.blocks[:1]
    return model


def longer(model: Backbone) -> Backbone:
    model.blocks.append(copy.deepcopy(model.blocks[-1]))
    return model


def by_hand(model: Backbone, pixels: Tensor) -> Tensor:
    x, rope = model.embed_tokens(pixels), model.rope(model.grid_of(pixels))
    for block in model.blocks:
        x = block(x, rope)
    return model.normed(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("change", [shorter, cut, longer], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["dinov3", "dinov2"])
def test_depth_is_that_of_the_blocks(name: str, change: Any, tmp_path: Path) -> None:
    model = small(name)
    model.extract_features(PICTURE)  # makes a plan for the whole model
    depth = len(model.blocks)
    model = change(model)
    found = len(model.blocks)
    assert found != depth and model.config.depth == model.n_blocks == found
    assert f"{found} blocks" in model.summary() and model.description()["depth"] == found
    pixels = model.preprocess.batch([PICTURE]).pixels
    with torch.no_grad():
        want = by_hand(model, pixels)[:, 0]
        assert torch.equal(model(pixels).cls_token, want)
        assert torch.allclose(model.forward_packed([pixels])[0].cls_token, want, atol=1e-5)
    features = model.extract_features(PICTURE, layers=found)
    assert len(features.layers) == found and torch.allclose(features.cls_token, want, atol=1e-4)
    assert torch.equal(features.layers[-1].cls_token, features.cls_token)
    model.attention_maps(PICTURE, size=64, layer=found - 1)
    for layout in ("hf", "meta"):
        target = tmp_path / ("a.pth" if layout == "meta" else "a")
        heads = model.num_heads if layout == "meta" else None  # a .pth does not state the heads
        again = Backbone.from_pretrained(model.save_pretrained(target, layout), device="cpu", num_heads=heads)
        assert again.fingerprint() == model.fingerprint() and again.config.depth == found


def test_a_shortened_model_of_the_zoo_is_saved_and_loaded(nano: Backbone, tmp_path: Path) -> None:
    model = shorter(copy.deepcopy(nano))
    again = Backbone.from_pretrained(model.save_pretrained(tmp_path / "a"), device="cpu")
    assert np.array_equal(again.embed([PICTURE]), model.embed([PICTURE])) and again.config.depth == 3


# --- a child of a process that computes with several threads -------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("way", ["features", "module", "reading"])
def test_a_forked_child_computes(nano: Backbone, way: str) -> None:
    calls = {
        "features": lambda: nano.extract_features(PICTURE, size=256),
        "module": lambda: nano(torch.rand(2, 3, 256, 256)),
        "reading": lambda: nano.embed([PICTURE] * 4, size=128, num_workers=2),
    }
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        calls[way]()
        child = os.fork()
        if not child:
            calls[way]()
            os._exit(torch.get_num_threads())
        limit = time.monotonic() + 30
        while time.monotonic() < limit:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                assert os.waitstatus_to_exitcode(status) == 1
                assert torch.get_num_threads() == 2
                return
            time.sleep(0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    finally:
        torch.set_num_threads(before)


# --- torch.fx -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_a_graph_of_torch_fx_is_the_module(name: str, training: bool) -> None:
    """The graph works for other sizes, with masks and with its checks, and keeps its device and dtype."""
    model = small(name).train(training)
    graph = torch.fx.symbolic_trace(model)
    side = model.patch_size
    for h, w in ((2, 3), (4, 4), (1, 1)):
        pixels = torch.rand(2, 3, h * side, w * side)
        masks = torch.rand(2, h * w) < 0.5 if model.config.mask_token else None
        for given in {None, masks}:
            found, want = graph(pixels, masks=given), model(pixels, masks=given)
            assert torch.equal(found.patch_tokens, want.patch_tokens) and torch.equal(found.cls_token, want.cls_token)
    complaint(InputError, lambda: graph(torch.rand(1, 3, side + 1, side)))
    complaint(InputError, lambda: graph(pixels, layers=2))
    graph(pixels).cls_token.sum().backward()


def test_a_graph_of_torch_fx_with_layers() -> None:
    model = small()

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: Tensor) -> Any:
            return self.model(pixels, layers=[0, -1])

    graph = torch.fx.symbolic_trace(Last())
    pixels = torch.rand(2, 3, 64, 64)
    found, want = graph(pixels), model(pixels, layers=[0, -1])
    assert all(torch.equal(a.patch_tokens, b.patch_tokens) for a, b in zip(found.layers, want.layers, strict=True))
