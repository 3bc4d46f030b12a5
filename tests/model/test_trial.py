"""When a plan for CUDA is made, tried, dropped and refused: the CPU stands in for a device that nobody has seen."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from oracles import SMALL, randomise
from pictures import photo
from torch import Tensor, nn

import dinov3_infer.features.extractor as extractor_module
import dinov3_infer.model.cuda.cuda_plan
from dinov3_infer import Backbone, PrecisionError, Store
from dinov3_infer.features.extractor import Extractor
from dinov3_infer.model import chips, dispatch
from dinov3_infer.model.attention import why_not_triton
from dinov3_infer.model.cuda.cuda_plan import CudaPlan
from dinov3_infer.model.trial import LEAST

PICTURES = [photo(64, 64, seed=i) for i in range(3)]


class Device:
    """What happened on the device that stands in."""

    def __init__(self) -> None:
        self.made = 0
        self.ran = 0
        self.tried = 0
        self.reason: str | None = None  # why its kernels cannot run
        self.before: Callable[[], Any] | None = None  # of each pass of a plan
        self.after: Callable[[Any], Any] | None = None


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """CPU tensors under the rules of CUDA: 16-bit products, plans that are tried, images as uint8."""
    found, call, trial = Device(), CudaPlan.__call__, dispatch.why_not_trusted
    rules = dispatch._DEVICES["cuda"]

    def make(*arguments: Any) -> Any:
        found.made += 1
        return rules.make(*arguments)

    def run(plan: CudaPlan, *arguments: Any, **options: Any) -> Any:
        found.ran += 1
        if found.before is not None:
            found.before()
        outputs = call(plan, *arguments, **options)
        return outputs if found.after is None else found.after(outputs)

    def why_not(model: Any, request: Any) -> str | None:
        return rules.why_not(model, request) if request.half is None else found.reason

    def tried(*arguments: Any) -> Any:
        found.tried += 1
        return trial(*arguments)

    monkeypatch.setitem(dispatch._DEVICES, "cpu", rules._replace(why_not=why_not, make=make))
    monkeypatch.setattr(dispatch, "_TRUSTED", set())
    monkeypatch.setattr(dispatch, "why_not_trusted", tried)
    monkeypatch.setattr(CudaPlan, "__call__", run)
    monkeypatch.setattr(chips, "_DISTRUSTED", {})
    monkeypatch.setattr(Extractor, "on_gpu", True)
    mixed = lambda self: self.mixed_precision and self.network.main_weight.dtype == torch.float32  # noqa: E731
    monkeypatch.setattr(Extractor, "_autocasts", mixed)
    yield found


class Event:
    """Of a GPU that is done with everything when somebody waits; what happens is written down."""

    log: list[str] = []
    count = 0

    def record(self) -> None:
        Event.count += 1
        self.number = Event.count
        self.log.append(f"launch {self.number}")

    def synchronize(self) -> None:
        self.log.append(f"wait {self.number}")


@pytest.fixture
def events(device: Device, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "log", [])
    monkeypatch.setattr(Event, "count", 0)
    return Event.log


def backbone(name: str = "dinov3", seed: int = 0) -> Backbone:
    bb = randomise(Backbone.from_config(SMALL[name]), seed)
    bb.preprocess = replace(bb.preprocess, size=4 * bb.patch_size)  # type: ignore[union-attr, operator, arg-type]
    return bb  # type: ignore[return-value]


def features(bb: Backbone, *pictures: Any, **options: Any) -> Tensor:
    return bb.extract_features(list(pictures) or PICTURES, **options).last_hidden_state


def as_written(bb: Backbone) -> Tensor:
    """The features without a plan."""
    before, bb.mode = bb.mode, "plain"
    found = features(bb)
    bb.mode = before
    return found


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def wrong(outputs: Any) -> Any:
    for output in outputs:
        output.cls_token.neg_()
    return outputs


# --- made and trusted ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_trust_is_earned_once(name: str, device: Device, caplog: pytest.LogCaptureFixture) -> None:
    """By the first model of a kind; three passes, then that of the user; what follows is not tried again."""
    bb = backbone(name)
    assert bb.why_not_plan() is None
    assert (device.made, device.tried, device.ran) == (1, 1, 3)
    found = features(bb)
    features(bb, PICTURES[0])
    assert (device.made, device.tried, device.ran) == (1, 1, 5)
    near = torch.nn.functional.cosine_similarity(found, as_written(bb), dim=-1)
    assert near.min() > LEAST["exact"][0]
    other = backbone(name, seed=1)
    features(other)
    assert other.why_not_plan() is None
    assert (device.made, device.tried) == (2, 1) and not caplog.records


@pytest.mark.parametrize("broken", [None, "few", "many"])
def test_large_batches_with_another_kernel_are_tried_too(
    broken: str | None, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the number of images from which it runs; either of the two is enough to refuse the plan."""
    bb, seen = backbone(), []

    def check(outputs: Any) -> Any:
        seen.append(len(outputs[0].cls_token))
        return wrong(outputs) if broken == ("few" if seen[-1] == 3 else "many") else outputs

    device.after = check
    monkeypatch.setattr(dispatch, "_large_batch", lambda model, request, patches: 5)
    assert (bb.why_not_plan() is None) is (broken is None)
    assert seen == [3] * 3 + ([] if broken == "few" else [6] * 3)
    before = device.tried
    features(bb)
    assert device.tried == before


