"""Settings, schedules, groups of parameters, and the command line made of them."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from pictures import complaint
from PIL import Image
from repository import ROOT
from torch import nn

from dinov3_infer import Backbone
from dinov3_infer.errors import InputError
from dinov3_infer.train.command import main, parse
from dinov3_infer.train.config import PRESETS, TrainConfig
from dinov3_infer.train.heads import ProjectionHead, Standardise
from dinov3_infer.train.optim import parameter_groups, ramp, set_rates, warmup_cosine


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_whole(name: str) -> None:
    """Every preset is a configuration, once a distillation has a teacher."""
    config = TrainConfig.preset(name, **({"teacher": "dinov2_vits14"} if name == "distill" else {}))
    assert TrainConfig(**{**vars(config)}) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(steps=0), "steps is 0"),
        (dict(local_px=-96), "local_px is -96; give 0 or more"),
        (dict(mask_share=1.5), "mask_share is 1.5"),
        (dict(koleo_weight=-1.0), "koleo_weight is -1"),
        (dict(lr_at_1024=float("nan")), "lr_at_1024 is nan"),
        (dict(global_scale=(0.5, 0.1)), "global_scale is a range"),
        (dict(centring="middle"), "centring is one of sinkhorn, centre"),
        (dict(gram="start", from_scratch=True), "random"),
        (dict(dino_weight=0.0, ibot_weight=0.0), "no objective"),
        (dict(mask_share=0.0), "nothing is masked"),
        (dict(feature_weight=1.0), "teacher="),
        (dict(teacher="dinov2_vits14"), "no distillation weight"),
        (dict(tune="lora", engine="fsdp"), "ddp"),
        (dict(gram="ema", gram_per_image=False, accumulate=2), "accumulate=1"),
        (dict(sizes=("512x112",)), "global/local/gram"),
        (dict(colour=1), "'colour' is not a setting"),
        (dict(rope_rescale=0.5), "rescale"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_settings_that_cannot_be_meant(changes: dict, words: str) -> None:
    assert words in complaint(InputError, lambda: TrainConfig.preset("adapt", **changes))


def test_every_number_says_which_values_it_takes() -> None:
    """In its type; any whole number is a seed, and `RopeAugmentation` and AdamW check their own."""
    bare = {field.name for field in fields(TrainConfig) if field.type in (int, float, tuple[float, float])}
    assert bare == {"seed", "rope_shift", "rope_jitter", "rope_rescale", "betas"}


def test_views_follow_the_patches() -> None:
    """Sides are rounded to whole patches; a teacher of another patch size gets the same grid."""
    config = TrainConfig.preset("distill", teacher="dinov2_vits14")
    [(probability, views)] = config.view_configs(16, 14, (0, 0, 0), (1, 1, 1))
    assert (probability, views.global_px, views.gram_px, views.num_local) == (1.0, 128, 112, 0)
    assert views.jitter_probability == views.grey == views.solarize == views.local_blur == views.mask_probability == 0
    [(_, views)] = TrainConfig().view_configs(14, 14, (0, 0, 0), (1, 1, 1))
    assert (views.global_px, views.local_px, views.gram_px) == (224, 98, None)
    assert views.local_blur and views.grey and views.solarize
    [(_, views)] = TrainConfig(blur=False).view_configs(14, 14, (0, 0, 0), (1, 1, 1))
    assert views.local_blur == sum(views.global_blur) == 0 and views.grey and views.solarize
    mixed = TrainConfig(gram="start", sizes=("512/112/768:0.3", "768/336/1152:0.05"))
    found = mixed.view_configs(16, 16, (0, 0, 0), (1, 1, 1))
    assert [(p, v.global_px, v.local_px, v.gram_px) for p, v in found] == [(0.3, 512, 112, 768), (0.05, 768, 336, 1152)]


def test_the_learning_rate_follows_the_batch() -> None:
    assert TrainConfig(lr_at_1024=4e-4, batch_size=4096).lr == pytest.approx(8e-4)
    assert TrainConfig(lr_at_1024=4e-4, batch_size=64).lr == pytest.approx(1e-4)


# --- schedules ---------------------------------------------------------------------------------------------------


def test_golden_schedule() -> None:
    """Values of the published code (dinov3 at 6876159)."""
    expected = [0, 0.25, 0.5, 0.75, 1, 0.9554, 0.8306, 0.6501, 0.4499, 0.2694, 0.1446, 0.1, 0.1]
    found = [warmup_cosine(step, start=0, peak=1, end=0.1, warmup=4, total=12) for step in range(13)]
    assert found == pytest.approx(expected, abs=5e-5)


def test_ramp() -> None:
    assert [ramp(step, 2, 3) for step in range(7)] == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert [ramp(step, 0, 0) for step in range(2)] == [1, 1]


# --- groups of parameters ----------------------------------------------------------------------------------------


def student() -> nn.ModuleDict:
    with torch.device("meta"):
        backbone = Backbone.from_config("dinov3_vits16")
    return nn.ModuleDict({"backbone": backbone, "dino_head": ProjectionHead(384, 8, 4, 16)})


def test_rates_of_a_vit_small() -> None:
    """Layer-wise decay 0.9, patch embedding at a fifth; no decay of biases, norms and gammas."""
    config, model = TrainConfig(layer_decay=0.9), student()
    groups = parameter_groups(model, config)
    found = {p: group for group in groups for p in group["params"]}
    rate = {name: found[p]["rate"] for name, p in model.named_parameters()}
    decays = {name: found[p]["decays"] for name, p in model.named_parameters()}
    expected = {
        "cls_token": 0.2542, "register_tokens": 0.2542, "patch_embed.proj.weight": 0.0508, "norm.weight": 1.0,
        "blocks.0.attn.qkv.weight": 0.2824, "blocks.11.mlp.fc2.bias": 0.9,
    }  # fmt: skip
    assert {n: rate[f"backbone.{n}"] for n in expected} == pytest.approx(expected, abs=5e-5)
    assert decays["backbone.cls_token"] and decays["backbone.blocks.3.mlp.fc1.weight"]
    not_decayed = ("blocks.3.mlp.fc1.bias", "blocks.3.norm1.weight", "blocks.3.ls1.gamma", "norm.bias")
    assert not any(decays[f"backbone.{name}"] for name in not_decayed)
    assert rate["dino_head.prototypes.weight"] == rate["dino_head.mlp.0.bias"] == 5.0
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_rates_in_the_course_of_a_run() -> None:
    """Warm-up, freeze and ramp of the backbone, heads at a rate of their own, prototypes held at first."""
    config = TrainConfig(steps=100, warmup_share=0.1, freeze_share=0.2, ramp_share=0.09, freeze_prototypes_share=0.05,
                         weight_decay_end=0.4, batch_size=1024, lr_at_1024=1.0, layer_decay=1.0,
                         head_lr=2.0)  # fmt: skip
    model = student()
    optimizer = torch.optim.AdamW(parameter_groups(model, config))
    of = {p: group for group in optimizer.param_groups for p in group["params"]}
    block, head = model.backbone.blocks[0].mlp.fc1.weight, model.dino_head
    seen = {}
    for step in (0, 4, 5, 10, 19, 20, 24, 29, 99):
        set_rates(optimizer, config, step)
        seen[step] = [of[p]["lr"] for p in (block, head.mlp[0].weight, head.prototypes.weight)]
    assert seen == {
        0: [0, 0, 0], 4: [0, 0.8, 0], 5: [0, 1, 1], 10: [0, 2, 2], 19: [0, 2, 2],
        20: pytest.approx([0.1, 2, 2]), 24: pytest.approx([0.5, 2, 2]), 29: [1, 2, 2], 99: [1, 2, 2],
    }  # fmt: skip
    assert of[block]["weight_decay"] == pytest.approx(0.4)
    assert of[model.backbone.norm.weight]["weight_decay"] == 0.0


# --- heads -------------------------------------------------------------------------------------------------------


def test_sizes_of_the_published_heads() -> None:
    """Numbers of parameters of the 7B's DINO head and of the default one."""
    with torch.device("meta"):
        heads = [ProjectionHead(4096, 8192, 512, 262_144), ProjectionHead(1024, 2048, 256, 65_536)]
    assert [sum(p.numel() for p in head.parameters()) for head in heads] == [239_092_224, 23_597_312]


