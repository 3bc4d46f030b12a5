"""What is written can be read again, by us and by the others, and a file is never half written."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import (
    SAME,
    SOURCES,
    load,
    meta_named,
    pixels_for,
    same_features,
    small_models_are_known as small_models_are_known,
    timm_name,
)
from oracles import SMALL, hf_model, hf_tokens, randomise, tokens
from safetensors.torch import load_file

from dinov3_infer import MODELS, Backbone, Dinov3Error, ViTConfig, zoo
from dinov3_infer.checkpoints import saving
from dinov3_infer.errors import InputError, UnsupportedError
from dinov3_infer.model.rope import rope_periods

LAYOUTS = ("hf", "meta.pth", "meta.safetensors", "timm")


def model_of(config: ViTConfig, seed: int = 0) -> Backbone:
    """A model with random parameters; a masked key bias is zero, since no file keeps it."""
    model = Backbone.from_config(config)
    randomise(model, seed)
    if config.qkv_bias and not config.key_bias:
        with torch.no_grad():
            for block in model.blocks:
                block.attn.qkv.bias.chunk(3)[1].zero_()
    return model


def save(model: Backbone, folder: Path, layout: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    name, _, kind = layout.partition(".")
    return model.save_pretrained(folder / f"m.{kind}" if kind else folder / name, layout=name)


def assert_equal_states(got: Backbone, expected: Backbone, but: tuple[str, ...] = ()) -> None:
    """All tensors have the same bits, except the named ones."""
    a, b = got.state_dict(), expected.state_dict()
    assert set(a) - set(but) == set(b) - set(but)
    assert [n for n in a if n not in but and not torch.equal(a[n], b[n])] == []


def lost_in(layout: str, config: ViTConfig) -> tuple[str, ...]:
    """The tensors that a layout drops or changes."""
    if layout != "timm":
        return ()
    return ("mask_token", *(("cls_token", "pos_embed") if config.position_grid and config.num_registers else ()))


@pytest.mark.parametrize("key", SOURCES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(layout: str, key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A saved and loaded model has the same bits, config and fingerprint; one log line names each loss."""
    model = model_of(SOURCES[key])
    again = load(save(model, tmp_path, layout), layout=layout.partition(".")[0])
    lost = lost_in(layout, model.config)
    assert_equal_states(again, model, but=lost)
    assert again.fingerprint() == model.fingerprint()
    changed = {"mask_token": False} if layout == "timm" else {}
    style = {"hf": "size", "meta": "offset", "timm": "antialias"}[layout.partition(".")[0]]
    if model.config.position_grid and not model.config.num_registers:
        changed["position_resize"] = style
    assert again.config == replace(model.config, **changed)
    said = [r.getMessage() for r in caplog.records if "nothing states the" not in r.getMessage()]
    expected = ["mask_token"] if "mask_token" in lost and model.config.mask_token else []
    expected += ["position"] if "pos_embed" in lost else []
    expected += ["another rule"] if again.config.position_resize != model.config.position_resize else []
    assert len(said) == len(expected) and all(word in line for word, line in zip(expected, said, strict=True)), said
    pixels = pixels_for(model.config)
    with torch.no_grad():
        assert torch.equal(tokens(again(pixels)), tokens(model(pixels)))


@pytest.mark.parametrize("key", SOURCES)
def test_chains(key: str, tmp_path: Path) -> None:
    """hf -> meta -> hf and meta -> hf -> meta give the original bytes."""
    model = model_of(SOURCES[key])
    for chain in (("hf", "meta.safetensors", "hf"), ("meta.safetensors", "hf", "meta.safetensors")):
        step, files = model, []
        for i, layout in enumerate(chain):
            path = save(step, tmp_path / f"{chain[0]}{i}", layout)
            files.append(load_file(path / "model.safetensors" if path.is_dir() else path))
            step = load(path, layout=layout.partition(".")[0])
        assert files[0].keys() == files[2].keys()
        assert all(torch.equal(files[0][n], files[2][n]) and files[0][n].dtype == files[2][n].dtype for n in files[0])


