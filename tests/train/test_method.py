"""One step of training, term by term, against a computation that shares the backbone's forward pass alone."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_infer import Backbone, ViTConfig
from dinov3_infer.errors import InputError
from dinov3_infer.train.config import TrainConfig
from dinov3_infer.train.method import Method, split_batch
from dinov3_infer.train.optim import clip_gradients, make_optimizer, set_rates
from dinov3_infer.train.views import Batch

TINY = ViTConfig(24, 2, 2, 48)
SMALL = dict(
    batch_size=4, num_local=2, global_px=64, local_px=32, dino_prototypes=16, ibot_prototypes=12, head_hidden=20,
    head_bottleneck=8, spread_group=2, freeze_share=0.0, ramp_share=0.0, rope_rescale=1.0, steps=10,
)  # fmt: skip


def settings(**changes) -> TrainConfig:
    return TrainConfig(**(SMALL | changes))


def tiny(seed: int = 0, config: ViTConfig = TINY, layerscale: float = 0.5) -> Backbone:
    """Random weights under which blocks do something."""
    backbone = Backbone.from_config(config, seed=seed).double()
    for name, parameter in backbone.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.constant_(parameter, layerscale)
        elif "token" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
    return backbone


def make(config: TrainConfig, teacher: Backbone | None = None) -> Method:
    torch.manual_seed(3)
    method = Method(config, tiny(), teacher).double().train()
    with torch.no_grad():  # the average is not the student, as later in a run
        for parameter in method.ema.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, dtype=parameter.dtype))
    return method


def batch_of(count: int = 4, config: TrainConfig | None = None, gram_px: int | None = None) -> Batch:
    draw = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    masks = torch.rand(2 * count, 16, generator=draw) < 0.4
    masks[1] = False
    gram = None if gram_px is None else noise(2 * count, 3, gram_px, gram_px)
    num_local = 2 if config is None else config.num_local
    return Batch(noise(2 * count, 3, 64, 64), noise(num_local * count, 3, 32, 32), gram, masks, torch.arange(count))


def terms_of(method: Method, batch: Batch, step: int = 0) -> dict[str, Tensor]:
    return method(batch, method.targets([batch], step)[0], step)


# --- the same again, without losses.py and method.py -------------------------------------------------------------


def sinkhorn(scores: Tensor, temperature: float) -> Tensor:
    q = (scores / temperature).exp()
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    return q


def cross_entropy(target: Tensor, scores: Tensor) -> Tensor:
    return -(target * (scores / 0.1).log_softmax(-1)).sum(-1)


def expected_terms(method: Method, batch: Batch, temperature: float) -> dict[str, Tensor]:
    student, average = method.student, method.ema
    half = len(batch.indices)
    scaled = method.config.standardise
    with torch.no_grad():
        seen = average["backbone"](batch.global_crops)
        masked = seen.patch_tokens[batch.masks]
        tokens = {"dino_head": seen.cls_token, "ibot_head": masked}
        scale = {
            n: (t.mean(0), t.std(0, correction=0).clamp(min=0.01)) if scaled else (0, 1) for n, t in tokens.items()
        }

    def scores_of(model: torch.nn.ModuleDict, head: str, tokens: Tensor) -> Tensor:
        return model[head]((tokens - scale[head][0]) / scale[head][1])

    with torch.no_grad():
        targets = sinkhorn(scores_of(average, "dino_head", seen.cls_token), temperature)
        patch_targets = sinkhorn(scores_of(average, "ibot_head", masked), temperature)
    out = student["backbone"](batch.global_crops, masks=batch.masks)
    local = student["backbone"](batch.local_crops)
    scores, local_scores = (scores_of(student, "dino_head", tokens) for tokens in (out.cls_token, local.cls_token))
    dino_global = [cross_entropy(targets[b], scores[(b + half) % (2 * half)]) for b in range(2 * half)]
    dino_local = [
        cross_entropy(targets[t * half + b], local_scores[crop * half + b])
        for crop in range(len(local_scores) // half)
        for t in range(2)
        for b in range(half)
    ]
    rows, ibot, row = scores_of(student, "ibot_head", out.patch_tokens[batch.masks]), [], 0
    for mask in batch.masks:
        count = int(mask.sum())
        if count:
            ibot.append(cross_entropy(patch_targets[row : row + count], rows[row : row + count]).mean())
        row += count
    koleo = []
    for crop in out.cls_token.chunk(2):
        unit = F.normalize(crop, dim=-1)
        for i in range(half):
            other = i + 1 if i % 2 == 0 else i - 1  # groups of two have one neighbour
            koleo.append(-((unit[i] - unit[other] + 1e-8).norm() + 1e-8).log())
    found = {
        "dino_global": torch.stack(dino_global).mean(),
        "dino_local": torch.stack(dino_local).mean(),
        "ibot": torch.stack(ibot).sum() / (2 * half),
        "koleo": torch.stack(koleo).mean(),
    }
    found["loss"] = (  # 2 global pairs and 2 * 2 local ones
        found["dino_global"] / 3 + found["dino_local"] * 2 / 3 + found["ibot"] + 0.1 * 2 * found["koleo"]
    )
    return found


@pytest.mark.parametrize("changes", [{}, dict(standardise=False, unit_prototypes=False)], ids=["adapt", "v3"])
def test_every_term_of_a_step(changes: dict[str, bool]) -> None:
    """DINO global and local, iBOT, KoLeo and their sum, value and gradient, in float64."""
    method, batch = make(settings(**changes)), batch_of()
    ours = terms_of(method, batch)
    theirs = expected_terms(method, batch, temperature=0.04)
    for name, value in theirs.items():
        assert float(ours[name].detach()) == pytest.approx(float(value.detach()), abs=1e-10), name
    parameters = {n: p for n, p in method.student.named_parameters() if p.requires_grad}
    gradients = [torch.autograd.grad(t["loss"], list(parameters.values())) for t in (ours, theirs)]
    for name, a, b in zip(parameters, *gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-11), name
        assert a.abs().max() > 0 or name.endswith("qkv.bias"), name


def test_a_whole_step_of_the_optimiser_and_the_average() -> None:
    """Clipping per part, AdamW with its rates, and the moving average, from their formulas."""
    config = settings(clip=0.05, warmup_share=0.0)
    method, batch = make(config), batch_of()
    optimizer = make_optimizer(method.student, config)
    before = {n: p.detach().clone() for n, p in method.student.named_parameters()}
    average = {n: p.detach().clone() for n, p in method.ema.named_parameters()}
    loss = expected_terms(method, batch, temperature=0.04)["loss"]
    trained = {n: p for n, p in method.student.named_parameters() if p.requires_grad}
    gradients = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    terms_of(method, batch)["loss"].backward()
    set_rates(optimizer, config, 0)
    clip_gradients(method.student, config.clip)
    optimizer.step()
    method.update_ema(0)
    for name, parameter in method.student.named_parameters():
        part = name.split(".")[0]
        norm = math.sqrt(sum(float(g.square().sum()) for n, g in gradients.items() if n.split(".")[0] == part))
        gradient = gradients[name] * min(1.0, config.clip / (norm + 1e-6))
        rate = config.lr * expected_rate(name)
        decay = 0.0 if name.endswith("bias") or "norm" in name or "gamma" in name else 0.04
        moved = before[name] * (1 - rate * decay) - rate * gradient / (gradient.abs() + 1e-8)  # both moments corrected
        assert torch.allclose(parameter, moved, rtol=1e-9, atol=1e-12), name
        expected = 0.98 * average[name] + 0.02 * moved
        assert torch.allclose(method.ema.get_parameter(name), expected, rtol=1e-9, atol=1e-12), name


def expected_rate(name: str) -> float:
    """layer_decay 0.98 in a model of two blocks, patch embedding at a fifth, heads at five times."""
    if not name.startswith("backbone."):
        return 5.0
    if ".blocks." in name:
        return 0.98 ** (2 - int(name.split(".")[2]))
    return 1.0 if "norm" in name else 0.98**3 * (0.2 if "patch_embed" in name else 1.0)


# --- parts of a batch --------------------------------------------------------------------------------------------


def gradients_of(method: Method, parts: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    total = torch.zeros((), dtype=torch.float64)
    method.zero_grad()
    for part, target in zip(parts, method.targets(parts, 0), strict=True):
        loss = method(part, target, 0)["loss"] / len(parts)
        loss.backward()
        total += loss.detach()
    return total, {n: p.grad.clone() for n, p in method.student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "changes", [{}, dict(centring="centre"), dict(gram="ema"), dict(rope_rescale=2.0), dict(sigreg_weight=0.1)], ids=str
)
def test_parts_of_a_batch_add_up_to_the_whole(changes: dict) -> None:
    """Accumulated gradients are those of the batch at once, Sinkhorn-Knopp and KoLeo included."""
    config, batch = settings(**changes), batch_of()
    whole, expected = gradients_of(make(config), [batch])
    parts, found = gradients_of(make(config), split_batch(batch, 2))
    assert float(parts) == pytest.approx(float(whole), abs=1e-10)
    assert all(torch.allclose(found[n], expected[n], rtol=1e-8, atol=1e-11) for n in expected)


def test_parts_hold_the_same_pictures() -> None:
    """Crops, masks and indices of a part belong to the same pictures, crop-major."""
    batch = batch_of(gram_px=32)
    number = torch.arange(4.0, dtype=torch.float64).repeat(2)  # of the picture, crop-major
    crop = torch.tensor([0.0, 0.5]).repeat_interleave(4)

    def mark(crops: Tensor, value: Tensor) -> Tensor:
        return torch.zeros_like(crops) + value[:, None, None, None]

    marked = batch._replace(
        global_crops=mark(batch.global_crops, number + crop),
        local_crops=mark(batch.local_crops, number),
        gram_crops=mark(batch.gram_crops, number),
    )
    second = split_batch(marked, 2)[1]
    assert second.global_crops[:, 0, 0, 0].tolist() == [2.0, 3.0, 2.5, 3.5]
    assert second.local_crops[:, 0, 0, 0].tolist() == second.gram_crops[:, 0, 0, 0].tolist() == [2.0, 3.0, 2.0, 3.0]
    assert second.indices.tolist() == [2, 3]
    assert torch.equal(second.masks, batch.masks[[2, 3, 6, 7]])


# --- the other teachers ------------------------------------------------------------------------------------------


def test_gram_holds_on_to_the_start() -> None:
    """The anchor looks at larger crops, is resized to the student's grid, and stays as it was."""
    method = make(settings(gram="start"))
    batch = batch_of(gram_px=128)
    anchor = copy.deepcopy(method.gram_teacher)
    tokens = anchor(batch.gram_crops).patch_tokens.unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    tokens = F.interpolate(tokens, size=(4, 4), mode="bicubic").flatten(2).mT
    student = F.normalize(method.student["backbone"](batch.global_crops, masks=batch.masks).patch_tokens, dim=-1)
    target = F.normalize(tokens, dim=-1)
    expected = ((student @ student.mT - target @ target.mT) ** 2).mean()
    found = terms_of(method, batch)
    assert float(found["gram"]) == pytest.approx(float(expected.detach()), abs=1e-10)
    method.update_ema(0)
    assert all(torch.equal(a, b) for a, b in zip(anchor.parameters(), method.gram_teacher.parameters(), strict=True))


