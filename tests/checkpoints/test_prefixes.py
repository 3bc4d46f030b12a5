"""Additions to a backbone in timm: positions of every token, classifiers, norms of pooled vectors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import put, timm_named
from oracles import SMALL, hf_model, randomise, tokens, worst_token
from torch import nn

from dinov3_infer import Backbone, UnsupportedError

SAME = 1e-5
OWN: dict[str, Any] = dict(
    img_size=70,
    patch_size=14,
    embed_dim=64,
    depth=2,
    num_heads=4,
    init_values=1e-5,
    num_classes=0,
    dynamic_img_size=True,
)


def vit(**changes: Any) -> nn.Module:
    import timm

    return randomise(timm.create_model("vit_small_patch16_224", pretrained=False, **(OWN | changes)))


def folder(place: Path, model: nn.Module, **arguments: Any) -> Path:
    stated = {"architecture": "vit_own", "num_classes": 0, "model_args": {"num_heads": 4, **arguments}}
    return put(place, dict(model.state_dict()), stated)


@pytest.mark.peers
@pytest.mark.parametrize("live", [False, True], ids=["file", "live"])
@pytest.mark.parametrize("no_embed_class", [False, True])
@pytest.mark.parametrize("registers", [0, 1, 4, 5, 8])
def test_registers_may_have_positions(registers: int, no_embed_class: bool, live: bool, tmp_path: Path) -> None:
    """Register positions load on the table's grid and on other grids, where only patch positions are resized."""
    theirs = vit(reg_tokens=registers, no_embed_class=no_embed_class)
    path = folder(tmp_path, theirs, no_embed_class=no_embed_class)
    ours = Backbone.adopt(theirs) if live else Backbone.from_pretrained(path, device="cpu")
    assert (ours.config.num_registers, ours.config.position_grid) == (registers, 5)
    for side in (70, 98):
        pixels = torch.randn(2, 3, side, side)
        with torch.no_grad():
            assert worst_token(tokens(ours(pixels)), theirs.forward_features(pixels)) < SAME


def test_a_table_of_no_square_is_refused(tmp_path: Path) -> None:
    state = timm_named(hf_model(SMALL["dinov2_reg"]).state_dict(), SMALL["dinov2_reg"])
    state["pos_embed"] = torch.zeros(1, 31, 64)
    with pytest.raises(UnsupportedError, match="no square grid after 0 or 5 tokens"):
        Backbone.from_pretrained(put(tmp_path, state), num_heads=4, device="cpu")


@pytest.mark.peers
@pytest.mark.parametrize("live", [False, True], ids=["file", "live"])
@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_a_classifier_is_left_aside(name: str, live: bool, tmp_path: Path) -> None:
    import timm

    size: dict[str, Any] = {} if "dinov3" in name else dict(img_size=112)
    theirs = timm.create_model(name, pretrained=False, num_classes=7, depth=2, global_pool="token", **size)
    theirs = randomise(theirs)
    path = put(tmp_path, dict(theirs.state_dict()), {"architecture": name, "num_classes": 7})
    ours = Backbone.adopt(theirs) if live else Backbone.from_pretrained(path, device="cpu")
    pixels = torch.randn(2, 3, *((112, 112) if size else (64, 64)))
    with torch.no_grad():
        assert worst_token(tokens(ours(pixels)), theirs.forward_features(pixels)) < SAME
    assert ours.info is None  # the tag stays with a classifier, and the weights are no longer those of the tag


@pytest.mark.peers
def test_the_norm_of_what_is_pooled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Beside a norm of all tokens it belongs to the classifier; alone it is that norm, with a warning."""
    theirs = vit(global_pool="avg")
    ours = Backbone.from_pretrained(folder(tmp_path, theirs), device="cpu")
    pixels = torch.randn(2, 3, 70, 70)
    with torch.no_grad():
        expected = theirs.fc_norm(theirs.forward_features(pixels))
        assert worst_token(tokens(ours(pixels)), expected) < SAME
    assert "timm applies its norm after the mean" in caplog.text
    state = dict(theirs.state_dict())
    both = state | {name.replace("fc_", ""): tensor + 1 for name, tensor in state.items() if name.startswith("fc_norm")}
    config = {"architecture": "vit_own", "model_args": {"num_heads": 4}}
    ours = Backbone.from_pretrained(put(tmp_path / "both", both, config), device="cpu")
    assert torch.equal(ours.norm.weight, both["norm.weight"])
