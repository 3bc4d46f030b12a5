"""A Backbone as an nn.Module: precisions, compile, export, copies, workers, threads, adapters, training."""

import copy
import io
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import SMALL, randomise, relative, tokens
from repository import ROOT
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import dinov3_infer
from dinov3_infer import Backbone, Preprocess
from dinov3_infer.model.rope import rope_periods

FAMILIES = pytest.mark.parametrize("name", ["dinov3_gated", "dinov2_reg", "dino"])


def setup(name: str = "dinov3", seed: int = 0) -> tuple[Backbone, Tensor]:
    """A small model and two normalised images of 2 x 3 patches."""
    model = randomise(Backbone(SMALL[name]), seed)
    return model, torch.randn(2, 3, 2 * model.patch_size, 3 * model.patch_size)  # type: ignore[return-value]


def pictures(count: int = 8, side: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


# --- precisions ----------------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_weights(name: str, dtype: torch.dtype) -> None:
    """With 16-bit weights, RoPE periods stay float32 bit for bit, and stream and result are float32 and close."""
    model, pixels = setup(name)
    expected = tokens(model(pixels))
    model.half() if dtype == torch.float16 else model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    if model.rope_periods is not None:
        assert model.rope_periods.dtype == torch.float32
        assert torch.equal(model.rope_periods, rope_periods(model.config.head_dim))
    stream, taken = model.run_blocks(pixels, indices=[0])
    found = tokens(model(pixels))
    assert stream.dtype == taken[0].dtype == found.dtype == torch.float32
    # two blocks, each with about ten roundings of relative size eps/2 that partly cancel
    assert 0 < relative(found, expected) < 4 * torch.finfo(dtype).eps


def test_periods_survive_every_cast() -> None:
    """Rounded periods, as in Meta's files, are kept too, also inside a larger module."""
    model, _ = setup()
    stored = rope_periods(model.config.head_dim).bfloat16().float()
    model.rope_periods.copy_(stored)
    holder = nn.Sequential(model)
    for cast in (holder.bfloat16, holder.half, holder.double, holder.float, lambda: holder.to("cpu", torch.bfloat16)):
        cast()
        assert model.rope_periods.dtype == torch.float32
        assert torch.equal(model.rope_periods, stored)
        assert model.state_dict()["rope_periods"] is not None
    assert holder.to("meta")[0].rope_periods.is_meta  # devices do change


def test_double() -> None:
    """In float64 everything but the RoPE angles is float64."""
    model, pixels = setup("dinov2_reg")
    expected = tokens(model(pixels))
    found = tokens(model.double()(pixels.double()))
    assert found.dtype == torch.float64
    assert 0 < relative(expected, found) < 3e-6  # float32 through two blocks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_stream_beyond_the_range_of_float16(dtype: torch.dtype) -> None:
    """Each block adds 120,000 to some channels, more than float16 can hold; the features stay right."""
    model, pixels = setup()
    with torch.no_grad():
        for block in model.blocks:
            block.ls2.gamma.fill_(2)
            block.mlp.fc2.bias[::7] = 60000
    expected = tokens(model(pixels))
    model.to(dtype)
    assert model.run_blocks(pixels)[0].max() > 65504
    assert tokens(model(pixels)).isfinite().all()
    assert relative(tokens(model(pixels)), expected) < 4 * torch.finfo(dtype).eps  # as above


@FAMILIES
def test_autocast_on_the_cpu(name: str) -> None:
    """Autocast runs matrix products in bfloat16; the stream is float32, and gradients are float32."""
    model, pixels = setup(name)
    expected = tokens(model(pixels))
    with torch.autocast("cpu", torch.bfloat16):
        stream, _ = model.run_blocks(pixels)
        found = tokens(model(pixels))
    assert stream.dtype == torch.float32
    assert (
        1e-4 < relative(found, expected) < 4 * torch.finfo(torch.bfloat16).eps
    )  # as above; equal would be no autocast
    found.float().square().mean().backward()
    assert model.blocks[0].attn.qkv.weight.grad.dtype == torch.float32


# --- compile and export --------------------------------------------------------------------------------------------


@FAMILIES
def test_compile_in_one_graph(name: str) -> None:
    """torch.compile finds no graph break, and gives the same tokens and gradients."""
    torch._dynamo.reset()  # else a second size is a dynamic one, and torch 2.13 cannot trace its antialiased backward
    model, pixels = setup(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    weights = [model.blocks[0].attn.qkv.weight, model.patch_embed.proj.weight]
    a, b = (tokens(m(pixels)) for m in (model, compiled))
    assert relative(b, a) < 2e-6  # decomposed operations round otherwise
    factors = torch.randn_like(a)
    for ours, theirs in zip(*(torch.autograd.grad((t * factors).sum(), weights) for t in (a, b)), strict=True):
        assert relative(theirs, ours) < 1e-5  # as above, backwards


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None and shutil.which("gcc") is None, reason="needs a C compiler")
def test_compile_with_inductor() -> None:
    """The default backend gives the same tokens."""
    torch._dynamo.reset()
    model, pixels = setup()
    model.blocks = model.blocks[:1]
    with torch.no_grad():
        assert relative(tokens(torch.compile(model, fullgraph=True)(pixels)), tokens(model(pixels))) < 2e-6  # as above


@FAMILIES
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic_batch"])
def test_export(name: str, dynamic: bool) -> None:
    """torch.export gives a program with the same results, for any number of images if asked."""
    model, pixels = setup(name)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},) if dynamic else None
    program = torch.export.export(model, (pixels,), dynamic_shapes=shapes)
    for batch in (pixels, torch.randn(5, *pixels.shape[1:])) if dynamic else (pixels,):
        assert relative(tokens(program.module()(batch)), tokens(model(batch))) < 1e-6  # the same operations, float32


