"""Every checkpoint layout gives the same model, and nothing in a file is ignored or invented."""

import argparse
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layouts import (
    FORMS,
    SAME,
    SOURCES,
    hub,
    in_memory,
    load,
    meta_named,
    pixels_for,
    put,
    same_features,
    small_models_are_known as small_models_are_known,
    timm_name,
    timm_named,
    wrapped,
)
from oracles import PUBLISHED_PERIODS, SMALL, hf_model, hf_tokens, tokens, worst_token
from safetensors.torch import load_file

from dinov3_infer import Backbone, CheckpointError, Dinov3Error, ViTConfig
from dinov3_infer.model.rope import rope_periods


@pytest.mark.parametrize("key", SOURCES)
def test_every_form_gives_the_source_features_and_one_fingerprint(key: str, tmp_path: Path) -> None:
    """Hugging Face, Meta and timm files of one model, in every container, with and without config.json."""
    source = hf_model(SOURCES[key])
    prints = set()
    for form, write in FORMS.items():
        model = load(write(tmp_path / form, source, key))
        same_features(model, source)
        assert (model.config.num_heads, model.config.norm_eps) == (SOURCES[key].num_heads, SOURCES[key].norm_eps), form
        assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters()), form
        assert not model.training
        prints.add(model.fingerprint())
    assert len(prints) == 1
    assert len(list((tmp_path / "hf_shards").glob("model-*.safetensors"))) > 1  # else it was no test of shards


def test_forms_have_the_names_of_the_hub(tmp_path: Path) -> None:
    """transformers writes old names to files and keeps new names in memory, so the test above covers both."""
    for key, old, new in (
        ("dinov3", "layer.0.norm1.weight", "model.layer.0.norm1.weight"),
        ("dinov2", "encoder.layer.0.attention.attention.query.weight", "encoder.layer.0.attention.q_proj.weight"),
        ("dinov2_gated", "encoder.layer.0.mlp.weights_in.weight", "encoder.layer.0.mlp.gate_proj.weight"),
        ("dino", "encoder.layer.0.intermediate.dense.weight", "layers.0.mlp.fc1.weight"),
    ):
        model = hf_model(SOURCES[key])
        assert old in load_file(hub(tmp_path / key, model) / "model.safetensors")
        assert new in model.state_dict()


@pytest.mark.parametrize("key", ["dinov3", "dinov3_gated"])
def test_timm_without_biases(key: str, tmp_path: Path) -> None:
    """timm's plain variant leaves out zero biases, and gives the same features and fingerprint."""
    source = hf_model(SOURCES[key])
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if re.search(r"[qv]_proj\.bias", name):
                parameter.zero_()
    plain = {n: t for n, t in timm_named(source.state_dict(), SOURCES[key]).items() if "_bias" not in n}
    model = load(put(tmp_path, plain, {"architecture": timm_name(key)}))
    assert not model.config.qkv_bias
    same_features(model, source)
    others = [load(FORMS[form](tmp_path / form, source, key)) for form in ("hf_hub", "meta_pth", "timm")]
    assert {m.fingerprint() for m in others} == {model.fingerprint()}


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_bfloat16_files_become_float32(kind: str, tmp_path: Path) -> None:
    """A bfloat16 file gives float32 parameters with exactly its values."""
    source = hf_model(SOURCES["dinov3"]).bfloat16()
    model = load(put(tmp_path, source.state_dict(), source.config.to_dict(), f"model.{kind}"))
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}
    assert model.fingerprint() == in_memory(source.float().state_dict(), source.config.to_dict()).fingerprint()


@pytest.mark.parametrize(
    ("key", "kind", "eps"),
    [("dinov3", "dinov3_vit", 1e-5), ("dinov2", "dinov2", 1e-6), ("dinov2_reg", "dinov2_with_registers", 1e-6),
     ("dino", "vit", 1e-12)],
)  # fmt: skip
def test_sparse_config_means_the_defaults_of_its_class(key: str, kind: str, eps: float) -> None:
    """Fields that config.json leaves out have the defaults of transformers' class; DINO v1's epsilon is 1e-12."""
    config = SMALL[key]
    source = hf_model(config)
    model = in_memory(source.state_dict(), {"model_type": kind, "num_attention_heads": config.num_heads})
    assert (model.config.norm_eps, model.config.rope_base) == (eps, 100.0)
    assert model.config.num_registers == config.num_registers
    same_features(model, source)