def test_each_kind_of_kernels_is_tried(device: Device, events: list[str]) -> None:
    """Other orders of length, several sizes, other dtypes of products, modes, architectures; not another batch."""
    bb = backbone()
    for count, (options, pictures) in enumerate(
        [
            (dict(size=64), PICTURES),
            (dict(size=128), PICTURES),
            (dict(size=32), PICTURES[:1]),
        ],
        start=1,
    ):
        for _ in range(2):
            features(bb, *pictures, **options)
        assert device.tried == count
    mixed = [photo(64, 64), photo(64, 128)]
    for _ in range(2):
        list(bb.iter_features(mixed, fit="native", size=128, batch_size=2))
    assert device.tried == 4
    bb.mode = "fast"
    features(bb)
    assert device.tried == 5
    for dtype, tried in ((torch.bfloat16, 5), (torch.float16, 6)):  # the products were in bfloat16 before
        features(backbone().to(dtype))
        assert device.tried == tried
    features(backbone("dino"))
    assert device.tried == 7


def test_the_trial_sees_what_the_plan_will_see(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of the package as uint8, at the size that was asked for."""
    seen: list[Any] = []
    trial = dispatch.why_not_trusted

    def tried(run: Any, judge: Any, images: Any, *rest: Any) -> Any:
        seen.extend((tuple(t.shape), t.dtype, bool(t.float().std() > 20)) for t in images)
        return trial(run, judge, images, *rest)

    monkeypatch.setattr(dispatch, "why_not_trusted", tried)
    features(backbone(), size=(48, 80))
    assert seen == [((3, 3, 48, 80), torch.uint8, True)]


# --- refused -------------------------------------------------------------------------------------------------------


def test_other_numbers_are_refused(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    """One warning with the reason, which is kept; the model runs as it is written, and nothing is tried twice."""
    bb, device.after = backbone(), wrong
    found = features(bb)
    (line,) = warnings(caplog)
    assert "cosine of -" in line and "not used on 'cpu'" in line and "slower" in line
    assert torch.equal(found, as_written(bb)) and torch.equal(features(bb), found)
    assert str(bb.why_not_plan()) in line
    assert device.tried == 2 and len(warnings(caplog)) == 1  # the plan, and attention alone


@pytest.mark.parametrize("fault", ["gelu", "gamma", "rope", "bias", "norm", "class token", "nan"])
def test_a_broken_kernel_is_noticed(fault: str, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what it does to the tokens of the images of the package."""
    module = dinov3_infer.model.cuda.cuda_plan
    if fault == "gelu":
        relu = lambda self, h: module.F.linear(module.F.linear(h, *self.up).relu(), *self.down)  # noqa: E731
        monkeypatch.setattr(module._Block, "branch", relu)
    elif fault == "gamma":
        norm = module.residual_norm
        monkeypatch.setattr(module, "residual_norm", lambda x, branch, gamma, *rest: norm(x, branch, None, *rest))
    elif fault == "rope":
        attend = module.rope_attention
        monkeypatch.setattr(module, "rope_attention", lambda qkv, cos, sin, **rest: attend(qkv, cos, -sin, **rest))
    elif fault == "bias":
        monkeypatch.setattr(module, "_linear", lambda linear, dtype: (linear.weight.to(dtype), None))
    elif fault == "norm":
        one = module.layer_norm
        monkeypatch.setattr(module, "layer_norm", lambda x, w, b, eps, dtype: one(x + 0.5, w, b * 0, eps, dtype))
    else:
        value = float("nan") if fault == "nan" else 0.0
        device.after = lambda outputs: [o._replace(cls_token=o.cls_token * value) for o in outputs]
    bb = backbone()
    found = features(bb)
    monkeypatch.undo()
    assert found.isfinite().all()
    assert bb not in dispatch._PLANS or dispatch._PLANS[bb].plan is None


def test_what_raises_in_the_trial_is_refused(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    """With the first line of what it said."""

    def fail() -> None:
        raise RuntimeError("no kernel image is available\nand a long story")

    bb, device.before = backbone(), fail
    found = features(bb)
    assert torch.equal(found, as_written(bb))
    assert str(bb.why_not_plan()).endswith("it raised RuntimeError: no kernel image is available")
    assert len(warnings(caplog)) == 1


def test_what_raises_later_rises(device: Device) -> None:
    bb = backbone()
    features(bb)

    def fail() -> None:
        raise RuntimeError("an illegal memory access")

    device.before = fail
    with pytest.raises(RuntimeError, match="illegal memory access"):
        features(bb)
    assert bb.why_not_plan() is None


def test_a_lack_of_memory_says_nothing_of_the_numbers(device: Device) -> None:
    """It rises, as `embed` wants it, and the next call tries again."""

    def fail() -> None:
        raise torch.OutOfMemoryError("out of memory")

    bb, device.before = backbone(), fail
    with pytest.raises(torch.OutOfMemoryError):
        features(bb)
    device.before = None
    assert bb.why_not_plan() is None and device.tried == 2


def test_weights_that_are_not_finite_prove_nothing(device: Device) -> None:
    """Neither for the plan nor against it: the user hears of the weights, and the next model is tried."""
    bb = backbone()
    with torch.no_grad():
        bb.blocks[0].mlp.fc1.bias[3] = float("nan")
    with pytest.raises(PrecisionError):
        features(bb)
    assert not dispatch._TRUSTED and bb.why_not_plan() is None
    device.after = wrong
    assert "cosine" in str(backbone(seed=1).why_not_plan())


def test_a_refused_plan_is_tried_again_when_asked(device: Device) -> None:
    bb, device.after = backbone(), wrong
    features(bb)
    device.after = None
    assert bb.why_not_plan() is not None
    bb.refresh()
    assert bb.why_not_plan() is None and not torch.equal(features(bb), as_written(bb))


def test_attention_that_is_wrong_by_itself_is_not_used_either(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the model as it is written takes torch's; a plan that is wrong elsewhere leaves it alone."""
    cuda = torch.device("cuda", 0)
    bb, device.after = backbone(), wrong
    features(bb)
    assert not chips._DISTRUSTED
    bb, device.after = backbone(), None
    attend = dinov3_infer.model.attention.rope_attention
    broken = lambda qkv, cos, sin, **rest: -attend(qkv, cos, sin, **rest)  # noqa: E731
    for block in bb.blocks:
        block.attn.attend = broken
    monkeypatch.setattr(dinov3_infer.model.watch, "rope_attention", broken)
    monkeypatch.setattr(dinov3_infer.model.cuda.cuda_plan, "rope_attention", broken)
    features(bb)
    assert "the Triton kernel was tried on 'cpu'" in chips._DISTRUSTED[torch.device("cpu")]
    assert "tried" not in str(why_not_triton(cuda, torch.bfloat16, 64))
    chips.distrust(cuda, "it was tried")
    assert why_not_triton(cuda, torch.bfloat16, 64) == "it was tried"


# --- none at all ---------------------------------------------------------------------------------------------------


def test_where_none_is_made(device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """With float32 products, without kernels, in mode "plain", with gradients, under a compiler."""
    bb = backbone()
    bb.mixed_precision = False
    features(bb)
    assert "float32" in str(bb.why_not_plan()) and "dtype='auto'" in str(bb.why_not_plan())
    bb.mixed_precision, device.reason = True, "Triton is not installed"
    features(bb)
    assert bb.why_not_plan() == "Triton is not installed"
    device.reason = None
    bb.mode = "plain"
    features(bb)
    bb.mode = "exact"
    assert bb.extractor.plan() is None  # gradients are on
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert bb.extractor.plan() is None
    assert (device.made, device.ran) == (0, 0) and not caplog.records
    before = bb(torch.randn(1, 3, 32, 32)).cls_token
    assert before.requires_grad and device.ran == 0


def test_the_rules_of_a_real_gpu() -> None:
    """Asked of tensors that are there in name alone."""
    model = backbone()
    request = dispatch.Request(lambda size: torch.zeros(0))
    assert "float32" in str(dispatch._DEVICES["cuda"].why_not(model, request))
    assert "on 'cpu'" in str(dispatch._DEVICES["cuda"].why_not(model, request._replace(half=torch.bfloat16)))


def test_modes(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    """8 bits are for CPUs; "fast" takes another GELU, inside of what it promises."""
    bb = backbone()
    bb.mode = "int8"
    features(bb)
    assert warnings(caplog) == [
        "mode='int8' is not available here: products in 8 bits are made for CPUs; using mode='fast'"
    ]
    plan = dispatch._PLANS[bb].plan
    assert plan.tanh and plan.mode == "fast"
    bb.mode = "exact"
    features(bb)
    assert not dispatch._PLANS[bb].plan.tanh


# --- dropped -------------------------------------------------------------------------------------------------------


def _in_place(bb: Backbone) -> None:
    with torch.no_grad():
        bb.blocks[1].attn.proj.weight[0] += 1.0


def _storage(bb: Backbone) -> None:
    for _ in range(2):  # the second may get the memory of the first
        bb.blocks[0].attn.qkv.weight.data = torch.randn_like(bb.blocks[0].attn.qkv.weight) / 8


def _replaced(bb: Backbone) -> None:
    bb.blocks[0].ls1.gamma = nn.Parameter(torch.full((64,), 0.5))


def _loaded(bb: Backbone) -> None:
    bb.load_state_dict(backbone(seed=3).state_dict())


def _periods(bb: Backbone) -> None:
    bb.rope_periods.mul_(2.0)


def _unseen(bb: Backbone) -> None:
    bb.blocks[0].mlp.fc1.weight.data.mul_(-1.0)
    bb.refresh()


def _moved(bb: Backbone) -> None:
    bb.double().float()
    bb.blocks[0].mlp.fc1.bias.data.add_(1.0)


def _trained(bb: Backbone) -> None:
    bb.train()
    bb.blocks[0].mlp.fc1.bias.data.add_(1.0)
    bb.eval()


@pytest.mark.parametrize(
    "change",
    [_in_place, _storage, _replaced, _loaded, _periods, _unseen, _moved, _trained],
    ids=lambda f: f.__name__[1:],
)
def test_changed_weights_are_in_the_next_features(change: Callable[[Backbone], None], device: Device) -> None:
    """By a new plan, without a new trial; 16-bit parameters, which a plan shares, too."""
    for bb in (backbone(), backbone().to(torch.bfloat16)):
        before = features(bb)
        made, tried = device.made, device.tried
        change(bb)
        found = features(bb)
        assert (device.made, device.tried) == (made + 1, tried)
        near = torch.nn.functional.cosine_similarity(found, as_written(bb), dim=-1)
        assert near.min() > 0.999 and (found - before).abs().max() > 1e-2


def _hook(bb: Backbone) -> None:
    bb.blocks[0].mlp.register_forward_hook(lambda module, args, out: out * 2)


def _adapter(bb: Backbone) -> None:
    class Adapter(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1.0

    layer = Adapter(64, 192)
    layer.load_state_dict(bb.blocks[0].attn.qkv.state_dict())
    bb.blocks[0].attn.qkv = layer


def _attention(bb: Backbone) -> None:
    bb.set_attention("eager")


@pytest.mark.parametrize("change", [_hook, _adapter, _attention], ids=lambda f: f.__name__[1:])
def test_other_modules_run_as_they_are_written(change: Callable[[Backbone], None], device: Device) -> None:
    bb = backbone()
    features(bb)
    ran = device.ran
    change(bb)
    assert torch.equal(features(bb), as_written(bb)) and bb not in dispatch._PLANS
    assert device.ran == ran and bb.why_not_plan() is not None


# --- a stream ------------------------------------------------------------------------------------------------------


MANY = [photo(64, 64, seed=i) for i in range(7)]


def test_two_batches_are_in_flight(events: list[str]) -> None:
    """The next one is launched before the last one is waited for; rows are in order and those of each batch alone."""
    bb = backbone()
    rows = bb.embed(MANY, batch_size=2, num_workers=0)
    assert events == ["launch 1", "launch 2", "wait 1", "launch 3", "wait 2", "launch 4", "wait 3", "wait 4"]
    for i, image in enumerate(MANY):
        near = torch.nn.functional.cosine_similarity(
            torch.from_numpy(rows[i]), bb.extract_features(image).embedding[0], dim=0
        )
        assert near > 0.999
    events.clear()
    found = list(bb.iter_features(MANY, batch_size=4, num_workers=0))
    assert len(found) == 7 and [line.split()[0] for line in events] == ["launch", "launch", "wait", "wait"]


@pytest.mark.parametrize("out", [None, "x.npy", "x/"])
def test_a_lack_of_memory_lands_what_flies_first(
    out: str | None, events: list[str], device: Device, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Then it is tried again, and only alone is a pass made smaller; every row is there, in order."""
    bb = backbone()
    options: dict[str, Any] = dict(batch_size=4, num_workers=0)
    expected = bb.embed(MANY, **options)
    flying = lambda: sum(1 if line.startswith("launch") else -1 for line in events)  # noqa: E731

    def full() -> None:
        if flying() >= 1:
            raise torch.OutOfMemoryError("out of memory")

    device.before = full
    if out is None:
        found = bb.embed(MANY, **options)
    else:
        bb.embed(MANY, f"{tmp_path}/{out}", **options)
        found = np.concatenate([block for _, block in Store(f"{tmp_path}/{out}").blocks()])
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)  # as a store gives them
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.0 if out is None else 1e-6)
    assert not caplog.records and "wait 1" in events


@pytest.mark.parametrize(
    "pooling, kind, alone",
    [("cls", "embedding", True), ("mean", "embedding", False), ("cls_mean", "embedding", False)]
    + [("cls", "patches", False)],
)
def test_class_tokens_alone_where_nothing_else_is_wanted(
    pooling: Any, kind: Any, alone: bool, events: list[str], device: Device
) -> None:
    """And the same for all batches of an output."""
    seen: list[int] = []
    device.after = lambda outputs: (seen.extend(o.patch_tokens.shape[1] for o in outputs), outputs)[1]
    bb = backbone()
    bb.extract_features(MANY)  # the trial
    seen.clear()
    bb.embed(MANY, batch_size=2, num_workers=0, pooling=pooling, kind=kind)
    assert seen == [0 if alone else 16] * 4
    seen.clear()
    bb.extract_features(MANY)
    assert seen == [16]


# --- what is given to it -------------------------------------------------------------------------------------------


def test_images_go_over_as_uint8(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless they are padded or floats; a batch of both is floats.  Without a plan they are normalised over there."""
    seen: list[torch.dtype] = []
    launched = Extractor.launched

    def watched(self: Extractor, batches: Any, *rest: Any, **options: Any) -> Any:
        seen.extend(batch.pixels.dtype for batch in batches)
        return launched(self, batches, *rest, **options)

    monkeypatch.setattr(Extractor, "launched", watched)
    bb = backbone()
    light = torch.rand(3, 64, 64)
    features(bb)
    features(bb, light)
    features(bb, PICTURES[0], light)
    features(bb, photo(64, 32), fit="pad")
    assert seen == [torch.uint8, torch.float32, torch.float32, torch.float32]
    both = features(bb, PICTURES[0], light)
    torch.testing.assert_close(both[:1], features(bb, PICTURES[0]), rtol=0, atol=0.05)
    torch.testing.assert_close(both[1:], features(bb, light), rtol=0, atol=0.05)
    with monkeypatch.context() as patch:
        patch.setattr(Extractor, "on_gpu", False)
        expected = as_written(bb)
    assert torch.equal(as_written(bb), expected)
    assert bb.attention_maps(PICTURES[0], size=64).shape == (1, 4, 4, 4)
    assert bb.check_precision(PICTURES).cls_mean > 0.999
    assert bb.extract_features(PICTURES, layers=1, facet="key").layers[0].patch_tokens.dtype == torch.float32


def test_the_arithmetic_is_recorded(device: Device) -> None:
    """With the plan, since its vectors are not those of the model as it is written."""
    bb = backbone()
    assert bb.extractor.arithmetic == "float32, products in bfloat16, by a plan"
    bb.mode = "plain"
    assert bb.extractor.arithmetic == "float32, products in bfloat16"
    bb = backbone().to(torch.float16)
    bb.mode = "fast"
    assert bb.extractor.arithmetic == "float16, by a plan, mode fast"


# --- kernels that are compiled before a long run -------------------------------------------------------------------


@pytest.mark.parametrize("target", [None, "vectors.npy", "shards"])
def test_embed_compiles_before_its_first_pass(
    target: str | None, device: Device, events: list[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For its size, or for any; single calls do not."""
    bb, asked = backbone(), []
    monkeypatch.setattr(extractor_module, "warm", lambda model, request: asked.append((request.sizes, device.ran)))
    side = 4 * bb.patch_size
    out = None if target is None else tmp_path / target
    bb.embed(PICTURES, out)
    (sizes, _) = asked.pop()
    assert sizes == ((side, side),) and not asked
    bb.embed([photo(48, 64), photo(64, 48)], fit="native")
    assert [sizes for sizes, _ in asked] == [()]
    asked.clear()
    bb.extract_features(PICTURES)
    list(bb.iter_features(PICTURES))
    assert not asked


@pytest.mark.parametrize(
    ("half", "tables"), [(torch.bfloat16, torch.float16), (torch.float16, torch.float32), (None, torch.float32)]
)
def test_what_is_compiled(half: Any, tables: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forms of the model's heads; a failure is no error yet; nothing off CUDA or for another attention."""
    bb, asked = backbone(), []
    request = dispatch.Request(bb.extractor.samples, half, sizes=((32, 48),))
    monkeypatch.setattr(dispatch, "launch", lambda *given: asked.append(given))
    monkeypatch.setattr(dispatch, "why_not_triton", lambda *_: None)
    dispatch.warm(bb, request)
    assert not asked
    monkeypatch.setattr(Backbone, "device", property(lambda self: torch.device("cuda")))
    dispatch.warm(bb, request)
    ((name, like, heads, width, kind, count),) = asked
    assert (name, like.dtype, heads, width) == ("warm", half or torch.float32, bb.num_heads, bb.config.head_dim)
    assert kind == tables and count == bb.config.num_prefix + 6
    dispatch.warm(bb, request._replace(sizes=()))
    assert asked.pop()[-1] is None
    bb.set_attention("sdpa")
    dispatch.warm(bb, request)
    assert len(asked) == 1
    bb.set_attention("auto")

    def fails(*_: Any) -> None:
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(dispatch, "launch", fails)
    dispatch.warm(bb, request)
