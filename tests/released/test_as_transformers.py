"""Heads in transformers' layout: its classes load them, give the same numbers, and the way back is exact."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import randomise, relative
from pictures import photo
from PIL import Image
from torch import nn

from dinov3_infer import Backbone, CheckpointError, InputError, UnsupportedError
from dinov3_infer.released.attach import load_head
from dinov3_infer.released.catalogue import find_head
from dinov3_infer.released.depth import Depth
from dinov3_infer.released.head import Released
from dinov3_infer.released.imagenet import Classifier
from dinov3_infer.released.segments import Segments

pytestmark = pytest.mark.usefixtures("no_grad")


def made(kind: Any, name: str, variant: Any = None) -> Any:
    """A head with random numbers everywhere, on a backbone of such."""
    info = find_head(name, variant)
    head = kind(info, randomise(Backbone.from_config(info.backbone), 1))
    return randomise_head(head)


def randomise_head(head: Released) -> Released:
    generator = torch.Generator().manual_seed(2)
    for name, tensor in head.named_parameters():
        if not name.startswith("backbone."):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * max(1, tensor[0].numel()) ** -0.5)
    return head.eval()


def loaded(model: Any, folder: Path) -> nn.Module:
    """By transformers, which must not miss or leave over anything."""
    found, info = model.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return found.eval()  # type: ignore[no-any-return]


def assert_comes_back(head: Any, folder: Path, variant: Any) -> None:
    again = load_head(head.info.name, weights=folder, variant=variant, device="cpu")
    assert again.backbone.fingerprint() == head.backbone.fingerprint()
    for name, tensor in head.backbone.state_dict().items():
        assert torch.equal(tensor, again.backbone.state_dict()[name]), name
    for name, tensor in head.head_state().items():
        assert torch.equal(tensor, again.head_state()[name]), name
    assert again.names == head.names
    other = randomise(Backbone.from_config(head.info.backbone), 9)
    with pytest.raises(CheckpointError, match="goes with other weights of its backbone"):
        load_head(head.info.name, other, weights=folder, variant=variant)  # type: ignore[arg-type]


@pytest.mark.parametrize("registers", [False, True])
def test_classifiers(registers: bool, tmp_path: Path) -> None:
    import transformers as t

    name = f"dinov2_vits14{'_reg' if registers else ''}_lc"
    head = made(Classifier, name, 1)
    assert head.save_pretrained(tmp_path / "x") == tmp_path / "x"
    kind = t.Dinov2WithRegistersForImageClassification if registers else t.Dinov2ForImageClassification
    model = loaded(kind, tmp_path / "x")
    pixels = torch.randn(1, 3, 518, 518)
    assert relative(model(pixels).logits, head(pixels)) < 5e-6
    assert model.config.num_labels == 1000 and model.config.id2label[7] == head.names[7]  # type: ignore[union-attr]
    stated = json.loads((tmp_path / "x" / "preprocessor_config.json").read_text())
    processor = t.BitImageProcessorPil(**{k: v for k, v in stated.items() if k != "image_processor_type"})
    image = photo(300, 400)
    theirs = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    assert torch.allclose(theirs, head.preprocess.batch([image]).pixels, atol=1e-5)
    assert_comes_back(head, tmp_path / "x", 1)


def test_depth_of_dinov2(tmp_path: Path) -> None:
    """transformers has no 0.001, no clamp and no resizing."""
    import transformers as t

    head = made(Depth, "dinov2_vits14_dd", "KITTI")
    head.decoder.conv_depth.head[4].bias += 1
    head.save_pretrained(tmp_path / "x")
    model = loaded(t.DPTForDepthEstimation, tmp_path / "x")
    pixels = torch.randn(1, 3, 518, 518)
    assert relative(model(pixels).predicted_depth, head.core(pixels)[0][:, 0] - 0.001) < 5e-6
    assert_comes_back(head, tmp_path / "x", "KITTI")


def test_canopy_height(tmp_path: Path) -> None:
    """Of a smaller backbone, since the released one has 300 million parameters; periods that were rounded stay so."""
    t = pytest.importorskip("transformers")
    if not hasattr(t, "CHMv2ForDepthEstimation"):
        pytest.skip("this transformers has no CHMv2")
    info = find_head("dinov3_vitl16_chmv2")
    small = dict(channels=(8, 16, 24, 32), inner=16, hidden=8)
    options = info.options | dict(dpt=info.options["dpt"] | small, blocks=(0, 1, 2, 3), outputs=16)
    info = replace(info, backbone="nano", options=options)
    bb: Any = randomise(Backbone.from_config("nano"), 1)
    bb.rope_periods = bb.rope_periods.bfloat16().float()
    head: Any = randomise_head(Depth(info, bb))
    head.save_pretrained(tmp_path)
    model = loaded(t.CHMv2ForDepthEstimation, tmp_path)
    bb.rope_periods = Backbone.from_config("nano").rope_periods  # transformers has exact ones alone
    pixels = torch.randn(1, 3, 64, 96)
    assert relative(model(pixels).predicted_depth, head(pixels)[:, 0]) < 1e-5
    again = Depth(info, Backbone.from_pretrained(tmp_path, device="cpu"))
    from dinov3_infer.checkpoints.reading import open_checkpoint

    again.read(open_checkpoint(tmp_path))
    assert torch.equal(again.backbone.rope_periods, again.backbone.rope_periods.bfloat16().float())
    assert all(torch.equal(tensor, again.head_state()[name]) for name, tensor in head.head_state().items())


def test_what_transformers_has_not(tmp_path: Path) -> None:
    for kind, name, variant in (
        (Classifier, "dinov2_vits14_lc", 4), (Classifier, "dino_vits16_lc", None),
        (Depth, "dinov2_vits14_ld", ("NYU", 1)), (Segments, "dinov2_vits14_ade20k_linear", None),
    ):  # fmt: skip
        with pytest.raises(UnsupportedError, match=f"transformers has no class for this {name}; save"):
            made(kind, name, variant).save_pretrained(tmp_path / "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"transformers' layout is a folder, and '.*file' is a file"):
        made(Classifier, "dinov2_vits14_lc", 1).save_pretrained(tmp_path / "file")
    assert not (tmp_path / "x").exists()