def test_scores_are_dot_products_with_a_direction() -> None:
    """The bottleneck has length 1; DINO v1's prototypes have too, DINOv3's have not."""
    for unit in (False, True):
        head = ProjectionHead(6, 8, 4, 5, unit_prototypes=unit)
        with torch.no_grad():
            head.prototypes.weight.copy_(3.0 * torch.eye(5, 4))
        scores = head(torch.randn(7, 6))
        assert torch.allclose(scores.norm(dim=-1), torch.full((7,), 1.0 if unit else 3.0))


def test_heads_see_standardised_tokens() -> None:
    """Exactly so for as long as the window grows; then what is new replaces what is old.  Rounding is not magnified."""
    scale, endless = Standardise(5, window=100).double(), Standardise(5).double()
    steps = [(step % 7) + torch.randn(6, 2, 5, dtype=torch.float64) for step in range(100)]
    for step, tokens in enumerate(steps):
        scale.learn(tokens, step)
        endless.learn(tokens, step)
    every = torch.cat(steps).flatten(0, 1)
    seen = scale(every)
    assert torch.allclose(seen.mean(0), torch.zeros(5, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(seen.var(0, correction=0), torch.ones(5, dtype=torch.float64))
    for step in range(100, 800):
        scale.learn(steps[step % 100] + 50.0, step)
        endless.learn(steps[step % 100] + 50.0, step)
    assert torch.allclose(endless.mean, every.mean(0) + 50.0 * 7 / 8)
    assert (scale.mean - every.mean(0) - 50.0).abs().max() < 0.2
    same = Standardise(5)
    same.learn(torch.ones(4, 5) + 1e-7 * torch.randn(4, 5), 0)
    assert same(torch.ones(4, 5)).abs().max() < 1e-4


# --- the command line --------------------------------------------------------------------------------------------


def test_preset_file_and_flags(tmp_path: Path) -> None:
    """The preset, then the file, then the flags."""
    file = tmp_path / "mine.toml"
    file.write_text('preset = "dinov3"\nsteps = 7\nglobal_scale = [0.5, 1.0]\nsizes = ["512/112/768:0.3"]\n')
    config, given = parse(["--config", str(file), "--data", "a", "b:0.1:pure", "--batch-size", "8", "--no-distortions"])
    assert config == TrainConfig.preset(
        "dinov3", steps=7, global_scale=(0.5, 1.0), sizes=("512/112/768:0.3",), data=("a", "b:0.1:pure"), batch_size=8,
        distortions=False,
    )  # fmt: skip
    assert not given.resume and not given.dry_run


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_examples_are_configurations(path: Path) -> None:
    """Each has its source in a comment."""
    parse(["--config", str(path), "--data", "x"])
    assert path.read_text().startswith("# ")


def test_help_says_what_the_source_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Every setting, below its heading, with its comment and its default."""
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"--{field.name.replace('_', '-')}" in said for field in fields(TrainConfig))
    assert "optimiser (AdamW): --lr-at-1024 X times sqrt(batch_size / 1024)" in said
    assert "--global-scale X X share of the picture's area; v3 (0.32 1.0)" in said


def test_errors_name_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", "x", "--mask-share", "0", "--out", str(tmp_path / "mask_share")]) == 2
    assert "set --ibot-weight 0" in capsys.readouterr().err
    (tmp_path / "batch_size").mkdir()
    assert main(["--data", str(tmp_path / "batch_size"), "--out", str(tmp_path / "run"), "--model", "nano"]) == 2
    assert f"{tmp_path}/batch_size" in capsys.readouterr().err


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings, memory and the first batch as a picture; the folder is free for the run itself."""
    for i in range(4):
        Image.new("RGB", (60, 50), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    argv = ["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--model", "nano", "--from-scratch", "--device",
            "cpu", "--batch-size", "4", "--accumulate", "2", "--global-px", "64", "--local-px", "32",
            "--dino-prototypes", "8", "--ibot-prototypes", "8", "--head-hidden", "8", "--head-bottleneck", "4",
            "--workers", "0"]  # fmt: skip
    assert main([*argv, "--dry-run"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["batch_size"] == 4 and said["pictures"] == 4 and said["gib_of_activations_at_most"] > 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["first_batch.png"]