# --- copies, workers, threads --------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_copies(name: str, way: str) -> None:
    """A copy gives the same bits and shares no memory with the original."""
    model, pixels = setup(name)
    expected = tokens(model(pixels))
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other, _ = setup(name, seed=1)
        other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(tokens(other(pixels)), expected)
    assert other.preprocess == model.preprocess
    assert other.fingerprint() == model.fingerprint()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    assert torch.equal(tokens(model(pixels)), expected)


class Pictures(Dataset[Tensor]):
    """Defined at module level, so that a spawned worker can import it."""

    def __init__(self, transform: Preprocess) -> None:
        self.transform, self.arrays = transform, pictures()

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.arrays[index])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_preprocess_in_workers(start: str) -> None:
    """Runs in a separate process, because other tests leave threads behind, and forking beside threads is unsafe."""
    paths = os.pathsep.join(str(ROOT / at) for at in ("", "kernels", "tests/support", "tests/end_to_end"))
    script = f"import test_module; test_module.check_workers({start!r})"
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": paths}, check=True)


def check_workers(start: str) -> None:
    """`preprocess` as the transform of a Dataset gives the same pixels in a worker process, and the same features."""
    model, _ = setup()
    transform = model.preprocess.with_options(32)
    loader = DataLoader(Pictures(transform), batch_size=4, num_workers=1, multiprocessing_context=start)
    pixels = torch.cat(list(loader))
    assert torch.equal(pixels, torch.stack([transform(array) for array in pictures()]))
    with torch.no_grad():
        expected = model.extract_features(pictures(), size=32)
        assert relative(model(pixels).cls_token, expected.cls_token) < 1e-6  # one batch for two, float32


def test_threads() -> None:
    """Eight threads at once get the result that each image gives alone."""
    model, _ = setup()
    arrays = pictures(32)
    expected = [model.extract_features(array, size=48, layers=1) for array in arrays]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda array: model.extract_features(array, size=48, layers=1), arrays))
    for a, b in zip(found, expected, strict=True):
        # a thread may split sums otherwise: float32 rounding, where an image mistaken for another is 100 times off
        assert relative(a.last_hidden_state, b.last_hidden_state) < 2e-6
        assert relative(a.layers[0].patch_tokens, b.layers[0].patch_tokens) < 2e-6
    assert relative(expected[0].cls_token, expected[1].cls_token) > 1e-3


