"""The depth heads: recorded numbers of Meta's code, transformers' models, and the way back to the image."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fill import filled, noise
from oracles import randomise, relative
from pictures import photo

from dinov3_infer import Backbone, CheckpointError, InputError
from dinov3_infer.released.attach import load_head
from dinov3_infer.released.catalogue import find_head
from dinov3_infer.released.depth import Depth, DptDecoder, LinearDecoder, _metres, bins_of

pytestmark = pytest.mark.usefixtures("no_grad")

_PLAIN: dict[str, Any] = dict(inner=16, norm=False, unit_bias=False, project=True, readout=True)
CASES: dict[str, Any] = {  # decoder, seed, width; sum, sum of absolute values and first values of what it gives
    "synthmix": (
        _PLAIN | dict(channels=(8,) * 4, hidden=4, outputs=16, readout=False, norm=True),
        21, 12, (-6327.7279328, 24341.016492, -0.066534, -0.2043336, -0.2012051),
    ),
    "chmv2": (
        _PLAIN | dict(channels=(4, 8, 12, 16), hidden=6, outputs=16, unit_bias=True, project=False),
        22, 12, (2191.6833171, 34770.2310828, -0.1435706, -0.0431588, -0.0116591),
    ),
    "dinov2": (_PLAIN | dict(channels=(2, 4, 8, 16), hidden=32, outputs=1), 23, 16, None),
}  # fmt: skip


def features(width: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [noise(20 + i, 1, width, 3, 4) for i in range(4)], [noise(30 + i, 1, width) for i in range(4)]


def decoded(name: str) -> torch.Tensor:
    options, seed, width, _ = CASES[name]
    decoder = filled(DptDecoder(width, **options).double(), seed)
    if name == "dinov2":
        decoder.conv_depth.head[4].bias += 1  # type: ignore[union-attr, index, operator]
    return decoder(*features(width))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["synthmix", "chmv2"])
def test_logits_are_metas(name: str) -> None:
    total, size, *first = CASES[name][3]
    found = decoded(name)
    assert found.shape == (1, 16, 64, 64)
    assert float(found.sum()) == pytest.approx(total, abs=1e-6) and float(found.abs().sum()) == pytest.approx(
        size, abs=1e-5
    )
    assert found.flatten()[:3].tolist() == pytest.approx(first, abs=1e-7)


def test_depths_are_metas() -> None:
    """Of bins on a line, of bins that go from a logarithm to a line, and of one output."""
    depth = _metres(decoded("synthmix"), bins_of("linear", 16, 0.001, 100.0), 0.1)
    assert float(depth.sum()) == pytest.approx(176413.8833441, rel=1e-7)
    assert depth.flatten()[:3].tolist() == pytest.approx([50.3971347, 50.7160612, 52.7415935], rel=1e-6)
    depth = _metres(decoded("chmv2"), bins_of("mixlog", 16, 0.001, 96.0), 1e-8)
    assert float(depth.sum()) == pytest.approx(118111.86864, rel=1e-6)
    assert depth.flatten()[:3].tolist() == pytest.approx([41.20201, 35.93237, 35.35158], rel=1e-6)
    depth = _metres(decoded("dinov2"), None, 0.001)
    assert float(depth.sum()) == pytest.approx(4262.8745413, rel=1e-9)
    resized = F.interpolate(depth.clamp(0.001, 10), size=(37, 51), mode="bilinear", align_corners=False)
    assert float(resized.sum()) == pytest.approx(1963.9104344, rel=1e-9)
    assert resized.flatten()[:2].tolist() == pytest.approx([1.0107693, 1.0739074], abs=1e-7)


def test_bins_of_canopy_height() -> None:
    bins = bins_of("mixlog", 256, 0.001, 96.0) / 8
    some = bins[[0, 1, 2, 64, 128, 192, 254, 255]].tolist()
    assert some == pytest.approx([0.001, 0.001222, 0.001814, 0.763994, 3.079397, 7.094426, 11.951427, 12], abs=2e-6)
    assert float(bins.double().sum()) == pytest.approx(1060.70215, abs=1e-3)
    nothing = _metres(-torch.ones(1, 256, 1, 1), 8 * bins, 1e-8)
    assert float(nothing) == pytest.approx(33.147, abs=1e-3)


@pytest.mark.parametrize(
    ("maps", "total", "first", "most", "depth", "first_depth"),
    [
        ([3], 99.3943244, 0.1512939, 10.0, 893.3064974, 6.4182469),
        ([3], 99.3943244, 0.1512939, 80.0, 7145.7331572, 51.3434668),
        ([0, 1, 2, 3], 422.6193337, -0.6805497, 10.0, 948.0861824, 6.1063146),
    ],
)
def test_the_linear_heads_are_metas(
    maps: list[int], total: float, first: float, most: float, depth: float, first_depth: float
) -> None:
    decoder = filled(LinearDecoder(16, len(maps), 16).double(), 24)
    every, cls_tokens = features(16)
    logits = decoder([every[i] for i in maps], [cls_tokens[i] for i in maps])
    assert logits.shape == (1, 16, 12, 16) and float(logits.sum()) == pytest.approx(total, abs=1e-6)
    assert float(logits.flatten()[0]) == pytest.approx(first, abs=1e-7)
    found = _metres(logits, bins_of("linear", 16, 0.001, most), 0.1)
    assert float(found.sum()) == pytest.approx(depth, rel=1e-7)
    assert float(found.flatten()[0]) == pytest.approx(first_depth, rel=1e-6)


PARAMETERS = {
    "dinov2_vits14_dd": 13_961_377, "dinov2_vitb14_dd": 24_193_921, "dinov2_vitl14_dd": 34_190_017,
    "dinov2_vitg14_dd": 61_800_769, "dinov3_vit7b16_dd": 230_687_776, "dinov3_vitl16_chmv2": 33_747_200,
    ("dinov2_vits14_ld", 1): 196_864, ("dinov2_vits14_ld", 4): 786_688, ("dinov2_vitg14_ld", 4): 3_145_984,
    ("dinov2_vitl14_ld", 1): 524_544,
}  # fmt: skip


@pytest.mark.parametrize("key", PARAMETERS)
def test_parameters_are_those_that_were_published(key: Any) -> None:
    name, variant = (key, None) if isinstance(key, str) else (key[0], ("NYU", key[1]))
    info = find_head(name, variant)
    with torch.device("meta"):
        head = Depth(info, Backbone.from_config(info.backbone))
        assert sum(p.numel() for p in head.decoder.parameters()) == PARAMETERS[key]
    assert len(head.head_state()) == {"_dd": 56, "mv2": 68, "_ld": 2}[name[-3:]] + (12 if "7b" in name else 0)


@pytest.fixture(scope="module")
def small() -> Backbone:
    return randomise(Backbone.from_config("dinov2_vits14"), 1)  # type: ignore[return-value]


def saved(info: Any, bb: Backbone, path: Path, prefix: str = "decode_head.") -> Depth:
    """A random head as a file like Meta's, with what a training run leaves beside it."""
    head = Depth(info, bb)
    randomise(head.decoder, 4)
    state = {prefix + name: tensor for name, tensor in head.head_state().items()}
    torch.save({"meta": {"epoch": 3}, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}, path)
    return head


