"""ConvNeXt at full width compared with transformers and timm, loaded from files in every layout."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fill import filled
from oracles import relative
from safetensors.torch import load_file
from torch import Tensor, nn

from dinov3_infer import Backbone, ConvNeXtConfig, zoo
from dinov3_infer.checkpoints.layouts import LayoutName

pytestmark = pytest.mark.usefixtures("no_grad")

LARGER = [pytest.param(f"dinov3_convnext_{size}", marks=pytest.mark.slow) for size in ("small", "base", "large")]
SIZES = ["dinov3_convnext_tiny", *LARGER]
LIMITS = {torch.float64: 1e-9, torch.float32: 5e-6}
GRIDS = [(64, 96), (70, 100), (224, 224)]  # pixels


@pytest.fixture(scope="module", params=SIZES)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Backbone, Path]]:
    """A model of the table with all tensors changed from their initial values, and its files in every layout."""
    folder = tmp_path_factory.mktemp(request.param)
    bb = Backbone.from_config(request.param)
    filled(bb, 5)
    for layout, name in (("hf", "hf"), ("timm", "timm"), ("meta", "meta.pth")):
        bb.save_pretrained(folder / name, layout)  # type: ignore[arg-type]
    yield bb, folder
    del bb
    gc.collect()


def of_transformers(folder: Path) -> nn.Module:
    import transformers

    model, info = transformers.DINOv3ConvNextModel.from_pretrained(folder / "hf", output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()  # type: ignore[no-any-return]


def of_timm(folder: Path) -> nn.Module:
    from dinov3_infer.cli.bench.contestants import timm_model

    return timm_model(folder / "timm", torch.device("cpu"))  # type: ignore[no-any-return]


def tokens(output: Any) -> Tensor:
    """Class token and patches, [B, 1 + P, C]."""
    if hasattr(output, "last_hidden_state"):
        return output.last_hidden_state  # type: ignore[no-any-return]
    if isinstance(output, dict):
        return torch.cat((output["cls_token"][:, None], output["patch_tokens"]), dim=1)
    return torch.cat((output.cls_token[:, None], output.patch_tokens), dim=1)


PEERS = [of_transformers, pytest.param(of_timm, marks=pytest.mark.peers)]


@pytest.mark.parametrize("peer", PEERS)
def test_tokens_are_those_of(written: tuple[Backbone, Path], peer: Callable[[Path], nn.Module]) -> None:
    """Class token (the pooled output of the other library) and patches agree, in both precisions, at odd sizes too."""
    bb, folder = written
    for dtype, limit in LIMITS.items():
        ours, theirs = Backbone.from_pretrained(folder / "meta.pth", dtype=dtype, device="cpu"), peer(folder).to(dtype)
        for size in GRIDS if bb.embed_dim == 768 else GRIDS[:2]:
            pixels = torch.randn(2, 3, *size, dtype=dtype)
            found, expected = tokens(ours(pixels)), tokens(theirs(pixels))
            assert found.shape == expected.shape == (2, 1 + size[0] // 32 * (size[1] // 32), bb.embed_dim)
            assert relative(found[:, 0], expected[:, 0]) <= limit, size
            assert relative(found, expected) <= limit, size


def test_stages_are_those_of_transformers(written: tuple[Backbone, Path]) -> None:
    """The raw maps of the stages equal transformers' hidden states."""
    bb, folder = written
    pixels = torch.randn(1, 3, 70, 100, dtype=torch.float64)
    states = of_transformers(folder).double()(pixels, output_hidden_states=True).hidden_states
    ours = Backbone.from_pretrained(folder / "hf", dtype=torch.float64, device="cpu")
    for layer, state in zip(ours(pixels, layers=[0, 1, 2]).layers, states[1:4], strict=True):
        assert relative(layer.patch_tokens.mT.unflatten(2, state.shape[2:]), state) <= 1e-9
    last, _ = ours.forward_intermediates(pixels)  # type: ignore[operator]
    assert relative(last, states[4]) <= 1e-9


@pytest.mark.parametrize("layout", ["hf", "timm", "meta.pth"])
def test_every_layout_comes_back_bit_for_bit(written: tuple[Backbone, Path], layout: str) -> None:
    """The fingerprint is the same for every file."""
    bb, folder = written
    back = Backbone.from_pretrained(folder / layout, device="cpu")
    assert back.config == bb.config and back.preprocess == bb.preprocess
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in bb.state_dict().items())
    assert len(back.state_dict()) == len(bb.state_dict()) and back.fingerprint() == bb.fingerprint()


# --- files of others -------------------------------------------------------------------------------------------------

