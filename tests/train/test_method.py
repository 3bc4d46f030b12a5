"""One training step, term by term, against a computation that shares only the backbone's forward pass."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training import batch_of, make, settings, terms_of

from dinov3_infer.model.packing import Packing
from dinov3_infer.train.method import Method, split_batch
from dinov3_infer.train.optim import clip_gradients, make_optimizer, set_rates
from dinov3_infer.train.views import Batch

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
    student, average, config = method.student, method.ema, method.config
    half = len(batch.indices)
    scaled, size = config.standardise, min(config.spread_group, half)
    part = {"dino_head": "dino_head", "ibot_head": "ibot_head" if config.ibot_prototypes else "dino_head"}
    with torch.no_grad():
        seen = average["backbone"](batch.global_crops)
        masked = seen.patch_tokens[batch.masks]
        tokens = {"dino_head": seen.cls_token, "ibot_head": masked}
        scale = {
            n: (t.mean(0), t.std(0, correction=0).clamp(min=0.01)) if scaled else (0, 1) for n, t in tokens.items()
        }

    def scores_of(model: torch.nn.ModuleDict, head: str, tokens: Tensor) -> Tensor:
        return model[part[head]]((tokens - scale[head][0]) / scale[head][1])

    with torch.no_grad():
        targets = sinkhorn(scores_of(average, "dino_head", seen.cls_token), temperature)
        patch_targets = sinkhorn(scores_of(average, "ibot_head", masked), temperature)
    out = student["backbone"](batch.global_crops, masks=batch.masks)
    stream, _ = student["backbone"].run_blocks(batch.local_crops)
    local = (student["backbone"].local_cls_norm or student["backbone"].norm)(stream)[:, 0]
    scores, local_scores = (scores_of(student, "dino_head", tokens) for tokens in (out.cls_token, local))
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
            others = [j for j in range(i // size * size, i // size * size + size) if j != i]
            nearest = max(others, key=lambda j: float((unit[i] * unit[j]).sum().detach()))
            koleo.append(-((unit[i] - unit[nearest] + 1e-8).norm() + 1e-8).log())
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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(standardise=False, unit_prototypes=False),
        dict(spread_group=16),  # more than there are: KoLeo among all images, each crop by itself
        dict(ibot_prototypes=0),
        dict(ibot_hidden=28, ibot_bottleneck=6),
        dict(local_cls_norm=True),
    ],
    ids=["adapt", "v3", "one group", "one head", "two sizes", "local norm"],
)
def test_every_term_of_a_step(changes: dict) -> None:
    """DINO global and local, iBOT, KoLeo and their sum are right in value and gradient, in float64."""
    method, batch = make(settings(**changes)), batch_of()
    if method.backbone.local_cls_norm is not None:  # which begins as the other norm
        torch.nn.init.normal_(method.backbone.local_cls_norm.weight)
    ours = terms_of(method, batch)
    theirs = expected_terms(method, batch, temperature=0.04)
    for name, value in theirs.items():
        assert float(ours[name].detach()) == pytest.approx(float(value.detach()), abs=1e-10), name
    parameters = {n: p for n, p in method.student.named_parameters() if p.requires_grad}
    gradients = [torch.autograd.grad(t["loss"], list(parameters.values())) for t in (ours, theirs)]
    for name, a, b in zip(parameters, *gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-11), name
        assert a.abs().max() > 0 or name.endswith("qkv.bias"), name


def test_drop_path_grows_with_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two blocks computes all images; each branch of the second computes half of them."""
    drawn, plain = [], Packing.draw
    monkeypatch.setattr(Packing, "draw", lambda self, share, draw: drawn.append(share) or plain(self, share, draw))
    for grows, expected in ((False, [0.5] * 4), (True, [0.5] * 2)):
        terms_of(make(settings(drop_path=0.5, drop_path_grows=grows)), batch_of())
        assert drawn == expected
        drawn.clear()


def test_a_whole_step_of_the_optimiser_and_the_average() -> None:
    """Clipping per part, AdamW with its rates, and the moving average follow their formulas."""
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
    """The factor with layer_decay 0.98 in a model of two blocks, patch embedding at a fifth, heads at five times."""
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
    "changes",
    [
        {},
        dict(centring="centre"),
        dict(centring="centre", ibot_prototypes=0),
        dict(gram="ema"),
        dict(rope_rescale=2.0),
        dict(sigreg_weight=0.1),
    ],
    ids=str,
)
def test_parts_of_a_batch_add_up_to_the_whole(changes: dict) -> None:
    """Accumulated gradients equal those of the whole batch, with Sinkhorn-Knopp and KoLeo."""
    config, batch = settings(**changes), batch_of()
    whole, expected = gradients_of(make(config), [batch])
    parts, found = gradients_of(make(config), split_batch(batch, 2))
    assert float(parts) == pytest.approx(float(whole), abs=1e-10)
    assert all(torch.allclose(found[n], expected[n], rtol=1e-8, atol=1e-11) for n in expected)


def test_parts_hold_the_same_images() -> None:
    """Crops, masks and indices of a part belong to the same images, crop-major."""
    batch = batch_of(gram_px=32)
    number = torch.arange(4.0, dtype=torch.float64).repeat(2)  # of the image, crop-major
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
