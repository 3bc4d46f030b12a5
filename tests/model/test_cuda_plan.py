"""The plan for CUDA, on a CPU: its numbers, its graphs with a recorder that stands in, and what it keeps."""

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import SMALL, randomise
from torch import Tensor

import dinov3_infer.model.cuda.cuda_plan as module
from dinov3_infer import Backbone
from dinov3_infer.model.cuda.cuda_plan import CudaPlan
from dinov3_infer.model.cuda.graphs import Graphs
from dinov3_infer.model.layers import ViTConfig
from dinov3_infer.model.network import BackboneOutput, LayerOutput, Outputs, normalised

pytestmark = pytest.mark.usefixtures("no_grad")
WIDE = {  # 64 channels a head, as the kernels have them
    "small": ViTConfig(384, 4, 6, 1536),
    "gated": ViTConfig(384, 3, 6, 1024, gated=True),
    "learned": ViTConfig(384, 3, 6, 1536, patch_size=14, position_grid=5, key_bias=True, norm_eps=1e-6),
    "untied": ViTConfig(256, 2, 2, 512, gated=True, prefix_norm=True, qkv_bias=False),
}
SCALE = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def built(config: ViTConfig) -> Backbone:
    return randomise(Backbone.from_config(config))  # type: ignore[return-value]


def noise(bb: Backbone, *shapes: tuple[int, int, int], seed: int = 0) -> list[Tensor]:
    """Normalised pixels of (images, h, w) in patches."""
    generator, side = torch.Generator().manual_seed(seed), bb.patch_size
    return [torch.randn(count, 3, h * side, w * side, generator=generator) for count, h, w in shapes]


def flat(output: BackboneOutput | LayerOutput) -> Tensor:
    return torch.cat((output[0][:, None], output[1], output[2]), dim=1)


def autocast(bb: Backbone, pixels: Tensor, layers: Any = None, dtype: torch.dtype = torch.bfloat16) -> BackboneOutput:
    with torch.autocast("cpu", dtype):
        return bb(pixels, layers=layers)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


