"""The fast path on a CPU: the numbers of the plain one, for every image alone and in any company."""

import logging
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import fetch
import pytest
import torch
from machine import WHY_NOT, WHY_NOT_COMPILED
from oracles import SMALL, randomise
from pictures import complaint, photo
from torch import Tensor

import dinov3_infer.model.cpu.linear
import dinov3_infer.model.cpu.plan
import dinov3_infer.model.dispatch
from dinov3_infer import Backbone, InputError, ViTConfig
from dinov3_infer.model.cpu.compiled import why_not_compiled
from dinov3_infer.model.cpu.linear import PackedLinear, QuantisedLinear, smoothed, why_not_int8, why_not_packed
from dinov3_infer.model.cpu.plan import CpuPlan, spans_of
from dinov3_infer.model.dispatch import _PLANS, Precision, compare
from dinov3_infer.zoo import MODELS

MODES = [
    pytest.param(mode, marks=pytest.mark.skipif(reason is not None, reason=f"{mode}: {reason}"))
    for mode, reason in WHY_NOT.items()
]
HOW = [
    pytest.param("fused", marks=pytest.mark.skipif(WHY_NOT_COMPILED is not None, reason=f"fused: {WHY_NOT_COMPILED}")),
    "torch",
]
pytestmark = pytest.mark.skipif(WHY_NOT["exact"] is not None, reason=f"no plan here: {WHY_NOT['exact']}")
PICTURES = [photo(*size, seed=i) for i, size in enumerate([(64, 64), (64, 96), (16, 16), (50, 70), (64, 64), (16, 32)])]


def backbone(config: ViTConfig | str = "dinov3", mode: str = "exact") -> Backbone:
    bb = randomise(Backbone.from_config(SMALL[config] if isinstance(config, str) else config))
    bb.mode = mode  # type: ignore[assignment]
    return bb  # type: ignore[return-value]


def planned(bb: Backbone) -> CpuPlan | None:
    with torch.no_grad():
        return bb.extractor.plan()  # type: ignore[return-value]


def plain(bb: Backbone, image: Any) -> Tensor:
    """All tokens of one image from the module as it is written."""
    with torch.no_grad():
        output = bb(bb.preprocess.with_options(fit="native").batch([image]).pixels)
    return torch.cat((output.cls_token[:, None], output.register_tokens, output.patch_tokens), dim=1)


def test_what_the_machine_has_is_used() -> None:
    """Operators that raise or give other numbers here are a fault to mend, and no reason to skip what tests them."""
    found = {"exact": why_not_packed(), "fast": why_not_packed(torch.bfloat16), "int8": why_not_int8()}
    assert {mode for mode, reason in found.items() if reason is None} == {
        m for m, why in WHY_NOT.items() if why is None
    }
    assert (why_not_compiled() is None) is (WHY_NOT_COMPILED is None), why_not_compiled()


@pytest.mark.parametrize("mode", ["exact", "fast", "int8"])
def test_a_loaded_model_runs_by_its_plan_and_by_the_compiled_kernels(mode: Any) -> None:
    """In the mode asked for where this CPU has it, and by the C passes where there is a compiler; never skipped."""
    bb = Backbone.from_pretrained("nano", device="cpu", mode=mode)
    bb.extract_features(PICTURES[0])
    plan = _PLANS[bb][-1]
    expected = mode if WHY_NOT[mode] is None else "fast" if mode == "int8" and WHY_NOT["fast"] is None else "exact"
    assert plan.mode == expected
    compiled = why_not_compiled(plan.dtype, bb.config.head_dim) is None
    assert plan.fused is compiled and (compiled or expected != "exact" or shutil.which("cc") is None)


def features(bb: Backbone, image: Any) -> Tensor:
    return bb.extract_features(image, fit="native").last_hidden_state