@pytest.mark.parametrize("dataset", ["NYU", "KITTI"])
def test_metas_call_and_ours(dataset: str, small: Backbone, tmp_path: Path) -> None:
    """Theirs is stretched over the padding; ours lies on the pixels of the image, in the range of its data."""
    info = find_head("dinov2_vits14_dd", dataset)
    made = saved(info, small, tmp_path / "head.pth")
    head = load_head(info.name, small, weights=tmp_path / "head.pth", variant=dataset)
    pixels = torch.randn(1, 3, 60, 90)
    padded = F.pad(pixels, (4, 4, 5, 5))
    found = small.get_intermediate_layers(padded, [2, 5, 8, 11], True, True, norm=False)  # type: ignore[operator]
    core = made.decoder([f[0] for f in found], [f[1] for f in found]).relu() + 0.001
    assert core.shape == (1, 1, 96, 128)
    most = 10.0 if dataset == "NYU" else 80.0
    theirs = F.interpolate(core.clamp(0.001, most), size=(60, 90), mode="bilinear", align_corners=False)
    assert relative(head(pixels), theirs) < 1e-6
    image = photo(60, 90)
    (ours,) = head.predict(image)
    normal = head.preprocess.batch([image]).pixels
    assert normal.shape == (1, 3, 60, 90)
    core, _ = head.core(normal)
    expected = F.interpolate(core, size=(70, 98), mode="bilinear", align_corners=False)[0, 0, 5:65, 4:94]
    assert ours.depth.shape == (60, 90) and relative(ours.depth, expected.clamp(0.001, most)) < 1e-6
    assert head.predict([photo(40, 200), photo(33, 31)], size=56)[0].depth.shape == (40, 200)


def test_nyu_of_the_linear_head_is_in_metres(small: Backbone, tmp_path: Path) -> None:
    """Meta's entry takes bins up to 80 m, which is eight times too far; ours up to 10."""
    info = find_head("dinov2_vits14_ld", ("NYU", 1))
    saved(info, small, tmp_path / "head.pth")
    head = load_head(info.name, small, weights=tmp_path / "head.pth", variant=("NYU", 1))
    pixels = torch.randn(1, 3, 56, 56)
    theirs, (ours, _) = head(pixels), head.core(pixels)
    assert ours.max() <= 10 < theirs.max() <= 80
    assert relative(F.interpolate(ours, size=(56, 56), mode="bilinear") * 8, theirs) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)])
