"""The teachers of Gram anchoring and distillation, the heads, and the trained parts of a model."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from training import TINY, batch_of, make, settings, terms_of, tiny

from dinov3_infer.errors import InputError
from dinov3_infer.train.method import Method

# --- the other teachers ------------------------------------------------------------------------------------------


def test_gram_holds_on_to_the_start() -> None:
    """The Gram teacher sees larger crops, is resized to the student's grid, and does not change."""
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


def test_gram_begins_and_weighs_as_its_schedule_says() -> None:
    """There is no term before anchoring begins; then it and the local part have the weights of the step."""
    method = make(settings(gram="renew", gram_begin_share=0.2, gram_ramp_share=0.4, gram_local_weight=0.5))
    assert "gram" not in terms_of(method, batch_of(), step=1)
    for step, gram, local in ((1, 0.0, 1.0), (3, 0.5, 0.875), (5, 2.0, 0.5), (9, 2.0, 0.5)):
        terms = terms_of(method, batch_of(), step)
        expected = 2.0 * terms.get("gram", torch.zeros(())) * gram / 2 + terms["dino_local"] * 2 / 3 * local
        rest = terms["dino_global"] / 3 + terms["ibot"] + 0.2 * terms["koleo"]
        assert float(terms["loss"].detach()) == pytest.approx(float(expected + rest), abs=1e-10), step


@pytest.mark.parametrize(("renewals", "expected"), [(0, [2, 4, 6, 8]), (1, [2, 4]), (2, [2, 4, 6])])
def test_the_gram_teacher_is_renewed_from_the_average(renewals: int, expected: list[int]) -> None:
    """It is copied at the steps of the renewals, as often as set, and never from the student."""
    config = settings(gram="renew", gram_begin_share=0.2, gram_renew_steps=2, gram_renewals=renewals, steps=9)
    method = make(config)
    changed = []
    for step in range(9):
        before = copy.deepcopy(method.gram_teacher)
        with torch.no_grad():
            method.student["backbone"].cls_token.add_(1.0)
        method.update_ema(step)
        if not torch.equal(before.cls_token, method.gram_teacher.cls_token):
            changed.append(step + 1)
            pairs = zip(method.gram_teacher.parameters(), method.average.parameters(), strict=True)
            assert all(torch.equal(ours, average) for ours, average in pairs)
            assert not torch.equal(method.gram_teacher.cls_token, method.backbone.cls_token)
    assert changed == expected


def test_distillation_by_features() -> None:
    """Teacher features are standardised over all steps; student and teacher may differ in patch and width."""
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
    pairs = zip(student.cls_token.chunk(2), seen[-1].cls_token.chunk(2), strict=True)  # the images of a crop, in twos
    units = [[F.normalize(t, dim=-1).unflatten(0, (-1, 2)) for t in pair] for pair in pairs]
    relation = torch.stack([((a @ a.mT - b @ b.mT) ** 2).mean() for a, b in units]).mean()
    assert float(terms["relation_cls"]) == pytest.approx(float(relation.detach()), abs=1e-9)


def test_grids_that_differ_are_refused() -> None:
    config = settings(teacher="given", dino_weight=0.0, ibot_weight=0.0, feature_weight=1.0)
    with pytest.raises(InputError, match="patches"):
        terms_of(make(config, tiny(1)), batch_of(gram_px=48))


# --- what learns -------------------------------------------------------------------------------------------------


def test_the_backbone_is_frozen_at_first() -> None:
    """Heads are trained from the start, the backbone from freeze_share on."""
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


def test_a_norm_for_local_crops_is_made_once() -> None:
    """It starts as the final norm, so features do not change; student and average have it; loaded ones are kept."""

    def made(**changes: bool) -> Method:
        torch.manual_seed(3)
        return Method(settings(**changes), tiny()).double().train()

    plain, method = made(), made(local_cls_norm=True)
    assert plain.backbone.local_cls_norm is None and method.backbone.config.local_cls_norm
    assert method.average.local_cls_norm is not None
    ours, theirs = terms_of(method, batch_of()), terms_of(plain, batch_of())
    assert all(float(ours[name].detach()) == pytest.approx(float(theirs[name].detach()), abs=1e-12) for name in theirs)
    own = tiny(config=replace(TINY, local_cls_norm=True, prefix_norm=True))
    torch.nn.init.constant_(own.local_cls_norm.weight, 3.0)
    assert float(Method(settings(local_cls_norm=True), own).average.local_cls_norm.weight[0]) == 3.0
    without = tiny(config=replace(TINY, prefix_norm=True))
    torch.nn.init.constant_(without.cls_norm.weight, 2.0)  # the one that local class tokens have had
    assert float(Method(settings(local_cls_norm=True), without).average.local_cls_norm.weight[0]) == 2.0


@pytest.mark.parametrize("changes", [{}, dict(dino_weight=0.0)], ids=str)
def test_one_head_keeps_two_centres(changes: dict) -> None:
    """Class tokens and masked patches have separate centres, also if only one of the losses is on."""
    method, batch = make(settings(ibot_prototypes=0, centring="centre", standardise=False, **changes)), batch_of()
    assert [name for name in method.student if name.endswith("head")] == ["dino_head"]
    seen = method.average(batch.global_crops)
    terms_of(method, batch)
    tokens = {"ibot_head": seen.patch_tokens[batch.masks]} | ({} if changes else {"dino_head": seen.cls_token})
    assert {n.removesuffix("_centre") for n, _ in method.named_buffers(recurse=False)} == set(tokens)
    for name, these in tokens.items():
        expected = 0.1 * method.ema["dino_head"](these).mean(0)
        assert torch.allclose(method.get_buffer(f"{name}_centre"), expected, atol=1e-12)


def test_registers_and_teachers_get_no_gradient() -> None:
    method = make(settings(gram="start"))
    terms_of(method, batch_of(gram_px=64))["loss"].backward()
    for module in (method.ema, method.gram_teacher):
        assert not module.training and all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"dino_head": (20, 8, 16), "ibot_head": (20, 8, 12)}),
        (dict(ibot_hidden=28, ibot_bottleneck=6), {"dino_head": (20, 8, 16), "ibot_head": (28, 6, 12)}),
        (dict(ibot_prototypes=0), {"dino_head": (20, 8, 16)}),
        (dict(ibot_weight=0.0), {"dino_head": (20, 8, 16)}),
    ],
    ids=str,
)
def test_sizes_of_the_heads(changes: dict, expected: dict[str, tuple[int, int, int]]) -> None:
    """Hidden width, bottleneck and prototypes are right in student and moving average."""
    method = make(settings(**changes))
    for model in (method.student, method.ema):
        heads = {name: head for name, head in model.items() if name.endswith("head")}
        found = {n: (len(h.mlp[0].weight), *reversed(h.prototypes.weight.shape)) for n, h in heads.items()}
        assert found == expected
