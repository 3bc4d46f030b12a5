"""Attention maps, queries, keys and values equal those of transformers and of a hook, without the whole matrix."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import SMALL, hf_model, randomise, relative
from pictures import complaint, photo
from torch import Tensor

from dinov3_infer import Backbone, InputError, InputTypeError, LayerError
from dinov3_infer.model.introspection import attention_rows
from dinov3_infer.model.rope import apply_rope

DEPTH = 3
CONFIGS = {name: replace(config, depth=DEPTH) for name, config in SMALL.items()}
IMAGE = photo(90, 130)


def backbone(name: str = "dinov3", dtype: torch.dtype = torch.float32) -> Backbone:
    return randomise(Backbone.from_config(CONFIGS[name])).to(dtype)  # type: ignore[return-value]


@pytest.mark.parametrize("block", range(DEPTH))
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_rows_are_those_of_transformers(name: str, block: int) -> None:
    """Rows of the class token and two patches of every head, in float64, against `output_attentions` in eager mode."""
    theirs: Any = hf_model(CONFIGS[name]).double()
    theirs.set_attn_implementation("eager")
    ours = Backbone.adopt(theirs)
    pixels = torch.randn(2, 3, 3 * ours.patch_size, 5 * ours.patch_size, dtype=torch.float64)
    options = {"interpolate_pos_encoding": True} if type(theirs).__name__ == "ViTModel" else {}
    full = theirs(pixels, output_attentions=True, **options).attentions[block]
    for token in (0, ours.num_prefix_tokens, ours.num_prefix_tokens + 13):
        rows = attention_rows(ours, pixels, block, torch.tensor([token, 0]))
        assert rows.shape == (*full.shape[:2], 1, full.shape[3]) and rows.dtype == torch.float64
        assert relative(rows[0, :, 0], full[0, :, token]) < 1e-7  # all build the RoPE table in float32
        assert relative(rows[1, :, 0], full[1, :, 0]) < 1e-7
    if block == DEPTH - 1:
        assert relative(ours.get_last_selfattention(pixels), full) < 1e-7


def full_matrix(bb: Backbone, pixels: Tensor, block: int) -> Tensor:
    """[B, H, N, N] in float64, from the inputs of a block's attention."""
    seen: list[Any] = []
    attention: Any = bb.blocks[block].attn
    original = attention.attend
    attention.attend = lambda qkv, cos, sin, **options: (seen.append((qkv, cos, sin)), original(qkv, cos, sin))[1]
    with torch.no_grad():
        bb(pixels)
    attention.attend = original
    ((qkv, cos, sin),) = seen
    q, k, _ = qkv.double().unbind(2)
    if cos is not None:
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1)


@pytest.mark.parametrize("layer", [0, 1, -1])
@pytest.mark.parametrize("name", CONFIGS)
def test_maps_are_rows_of_the_full_matrix(name: str, layer: int) -> None:
    """Maps of the class token, and of the patch under a point in pixels of the original image."""
    bb = backbone(name)
    images, side = [IMAGE, photo(90, 130, seed=1)], 6 * bb.patch_size
    features = bb.extract_features(images, size=side, fit="native")
    full = full_matrix(bb, bb.preprocess.with_options(side, "native").batch(images).pixels, layer % DEPTH)
    prefix, (h, w) = bb.num_prefix_tokens, features.grid
    maps = bb.attention_maps(images, layer, size=side)
    assert maps.shape == (2, bb.num_heads, h, w) and maps.dtype == torch.float32
    assert relative(maps, full[:, :, 0, prefix:].unflatten(-1, (h, w))) < 1e-5
    for point in [(0, 0), (129.5, 89.5), (70, 20)]:
        row, column = features.to_patch(*point)
        expected = full[:, :, prefix + row * w + column, prefix:].unflatten(-1, (h, w))
        assert relative(bb.attention_maps(images, layer, point, size=side), expected) < 1e-5


def test_a_map_is_what_the_prefix_leaves_of_one() -> None:
    """The softmax runs over all tokens, so a map sums to 1 minus the share of the prefix."""
    bb = backbone()
    full = full_matrix(bb, bb.preprocess.with_options(96, "native").batch([IMAGE]).pixels, DEPTH - 1)
    left = 1 - full[:, :, 0, : bb.num_prefix_tokens].sum(-1)
    assert torch.allclose(bb.attention_maps(IMAGE, size=96).sum((-1, -2)).double(), left, atol=1e-5) and left.max() < 1


def test_points_are_those_of_the_original_image() -> None:
    """A crop keeps the patch under a point; a point outside the crop or the image is an error."""
    bb = backbone()
    middle = bb.attention_maps(IMAGE, query=(65, 45), size=64, fit="crop")
    features = bb.extract_features(IMAGE, size=64, fit="crop")
    pixels = bb.preprocess.with_options(64, "crop").batch([IMAGE]).pixels
    row, column = features.to_patch(65, 45)
    expected = attention_rows(bb, pixels, DEPTH - 1, torch.tensor([bb.num_prefix_tokens + row * 4 + column]))
    assert torch.equal(middle.flatten(2), expected[:, :, 0, bb.num_prefix_tokens :].detach())
    assert "cropped away" in complaint(InputError, lambda: bb.attention_maps(IMAGE, query=(2, 2), size=64, fit="crop"))
    assert "once per block" in complaint(InputTypeError, lambda: bb.attention_maps(IMAGE, [0, 1]))
    assert "130 wide and 90 high" in complaint(InputError, lambda: bb.attention_maps(IMAGE, query=(130, 2)))


