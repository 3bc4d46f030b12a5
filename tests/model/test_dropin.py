"""Methods with names of Meta, timm and transformers do what those do."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from oracles import SMALL, randomise, relative
from torch import Tensor

from dinov3_infer import Backbone, InputError
from dinov3_infer.errors import LayerError

CONFIGS = {
    "dinov3": replace(SMALL["dinov3"], depth=4),
    "dinov3_prefix_norm": replace(SMALL["dinov3"], depth=4, prefix_norm=True),
    "dinov2": replace(SMALL["dinov2"], depth=4),
    "dino": replace(SMALL["dino"], depth=4),
}
FAMILIES = pytest.mark.parametrize("name", CONFIGS)


def setup(name: str = "dinov3") -> tuple[Backbone, Tensor]:
    """A model of four blocks and two images of 2x3 patches."""
    model = randomise(Backbone(CONFIGS[name]))
    return model, torch.randn(2, 3, 2 * model.patch_size, 3 * model.patch_size)  # type: ignore[return-value]


def as_map(patches: Tensor) -> Tensor:
    """[B, 6, C] -> [B, C, 2, 3], patch by patch."""
    rows = [torch.stack([patches[:, 3 * row + column] for column in range(3)], dim=-1) for row in range(2)]
    return torch.stack(rows, dim=-2)


@FAMILIES
def test_forward_features(name: str) -> None:
    """Meta's keys and shapes; `x_prenorm` after the final norm gives the other entries, which equal forward's."""
    model, pixels = setup(name)
    found, output, prefix = model.forward_features(pixels), model(pixels), model.num_prefix_tokens
    assert isinstance(found, dict)
    shapes = {key: tuple(value.shape) for key, value in found.items() if value is not None}
    assert shapes == {
        "x_norm_clstoken": (2, 64), "x_storage_tokens": (2, prefix - 1, 64), "x_norm_regtokens": (2, prefix - 1, 64),
        "x_norm_patchtokens": (2, 6, 64), "x_prenorm": (2, prefix + 6, 64),
    }  # fmt: skip
    assert found["masks"] is None
    assert torch.equal(found["x_norm_clstoken"], output.cls_token)
    assert torch.equal(found["x_norm_patchtokens"], output.patch_tokens)
    assert torch.equal(found["x_storage_tokens"], output.register_tokens)
    assert torch.equal(found["x_norm_regtokens"], output.register_tokens)
    first = model.norm if model.cls_norm is None else model.cls_norm
    assert torch.equal(first(found["x_prenorm"][:, 0]), found["x_norm_clstoken"])
    assert torch.equal(first(found["x_prenorm"][:, 1:prefix]), found["x_norm_regtokens"])
    assert torch.equal(model.norm(found["x_prenorm"][:, prefix:]), found["x_norm_patchtokens"])
    assert relative(found["x_prenorm"][:, prefix:], found["x_norm_patchtokens"]) > 0.01


def test_forward_features_with_masks() -> None:
    """The masks have an effect, and are returned unchanged."""
    model, pixels = setup()
    masks = torch.tensor([[True, False] * 3, [False] * 6])
    found = model.forward_features(pixels, masks)
    assert found["masks"] is masks
    assert torch.equal(found["x_norm_patchtokens"], model(pixels, masks=masks).patch_tokens)
    assert not torch.equal(found["x_norm_patchtokens"], model(pixels).patch_tokens)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_forward_features_of_a_list(masked: bool) -> None:
    """A list of crops gives one dictionary per crop."""
    model, pixels = setup()
    crops = [pixels, torch.randn(3, 3, 16, 32)]
    masks = [torch.tensor([[True] + [False] * 5] * 2), None] if masked else None
    for found, crop, mask in zip(model.forward_features(crops, masks), crops, masks or [None, None], strict=True):
        expected = model.forward_features(crop, mask)
        assert found.keys() == expected.keys()
        assert all(a is b or torch.equal(a, b) for a, b in zip(found.values(), expected.values(), strict=True))


def test_forward_features_wants_one_mask_for_each_crop() -> None:
    """Meta's code cuts the longer list; ours refuses that, and a list of masks for a single tensor."""
    model, pixels = setup()
    with pytest.raises(InputError, match="2 crops and 1 masks"):
        model.forward_features([pixels, pixels], [None])
    with pytest.raises(InputError, match="list of masks"):
        model.forward_features(pixels, [None])


