"""Schedules and parameter groups."""

import math

import pytest
import torch
from torch import nn

from dinov3_infer import Backbone, ViTConfig
from dinov3_infer.train.config import TrainConfig
from dinov3_infer.train.heads import ProjectionHead
from dinov3_infer.train.optim import (
    gram_weight,
    learning_rate,
    local_weight,
    make_optimizer,
    parameter_groups,
    ramp,
    set_rates,
    warmup_cosine,
)

TINY = ViTConfig(8, 1, 2, 8)


def test_golden_schedule() -> None:
    """The values equal those of the published code (dinov3 at 6876159)."""
    expected = [0, 0.25, 0.5, 0.75, 1, 0.9554, 0.8306, 0.6501, 0.4499, 0.2694, 0.1446, 0.1, 0.1]
    found = [warmup_cosine(step, start=0, peak=1, end=0.1, warmup=4, total=12) for step in range(13)]
    assert found == pytest.approx(expected, abs=5e-5)


def test_ramp() -> None:
    assert [ramp(step, 2, 3) for step in range(7)] == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert [ramp(step, 0, 0) for step in range(2)] == [1, 1]


def test_ramps_by_half_a_cosine() -> None:
    """The Gram weight, the weight of local crops and a warm-up follow half a cosine from first to last step."""
    half = [0, 0.25, 0.75, 1]  # (1 - cos(pi k / 3)) / 2
    config = TrainConfig(steps=10, gram="start", gram_begin_share=0.2, gram_ramp_share=0.4, gram_local_weight=0.5,
                         local_weight=0.8)  # fmt: skip
    assert [gram_weight(config, s) for s in range(8)] == pytest.approx([0, 0, *(2 * h for h in half), 2, 2])
    assert [local_weight(config, s) for s in range(8)] == pytest.approx(
        [0.8, 0.8, *(0.8 * (1 - h / 2) for h in half), 0.4, 0.4]
    )
    at_once = TrainConfig(steps=10, gram="start")
    assert [gram_weight(at_once, step) for step in (0, 9)] == [2, 2]
    assert gram_weight(TrainConfig(steps=10), 5) == 0.0 and local_weight(TrainConfig(gram_local_weight=0.5), 5) == 1.0
    rising = TrainConfig(steps=10, batch_size=1024, lr_at_1024=1.0, warmup="cosine", warmup_share=0.4, lr_end_share=0.5)
    expected = [*half, *(0.5 + 0.25 * (1 + math.cos(math.pi * k / 5)) for k in range(6))]
    assert [learning_rate(rising, step) for step in range(10)] == pytest.approx(expected)


def test_adamw_has_the_betas_of_the_settings() -> None:
    """Three steps follow their formulas; the first step of a run does not depend on the betas."""
    betas, rate, decay = (0.5, 0.7), 0.1, 0.04
    config = TrainConfig(betas=betas, batch_size=1024, lr_at_1024=rate, warmup_share=0.0, head_lr=1.0, freeze_share=0.0,
                         ramp_share=0.0)  # fmt: skip
    head = ProjectionHead(4, 4, 2, 3)
    optimizer = make_optimizer(nn.ModuleDict({"backbone": Backbone.from_config(TINY), "dino_head": head}), config)
    weight = head.prototypes.weight
    expected, first, second = weight.detach().double(), 0.0, 0.0
    for step in range(3):
        gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
        weight.grad = gradient.clone()
        set_rates(optimizer, config, step)
        optimizer.step()
        first = betas[0] * first + (1 - betas[0]) * gradient.double()
        second = betas[1] * second + (1 - betas[1]) * gradient.double() ** 2
        mean, square = first / (1 - betas[0] ** (step + 1)), second / (1 - betas[1] ** (step + 1))
        expected = expected * (1 - rate * decay) - rate * mean / (square.sqrt() + 1e-8)
        assert torch.allclose(weight.double(), expected, rtol=1e-5, atol=1e-6), step


def student() -> nn.ModuleDict:
    with torch.device("meta"):
        backbone = Backbone.from_config("dinov3_vits16")
    return nn.ModuleDict({"backbone": backbone, "dino_head": ProjectionHead(384, 8, 4, 16)})


def test_rates_of_a_vit_small() -> None:
    """Layer decay is 0.9, the patch embedding has a fifth; biases, norms and gammas do not decay."""
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
    """Warm-up, freeze and ramp of the backbone; heads with another rate; fixed prototypes at first."""
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