def test_gram_begins_ramps_and_renews() -> None:
    """Weight 0 before its time, then a ramp; the teacher is copied every so many steps."""
    method = make(settings(gram="renew", gram_begin_share=0.2, gram_ramp_share=0.3, gram_renew_steps=2))
    assert [method.gram_weight(step) for step in (0, 1, 2, 3, 4, 5, 9)] == [0, 0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert "gram" not in terms_of(method, batch_of(), step=1)
    changed = []
    for step in range(5):
        before = copy.deepcopy(method.gram_teacher.state_dict())
        with torch.no_grad():
            method.student["backbone"].cls_token.add_(1.0)
        method.update_ema(step)
        changed.append(not torch.equal(before["cls_token"], method.gram_teacher.cls_token))
    assert changed == [False, True, False, True, False]


def test_distillation_by_features() -> None:
    """Standardised teacher features over all steps so far; student and teacher may differ in patch and width."""
    teacher = tiny(1, replace(TINY, embed_dim=32, patch_size=14))
    config = settings(teacher="given", num_local=0, dino_weight=0.0, ibot_weight=0.0, koleo_weight=0.0,
                      feature_weight=1.0, relation_weight=1.0)  # fmt: skip
    method = make(config, teacher)
    seen = []
    for step in range(3):
        batch = batch_of(config=config, gram_px=56)
        batch = batch._replace(gram_crops=batch.gram_crops * (1 + step))
        out = teacher(batch.gram_crops)
        seen.append(out)
        terms = terms_of(method, batch, step)
    every = torch.cat([o.patch_tokens for o in seen]).flatten(0, 1)
    assert torch.allclose(method.scales["teacher_patches"].mean, every.mean(0))
    assert torch.allclose(method.scales["teacher_patches"].variance, every.var(0, correction=0))
    student = method.student["backbone"](batch.global_crops)
    target = (seen[-1].patch_tokens - every.mean(0)) / every.std(0, correction=0)
    ours = method.student["patch_projection"](student.patch_tokens)
    expected = 0.9 * (1 - F.cosine_similarity(ours, target, dim=-1)).mean() + 0.1 * F.smooth_l1_loss(ours, target)
    assert float(terms["feature_patch"]) == pytest.approx(float(expected.detach()), abs=1e-9)
    a, b = (F.normalize(t, dim=-1) for t in (student.patch_tokens, seen[-1].patch_tokens))
    relation = ((a @ a.mT - b @ b.mT) ** 2).mean()
    assert float(terms["relation_patch"]) == pytest.approx(float(relation.detach()), abs=1e-9)


def test_grids_that_differ_are_refused() -> None:
    config = settings(teacher="given", dino_weight=0.0, ibot_weight=0.0, feature_weight=1.0)
    with pytest.raises(InputError, match="patches"):
        terms_of(make(config, tiny(1)), batch_of(gram_px=48))


# --- what learns -------------------------------------------------------------------------------------------------


def test_the_backbone_is_frozen_at_first() -> None:
    """Heads learn from the start, the backbone from freeze_share on."""
    method, batch = make(settings(freeze_share=0.5)), batch_of()
    for step, learns in ((0, False), (4, False), (5, True)):
        method.zero_grad(set_to_none=True)
        terms_of(method, batch, step)["loss"].backward()
        assert (method.student["backbone"].norm.weight.grad is not None) == learns
        assert method.student["dino_head"].prototypes.weight.grad is not None


@pytest.mark.parametrize(
    ("changes", "learning"),
    [
        (dict(tune="last", tune_blocks=1), {"blocks.1", "norm"}),
        (dict(tune="lora", lora_rank=2), {"blocks.0", "blocks.1"}),
    ],
    ids=["last", "lora"],
)
def test_parts_of_the_backbone_learn(changes: dict, learning: set[str]) -> None:
    method = make(settings(**changes))
    names = [n for n, p in method.student["backbone"].named_parameters() if p.requires_grad]
    assert {".".join(n.split(".")[: 2 if n.startswith("blocks") else 1]) for n in names} == learning
    if changes["tune"] == "lora":
        assert all(n.endswith((".up", ".down")) for n in names)


def test_registers_and_teachers_get_no_gradient() -> None:
    method = make(settings(gram="start"))
    terms_of(method, batch_of(gram_px=64))["loss"].backward()
    for module in (method.ema, method.gram_teacher):
        assert not module.training and all(p.grad is None for p in module.parameters())