@pytest.mark.parametrize("field", ["num_attention_heads", "layer_norm_eps", "rope_theta"])
def test_config_decides_what_tensors_do_not_show(field: str) -> None:
    """Heads, epsilon and RoPE base from config.json change the features."""
    source = hf_model(SOURCES["dinov3"])
    changed = {"num_attention_heads": 2, "layer_norm_eps": 1e-2, "rope_theta": 10.0}
    config = source.config.to_dict() | {field: changed[field]}
    if field == "rope_theta" and "rope_parameters" in config:
        config["rope_parameters"] = {"rope_theta": changed[field], "rope_type": "default"}
    model = in_memory(source.state_dict(), config)
    pixels = pixels_for(model.config)
    with torch.no_grad():
        assert worst_token(tokens(model(pixels)), hf_tokens(source, pixels)) > 1e-3
    expected = type(source)(type(source.config)(**config)).eval()
    expected.load_state_dict(source.state_dict())
    same_features(model, expected)


# Training files and wrappers


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "backbone.", "module._orig_mod.backbone.", "teacher.backbone."]
)
@pytest.mark.parametrize("form", ["meta", "timm", "hf"])
def test_prefixes(form: str, prefix: str) -> None:
    """Prefixes of DDP, compile and larger models change nothing."""
    source = hf_model(SOURCES["dinov3"])
    names = {"meta": meta_named, "timm": timm_named, "hf": lambda state, config: state}[form]
    state = names(source.state_dict(), SOURCES["dinov3"])
    model = in_memory(wrapped(state, prefix))
    same_features(model, source)
    assert model.fingerprint() == in_memory(state).fingerprint()


@pytest.mark.parametrize("key", ["dinov3", "dinov2"])
@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [(r"^blocks\.(\d)\.", r"blocks.\1._checkpoint_wrapped_module."), (r"^blocks\.(\d)\.", r"blocks.\1.\1."),
     (r"^blocks\.(\d)\.", r"blocks.0.\1."), (r"\.mlp\.", r".mlp._orig_mod.")],
    ids=["checkpointed", "a_block_a_chunk", "one_chunk", "compiled_part"],
)  # fmt: skip
def test_names_from_training(key: str, pattern: str, replacement: str) -> None:
    """Activation checkpointing, block chunks and compiled parts change the names."""
    source = hf_model(SOURCES[key])
    state = {re.sub(pattern, replacement, n): t for n, t in meta_named(source.state_dict(), SOURCES[key]).items()}
    same_features(in_memory(state), source)


def test_teacher_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The heads in the evaluation file of Meta's training code are ignored with a log line."""
    source = hf_model(SOURCES["dinov3"])
    teacher = wrapped(meta_named(source.state_dict(), SOURCES["dinov3"]), "backbone.")
    teacher |= {"dino_head.mlp.0.weight": torch.ones(3, 64), "ibot_head.last_layer.weight": torch.ones(3, 8)}
    with caplog.at_level(logging.INFO, "dinov3_infer"):
        model = load(put(tmp_path, {"teacher": teacher, "iteration": 7}, None, "teacher_checkpoint.pth"))
    same_features(model, source)
    assert "ignored 2 others" in caplog.text and "'teacher.backbone.'" in caplog.text


def test_main_dino_checkpoint_gives_the_teacher(tmp_path: Path) -> None:
    """A whole training file of DINO v1, with optimiser and arguments, gives the teacher and not the student."""
    teacher, student = hf_model(SOURCES["dino"]), hf_model(SOURCES["dino"], seed=1)
    teacher_state, student_state = (meta_named(m.state_dict(), SOURCES["dino"]) for m in (teacher, student))
    head = {"head.mlp.0.weight": torch.ones(3, 64), "head.last_layer.weight_g": torch.ones(3, 1)}
    content = {
        "student": wrapped(wrapped(student_state, "backbone.") | head, "module."),
        "teacher": wrapped(teacher_state, "backbone.") | head,
        "optimizer": {
            "state": {0: {"step": 3, "exp_avg": torch.ones(3)}},
            "param_groups": [{"lr": 1e-3, "params": [0]}],
        },
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", lr=1e-3),
        "dino_loss": {"center": torch.zeros(1, 3)},
    }
    same_features(load(put(tmp_path, content, None, "checkpoint.pth")), teacher)


