"""Weight changes that torch does not count: long calls detect them, short calls need `refresh`."""

import copy
from collections.abc import Callable

import pytest
import torch
from pictures import photo

from dinov3_infer import Backbone
from dinov3_infer.model.watch import checksums

pytestmark = pytest.mark.planned
IMAGE = photo(64, 64)


def _swap(model: Backbone) -> None:
    weight = model.blocks[1].attn.qkv.weight.detach().numpy()
    weight[[0, 64]] = weight[[64, 0]]


def _two_that_cancel(model: Backbone) -> None:
    weight = model.blocks[0].mlp.fc1.weight.detach().numpy()
    weight[3, 5], weight[40, 7] = weight[40, 7].copy(), weight[3, 5].copy()


EDITS: dict[str, Callable[[Backbone], object]] = {
    "head": lambda m: m.blocks[0].attn.qkv.weight.data[:64].zero_(),
    "register": lambda m: m.register_tokens.data[:, 0].zero_(),
    "part of the class token": lambda m: m.cls_token.data[..., :50].fill_(3.0),
    "rows by numpy": lambda m: m.blocks[0].mlp.fc1.weight.detach().numpy().__setitem__(slice(0, 100), 0),
    "one bias": lambda m: m.blocks[3].mlp.fc2.bias.data.__setitem__(0, 50.0),
    "one value": lambda m: m.blocks[2].mlp.fc1.weight.data.__setitem__((700, 3), 9.0),
    "scale": lambda m: m.blocks[1].ls2.gamma.data[1:3].mul_(2),
    "rows that change places": _swap,
    "values that change places": _two_that_cancel,
    "two equal values": lambda m: m.norm.bias.data[:2].fill_(0.5),
}


@pytest.fixture(scope="module")
def nano() -> Backbone:
    return Backbone.from_pretrained("nano", device="cpu")


@pytest.mark.parametrize("name", EDITS)
def test_any_change_shows_in_the_checksum(nano: Backbone, name: str) -> None:
    model = copy.deepcopy(nano)
    before = checksums(model)
    assert before == checksums(nano)
    EDITS[name](model)
    assert checksums(model) != before


def _plain(model: Backbone) -> torch.Tensor:
    with torch.no_grad():
        return model(model.preprocess.batch([IMAGE]).pixels).cls_token  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", EDITS)
def test_a_long_call_sees_a_change_and_a_short_one_after_refresh(nano: Backbone, name: str) -> None:
    model = copy.deepcopy(nano)
    count = 1 + torch.get_num_threads()  # images of 256 patches
    model.extract_features([IMAGE] * count)
    EDITS[name](model)
    assert torch.allclose(model.extract_features([IMAGE] * count).cls_token, _plain(model), atol=1e-4)
    model.extract_features(IMAGE, size=32)
    EDITS["head"](model)
    model.refresh()
    want = _plain(model)
    assert torch.allclose(model.extract_features(IMAGE).cls_token, want, atol=1e-4)


def test_a_changed_config_ends_the_plan(nano: Backbone) -> None:
    from dataclasses import replace

    model = Backbone.from_config("dinov2_vits14", seed=0)
    model.blocks = model.blocks[:1]
    before = model.extract_features(IMAGE, size=56).cls_token
    model.config = replace(model.config, position_resize="antialias")
    after = model.extract_features(IMAGE, size=56).cls_token
    model.refresh()
    assert not torch.equal(before, after) and torch.equal(model.extract_features(IMAGE, size=56).cls_token, after)