SMALL = ConvNeXtConfig((2, 1, 3, 1), (8, 16, 24, 32))


def live_transformers() -> nn.Module:
    import transformers

    config = transformers.DINOv3ConvNextConfig(depths=list(SMALL.depths), hidden_sizes=list(SMALL.widths))
    model = transformers.DINOv3ConvNextModel(config).eval()
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model  # type: ignore[no-any-return]


def test_a_file_and_a_module_of_transformers(tmp_path: Path) -> None:
    """Covers transformers' files and its names in memory, with and without a config."""
    model, pixels = live_transformers(), torch.randn(2, 3, 64, 96)
    model.save_pretrained(tmp_path / "hub")
    torch.save(model.state_dict(), tmp_path / "live.pth")
    expected = model(pixels).last_hidden_state
    for ours in (
        Backbone.from_pretrained(tmp_path / "hub", device="cpu"),
        Backbone.from_pretrained(tmp_path / "live.pth", device="cpu"),
        Backbone.adopt(model),
    ):
        assert ours.config == SMALL
        assert relative(tokens(ours(pixels)), expected) <= 5e-6


@pytest.mark.peers
def test_a_module_of_timm() -> None:
    import timm

    model: Any = timm.create_model("convnext_tiny", depths=SMALL.depths, dims=SMALL.widths, num_classes=10).eval()
    pixels = torch.randn(2, 3, 64, 96)
    ours = Backbone.adopt(model)
    assert ours.config == SMALL
    assert relative(ours(pixels).cls_token, model.forward_head(model.forward_features(pixels), pre_logits=True)) <= 5e-6


@pytest.mark.parametrize("layout", ["meta.pth", "meta.safetensors"])
def test_metas_file_has_the_final_norm_twice(tmp_path: Path, layout: str) -> None:
    """Meta's strict load needs both; extra keys of EUPE files are left out."""
    bb = Backbone(SMALL)
    path = bb.save_pretrained(tmp_path / layout, "meta")
    state = load_file(path) if layout.endswith("safetensors") else torch.load(path, weights_only=True)
    assert set(state) - set(bb.state_dict()) == {"norms.3.weight", "norms.3.bias"}
    assert torch.equal(state["norms.3.weight"], state["norm.weight"])
    for extra in ("projectors.vitb.0.weight", "norms.0.weight"):
        state[extra] = torch.zeros(8, 8)
    del state["norms.3.weight"], state["norms.3.bias"]
    torch.save(state, tmp_path / "eupe.pth")
    assert Backbone.from_pretrained(tmp_path / "eupe.pth", device="cpu").fingerprint() == bb.fingerprint()


LAYOUTS: list[LayoutName] = ["hf", "timm", "meta"]
DAMAGES = [
    (lambda s, n: s.pop(n), "1 missing: "),
    (lambda s, n: s.update({n: s[n][..., :-1]}), "of another shape|has shape|is of shape|does not fit"),
    (lambda s, n: s.update({f"{n}2": s[n]}), "1 left over: "),
    (lambda s, n: s.update({"stages.0.0.grn.gamma": s[n]}), "ConvNeXt V2"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=range(len(DAMAGES)))
@pytest.mark.parametrize("name", ["stages.2.1.pwconv1.weight", "norm.weight", "downsample_layers.1.0.bias"])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, damage: Any, words: str) -> None:
    """Missing and extra keys both raise an error."""
    state = dict(Backbone(SMALL).state_dict())
    damage(state, name)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises((ValueError, NotImplementedError), match=words):
        Backbone.from_pretrained(tmp_path / "a.pth", device="cpu")


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    path = Backbone(SMALL).save_pretrained(tmp_path / "a.pth", "meta")
    with pytest.raises(ValueError, match=r"looks like a ConvNeXt \(2 1 3 1 blocks, 8 16 24 32 wide\); you asked for"):
        Backbone.from_pretrained("dinov3_convnext_tiny", weights=path, device="cpu")
    with pytest.raises(ValueError, match="you asked for dinov3_vits16"):
        Backbone.from_pretrained("dinov3_vits16", weights=path, device="cpu")


def test_rows_of_the_zoo() -> None:
    """All three libraries count the same parameters, and every id leads to its row."""
    counts = {"tiny": 27_820_128, "small": 49_454_688, "base": 87_566_464, "large": 196_230_336}
    for size, count in counts.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in Backbone.from_config(f"dinov3_convnext_{size}").parameters()) == count
        row = zoo.MODELS[f"dinov3_convnext_{size}"]
        ids = (row.hub_id, row.timm_id, f"convnext_{size}.dinov3_lvd1689m")
        assert all(zoo.find(str(name)) is row for name in ids)
