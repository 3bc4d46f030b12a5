"""The heads of the trainer."""

import torch

from dinov3_infer.train.heads import ProjectionHead, Standardise


def test_sizes_of_the_published_heads() -> None:
    """The DINO heads of the 7B and of the default have the published numbers of parameters."""
    with torch.device("meta"):
        heads = [ProjectionHead(4096, 8192, 512, 262_144), ProjectionHead(1024, 2048, 256, 65_536)]
    assert [sum(p.numel() for p in head.parameters()) for head in heads] == [239_092_224, 23_597_312]


def test_scores_are_dot_products_with_a_direction() -> None:
    """The bottleneck has length 1, and so have DINO v1's prototypes, unlike DINOv3's."""
    for unit in (False, True):
        head = ProjectionHead(6, 8, 4, 5, unit_prototypes=unit)
        with torch.no_grad():
            head.prototypes.weight.copy_(3.0 * torch.eye(5, 4))
        scores = head(torch.randn(7, 6))
        assert torch.allclose(scores.norm(dim=-1), torch.full((7,), 1.0 if unit else 3.0))


def test_heads_see_standardised_tokens() -> None:
    """Standardisation is exact within the window; later tokens replace earlier ones; rounding is not magnified."""
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
