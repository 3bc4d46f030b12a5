"""The table "Compared with" of the README is true of the transformers and the timm that are installed.

Its row on inputs was read in their sources; its column on Meta's repository is from its code at 6876159.
"""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT
from safetensors.torch import load_file, save_file

from dinov3_infer import Backbone

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("no_grad")]

UNEVEN = torch.rand(1, 3, 250, 333)  # 15 x 20 whole patches of 16
TIMM = "vit_small_patch16_dinov3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT-S with random weights in each layout."""
    found, model = tmp_path_factory.mktemp("comparison"), Backbone.from_config("dinov3_vits16", seed=0)
    for layout in ("hf", "timm"):
        model.save_pretrained(found / layout, layout=layout)  # type: ignore[arg-type]
    model.save_pretrained(found / "meta.pth", layout="meta")
    return found


def timm_model(**options: Any) -> Any:
    import timm

    return timm.create_model(TIMM, **options).eval()


def hf_model(folder: Path, **options: Any) -> Any:
    import transformers

    return transformers.AutoModel.from_pretrained(folder, **options).eval()


def row(name: str) -> list[str]:
    """The cells of a row: ours, transformers, timm, Meta."""
    found = re.search(rf"^\| {name} \|(.*)\|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None, name
    return [cell.strip() for cell in found[1].split(" | ")]


def test_versions_are_named() -> None:
    import timm
    import transformers

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"transformers {transformers.__version__.rpartition('.')[0]}, timm {timm.__version__}, and Meta" in text


def test_checkpoints(folder: Path) -> None:
    assert row("loads checkpoints of")[1:3] == ["Hugging Face, timm", "timm, Meta"]
    assert type(hf_model(folder / "timm")).__name__ == "TimmWrapperModel"
    with pytest.raises((OSError, ValueError)):
        hf_model(folder / "meta.pth")
    timm_model(pretrained=True, pretrained_cfg_overlay=dict(file=str(folder / "meta.pth")))
    with pytest.raises(RuntimeError):
        timm_model(pretrained=True, pretrained_cfg_overlay=dict(file=str(folder / "hf" / "model.safetensors")))


def test_sides_that_are_not_whole_patches(folder: Path) -> None:
    cells = row("a side that is not whole patches")
    assert cells[1:3] == ["cut off silently", "error, or `dynamic_img_pad=True` pads"]
    assert hf_model(folder / "hf")(UNEVEN).last_hidden_state.shape[1] == 5 + 15 * 20
    with pytest.raises(AssertionError, match="divisible"):
        timm_model()(UNEVEN)
    assert timm_model(dynamic_img_pad=True).forward_features(UNEVEN).shape[1] == 5 + 16 * 21


def test_default_vectors(folder: Path) -> None:
    assert row("default vector") == ["class token", "class token", "mean of patches", "class token"]
    pixels = torch.rand(1, 3, 64, 64)
    theirs = hf_model(folder / "hf")(pixels)
    assert torch.equal(theirs.pooler_output, theirs.last_hidden_state[:, 0])
    model = timm_model()
    torch.testing.assert_close(model(pixels), model.forward_features(pixels)[:, 5:].mean(dim=1), rtol=1e-4, atol=1e-5)


def test_images_of_several_sizes() -> None:
    assert row("images of several sizes")[2] == "one size per batch, or padded (`NaFlexVit`)"
    model = timm_model(use_naflex=True)
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).reshape(1, 16, 2)
    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[1, 8:] = False  # a smaller image
    batch = {"patches": torch.rand(2, 16, 768), "patch_coord": places.repeat(2, 1, 1), "patch_valid": valid}
    assert model(batch).shape == (2, 384)


def test_attention_weights(folder: Path) -> None:
    import timm
    from timm.utils import AttentionExtract

    assert row("attention weights")[1:3] == ["whole matrix, eager only", "whole matrix, `AttentionExtract`"]
    pixels = torch.rand(1, 3, 64, 64)
    found = {
        name: hf_model(folder / "hf", attn_implementation=name)(pixels, output_attentions=True).attentions
        for name in ("eager", "sdpa")
    }
    assert found["eager"][0].shape == (1, 6, 21, 21) and not found["sdpa"]
    timm.layers.set_fused_attn(False)
    try:
        maps = AttentionExtract(timm_model(), method="fx")(pixels)
    finally:
        timm.layers.set_fused_attn(True)
    assert maps["blocks.0.attn.softmax"].shape == (1, 6, 21, 21)


def test_half_precision(folder: Path) -> None:
    assert set(row("half precision")[1:]) == {"all in the dtype of the weights"}
    streams: dict[str, torch.dtype] = {}

    def note(name: str) -> Any:
        return lambda _, given: streams.update({name: given[0].dtype})

    pixels = torch.rand(1, 3, 64, 64).bfloat16()
    theirs, timms = hf_model(folder / "hf", dtype=torch.bfloat16), timm_model().bfloat16()
    theirs.get_submodule("model.layer.1").register_forward_pre_hook(note("transformers"))
    timms.blocks[1].register_forward_pre_hook(note("timm"))
    theirs(pixels), timms(pixels)
    ours = Backbone.from_pretrained(folder / "hf", device="cpu", dtype=torch.bfloat16)
    ours.blocks[1].register_forward_pre_hook(note("ours"))
    ours(torch.rand(1, 3, 64, 64))
    assert streams == {"transformers": torch.bfloat16, "timm": torch.bfloat16, "ours": torch.float32}


def test_missing_and_unexpected_tensors(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert row("a missing or unexpected tensor")[1:3] == ["warning", "error"]
    for layout in ("hf", "timm"):
        tensors = load_file(folder / layout / "model.safetensors")
        del tensors[next(name for name in tensors if "mlp" in name)]
        tensors["extra"] = torch.zeros(2)
        (tmp_path / layout).mkdir()
        (tmp_path / layout / "config.json").write_bytes((folder / layout / "config.json").read_bytes())
        save_file(tensors, tmp_path / layout / "model.safetensors", {"format": "pt"})
    log = logging.getLogger("transformers")
    log.addHandler(caplog.handler)
    try:
        hf_model(tmp_path / "hf")
    finally:
        log.removeHandler(caplog.handler)
    assert "MISSING" in caplog.text and "UNEXPECTED" in caplog.text
    with pytest.raises(RuntimeError, match="Missing key"):
        timm_model(checkpoint_path=str(tmp_path / "timm" / "model.safetensors"))