def test_dpt_of_transformers(dtype: torch.dtype, small: Backbone, tmp_path: Path) -> None:
    """Backbone and head in one folder; there is no 0.001 in it, no clamp and no resizing."""
    import transformers as t

    backbone = t.Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, out_indices=[3, 6, 9, 12],
        apply_layernorm=False, reshape_hidden_states=False,
    )  # fmt: skip
    config = t.DPTConfig(
        backbone_config=backbone, neck_hidden_sizes=[48, 96, 192, 384], fusion_hidden_size=256, add_projection=True,
        use_bias_in_fusion_residual=False, reassemble_factors=[4, 2, 1, 0.5], readout_type="project",
        num_relative_features=32, is_hybrid=False, use_batch_norm_in_fusion_residual=False,
    )  # fmt: skip
    model = randomise(t.DPTForDepthEstimation(config), 2)
    with torch.no_grad():
        model.head.head[4].bias += 1  # type: ignore[union-attr, index, operator]
    model.save_pretrained(tmp_path)
    head = load_head("dinov2_vits14_dd", weights=tmp_path, device="cpu").to(dtype)
    pixels = torch.randn(1, 3, 518, 518, dtype=dtype)
    expected = model.to(dtype)(pixels).predicted_depth
    assert relative(head.core(pixels)[0][:, 0] - 0.001, expected) < (1e-9 if dtype == torch.float64 else 5e-6)


def test_canopy_height_of_transformers(tmp_path: Path) -> None:
    """The head alone, on the same features."""
    t = pytest.importorskip("transformers")
    if not hasattr(t, "CHMv2ForDepthEstimation"):
        pytest.skip("this transformers has no CHMv2")
    backbone = t.DINOv3ViTConfig(
        hidden_size=64, num_attention_heads=2, num_hidden_layers=4, intermediate_size=128, num_register_tokens=4,
        out_indices=[1, 2, 3, 4], apply_layernorm=True, reshape_hidden_states=True, layer_norm_eps=1e-5, key_bias=False,
        return_class_token=True,
    )  # fmt: skip
    config = t.CHMv2Config(
        backbone_config=backbone, post_process_channels=[8, 16, 24, 32], fusion_hidden_size=16, head_hidden_size=8,
        number_output_channels=16,
    )  # fmt: skip
    model = randomise(t.CHMv2ForDepthEstimation(config), 3).double()
    model.save_pretrained(tmp_path)
    decoder = DptDecoder(
        64, (8, 16, 24, 32), 16, 8, 16, readout=True, norm=False, unit_bias=True, project=False
    ).double()  # fmt: skip
    from dinov3_infer.checkpoints.reading import open_checkpoint

    names, strange = Depth.names_in(checkpoint := open_checkpoint(tmp_path))
    assert not strange
    decoder.load_state_dict({ours: checkpoint.tensors.read(theirs) for ours, theirs in names.items()})
    pixels = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    found = model.backbone(pixels)  # type: ignore[operator]
    logits = decoder(found.feature_maps, found.cls_tokens)
    depth = _metres(logits, bins_of("mixlog", 16, 0.001, 96.0), 1e-8)
    assert relative(depth[:, 0], model(pixels).predicted_depth) < 1e-6  # its bins are float32


def test_wrong_files(small: Backbone, tmp_path: Path) -> None:
    """A classifier's, one of another size, one that lacks a tensor, and a backbone with registers."""
    torch.save({"weight": torch.zeros(3, 3)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"56 missing: .*1 left over: weight; is it that head's file"):
        load_head("dinov2_vits14_dd", small, weights=tmp_path / "a.pth")
    info = find_head("dinov2_vits14_dd")
    head = saved(info, small, tmp_path / "b.pth")
    state = torch.load(tmp_path / "b.pth", weights_only=True)["state_dict"]
    state.pop("decode_head.convs.2.conv.weight")
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match=r"1 missing: convs.2.conv.weight"):
        load_head("dinov2_vits14_dd", small, weights=tmp_path / "b.pth")
    again = load_head("dinov2_vits14_dd", small, weights=head.save(tmp_path / "c.safetensors"))
    assert all(torch.equal(t, again.head_state()[n]) for n, t in head.head_state().items())
    for size in (0, -5, "56", 1.5, (1, 2, 3)):
        with pytest.raises(InputError, match="size is a number of pixels or"):
            again.predict(photo(30, 30), size)
    with pytest.raises(InputError, match="dinov2_vits14_dd goes on dinov2_vits14, and this backbone looks like"):
        load_head("dinov2_vits14_dd", Backbone.from_config("dinov2_vits14_reg"), weights=tmp_path / "b.pth")
    with pytest.raises(InputError, match=r"was released for 'NYU' or 'KITTI', not for 'nyu'"):
        find_head("dinov2_vits14_dd", "nyu")