# --- adapters and training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dinov3", "dinov3_no_bias", "dinov2_reg"])
def test_lora(name: str, dtype: torch.dtype) -> None:
    """peft's adapters change nothing at first; only they get gradients; then they change the output."""
    peft = pytest.importorskip("peft")
    model, pixels = setup(name)
    model.to(dtype)
    before = tokens(model(pixels)).detach()
    config = peft.LoraConfig(r=4, target_modules=r"blocks\.\d+\.attn\.(qkv|proj)", lora_alpha=8)
    peft.inject_adapter_in_model(config, model)
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * 2 * 2  # A and B of two linears in two blocks
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapters)
    assert torch.equal(tokens(model(pixels)), before)
    tokens(model(pixels)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in adapters.items() if "lora_B" in name)
    with torch.no_grad():
        for name, p in adapters.items():
            if "lora_B" in name:
                p.normal_()
    found = tokens(model(pixels))
    assert found.isfinite().all()
    assert relative(found, before) > 0.01
    found.square().sum().backward()
    assert all(p.grad.any() for p in adapters.values())


@pytest.mark.parametrize("name", SMALL)
def test_a_training_step_reaches_every_parameter(name: str) -> None:
    """All parameters get a gradient; the mask token needs masks, and the norm for local crops needs local crops."""
    config = replace(SMALL[name], local_cls_norm=True, prefix_norm=name == "dinov3")
    model = randomise(Backbone(config)).train()
    pixels = torch.randn(2, 3, 2 * model.patch_size, 3 * model.patch_size)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)

    def without_gradient(outputs: list[dinov3_infer.BackboneOutput]) -> set[str]:
        optimiser.zero_grad()
        sum((tokens(o) * torch.randn_like(tokens(o))).sum() for o in outputs).backward()
        return {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}

    optional = {"mask_token"} if config.mask_token else set()
    assert without_gradient([model(pixels)]) == optional | {"local_cls_norm.weight", "local_cls_norm.bias"}
    masks = [torch.tensor([[True] + [False] * 5] * 2), None] if config.mask_token else None
    assert without_gradient(model.forward_packed([pixels, pixels], masks)) == set()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


# --- the package itself --------------------------------------------------------------------------------------------


def test_import_is_cheap_and_lazy() -> None:
    """After torch, importing the package takes at most 0.15 s and loads no large library."""
    heavy = ("triton", "transformers", "PIL", "huggingface_hub", "timm", "torchvision", "safetensors")
    script = (
        "import sys, time, torch\n"
        "before = set(sys.modules); start = time.perf_counter()\n"
        "import dinov3_infer\n"
        f"print(time.perf_counter() - start, *[n for n in {heavy} if n in set(sys.modules) - before])"
    )
    runs = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
        runs.append(done.stdout.split())
    assert all(len(run) == 1 for run in runs), runs
    assert statistics.median(float(run[0]) for run in runs) < 0.15


def test_public_names() -> None:
    """Every name of __all__ exists as attribute, in star imports and in dir(); others raise AttributeError."""
    space: dict[str, object] = {}
    exec("from dinov3_infer import *", space)
    for name in dinov3_infer.__all__:
        assert space[name] is getattr(dinov3_infer, name)
        assert isinstance(space[name], dict) or name in ("Fit", "ImageLike") or space[name].__name__ == name  # type: ignore[attr-defined]
    assert len(set(dinov3_infer.__all__)) == len(dinov3_infer.__all__)
    assert set(dinov3_infer.__all__) <= set(dir(dinov3_infer))
    assert dir(dinov3_infer) == sorted(set(dir(dinov3_infer)))
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", dinov3_infer.__version__)
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = dinov3_infer.nothing


@pytest.mark.parametrize(("name", "positions"), [("dinov3", "RoPE"), ("dinov2_reg", "learned 5x5")])
def test_repr(name: str, positions: str) -> None:
    """The first line of repr() names the model."""
    model, _ = setup(name)
    head = repr(model)[:200]
    for fact in ("Backbone", "2 blocks of width 64", f"patch {model.patch_size}", "4 registers", positions):
        assert fact in head