# --- the numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", SMALL)
def test_exact_equals_plain(name: str, how: str, no_grad: None) -> None:
    """Within 1e-5 for every architecture, several sizes in one pass, every layer, one patch alone among them."""
    bb = backbone(replace(SMALL[name], num_heads=2 if how == "fused" else 4))  # of 32 channels, and of 16
    plan, side = planned(bb), bb.patch_size
    pixels = [torch.randn(shape) for shape in ((2, 3, 4 * side, 5 * side), (1, 3, side, side), (3, 3, side, 7 * side))]
    assert plan is not None and plan.fused is (how == "fused")
    for found, batch in zip(plan(bb, pixels, [1, 0]), pixels, strict=True):
        expected = bb(batch, layers=[1, 0])
        for ours, theirs in zip((found[:3], *found.layers), (expected[:3], *expected.layers), strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert a.shape == b.shape and a.dtype == torch.float32
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["dinov3", "dinov2_reg"])
def test_tables_are_those_of_a_grid(name: str, how: str, no_grad: None) -> None:
    """Not of its number of patches, its height or its width, which others share."""
    bb = backbone(replace(SMALL[name], num_heads=2 if how == "fused" else 4))
    plan, side = planned(bb), bb.patch_size
    assert plan is not None
    for h, w in [(3, 4), (4, 3), (2, 6), (6, 2), (1, 12), (12, 1), (3, 4), (3, 6), (6, 4)]:
        pixels = torch.randn(1, 3, h * side, w * side)
        found, expected = plan(bb, [pixels])[0], bb(pixels)
        for a, b in zip(found[:3], expected[:3], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("config", [*SMALL.values(), ViTConfig(384, 1, 6, 1536), ViTConfig(768, 2, 12, 3072)])
def test_class_tokens_alone(config: ViTConfig, mode: str, no_grad: None) -> None:
    """Bit for bit those of the whole pass, whatever is beside them."""
    bb = backbone(config)
    bb.preprocess = replace(bb.preprocess, size=4 * bb.patch_size)
    side, half = bb.patch_size, torch.float32 if mode == "exact" else torch.bfloat16
    plan = CpuPlan(bb, half, spans_of(bb, [bb.extractor.samples()]) if mode == "int8" else None)
    pixels = [
        torch.randn(count, 3, h * side, w * side) for count, h, w in [(1, 1, 1), (3, 2, 4), (17, 3, 2), (1, 4, 5)]
    ]
    whole = plan(bb, pixels)
    for found, expected, given in zip(plan(bb, pixels, class_only=True), whole, pixels, strict=True):
        assert torch.equal(found.cls_token, expected.cls_token)
        assert found.patch_tokens.shape == found.register_tokens.shape == (len(given), 0, config.embed_dim)
        assert torch.equal(plan(bb, [given[-1:]], class_only=True)[0].cls_token, expected.cls_token[-1:])


# every architecture at its own width, with two of its blocks
WIDE = {
    replace(row.config, depth=2): name for name, row in reversed(MODELS.items()) if isinstance(row.config, ViTConfig)
}


@pytest.mark.slow
@pytest.mark.parametrize("config", WIDE, ids=WIDE.values())
def test_exact_equals_plain_at_every_width(config: ViTConfig, no_grad: None) -> None:
    bb = backbone(config)
    pixels = torch.randn(2, 3, 6 * bb.patch_size, 4 * bb.patch_size, generator=torch.Generator().manual_seed(0))
    plan = planned(bb)
    assert plan is not None
    for ours, theirs in zip(plan(bb, [pixels])[0][:3], bb(pixels)[:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_heads_of_an_odd_width(mode: str) -> None:
    """Which learned positions allow."""
    bb = backbone(ViTConfig(63, 2, 3, 126, position_grid=4), mode)
    bb.preprocess = replace(bb.preprocess, size=256)  # 4 patches a side are too few to find the spans of int8 from
    found = torch.nn.functional.cosine_similarity(features(bb, PICTURES[0]), plain(bb, PICTURES[0]), dim=-1)
    assert found.min() > {"exact": 1 - 1e-6, "fast": 0.999, "int8": 0.97}[mode]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("mode", MODES)
def test_the_defaults_of_torch_do_not_matter(mode: str, how: str, no_grad: None) -> None:
    """Neither the dtype nor the device of tensors that nobody gave one."""
    bb, pixels = backbone(replace(SMALL["dinov3"], num_heads=2 if how == "fused" else 4)), torch.randn(2, 3, 32, 48)
    half = torch.float32 if mode == "exact" else torch.bfloat16
    spans = spans_of(bb, [pixels]) if mode == "int8" else None
    expected = CpuPlan(bb, half, spans)(bb, [pixels])[0]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            reasons = why_not_packed.__wrapped__(half), why_not_int8.__wrapped__()
            found = CpuPlan(bb, half, spans)(bb, [pixels])[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert reasons == (why_not_packed(half), why_not_int8())
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("name", SMALL)
def test_fewer_bits_stay_near(name: str, mode: str, how: str, no_grad: None) -> None:
    """bfloat16 within a cosine of 0.999, 8 bits within 0.99, on every token."""
    bb = backbone(replace(SMALL[name], num_heads=2 if how == "fused" else 4))
    pixels = bb.preprocess.batch(PICTURES[:2] + PICTURES[3:5]).pixels
    spans = spans_of(bb, [pixels]) if mode == "int8" else None
    for dtype in (torch.bfloat16, torch.float32) if mode == "int8" else (torch.bfloat16,):
        found = compare(CpuPlan(bb, dtype, spans)(bb, [pixels.flip(-1)])[0], bb(pixels.flip(-1)))
        assert min(found) > (0.999 if mode == "fast" else 0.99)
        assert max(found) < 1.0 - 1e-9  # it did round


def test_large_images_go_in_parts(monkeypatch: pytest.MonkeyPatch, no_grad: None) -> None:
    """How many scores and images go at a time, where attention is made of products, changes nothing but rounding."""
    monkeypatch.setattr(dinov3_infer.model.cpu.plan, "why_not_compiled", lambda *_: "no compiler")
    bb = backbone()
    pixels = torch.randn(3, 3, 80, 112)
    expected = [CpuPlan(bb, dtype)(bb, [pixels])[0].patch_tokens for dtype in (torch.float32, torch.bfloat16)]
    monkeypatch.setattr(dinov3_infer.model.cpu.plan, "_SCORES", 400)
    monkeypatch.setattr(dinov3_infer.model.cpu.plan, "_ROWS", 31)
    found = [CpuPlan(bb, dtype)(bb, [pixels])[0].patch_tokens for dtype in (torch.float32, torch.bfloat16)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"{n}_threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width, heads, gated", [(384, 6, False), (768, 12, False), (256, 4, True), (256, 16, False)])
def test_neighbours_do_not_matter(width: int, heads: int, gated: bool, mode: str, threads: int) -> None:
    """Bit for bit, at the widths of released models: any batch, order and mixture of sizes."""
    bb = backbone(ViTConfig(width, 1, heads, 4 * width, gated=gated), mode)
    bb.preprocess = replace(bb.preprocess, size=64)
    images = [photo(*size, seed=i) for i, size in enumerate([(96, 224), (48, 80), (16, 16), (16, 32)])]
    alone = [bb.extract_features(image, fit="native").last_hidden_state for image in images]
    draw = random.Random(width)
    for _ in range(2):
        order = draw.choices(range(len(images)), k=draw.randint(3, 7))
        stream = bb.iter_features([images[i] for i in order], fit="native", batch_size=draw.randint(1, 7))
        assert all(torch.equal(alone[i], f.last_hidden_state) for i, f in zip(order, stream, strict=True)), order


@pytest.mark.parametrize("count", [2, 3, 15, 16, 17, 96, 97, 500])
def test_a_row_depends_on_itself_alone(count: int) -> None:
    """What all of this rests on, for every kind of product."""
    x, weight, bias, other = (torch.randn(shape) for shape in ((512, 1536), (384, 1536), (384,), (512, 384)))
    linears: list[tuple[Any, torch.dtype]] = [(PackedLinear(weight, bias), torch.float32)]
    if WHY_NOT["fast"] is None:
        linears.append((PackedLinear(weight, bias, torch.bfloat16), torch.bfloat16))
    if WHY_NOT["int8"] is None:
        linears.append(
            (QuantisedLinear(weight, bias, *smoothed(x.amin(0), x.amax(0), weight), x.mean(0)), torch.float32)
        )
    for linear, dtype in linears:
        taken, beside = linear.taken(x), other.to(dtype)
        whole = (linear(taken), linear(taken, "gelu"), linear.times(taken, beside))
        few, some = taken[:count], beside[:count]
        part = (linear(few), linear(few, "gelu"), linear.times(few, some))
        assert all(torch.equal(a[:count], b) for a, b in zip(whole, part, strict=True))


@pytest.mark.skipif(WHY_NOT["int8"] is not None, reason=f"int8: {WHY_NOT['int8']}")
def test_a_one_sided_input_in_8_bits() -> None:
    """What GELU gives lies far from the middle of its grid, and the rounding of W must not be multiplied by that."""
    x, weight, bias = torch.randn(256, 512).clamp_min(-0.17) * 0.3, torch.randn(64, 512) / 20, torch.randn(64)
    x[0, 0] = 10.0
    size = torch.full((512,), (x.max() - x.min()).item() / 255)
    linear = QuantisedLinear(weight, bias, x.min() + 128 * size, size, x.mean(0))
    expected = torch.nn.functional.linear(x, weight, bias)
    error = linear(linear.taken((x - linear.middle) / size)) - expected
    assert error.square().mean().sqrt() < 0.02 * expected.square().mean().sqrt()


# --- what is missing is done without ------------------------------------------------------------------------------


def test_without_operators_the_plain_path_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    bb = backbone()
    monkeypatch.setattr(dinov3_infer.model.dispatch, "why_not_packed", lambda *_: "no operators")
    assert torch.equal(features(bb, PICTURES[0]), plain(bb, PICTURES[0]))


@pytest.mark.parametrize("fault", ["missing", "wrong"])
def test_operators_are_tried_before_they_are_trusted(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that raises or gives other numbers is a reason, not an error."""

    def other(self: Any, x: Tensor, activation: str = "none") -> Tensor:
        if fault == "missing":
            raise RuntimeError("no such operator\nand a long story")
        return x[:, :32] * 0

    monkeypatch.setattr(PackedLinear, "__call__", other)
    reason = why_not_packed.__wrapped__()
    assert reason is not None and ("other numbers" if fault == "wrong" else "no such operator") in reason
    assert "\n" not in reason


@pytest.mark.parametrize("mode", ["fast", "int8"])
def test_modes_give_way_with_a_line(
    mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To the next one that the machine is good for, once, and with its numbers."""
    missing = lambda dtype=torch.float32: "no such CPU" if dtype == torch.bfloat16 else None  # noqa: E731
    monkeypatch.setattr(dinov3_infer.model.dispatch, "why_not_packed", missing)
    monkeypatch.setattr(dinov3_infer.model.dispatch, "why_not_int8", lambda: "no such CPU")
    bb, exact = backbone(mode=mode), backbone()
    found = [features(bb, image) for image in PICTURES[:2]]
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == (1 if mode == "fast" else 2)
    assert lines[-1].endswith("is not available here: no such CPU; using mode='exact'")
    assert all(torch.equal(a, features(exact, p)) for a, p in zip(found, PICTURES, strict=False))


@pytest.mark.skipif(WHY_NOT["int8"] is not None, reason=f"int8: {WHY_NOT['int8']}")
def test_int8_passes_a_gate(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Or it is not used, and the line says how far off it was."""
    bb = backbone(mode="int8")
    bb.preprocess = replace(bb.preprocess, size=64)
    assert not torch.equal(features(bb, PICTURES[0]), features(backbone(), PICTURES[0])) and not caplog.records
    monkeypatch.setattr(dinov3_infer.model.dispatch, "_LEAST", (1.1, 1.1))
    bb.eval().to("cpu")
    features(bb, PICTURES[0])
    line = caplog.records[0].getMessage()
    assert "'int8' is not available here: class tokens have a cosine of" in line and line.endswith("mode='fast'")


def test_an_unknown_mode_is_refused() -> None:
    said = complaint(InputError, lambda: Backbone.from_pretrained("vits16", mode="turbo"))  # type: ignore[arg-type]
    assert "exact, fast, int8" in said and "'turbo'" in said


def test_check_precision() -> None:
    """One for the exact mode, less for the others, in the order of the fields."""
    bb = backbone()
    exact = bb.check_precision(PICTURES[:2], size=64)
    assert isinstance(exact, Precision) and min(exact) > 1 - 1e-6
    if WHY_NOT["fast"] is None:
        bb.mode = "fast"
        fast = bb.check_precision(PICTURES[:2], size=64)
        assert (
            0.999 < fast.patch_worst <= fast.patch_percentile <= 1 and fast.cls_worst <= fast.cls_mean < exact.cls_mean
        )


@pytest.mark.data
@pytest.mark.parametrize("mode", MODES)
def test_real_weights(mode: str, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The errors that `from_pretrained` states, on ViT-S/14 and photographs that int8 was not calibrated with."""
    pytest.importorskip("onnx", reason="the real weights lie in an ONNX file: pip install onnx")
    bb = Backbone.from_pretrained(fetch.write_dinov2_vits14(tmp_path)[0], device="cpu", mode=mode)  # type: ignore[arg-type]
    found = bb.check_precision(list(fetch.photographs().values()))
    print(mode, found)
    cls, patches = {"exact": (1 - 1e-6, 1 - 1e-6), "fast": (0.999, 0.998), "int8": (0.99, 0.98)}[mode]
    assert found.cls_mean >= cls and found.patch_percentile >= patches
    assert planned(bb) is not None and "not available" not in caplog.text