@pytest.mark.parametrize("key", SOURCES)
def test_meta_files_have_the_names_of_meta(key: str, tmp_path: Path) -> None:
    """The tensors of our file equal an independent translation of the same model, name by name."""
    source = hf_model(SOURCES[key])
    expected = meta_named(source.state_dict(), SOURCES[key])
    for name in [n for n in expected if n.endswith("bias_mask")]:
        expected[name.removesuffix("_mask")] *= expected[name]
    written = torch.load(save(Backbone.adopt(source), tmp_path, "meta.pth"), weights_only=True)
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert tensor.shape == expected[name].shape and torch.equal(tensor.float(), expected[name]), name


@pytest.mark.parametrize(
    "name, made",
    [
        ("dinov3_vits16", "a mask token of zeros, biases of zero for queries, keys and values, with their mask"),
        ("dinov3_vitl16_sat493m", "zeros, biases of zero .* a norm for local crops, a copy of the other"),
        ("dinov3_vit7b16", "zeros, a norm for local crops"),
        ("lingbot_vitg16", "added a mask token of zeros, which"),
        ("dinov2_vits14", "added a mask token of zeros, which"),
        ("dinov2_vitb14_reg", "added a mask token of zeros, which"),
        ("dino_vits16", None),
    ],
)
def test_metas_strict_loaders_find_all_that_they_ask_for(
    name: str, made: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model from timm's files gets all names of Meta's own file, and one log line says what was added."""
    row = MODELS[name]
    small = replace(row.config, embed_dim=64, depth=2, num_heads=1, ffn_dim=128)
    monkeypatch.setitem(zoo.ARCHITECTURES, row.architecture, small)
    brought = replace(small, mask_token=False, qkv_bias=small.qkv_bias and row.family != "dinov3")
    model = Backbone(brought, row).eval()
    path = model.save_pretrained(tmp_path / "m.pth", "meta")
    whole = Backbone(replace(small, local_cls_norm="7b" in name or "sat" in name), row).eval()
    expected = torch.load(whole.save_pretrained(tmp_path / "whole.pth", "meta"), weights_only=True)
    written = torch.load(path, weights_only=True)
    assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in expected.items()}
    said = [r.getMessage() for r in caplog.records if "which Meta's strict loaders need" in r.getMessage()]
    assert len(said) == (made is not None) and (made is None or re.search(made, said[0])), said
    again = load(path, num_heads=1)
    assert again.fingerprint() == model.fingerprint()


@pytest.mark.parametrize("key", SMALL)
def test_transformers_loads_ours(key: str, tmp_path: Path) -> None:
    """transformers' from_pretrained misses no tensor, has none left over, and gives the same features."""
    import transformers

    model = model_of(SMALL[key])
    folder = save(model, tmp_path, "hf")
    options: dict[str, Any] = {"add_pooling_layer": False} if key == "dino" else {}
    theirs, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]
    same_features(model, theirs.eval())


TIMM_NAMES = {  # with biases; timm makes all of them from their name alone
    "dinov3_vits16": "vit_small_patch16_dinov3_qkvb",
    "dinov3_vits16plus": "vit_small_plus_patch16_dinov3_qkvb",
    "dinov2_vits14": "vit_small_patch14_dinov2",
    "dinov2_vits14_reg": "vit_small_patch14_reg4_dinov2",
    "dino_vits8": "vit_small_patch8_224",
    "lingbot_vits16": "vit_small_patch16_lingbot",
}


def timm_reads(folder: Path, architecture: str) -> Any:
    """timm's model of the name in config.json, loaded strictly from our file."""
    import timm

    assert json.loads((folder / "config.json").read_text())["architecture"] == architecture
    theirs = timm.create_model(architecture, pretrained=False, num_classes=0)
    theirs.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return theirs.eval()


@pytest.mark.peers
@pytest.mark.parametrize("name", TIMM_NAMES)
def test_timm_loads_ours(name: str, tmp_path: Path) -> None:
    """timm's class loads our file strictly under the architecture in config.json, and gives the same features."""
    model = randomise(Backbone.from_config(name))
    theirs = timm_reads(save(model, tmp_path, "timm"), TIMM_NAMES[name])
    side = model.config.patch_size * (model.config.position_grid or 4)
    pixels = torch.randn(1, 3, side, side)
    with torch.no_grad():
        ours = tokens(model(pixels))
        # 12 blocks of random weights in float32: 1e-6 measured
        assert (theirs.forward_features(pixels) - ours).norm() / ours.norm() < SAME