@pytest.mark.parametrize("query", ["patch", None, 5, (1, 2, 3), ("a", "b"), "ab"], ids=repr)
def test_wrong_queries_are_said(query: Any) -> None:
    text = complaint(InputError, lambda: backbone().attention_maps(IMAGE, query=query))
    assert "'cls' or a point (x, y)" in text and repr(query) in text


@pytest.mark.parametrize("layer", [DEPTH, -DEPTH - 1])
def test_layers_that_do_not_exist_are_said(layer: int) -> None:
    assert f"layer {layer} does not exist" in complaint(LayerError, lambda: backbone().attention_maps(IMAGE, layer))


def test_the_blocks_above_do_not_run() -> None:
    bb = backbone()
    ran: list[int] = []
    for i, block in enumerate(bb.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    bb.attention_maps(IMAGE, layer=1, size=64)
    assert ran == [0]


def test_no_matrix_is_built() -> None:
    """4,096 patches: the matrix of 4 heads would take 270 MB in float32; all allocations stay below a tenth of that."""
    bb = Backbone.from_config(replace(CONFIGS["dinov3"], depth=1))
    pixels = torch.zeros(1, 3, 1024, 1024)
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        rows = attention_rows(bb, pixels, 0, torch.zeros(1, dtype=torch.int64))
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert rows.shape == (1, 4, 1, 4101) and 0 < largest < 27e6


# Queries, keys, values


@pytest.mark.parametrize("facet", ["query", "key", "value"])
@pytest.mark.parametrize("name", CONFIGS)
def test_facets_are_what_a_hook_on_qkv_sees(name: str, facet: Any) -> None:
    """Heads are concatenated, for all tokens, in the requested order; the embedding does not change."""
    bb, seen = backbone(name), {}
    for i in range(DEPTH):
        bb.blocks[i].attn.qkv.register_forward_hook(lambda module, args, out, i=i: seen.__setitem__(i, out))
    features = bb.extract_features([IMAGE, IMAGE], size=6 * bb.patch_size, layers=[-1, 0], facet=facet)
    plain = bb.extract_features([IMAGE, IMAGE], size=6 * bb.patch_size)
    assert torch.equal(features.last_hidden_state, plain.last_hidden_state)
    for layer, block in zip(features.layers, (DEPTH - 1, 0), strict=True):
        expected = seen[block].chunk(3, dim=-1)[["query", "key", "value"].index(facet)]
        found = torch.cat((layer.cls_token[:, None], layer.register_tokens, layer.patch_tokens), dim=1)
        assert torch.equal(found, expected) and layer.feature_map.shape == (2, 64, 6, 6)


@pytest.mark.parametrize("part, facet", [("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")])
def test_facets_are_the_projections_of_transformers(part: str, facet: Any) -> None:
    """Compared by the names of transformers, before the rotation of DINOv3."""
    theirs, seen = hf_model(CONFIGS["dinov3"]), []
    modules = [module for name, module in theirs.named_modules() if name.endswith(part)]
    modules[1].register_forward_hook(lambda module, args, out: seen.append(out))
    bb = Backbone.adopt(theirs)
    with torch.no_grad():
        theirs(bb.preprocess.with_options(64).batch([IMAGE]).pixels)
    (layer,) = bb.extract_features(IMAGE, size=64, layers=[1], facet=facet).layers
    assert relative(layer.patch_tokens, seen[0][:, bb.num_prefix_tokens :]) < 1e-5


def test_facets_of_a_stream() -> None:
    """Images of mixed sizes give the result of each image alone."""
    bb, images = backbone(), [IMAGE, photo(64, 64), IMAGE]
    for features, image in zip(bb.iter_features(images, fit="native", layers=2, facet="key"), images, strict=True):
        alone = bb.extract_features(image, fit="native", layers=2, facet="key")
        for a, b in zip(features.layers, alone.layers, strict=True):
            assert torch.equal(a.patch_tokens, b.patch_tokens) and torch.equal(a.cls_token, b.cls_token)


def test_a_facet_needs_layers() -> None:
    bb = backbone()
    assert "layers=[-1]" in complaint(InputError, lambda: bb.extract_features(IMAGE, facet="key"))
    assert "got 'keys'" in complaint(InputError, lambda: bb.extract_features(IMAGE, layers=1, facet="keys"))  # type: ignore[arg-type]
    tokens = bb.extract_features(IMAGE, layers=1, facet="token")
    assert torch.equal(tokens.layers[0].patch_tokens, tokens.patch_tokens)
