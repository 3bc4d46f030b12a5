"""`forward_packed`: images of several sizes in one pass, random coordinates, stochastic depth."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import SMALL, randomise, relative, tokens
from torch import Tensor

import dinov3_infer.model.vit
from dinov3_infer import BackboneOutput, InputError, RopeAugmentation, VisionTransformer, ViTConfig
from dinov3_infer.model.attention import rope_attention
from dinov3_infer.model.packing import Packing

GROUPS = [(2, (4, 4)), (3, (2, 3)), (1, (2, 3)), (2, (1, 5))]  # (images, grid); two groups of one size among them


def model_of(config: ViTConfig) -> VisionTransformer:
    return randomise(VisionTransformer(config))  # type: ignore[return-value]


def crops_of(model: VisionTransformer, groups: list[tuple[int, tuple[int, int]]] = GROUPS) -> list[Tensor]:
    p, dtype = model.patch_size, model.cls_token.dtype
    return [torch.randn(count, 3, h * p, w * p, dtype=dtype) for count, (h, w) in groups]


def masks_of(model: VisionTransformer) -> list[Tensor | None] | None:
    """A mask for every group but the second."""
    if not model.config.mask_token:
        return None
    masks: list[Tensor | None] = [torch.rand(count, h * w) < 0.5 for count, (h, w) in GROUPS]
    masks[1] = None
    return masks


def separately(model: VisionTransformer, crops: list[Tensor], masks: list[Tensor | None] | None) -> list[Tensor]:
    """All tokens of each group, from one forward pass per image."""
    each = masks or [None] * len(crops)
    return [
        torch.cat([
            tokens(model(crop[i : i + 1], masks=None if mask is None else mask[i : i + 1])) for i in range(len(crop))
        ])
        for crop, mask in zip(crops, each, strict=True)
    ]  # fmt: skip


def equal(a: list[BackboneOutput], b: list[BackboneOutput]) -> bool:
    return all(torch.equal(tokens(x), tokens(y)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", SMALL)
def test_packed_equals_one_by_one(name: str) -> None:
    """Every image gives the same tokens as alone, with masks on some of the groups."""
    model = model_of(SMALL[name])
    crops, masks = crops_of(model), masks_of(model)
    outputs = model.forward_packed(crops, masks)
    assert [tuple(o.patch_tokens.shape) for o in outputs] == [(count, h * w, 64) for count, (h, w) in GROUPS]
    for output, expected in zip(outputs, separately(model, crops, masks), strict=True):
        assert relative(tokens(output), expected) < 2e-6  # float32 sums in another order


@pytest.mark.parametrize("name", SMALL)
def test_packed_gradients_equal_one_by_one(name: str) -> None:
    """The derivatives of every parameter and of the pixels are the same, in float64."""
    model = model_of(SMALL[name]).double()
    crops, masks = crops_of(model), masks_of(model)
    leaves = [*crops, *(p for n, p in model.named_parameters() if masks is not None or n != "mask_token")]
    for crop in crops:
        crop.requires_grad_()
    packed = [tokens(output) for output in model.forward_packed(crops, masks)]
    weights = [torch.randn_like(t) for t in packed]
    gradients = [
        torch.autograd.grad(sum((t * w).sum() for t, w in zip(outputs, weights, strict=True)), leaves)
        for outputs in (packed, separately(model, crops, masks))
    ]
    # float64 sums in another order; learned positions are resized in float32, and so their gradients are summed in it
    limit = 1e-11 if model.pos_embed is None or not model.config.resizes_in_float32 else 1e-6
    for ours, theirs, leaf in zip(*gradients, leaves, strict=True):
        assert theirs.norm() > 0
        assert relative(ours, theirs) < (limit if leaf is model.pos_embed else 1e-11)


def test_one_group_equals_forward() -> None:
    """A single group is a plain batch."""
    model = model_of(SMALL["dinov3_gated"])
    pixels = torch.randn(3, 3, 32, 48)
    assert relative(tokens(model.forward_packed([pixels])[0]), tokens(model(pixels))) < 2e-6  # as above


def spied(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """Records the results of a function, call by call."""
    results: list[Any] = []
    original: Callable[..., Any] = getattr(owner, name)

    def spy(*args: Any, **kwargs: Any) -> Any:
        results.append(original(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(owner, name, spy)
    return results


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_coordinates_are_drawn_for_every_block_and_group(monkeypatch: pytest.MonkeyPatch, drop_path: float) -> None:
    """Three blocks and two groups of one size use six tables; without augmentation they use one."""
    model = model_of(replace(SMALL["dinov3"], depth=3))
    crops = crops_of(model, [(2, (2, 3)), (1, (2, 3))])
    used: list[tuple[float, ...]] = []

    def spy(qkv: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Tensor:
        for start in (0, options["cu_seqlens"][-2]):  # the first image of either group
            used.append(tuple(cos[start + model.num_prefix_tokens].tolist()))
        return rope_attention(qkv, cos, sin, **options)

    for block in model.blocks:
        monkeypatch.setattr(block.attn, "attend", spy)
    model.forward_packed(crops, rope=RopeAugmentation(rescale=2.0), drop_path=drop_path)
    assert len(used) == len(set(used)) == 6
    used.clear()
    model.forward_packed(crops, drop_path=drop_path)
    assert len(used) == 6
    assert len(set(used)) == 1


def test_augmentation_without_steps_equals_none() -> None:
    """An augmentation without steps changes no number."""
    model = model_of(SMALL["dinov3"])
    crops = crops_of(model)
    assert equal(model.forward_packed(crops, rope=RopeAugmentation()), model.forward_packed(crops))


@pytest.mark.parametrize(
    "options",
    [
        dict(rope=RopeAugmentation(0.2, 1.5, 2.0)),
        dict(drop_path=0.5),
        dict(rope=RopeAugmentation(rescale=2.0), drop_path=0.5),
    ],
    ids=["rope", "drop_path", "both"],
)
def test_random_draws_follow_the_generator(options: dict[str, Any]) -> None:
    """The seed decides the tokens, and the global state is neither read nor changed."""
    model = model_of(SMALL["dinov3"])
    crops = crops_of(model, [(4, (3, 3)), (6, (2, 2))])
    state = torch.get_rng_state()
    results = []
    for seed in (1, 1, 2):
        results.append(model.forward_packed(crops, **options, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(results[0], results[1])
    assert not equal(results[0], results[2])


@pytest.mark.parametrize(("count", "kept"), [(1, 1), (2, 1), (3, 1), (5, 3), (8, 4), (16, 9)])
def test_kept_counts(count: int, kept: int) -> None:
    """A rate of 0.4 keeps max(1, floor(0.6 B)) images of a group, the counts of the reference implementation."""
    rows, packing, factors = Packing(((count, 3), (2, 5)), torch.device("cpu")).draw(0.4, None)
    assert packing.groups == ((kept, 3), (1, 5))
    assert rows.unique().numel() == len(rows) == len(factors) == 3 * kept + 5
    first = rows[: 3 * kept].unflatten(0, (kept, 3))
    assert (first % 3 == torch.arange(3)).all()  # whole images, tokens in order
    assert rows[: 3 * kept].max() < 3 * count <= rows[3 * kept :].min()
    assert factors.flatten().tolist() == pytest.approx([count / kept] * 3 * kept + [2.0] * 5)


def test_dropping_keeps_the_mean() -> None:
    """Over many draws the mean weight of every token is 1, in every group."""
    packing, draws = Packing(((5, 1), (3, 1)), torch.device("cpu")), 4000
    weights = torch.zeros(8)
    for _ in range(draws):
        rows, _, factors = packing.draw(0.4, None)
        weights[rows] += factors[:, 0] / draws
    # a weight is 3 with probability 1/3 in the second group: variance 2, so 4 errors of the mean are 0.09
    torch.testing.assert_close(weights, torch.ones(8), rtol=0, atol=0.09)
    assert weights.sum().item() == pytest.approx(8, rel=1e-4)  # each draw by itself keeps the total of its group


@pytest.mark.parametrize("name", ["dinov3_gated", "dinov2_reg"])
def test_dropped_images_skip_a_branch(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Each branch acts on its own subset, scaled by B / kept; the other images pass unchanged."""
    model = model_of(SMALL[name]).double()
    groups = [(5, (3, 3)), (4, (2, 3)), (1, (1, 2))]
    crops = crops_of(model, groups)
    draws = spied(monkeypatch, Packing, "draw")
    outputs = model.forward_packed(crops, drop_path=0.4)
    assert len(draws) == 2 * len(model.blocks)
    subsets = [tuple(sorted(rows.tolist())) for rows, _, _ in draws]
    assert len(set(subsets)) > 2  # the branches do not share one draw
    start = 0
    for output, crop, (count, (h, w)) in zip(outputs, crops, groups, strict=True):
        length = model.num_prefix_tokens + h * w
        for i in range(count):
            rope, x = model.rope((h, w)), model.embed_tokens(crop[i : i + 1])
            for number, block in enumerate(model.blocks):
                attention, ffn = (
                    {5: 5 / 3, 4: 2.0, 1: 1.0}[count] if start in subset else 0.0
                    for subset in subsets[2 * number : 2 * number + 2]
                )
                x = x + attention * block.ls1.gamma * block.attn(block.norm1(x), rope)
                x = x + ffn * block.ls2.gamma * block.mlp(block.norm2(x))
            assert relative(tokens(output)[i], model.normed(x)[0]) < 2e-7  # factors are held in float32
            start += length