@pytest.mark.peers
@pytest.mark.parametrize(
    ("name", "architecture"),
    [("dinov3_vits16", "vit_small_patch16_dinov3"), ("lingbot_vits16", "vit_small_patch16_lingbot")],
)
def test_timm_with_zero_biases(name: str, architecture: str, tmp_path: Path) -> None:
    """Zero biases are left out if timm has a variant without them, which config.json then names."""
    model = randomise(Backbone.from_config(name))
    for block in model.blocks:
        block.attn.qkv.bias.data.zero_()
    folder = save(model, tmp_path, "timm")
    timm_reads(folder, architecture)
    assert load(folder).fingerprint() == model.fingerprint()


@pytest.mark.parametrize(
    ("changes", "layout", "says"),
    [(dict(prefix_norm=True), "hf", "no separate norm"), (dict(prefix_norm=True), "timm", "cls_norm"),
     (dict(key_bias=True), "timm", "no bias for the keys"),
     (dict(layerscale=False), "hf", "always has layer scale"),
     (dict(ffn_dim=72), "timm", "only architectures that it has a name for")],
    ids=lambda v: "_".join(v) if isinstance(v, dict) else str(v).replace(" ", "_"),
)  # fmt: skip
def test_what_a_layout_cannot_hold_is_refused(changes: dict[str, Any], layout: str, says: str, tmp_path: Path) -> None:
    """If leaving a tensor out would change the features, saving is refused before anything is written."""
    model = model_of(replace(SOURCES["dinov3"], **changes))
    with pytest.raises(UnsupportedError, match=says):
        save(model, tmp_path, layout)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    with pytest.raises(NotImplementedError):
        save(model, tmp_path, layout)


@pytest.mark.parametrize(
    "changes",
    [dict(prefix_norm=True), dict(local_cls_norm=True), dict(key_bias=True, norm_eps=1e-6), dict(num_registers=0)],
    ids="_".join,
)
def test_meta_holds_everything(changes: dict[str, Any], tmp_path: Path) -> None:
    """Meta's layout stores other training architectures without loss."""
    model = model_of(replace(SOURCES["dinov3"], **changes))
    again = load(save(model, tmp_path, "meta.pth"))
    assert_equal_states(again, model)
    assert again.config == model.config


def test_hf_holds_key_bias_and_no_registers(tmp_path: Path) -> None:
    """The switches of transformers for them are set."""
    for i, changes in enumerate((dict(key_bias=True), dict(num_registers=0))):
        model = model_of(replace(SOURCES["dinov3"], **changes))  # type: ignore[arg-type]
        again = load(save(model, tmp_path / str(i), "hf"))
        assert_equal_states(again, model)
        assert again.config == model.config


