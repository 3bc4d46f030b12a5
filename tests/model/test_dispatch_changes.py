"""The fast path on a CPU follows the model: whatever changes it, hooks into it or moves it is in the next features."""

import copy
import gc
import logging
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from machine import WHY_NOT
from oracles import randomise
from test_dispatch import PICTURES, backbone, features, plain, planned
from torch import Tensor, nn

import dinov3_infer.model.dispatch
from dinov3_infer import Backbone
from dinov3_infer.backbone import ViTBackbone
from dinov3_infer.model.dispatch import _PLANS

pytestmark = pytest.mark.skipif(WHY_NOT["exact"] is not None, reason=f"no plan here: {WHY_NOT['exact']}")


def _in_place(bb: Backbone) -> None:
    with torch.no_grad():
        bb.blocks[1].attn.proj.weight[0] += 1.0  # one row, which a sample may miss


def _data(bb: Backbone) -> None:
    bb.blocks[0].mlp.fc1.weight.data.mul_(-1.0)  # no version tells of this


def _replaced(bb: Backbone) -> None:
    bb.blocks[0].ls1.gamma = nn.Parameter(torch.full((64,), 0.5))


def _data_replaced(bb: Backbone) -> None:
    for _ in range(2):  # the second may get the memory of the first
        bb.blocks[0].attn.qkv.weight.data = torch.randn_like(bb.blocks[0].attn.qkv.weight) / 8


def _loaded(bb: Backbone) -> None:
    bb.load_state_dict(randomise(Backbone.from_config(bb.config), seed=1).state_dict())


def _assigned(bb: Backbone) -> None:
    bb.load_state_dict(randomise(Backbone.from_config(bb.config), seed=2).state_dict(), assign=True)


def _periods(bb: Backbone) -> None:
    bb.rope_periods.mul_(2.0)


def _token(bb: Backbone) -> None:
    bb.register_tokens.data.zero_()


def _block(bb: Backbone) -> None:
    bb.blocks[0] = copy.deepcopy(bb.blocks[1])


def _epsilon(bb: Backbone) -> None:
    for block in bb.blocks:
        block.norm1.eps = 0.5


CHANGES = [
    _in_place, _data, _replaced, _data_replaced, _loaded, _assigned, _periods, _token, _block, _epsilon,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__[1:])
def test_changed_parameters_are_seen(change: Callable[[Backbone], None]) -> None:
    """Whatever way they change, the next features are theirs."""
    bb = backbone()
    before = features(bb, PICTURES[0])
    change(bb)
    expected = plain(bb, PICTURES[0])
    assert (before - expected).abs().max() > 1e-2
    torch.testing.assert_close(features(bb, PICTURES[0]), expected, rtol=0, atol=1e-5)


def test_refresh_is_for_writes_that_nothing_shows() -> None:
    """To one number that no sample has; the next features come from what is there."""
    bb = backbone()
    before = features(bb, PICTURES[0])
    bb.blocks[0].mlp.fc1.weight.data[0] += 100.0
    bb.refresh()
    assert bb not in _PLANS
    expected = plain(bb, PICTURES[0])
    assert (before - expected).abs().max() > 1e-2
    torch.testing.assert_close(features(bb, PICTURES[0]), expected, rtol=0, atol=1e-5)


def test_the_reason_for_having_no_plan_is_told() -> None:
    """None where there is one; else a sentence that names what is in its way."""
    bb = backbone()
    assert bb.why_not_plan() is None and bb in _PLANS
    bb.mode = "plain"
    assert "mode='plain'" in str(bb.why_not_plan())
    bb.mode = "exact"
    _hook(bb)
    assert bb.why_not_plan() == "'blocks.0.mlp' has a hook"
    for change, said in [(_adapter, "Adapter"), (_patched, "forward"), (_attention, "attn_implementation")]:
        bb = backbone()
        change(bb)
        assert said in str(bb.why_not_plan())
    assert "torch.bfloat16" in str(backbone().to(torch.bfloat16).why_not_plan())
    assert "'meta'" in str(backbone().to("meta").why_not_plan())


class Adapter(nn.Module):
    """As peft's: beside the layer that it wraps."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.weight = base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.1 * x.sum(-1, keepdim=True)


def _adapter(bb: Backbone) -> None:
    bb.blocks[0].attn.qkv = Adapter(bb.blocks[0].attn.qkv)


def _hook(bb: Backbone) -> None:
    bb.blocks[0].mlp.register_forward_hook(lambda module, args, out: out * 2)


def _pre_hook(bb: Backbone) -> None:
    bb.blocks[1].mlp.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def _patched(bb: Backbone) -> None:
    mlp = bb.blocks[1].mlp
    mlp.forward = lambda x: x * 0.5


def _parametrised(bb: Backbone) -> None:
    torch.nn.utils.parametrizations.weight_norm(bb.blocks[0].mlp.fc1)
    bb.blocks[0].mlp.fc1.parametrizations.weight.original0.data.mul_(2)


def _attention(bb: Backbone) -> None:
    bb.set_attention(lambda qkv, *args, **options: qkv[..., 2, :, :].flatten(-2))


@pytest.mark.parametrize(
    "change", [_adapter, _hook, _pre_hook, _patched, _parametrised, _attention], ids=lambda f: f.__name__[1:]
)
def test_other_modules_run_as_they_are_written(change: Callable[[Backbone], None]) -> None:
    """An adapter, a hook, a method of one's own: the plan leaves, and they take part."""
    bb = backbone()
    before = features(bb, PICTURES[0])
    assert bb in _PLANS
    change(bb)
    found = features(bb, PICTURES[0])
    assert bb not in _PLANS
    assert torch.equal(found, plain(bb, PICTURES[0]))
    assert (found - before).abs().max() > 1e-2