@FAMILIES
@pytest.mark.parametrize(
    ("n", "expected"), [(1, [3]), (3, [1, 2, 3]), ([2, 0], [0, 2]), ((3, 1, 2), [1, 2, 3]), ([-1, 1], [1, 3])], ids=str
)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "raw"])
@pytest.mark.parametrize("reshape", [True, False], ids=["map", "list"])
def test_get_intermediate_layers(name: str, n: Any, expected: list[int], norm: bool, reshape: bool) -> None:
    """Patches of the requested blocks, ordered from shallow to deep, with class token and registers on request."""
    model, pixels = setup(name)
    prefix = model.num_prefix_tokens
    streams = model.run_blocks(pixels, indices=expected)[1]
    wanted = [model.normed(streams[i]) if norm else streams[i] for i in expected]
    patches = [as_map(w[:, prefix:]) if reshape else w[:, prefix:] for w in wanted]
    options: dict[str, bool] = dict(reshape=reshape, norm=norm)

    alone = model.get_intermediate_layers(pixels, n, **options)
    with_cls = model.get_intermediate_layers(pixels, n, return_class_token=True, **options)
    with_extra = model.get_intermediate_layers(pixels, n, return_extra_tokens=True, **options)
    with_both = model.get_intermediate_layers(pixels, n, return_class_token=True, return_extra_tokens=True, **options)
    assert isinstance(alone, tuple)
    assert len(alone) == len(with_cls) == len(with_extra) == len(with_both) == len(expected)
    for i, (patch, whole) in enumerate(zip(patches, wanted, strict=True)):
        cls, extra = whole[:, 0], whole[:, 1:prefix]
        assert alone[i].is_contiguous() or not reshape
        for found, parts in (
            ((alone[i],), (patch,)),
            (with_cls[i], (patch, cls)),
            (with_extra[i], (patch, extra)),
            (with_both[i], (patch, cls, extra)),
        ):
            assert isinstance(found, tuple)
            assert len(found) == len(parts)
            assert all(torch.equal(a, b) for a, b in zip(found, parts, strict=True))


def test_last_intermediate_layer_is_the_output() -> None:
    """n=1, the default, gives x_norm_patchtokens exactly."""
    model, pixels = setup()
    expected = model.forward_features(pixels)["x_norm_patchtokens"]
    assert torch.equal(model.get_intermediate_layers(pixels)[0], expected)
    assert torch.equal(model.get_intermediate_layers(pixels, n=1)[0], expected)


@pytest.mark.parametrize("n", [0, 5, [4], [0, -5]], ids=str)
def test_get_intermediate_layers_out_of_range(n: Any) -> None:
    """Blocks that the model does not have are refused."""
    model, pixels = setup()
    with pytest.raises(LayerError):
        model.get_intermediate_layers(pixels, n)


@pytest.mark.parametrize("n", [[1, 1], [3, -1]], ids=str)
def test_get_intermediate_layers_twice(n: list[int]) -> None:
    """A block requested twice is refused, even under two numbers, since the result could not show its order."""
    model, pixels = setup()
    with pytest.raises(InputError, match="twice"):
        model.get_intermediate_layers(pixels, n)


@FAMILIES
@pytest.mark.parametrize(
    ("indices", "expected"), [(None, [0, 1, 2, 3]), (2, [2, 3]), ([1], [1]), ([2, 0], [0, 2]), ([-2], [2])], ids=str
)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "raw"])
@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
def test_forward_intermediates(name: str, indices: Any, expected: list[int], norm: bool, output_fmt: str) -> None:
    """timm's: all tokens after the final norm, and patches of blocks from shallow to deep, normed only with `norm`."""
    model, pixels = setup(name)
    prefix = model.num_prefix_tokens
    last, streams = model.run_blocks(pixels, indices=expected)
    options: dict[str, Any] = dict(norm=norm, output_fmt=output_fmt)
    final, found = model.forward_intermediates(pixels, indices, **options)
    pairs = model.forward_intermediates(pixels, indices, return_prefix_tokens=True, intermediates_only=True, **options)
    assert torch.equal(final, model.normed(last))
    assert isinstance(found, list)
    assert isinstance(pairs, list)
    for patches, pair, index in zip(found, pairs, expected, strict=True):
        whole = model.normed(streams[index]) if norm else streams[index]
        expected_patches = as_map(whole[:, prefix:]) if output_fmt == "NCHW" else whole[:, prefix:]
        assert torch.equal(patches, expected_patches)
        assert torch.equal(pair[0], expected_patches)
        assert torch.equal(pair[1], whole[:, :prefix])