def test_two_backbones_without_a_teacher_are_refused() -> None:
    """Neither of two backbones is guessed: the error names both prefixes."""
    state = meta_named(hf_model(SOURCES["dinov3"]).state_dict(), SOURCES["dinov3"])
    with pytest.raises(CheckpointError, match=r"2 backbones, under 'a\.', 'b\.'"):
        in_memory(wrapped(state, "a.") | wrapped(state, "b."))


# Meta's DINOv3


@pytest.mark.parametrize("mask", ["101", "000"])
def test_bias_times_mask(mask: str) -> None:
    """Meta's effective qkv bias is bias x bias_mask; the masks of the released files are all zero."""
    config = SOURCES["dinov3"]
    source = hf_model(config)
    state = meta_named(source.state_dict(), config)
    for name in [n for n in state if n.endswith("bias_mask")]:
        state[name] = torch.tensor([float(c) for c in mask]).repeat_interleave(config.embed_dim)
    if mask == "000":
        with torch.no_grad():
            for name, parameter in source.named_parameters():
                parameter.mul_(0.0 if re.search(r"[qv]_proj\.bias", name) else 1.0)
    same_features(in_memory(state), source)


def test_uninitialised_mask_is_refused() -> None:
    """A module that was built without its init has NaN masks."""
    state = meta_named(hf_model(SOURCES["dinov3"]).state_dict(), SOURCES["dinov3"])
    state["blocks.1.attn.qkv.bias_mask"] = torch.full_like(state["blocks.1.attn.qkv.bias_mask"], torch.nan)
    with pytest.raises(CheckpointError, match=r"'blocks\.1\.attn\.qkv\.bias_mask' holds NaN"):
        in_memory(state)


def test_stored_periods(tmp_path: Path) -> None:
    """bfloat16 periods keep their rounded values; `periods` gives exact or rounded ones for any file."""
    rounded = torch.tensor(PUBLISHED_PERIODS)
    config = ViTConfig(64, 2, 1, 128)
    source = hf_model(config)
    state = meta_named(source.state_dict(), config)
    state["rope_embed.periods"] = state["rope_embed.periods"].bfloat16()
    meta, hf = put(tmp_path / "meta", state, None, "m.pth"), hub(tmp_path / "hf", source)
    models = [load(meta), load(hf), load(meta, rope_periods="exact"), load(hf, rope_periods="bfloat16")]
    exact = rope_periods(64)
    for model, expected in zip(models, (rounded, exact, exact, rounded), strict=True):
        assert model.rope_periods.dtype == torch.float32
        assert torch.equal(model.rope_periods, expected)
    assert len({m.fingerprint() for m in models}) == 1
    same_features(models[2], source)
    pixels = pixels_for(config)
    with torch.no_grad():  # the rounding is 1e-3 of the period, and shows
        assert worst_token(tokens(models[0](pixels)), hf_tokens(source, pixels)) > 10 * SAME
    with pytest.raises(Dinov3Error, match="rope_periods is"):
        load(meta, rope_periods="bf16")  # type: ignore[arg-type]


def test_norms_of_training() -> None:
    """`local_cls_norm` is kept and changes nothing; `cls_norm` norms the class and register tokens."""
    config = SOURCES["dinov3"]
    source = hf_model(config)
    state = meta_named(source.state_dict(), config)
    plain, weight, bias = in_memory(state), torch.rand(64) + 0.5, torch.randn(64)
    local = in_memory(state | {"local_cls_norm.weight": weight, "local_cls_norm.bias": bias})
    assert torch.equal(local.local_cls_norm.weight, weight) and local.fingerprint() == plain.fingerprint()
    same_features(local, source)
    untied = in_memory(state | {"cls_norm.weight": weight, "cls_norm.bias": bias})
    pixels = pixels_for(config)
    with torch.no_grad():
        expected = plain.run_blocks(pixels)[0]
        expected = torch.cat(
            (F.layer_norm(expected[:, :5], (64,), weight, bias, 1e-5), plain(pixels).patch_tokens), dim=1
        )
        assert torch.equal(tokens(untied(pixels)), expected)
    assert untied.fingerprint() != plain.fingerprint()