def test_only_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with gradients, not while compiling, not for other dtypes, not for a subclass with a forward of its own."""
    bb = backbone()
    assert planned(bb) is not None
    assert bb.extractor.plan() is None  # gradients are on
    with torch.no_grad():
        assert replace(bb.extractor, mode="plain").plan() is None
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert planned(bb) is None
    assert planned(backbone().to(torch.bfloat16)) is None
    bb.__class__ = type("Mine", (ViTBackbone,), {"forward": lambda self, *a, **k: ViTBackbone.forward(self, *a, **k)})
    assert planned(bb) is None


@contextmanager
def _every_hook(bb: Backbone) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: out * 2 if m is bb.norm else None)
    yield
    handle.remove()


@contextmanager
def _sparse(bb: Backbone) -> Iterator[None]:
    layer = bb.blocks[0].mlp.fc1
    layer.weight = nn.Parameter(2 * layer.weight.detach().to_sparse_coo(), requires_grad=False)
    try:
        layer(torch.zeros(1, 2, layer.in_features))
    except RuntimeError as error:  # as torch 2.8
        pytest.skip(f"this torch has no product with it: {error}")
    yield


@contextmanager
def _subclass(bb: Backbone) -> Iterator[None]:
    """As of a quantised weight: what it holds is not what a product with it gives."""

    class Doubled(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            with torch._C.DisableTorchFunctionSubclass():
                found = function(*args, **(kwargs or {}))
            return 2 * found if function is torch.nn.functional.linear else found

    layer = bb.blocks[0].mlp.fc1
    weight = layer.weight.detach().as_subclass(Doubled)
    del layer._parameters["weight"]
    layer._parameters["weight"] = weight
    yield


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("change", [_every_hook, _sparse, _subclass], ids=lambda f: f.__name__[1:])
def test_what_modules_and_tensors_do_not_show(change: Any) -> None:
    """Hooks of all modules, weights that are no plain tensors: the model runs as it is written."""
    bb = backbone()
    before = features(bb, PICTURES[0])
    with change(bb):
        found, expected = features(bb, PICTURES[0]), plain(bb, PICTURES[0])
    assert bb not in _PLANS and torch.equal(found, expected)
    assert (found - before).abs().max() > 1e-2


def test_a_mode_that_cannot_be_had_is_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each model; the exact mode says nothing, for its numbers are the same."""
    for mode in ("exact", "fast"):
        bb = backbone(mode=mode)
        _hook(bb)
        features(bb, PICTURES[0]), features(bb, PICTURES[1])
    monkeypatch.setattr(dinov3_infer.model.dispatch, "why_not_packed", lambda *_: "no oneDNN")
    features(backbone(mode="int8"), PICTURES[0])
    hooked, off = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    rest = "the model runs without a plan"
    assert hooked == f"mode='fast' is not available here: 'blocks.0.mlp' has a hook; {rest}"
    assert off == f"mode='int8' is not available here: no oneDNN; {rest}"


def test_nan_in_what_is_not_needed_makes_no_new_plan() -> None:
    bb = backbone()
    with torch.no_grad():
        bb.mask_token.fill_(float("nan"))
    assert planned(bb) is planned(bb) is not None


def test_it_is_no_part_of_the_model() -> None:
    """Nothing of it in state, copies or pickles; `.to`, training and the end of the model end it."""
    bb = backbone()
    names = set(bb.state_dict())
    first = features(bb, PICTURES[0])
    assert set(bb.state_dict()) == names and bb in _PLANS
    twin, stored = copy.deepcopy(bb), pickle.loads(pickle.dumps(bb))  # noqa: S301
    assert twin not in _PLANS and stored not in _PLANS
    assert torch.equal(features(twin, PICTURES[0]), first) and torch.equal(features(stored, PICTURES[0]), first)
    bb.train()
    assert bb not in _PLANS
    assert torch.equal(features(bb, PICTURES[0]), first)
    bb.eval().double()
    assert bb not in _PLANS
    kept = weakref.ref(twin)
    del twin
    gc.collect()
    assert kept() is None


def test_with_gradients_the_module_is_plain() -> None:
    """`bb(...)` has gradients and its own numbers, plan or not."""
    bb = backbone()
    pixels = torch.randn(1, 3, 32, 32)
    before = bb(pixels).cls_token
    features(bb, PICTURES[0])
    after = bb(pixels).cls_token
    assert torch.equal(before, after) and after.requires_grad