def test_forward_intermediates_stops_early() -> None:
    """With `stop_early` no block after the last requested one runs, and the final tokens are those of that block."""
    model, pixels = setup()
    streams = model.run_blocks(pixels, indices=[1])[1]
    ran: list[int] = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    final, found = model.forward_intermediates(pixels, [0, 1], stop_early=True)
    assert ran == [0, 1]
    assert len(found) == 2
    assert torch.equal(final, model.normed(streams[1]))
    ran.clear()
    model.forward_intermediates(pixels, [0, 1])
    assert ran == [0, 1, 2, 3]


def test_forward_intermediates_format() -> None:
    """A format that timm does not have is refused by name."""
    model, pixels = setup()
    with pytest.raises(InputError, match="'NHWC'"):
        model.forward_intermediates(pixels, output_fmt="NHWC")
    with pytest.raises(LayerError):
        model.forward_intermediates(pixels, [4])


@pytest.mark.parametrize(("name", "registers"), [("dinov3", 4), ("dinov2", 0)])
def test_attributes_that_other_code_reads(name: str, registers: int) -> None:
    """Numbers under the names of Meta and timm."""
    model, _ = setup(name)
    assert model.embed_dim == model.num_features == 64
    assert model.patch_size == (16 if name == "dinov3" else 14)
    assert model.num_heads == model.config.num_heads == 64 // CONFIGS[name].head_dim
    assert model.n_blocks == len(model.blocks) == 4
    assert model.n_storage_tokens == model.num_register_tokens == registers
    assert model.num_prefix_tokens == registers + 1
    assert isinstance(model.norm, torch.nn.LayerNorm)


@pytest.mark.parametrize(("name", "grid"), [("dinov3", 16), ("dinov2", 37), ("dino", 28)])
def test_what_timm_tells_of_its_patches_and_blocks(name: str, grid: int) -> None:
    model, pixels = setup(name)
    side = model.patch_size
    grid = model.config.position_grid or grid
    assert model.patch_embed.patch_size == (side, side) and model.patch_embed.grid_size == (grid, grid)
    assert model.patch_embed.num_patches == grid * grid
    info = model.feature_info
    assert info.channels() == [64] * 4 and info.reduction([0, -1]) == [side, side] and info.module_name(2) == "blocks.2"
    assert len(info) == 4 and info[1] == {"module": "blocks.1", "num_chs": 64, "reduction": side}
    maps = model.forward_intermediates(pixels, intermediates_only=True)
    assert [m.shape[1] for m in maps] == info.channels()
    assert model.get_submodule(info.module_name(3)) is model.blocks[3]


@pytest.mark.peers
def test_feature_info_is_timms() -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vit_small_patch16_dinov3", features_only=False)
    ours = Backbone.from_config("dinov3_vits16")
    assert ours.feature_info.channels() == [one["num_chs"] for one in theirs.feature_info]
    assert ours.feature_info.reduction() == [one["reduction"] for one in theirs.feature_info]
    assert ours.feature_info.module_name() == [one["module"] for one in theirs.feature_info]
    assert ours.patch_embed.patch_size == theirs.patch_embed.patch_size
    assert ours.patch_embed.num_patches == theirs.patch_embed.num_patches


@FAMILIES
def test_checkpointed_gradients_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer activations are kept; not without gradients, nor with drop path."""
    model, pixels = setup(name)
    calls: list[Any] = []
    real = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr("dinov3_infer.model.vit.checkpoint", lambda *a, **k: calls.append(a) or real(*a, **k))

    def gradients(packed: bool) -> list[Tensor]:
        outputs = model.forward_packed([pixels, pixels[:1]]) if packed else [model(pixels, layers=[0])]
        loss = sum(out.patch_tokens.square().mean() + out.cls_token.sum() for out in outputs)
        return list(torch.autograd.grad(loss, [model.cls_token, model.blocks[0].mlp.parameters().__next__()]))

    for packed in (False, True):
        plain = gradients(packed)
        assert not calls
        model.set_grad_checkpointing()
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients(packed), strict=True)) and len(calls) == 4
        model.set_grad_checkpointing(False)
        calls.clear()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    with torch.no_grad():
        model(pixels)
    model.forward_packed([pixels], drop_path=0.5, generator=torch.Generator().manual_seed(0))
    model.gradient_checkpointing_disable()
    assert not calls and not model.is_gradient_checkpointing