def test_unmasked_key_bias_comes_with_its_epsilon() -> None:
    """A qkv bias without a mask comes from the default config of the training code, whose epsilon is 1e-6."""
    config = replace(SOURCES["dinov3"], key_bias=True, norm_eps=1e-6)
    source = hf_model(config)
    model = in_memory(meta_named(source.state_dict(), config))
    assert model.config.key_bias and model.config.norm_eps == 1e-6
    same_features(model, source)


# Recognition


def test_heads_of_an_unknown_bare_file(caplog: pytest.LogCaptureFixture) -> None:
    """Without config.json or name, Meta's periods give the heads; one warning states the assumptions."""
    config = replace(SOURCES["dinov3"], ffn_dim=72)
    assert in_memory(meta_named(hf_model(config).state_dict(), config)).config.num_heads == 4
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "nothing states the norm_eps and the transform and the mean and std" in caplog.text


def test_shared_names_of_v1(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Meta and timm share DINO v1's names: config.json decides, then `layout`, else Meta's with a warning."""
    state = timm_named(hf_model(SOURCES["dino"]).state_dict(), SOURCES["dino"])
    beside = put(tmp_path / "a", state, {"architecture": timm_name("dino")})
    bare = put(tmp_path / "b", state)
    assert load(beside).config.position_resize == "antialias"
    assert load(bare, layout="timm").config.position_resize == "antialias"
    assert load(bare, layout="meta").config.position_resize == "offset"
    assert "same names" not in caplog.text
    assert load(bare).config.position_resize == "offset"
    assert caplog.text.count("same names") == 1
    assert "layout='timm'" in caplog.text and "read as 'meta'" in caplog.text


@pytest.mark.parametrize(
    ("key", "rules"),
    [("dinov2", ("size", "offset", "antialias")), ("dinov2_reg", ("antialias",) * 3),
     ("dino", ("size", "offset", "antialias"))],
)  # fmt: skip
def test_layout_brings_its_resizing_rule(key: str, rules: tuple[str, ...], tmp_path: Path) -> None:
    """Positions are resized by the rule of the implementation that the file comes from."""
    source = hf_model(SOURCES[key])
    found = [load(FORMS[form](tmp_path / form, source, key)) for form in ("hf_hub", "meta_pth", "timm")]
    assert tuple(m.config.position_resize for m in found) == rules


def test_content_decides_over_config(tmp_path: Path) -> None:
    """Names that only one layout has decide, even beside a config.json of another layout."""
    source = hf_model(SOURCES["dinov3"])
    model = load(put(tmp_path, meta_named(source.state_dict(), SOURCES["dinov3"]), source.config.to_dict()))
    same_features(model, source)


@pytest.mark.parametrize(("form", "layout"), [("hf_hub", "meta"), ("meta_pth", "hf"), ("timm", "hf")])
def test_wrong_layout_is_refused(form: str, layout: Any, tmp_path: Path) -> None:
    path = FORMS[form](tmp_path, hf_model(SOURCES["dinov3"]), "dinov3")
    with pytest.raises(CheckpointError, match=f"layout '{layout}'"):
        load(path, layout=layout)


def test_weights_of_another_model(tmp_path: Path) -> None:
    """For a file of another size than the name the error has both."""
    path = FORMS["meta_pth"](tmp_path, hf_model(SOURCES["dinov3"]), "dinov3")
    with pytest.raises(CheckpointError, match=r"looks like small_dinov3; you asked for small_dinov3_gated"):
        Backbone.from_pretrained("small_dinov3_gated", weights=path, device="cpu")
    assert Backbone.from_pretrained("small_dinov3", weights=path, device="cpu").info.name == "small_dinov3"