def test_each_block_may_drop_a_share_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block with share 0 draws nothing; one number is the share of all blocks; other lists are refused."""
    model = model_of(replace(SMALL["dinov3"], depth=3))
    crops = crops_of(model, [(8, (2, 3))])
    draws = spied(monkeypatch, Packing, "draw")
    model.forward_packed(crops, drop_path=[0.0, 0.25, 0.5])
    assert [kept.groups[0][0] for _, kept, _ in draws] == [6, 6, 4, 4]
    several, one = (
        model.forward_packed(crops, drop_path=shares, generator=torch.Generator().manual_seed(0))
        for shares in ([0.25] * 3, 0.25)
    )
    assert equal(several, one)
    for shares, words in (([0.1, 0.2], "2 shares for 3 blocks"), ([0.0, 0.1, 1.0], "got 1.0")):
        with pytest.raises(InputError, match=words):
            model.forward_packed(crops, drop_path=shares)


def test_no_dropping_equals_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """drop_path=0 draws nothing and changes no bit, in training mode too."""
    model = model_of(SMALL["dinov3"])
    crops = crops_of(model)
    plain = model.forward_packed(crops)
    draws = spied(monkeypatch, Packing, "draw")
    state = torch.get_rng_state()
    assert equal(model.train().forward_packed(crops, drop_path=0.0), plain)
    assert not draws
    assert torch.equal(torch.get_rng_state(), state)


def test_tables_are_made_once_without_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    """One table per group of images, not per block."""
    made = spied(monkeypatch, dinov3_infer.model.vit, "rope_table")
    model = model_of(SMALL["dinov3"])
    model.forward_packed(crops_of(model))
    assert len(made) == len(GROUPS)


@pytest.mark.parametrize("prefix_norm", [False, True])
def test_local_norm(prefix_norm: bool) -> None:
    """In training, prefix tokens of later groups use `local_cls_norm`; patches never do, nor does eval mode."""
    model = model_of(replace(SMALL["dinov3"], local_cls_norm=True, prefix_norm=prefix_norm))
    crops = crops_of(model)
    evaluated = model.forward_packed(crops)
    trained = model.train().forward_packed(crops)
    usual = model.cls_norm if prefix_norm else model.norm
    assert equal(trained[:1], evaluated[:1])
    for before, after in zip(evaluated[1:], trained[1:], strict=True):
        assert torch.equal(before.patch_tokens, after.patch_tokens)
        for a, b in ((before.cls_token, after.cls_token), (before.register_tokens, after.register_tokens)):
            stream = (a - usual.bias) / usual.weight  # standardised, whichever norm follows
            expected = stream * model.local_cls_norm.weight + model.local_cls_norm.bias
            torch.testing.assert_close(b, expected, rtol=0, atol=1e-4)  # a division by a small weight undone
            assert relative(a, b) > 0.01
    assert torch.equal(tokens(model(crops[1])), tokens(model.eval()(crops[1])))  # forward never takes it


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_mask_for_each_group(count: int) -> None:
    """If the numbers of masks and crops differ, the error has both."""
    model = model_of(SMALL["dinov3"])
    with pytest.raises(InputError, match=f"2 .*{count} masks"):
        model.forward_packed([torch.randn(1, 3, 16, 16)] * 2, [None] * count)


def test_nothing_to_pack() -> None:
    """An empty list of crops is an error, and does not give an empty list."""
    with pytest.raises(InputError, match="at least one"):
        model_of(SMALL["dinov3"]).forward_packed([])


@pytest.mark.parametrize("drop_path", [-0.1, 1.0, float("nan")])
def test_a_drop_path_that_is_no_share_is_refused(drop_path: float) -> None:
    model = VisionTransformer(SMALL["dinov3"])
    with pytest.raises(InputError, match="give 0 to below 1"):
        model.forward_packed([torch.randn(1, 3, 32, 32)], drop_path=drop_path)


def test_rope_augmentation_of_learned_positions_is_refused() -> None:
    model = VisionTransformer(SMALL["dinov2"])
    with pytest.raises(InputError, match="learned positions"):
        model.forward_packed([torch.randn(1, 3, 28, 28)], rope=RopeAugmentation(rescale=2.0))