# --- the numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SMALL, *WIDE])
def test_kept_weights_have_the_bits_of_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tables in float32, silu rounded and patches by the convolution, as the plain path has them."""
    bb = built((SMALL | WIDE)[name])

    def two_steps(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def entered(plan: CudaPlan, batch: Tensor, *rest: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return bb.embed_tokens(batch)

    monkeypatch.setattr(module, "swiglu", two_steps)
    monkeypatch.setattr(CudaPlan, "_entered", entered)
    monkeypatch.setattr(module, "_TABLES", torch.float32)
    (pixels,) = noise(bb, (2, 3, 5))
    found, expected = CudaPlan(bb, torch.bfloat16)(bb, [pixels], [0])[0], autocast(bb, pixels, [0])
    for a, b in zip((*found[:3], *found.layers[0]), (*expected[:3], *expected.layers[0]), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*SMALL, *WIDE])
def test_its_error_is_at_most_that_of_autocast(name: str, dtype: torch.dtype) -> None:
    """Against float64, over many tokens, of one size and of several in a pass, layers too; 2 % are chance."""
    bb = built((SMALL | WIDE)[name])
    exact, plan = built((SMALL | WIDE)[name]).double(), CudaPlan(bb, dtype)
    given = noise(bb, (6, 5, 4), (4, 3, 6))
    squares = torch.zeros(2, 2, dtype=torch.float64)  # last and layer; plan and autocast
    for pixels in (given[:1], given[1:], given):
        for found, batch in zip(plan(bb, pixels, [0]), pixels, strict=True):
            truth, plain = exact(batch.double(), layers=[0]), autocast(bb, batch, [0], dtype)
            for row, part in enumerate((lambda o: o, lambda o: o.layers[0])):
                for column, output in enumerate((found, plain)):
                    squares[row, column] += error(flat(part(output)), flat(part(truth))) ** 2
    assert (squares[:, 0] <= 1.02**2 * squares[:, 1]).all(), squares.sqrt()
    assert (squares[:, 0] > 1e-10).all()  # it did round


@pytest.mark.parametrize("name", ["dinov3", "dinov2_reg", "dino", "untied"])
def test_uint8_is_normalised_on_the_way(name: str) -> None:
    """Within rounding of the sum: what the patch embedding is given has the same bits."""
    bb = built((SMALL | WIDE)[name])
    images = (noise(bb, (3, 4, 3))[0] * 60 + 120).clamp(0, 255).to(torch.uint8)
    plan, pixels = CudaPlan(bb, torch.bfloat16), normalised(images, SCALE)
    found, expected = plan(bb, [images], scale=SCALE)[0], plan(bb, [pixels])[0]
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))
    exact = bb(pixels)
    assert F.cosine_similarity(flat(found), flat(exact), dim=-1).min() > 0.999


@pytest.mark.parametrize("name", ["dinov3", "dinov2_reg"])
def test_tables_are_those_of_a_grid(name: str) -> None:
    """Not of its number of patches, its height or its width, which others share."""
    bb = built(SMALL[name])
    plan = CudaPlan(bb, torch.float16)
    for h, w in [(3, 4), (4, 3), (2, 6), (6, 2), (1, 12), (12, 1), (3, 4), (3, 6), (6, 4)]:
        (pixels,) = noise(bb, (1, h, w))
        assert error(flat(plan(bb, [pixels])[0]), flat(bb(pixels)).double()) < 5e-3
    assert len(plan.grids) == 8


@pytest.mark.parametrize("name", [*SMALL, *WIDE])
def test_class_tokens_alone(name: str) -> None:
    """The vectors of the whole pass, without the rest."""
    bb = built((SMALL | WIDE)[name])
    plan, given = CudaPlan(bb, torch.bfloat16), noise(bb, (3, 4, 3), (1, 2, 5), (2, 1, 1))
    for pixels in (given[:1], given):
        for found, whole, batch in zip(plan(bb, pixels, class_only=True), plan(bb, pixels), pixels, strict=True):
            assert found.patch_tokens.shape == found.register_tokens.shape == (len(batch), 0, bb.embed_dim)
            assert F.cosine_similarity(found.cls_token, whole.cls_token, dim=-1).min() > 0.9999


def test_the_sum_tells_of_what_is_not_finite() -> None:
    """In any token, of any image, of any size."""
    bb = built(SMALL["dinov3"])
    plan, given = CudaPlan(bb, torch.bfloat16), noise(bb, (3, 4, 3), (2, 2, 5))
    assert plan(bb, given).total.isfinite()  # type: ignore[union-attr]
    for batch, image in [(0, 0), (0, 2), (1, 1)]:
        broken = [t.clone() for t in given]
        broken[batch][image, 1, 3, 3] = float("inf")
        assert not plan(bb, broken).total.isfinite()  # type: ignore[union-attr]


def test_sixteen_bit_weights_are_not_copied() -> None:
    bb = built(SMALL["dinov3"]).to(torch.bfloat16)
    plan = CudaPlan(bb, torch.bfloat16)
    assert plan.blocks[0].proj[0].data_ptr() == bb.blocks[0].attn.proj.weight.data_ptr()
    (pixels,) = noise(bb, (2, 3, 4))
    assert F.cosine_similarity(flat(plan(bb, [pixels])[0]), flat(bb(pixels)), dim=-1).min() > 0.999


# --- graphs ---------------------------------------------------------------------------------------------------------


class Recorder:
    """Runs a call again into the memory of the first time, as the replay of a CUDA graph does."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0
        self.now = 0

    def stream(self) -> int:
        return self.now

    def capture(self, call: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        self.captured += 1
        found = call()
        for output in found:  # nobody may rely on what a capture leaves behind
            output.cls_token.fill_(float("nan"))

        def replay() -> None:
            self.replayed += 1
            fresh = call()
            assert found.total is not None and fresh.total is not None
            found.total.copy_(fresh.total)
            for old, new in zip(found, fresh, strict=True):
                for a, b in zip((*old[:3], *old.layers), (*new[:3], *new.layers), strict=True):
                    for into, source in zip(a, b, strict=True) if isinstance(a, tuple) else ((a, b),):
                        into.copy_(source)

        return replay, found


def graphed(bb: Backbone) -> tuple[CudaPlan, Recorder]:
    plan, recorder = CudaPlan(bb, torch.bfloat16), Recorder()
    plan.graphs = Graphs(recorder)
    return plan, recorder


def same(found: Sequence[BackboneOutput], expected: Sequence[BackboneOutput]) -> bool:
    pairs = [((*a[:3], *a.layers), (*b[:3], *b.layers)) for a, b in zip(found, expected, strict=True)]
    return all(
        all(map(torch.equal, x, y)) if isinstance(x, tuple) else torch.equal(x, y)
        for a, b in pairs
        for x, y in zip(a, b, strict=True)
    )


def test_a_shape_is_run_then_captured_then_replayed() -> None:
    """With the numbers of its own input each time, and results that later replays do not change."""
    bb = built(SMALL["dinov3"])
    plan, recorder = graphed(bb)
    plain = CudaPlan(bb, torch.bfloat16)
    given = [noise(bb, (2, 3, 4), seed=i) for i in range(5)]
    found = [plan(bb, pixels, [1]) for pixels in given]
    assert (recorder.captured, recorder.replayed) == (1, 4)
    assert all(same(f, plain(bb, pixels, [1])) for f, pixels in zip(found, given, strict=True))
    assert all(torch.equal(f.total, plain(bb, pixels, [1]).total) for f, pixels in zip(found, given, strict=True))  # type: ignore[arg-type]


def test_graphs_are_told_apart() -> None:
    """By shape, dtype, layers, scale and what is wanted; eight are kept, the least used goes."""
    bb = built(SMALL["dinov3"])
    plan, recorder = graphed(bb)
    plain = CudaPlan(bb, torch.bfloat16)
    (pixels,), (turned,) = noise(bb, (2, 3, 4)), noise(bb, (2, 4, 3))
    images = torch.randint(0, 256, pixels.shape, dtype=torch.uint8)
    asked: list[dict[str, Any]] = [
        dict(pixels=[pixels]), dict(pixels=[turned]), dict(pixels=[pixels[:1]]), dict(pixels=[pixels], indices=[0]),
        dict(pixels=[pixels], class_only=True), dict(pixels=[images], scale=SCALE),
        dict(pixels=[images], scale=(SCALE[1], SCALE[1])),
    ]  # fmt: skip
    for _ in range(3):
        for options in asked:
            assert same(plan(bb, **options), plain(bb, **options))
    assert (recorder.captured, recorder.replayed) == (7, 14)
    for width in range(1, 9):
        for _ in range(2):
            plan(bb, noise(bb, (1, 1, width)))
    assert recorder.captured == 15 and len(plan.graphs.kept) == 8
    plan(bb, [pixels])
    assert recorder.captured == 15  # it has to be seen again first


def test_where_no_graph_is_used() -> None:
    """For large batches, for several sizes in a pass, on another stream, and where there is no CUDA."""
    bb = built(SMALL["dinov3"])
    plan, recorder = graphed(bb)
    large = [torch.randn(1, 3, 16, 16).expand(9000, -1, -1, -1)]
    for _ in range(3):
        plan(bb, large)
        plan(bb, noise(bb, (1, 2, 2), (1, 2, 3)))
    assert recorder.captured == 0
    small = noise(bb, (1, 2, 2))
    plan(bb, small)
    recorder.now = 1
    for _ in range(3):
        plan(bb, small)
    assert recorder.captured == 0
    recorder.now = 0
    plan(bb, small)
    assert recorder.captured == 1
    assert torch.cuda.is_available() or Graphs().recorder is None


def test_threads_do_not_mix_their_images() -> None:
    """One copies in, replays and copies out before the next begins."""
    bb = built(SMALL["dinov3"])
    plan, _ = graphed(bb)
    plain = CudaPlan(bb, torch.bfloat16)
    given = [noise(bb, (1, 2, 3), seed=i) for i in range(4)]
    expected, wrong = [plain(bb, pixels) for pixels in given], []

    def work(number: int) -> None:
        with torch.no_grad():
            wrong.extend(number for _ in range(20) if not same(plan(bb, given[number]), expected[number]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Forgetful(Recorder):
    """Holds nothing of what it has recorded, as a CUDA graph, whose kernels have addresses alone."""

    def capture(self, call: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        self.captured += 1
        return (lambda: None), call()


def test_what_a_graph_reads_is_kept() -> None:
    """Though tables of more sizes than are kept come after it; and it goes with the graph."""
    bb = built(replace(SMALL["dinov3"], depth=1))
    plan = CudaPlan(bb, torch.bfloat16)
    plan.graphs = Graphs(Forgetful())
    first = noise(bb, (1, 1, 2))
    for _ in range(2):
        plan(bb, first)
    tables = weakref.ref(plan.grids[1, 2])
    for width in range(3, 40):
        plan(bb, [torch.zeros(1, 3, 16, 16 * width).expand(9000 // width, -1, -1, -1)])  # too large for a graph
    gc.collect()
    assert (1, 2) not in plan.grids and tables() is not None
    plan.graphs.kept.clear()
    gc.collect()
    assert tables() is None