@pytest.mark.parametrize("layout", ["hf", "timm"])
def test_norm_for_local_crops_is_left_out_with_a_word(
    layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only Meta's layout has a place for `local_cls_norm`; one log line says so, not one per tensor."""
    model = model_of(replace(SOURCES["dinov3"], local_cls_norm=True))
    assert load(save(model, tmp_path, layout)).fingerprint() == model.fingerprint()
    assert caplog.text.count("local_cls_norm") == 1


def test_rounded_periods_survive(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rounded periods are stored in our block of config.json and as bfloat16 in Meta's file; timm reads none."""
    model = model_of(SOURCES["dinov3"])
    exact = rope_periods(16)
    rounded = exact.bfloat16().float()
    assert not torch.equal(rounded, exact)
    model.rope_periods.copy_(rounded)
    for layout in ("hf", "meta.pth", "meta.safetensors"):
        assert torch.equal(load(save(model, tmp_path, layout)).rope_periods, rounded)
    assert torch.load(tmp_path / "m.pth", weights_only=True)["rope_embed.periods"].dtype == torch.bfloat16
    caplog.clear()
    assert torch.equal(load(save(model, tmp_path, "timm")).rope_periods, rounded)
    assert sum("RoPE periods" in r.getMessage() for r in caplog.records) == 1
    model.rope_periods.copy_(exact)
    save(model, tmp_path / "exact", "meta.pth")
    assert torch.load(tmp_path / "exact" / "m.pth", weights_only=True)["rope_embed.periods"].dtype == torch.float32
    folder = save(model, tmp_path / "exact", "hf")
    assert "rope_periods" not in json.loads((folder / "config.json").read_text())["dinov3_infer"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saving_over_the_source(layout: str, tmp_path: Path) -> None:
    """A model saved over its source file replaces the file, and the loaded model keeps its values."""
    path = save(model_of(SOURCES["dinov3"]), tmp_path, layout)
    loaded, kept = load(path), load(path)
    before = kept.fingerprint()
    with torch.no_grad():
        loaded.blocks[0].norm1.weight.add_(1.0)
        loaded.blocks[1].attn.proj.weight.mul_(2.0)
    after = loaded.fingerprint()
    assert save(loaded, tmp_path, layout) == path
    assert load(path).fingerprint() == loaded.fingerprint() == after != before
    assert kept.fingerprint() == before  # mapped from a file whose place another one has taken


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loaded_parameter_is_not_the_file(layout: str, tmp_path: Path) -> None:
    """Training a memory-mapped model does not write to its file."""
    path = save(model_of(SOURCES["dinov3"]), tmp_path, layout)
    file = path / "model.safetensors" if path.is_dir() else path
    content, first = file.read_bytes(), load(path)
    before = load(path).fingerprint()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1.0)
    assert file.read_bytes() == content
    assert load(path).fingerprint() == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_failed_write_leaves_the_old_file(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the disk fills up half way, the old file stays whole, and no temporary file remains."""
    path = save(model_of(SOURCES["dinov3"]), tmp_path, layout)
    before, names = load(path).fingerprint(), sorted(os.listdir(path if path.is_dir() else tmp_path))

    def full(tensors: Any, target: Any, *args: Any, **kwargs: Any) -> None:
        Path(target).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(saving, "save_file", full)
        patch.setattr(torch, "save", full)
        save(model_of(SOURCES["dinov3"], seed=1), tmp_path, layout)
    assert load(path).config.depth == 2
    assert load(path).fingerprint() == before
    assert sorted(os.listdir(path if path.is_dir() else tmp_path)) == names


def test_bfloat16_model_round_trip(tmp_path: Path) -> None:
    """A bfloat16 model keeps its values through each layout, and its periods stay exact."""
    model = model_of(SOURCES["dinov3"]).bfloat16()
    for layout in ("hf", "meta.safetensors"):
        again = load(save(model, tmp_path, layout))
        assert again.fingerprint() == model.fingerprint()
        assert torch.equal(again.rope_periods, rope_periods(16))


def test_wrong_targets(tmp_path: Path) -> None:
    """A folder for Meta's file, a file for a folder, and an unknown layout."""
    model = model_of(SOURCES["dinov3"])
    with pytest.raises(InputError, match=r"should end in \.pth or \.safetensors"):
        model.save_pretrained(tmp_path / "folder", layout="meta")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file; give another path"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(Dinov3Error, match="layout is one of"):
        model.save_pretrained(tmp_path / "x", layout="onnx")  # type: ignore[arg-type]
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_trained_biases_reach_timm_and_the_hidden_key_bias_nobody(tmp_path: Path) -> None:
    """A masked key bias counts as zero, so no layout needs a place for it."""
    model = model_of(SOURCES["dinov3"])
    for block in model.blocks:
        block.attn.qkv.bias.data.chunk(3)[1].fill_(3.0)
    pixels = pixels_for(model.config)
    with torch.no_grad():
        expected = tokens(model(pixels))
        for layout in LAYOUTS:
            again = load(save(model, tmp_path, layout))
            assert torch.equal(tokens(again(pixels)), expected), layout
            assert again.fingerprint() == model.fingerprint()
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["architecture"] == timm_name("dinov3").replace(
        "_dinov3", "_dinov3_qkvb"
    )


def test_from_transformers_to_every_layout(tmp_path: Path) -> None:
    """A live transformers model is adopted, written in each layout and read again."""
    source = hf_model(SOURCES["dinov3_gated"])
    for layout in LAYOUTS:
        again = load(save(Backbone.adopt(source), tmp_path, layout))
        pixels = pixels_for(again.config)
        with torch.no_grad():
            difference = tokens(again(pixels)) - hf_tokens(source, pixels)
        assert difference.norm() / hf_tokens(source, pixels).norm() < SAME


def test_saving_over_shards_replaces_them(tmp_path: Path) -> None:
    """An old index would lead back to the old weights."""
    source = hf_model(SOURCES["dinov3"])
    source.save_pretrained(tmp_path, max_shard_size="60KB")
    model = load(tmp_path)
    with torch.no_grad():
        model.norm.weight.add_(1.0)
    model.save_pretrained(tmp_path)
    assert load(tmp_path).fingerprint() == model.fingerprint()
    assert [p.name for p in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_an_unmerged_adapter_is_said(tmp_path: Path) -> None:
    """No layout has a place for the factors of an adapter."""
    from peft import LoraConfig, inject_adapter_in_model

    model = model_of(SOURCES["dinov3"])
    inject_adapter_in_model(LoraConfig(target_modules=["qkv"], r=2), model)
    for layout, target in (("hf", tmp_path / "hf"), ("meta", tmp_path / "m.pth")):
        with pytest.raises(UnsupportedError, match="an adapter that is not merged.*merge it"):
            model.save_pretrained(target, layout=layout)


def test_mean_and_std_go_where_there_is_a_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The configs of transformers and timm store mean and std; a log line says that Meta's file does not."""
    model = Backbone.from_config("lingbot_vits16", seed=0)
    model.preprocess = replace(model.preprocess, mean=(0.1, 0.2, 0.3))
    for layout in ("hf", "timm"):
        again = load(model.save_pretrained(tmp_path / layout, layout=layout))
        assert again.preprocess.mean == (0.1, 0.2, 0.3)
        assert again.info is not None and again.info.name == "lingbot_vits16" and again.preprocess.size == 512
    again = load(tmp_path / "hf" / "model.safetensors")
    assert again.preprocess.mean == (0.1, 0.2, 0.3)
    caplog.clear()
    again = load(model.save_pretrained(tmp_path / "m.safetensors", layout="meta"))
    assert again.preprocess == model.preprocess and again.info == model.info and not caplog.records
    model.save_pretrained(tmp_path / "m.pth", layout="meta")
    assert "no name and no transform" in caplog.text


def test_a_folder_in_the_way_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "d.pth").mkdir()
    with pytest.raises(InputError, match="the meta layout is one file, and .* is a folder"):
        model_of(SOURCES["dino"]).save_pretrained(tmp_path / "d.pth", layout="meta")


@pytest.mark.peers
@pytest.mark.parametrize("name", ["dinov3_vits16", "dinov2_vits14_reg", "dino_vits16", "lingbot_vits16"])
def test_timm_config_is_that_of_timm(name: str, tmp_path: Path) -> None:
    """timm reads the same transform from our file as from its own table."""
    import timm

    model = Backbone.from_config(name, seed=0)
    config = json.loads((model.save_pretrained(tmp_path, layout="timm") / "config.json").read_text())
    theirs = timm.get_pretrained_cfg(f"{config['architecture']}.{config['pretrained_cfg']['tag']}").to_dict()
    fields = ("input_size", "fixed_input_size", "interpolation", "crop_mode", "mean", "std")
    for field in fields:
        assert theirs[field] in (
            config["pretrained_cfg"][field],
            tuple(config["pretrained_cfg"][field] if field in ("input_size", "mean", "std") else ()),
        ), field
    assert config["pretrained_cfg"]["crop_pct"] == pytest.approx(
        theirs["crop_pct"], abs=0.004
    )  # 224 of 248 pixels is 0.903
