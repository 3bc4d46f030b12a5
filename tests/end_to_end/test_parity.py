"""The same numbers as transformers, for every family, loaded from files that transformers wrote."""

import copy
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from oracles import (
    SMALL,
    Saved,
    assert_same,
    assert_same_tokens,
    grid_cases,
    hf_layers,
    hf_model,
    hf_norm,
    hf_shapes,
    pixels_of,
    relative,
    tokens,
)
from torch import Tensor

from dinov3_infer import Backbone
from dinov3_infer.errors import InputError
from dinov3_infer.model.network import BackboneOutput, LayerOutput
from dinov3_infer.model.vit import VisionTransformer, ViTConfig
from dinov3_infer.zoo import ARCHITECTURES

pytestmark = pytest.mark.usefixtures("no_grad")


def as_hf(config: ViTConfig) -> ViTConfig:
    """The same architecture in transformers, with its epsilon for DINO and its rule for positions."""
    if not config.layerscale:
        config = replace(config, norm_eps=1e-12)
    return replace(config, position_resize="antialias" if config.num_registers or not config.position_grid else "size")


DEEP = {  # small width, full depth
    "dinov3": ARCHITECTURES["dinov3_vits16"],
    "dinov3-gated": ARCHITECTURES["dinov3_vits16plus"],
    "dinov3-no-bias-heads-of-128": ViTConfig(256, 12, 2, 512, gated=True, qkv_bias=False),
    "dinov2": ARCHITECTURES["dinov2_vits14"],
    "dinov2-registers": ARCHITECTURES["dinov2_vits14_reg"],
    "dinov2-gated": replace(ARCHITECTURES["dinov2_vitg14"], embed_dim=384, depth=12, num_heads=6, ffn_dim=1024),
    "dino-16": ARCHITECTURES["dino_vits16"],
    "dino-8": ARCHITECTURES["dino_vits8"],
}
WIDE = {  # full width, two blocks
    name: replace(config, depth=2)
    for name, config in ARCHITECTURES.items()
    if isinstance(config, ViTConfig) and not name.startswith("lingbot") and 384 < config.embed_dim < 4096
}
TINY = SMALL | {  # and what no released model has, but a config.json can say
    "dinov3_key_bias": replace(SMALL["dinov3"], key_bias=True),
    "dinov3_no_registers": replace(SMALL["dinov3"], num_registers=0),
    "dinov3_other_settings": replace(SMALL["dinov3"], num_registers=2, rope_base=30.0, norm_eps=1e-3, patch_size=8),
}
CONFIGS = {name: as_hf(config) for name, config in (DEEP | WIDE | TINY).items()}
DTYPES = [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32")]


@pytest.fixture(scope="module")
def make_saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    @functools.lru_cache(maxsize=10)  # building takes longer than most tests
    def make(name: str) -> Saved:
        config, directory = CONFIGS[name], tmp_path_factory.mktemp("hf")
        model = hf_model(config)
        model.save_pretrained(directory)
        return Saved(config, model, directory)

    return make


BASES = {name: config for name, config in WIDE.items() if config.embed_dim == 768 and config.patch_size != 8}
GRID_CASES = [
    *grid_cases(DEEP, (10, 6), (16, 24)),
    *grid_cases(BASES, (10, 6)),
    *grid_cases(DEEP, (14, 14), (32, 32), slow=True, native=True),
    *grid_cases({name: c for name, c in WIDE.items() if name not in BASES}, (10, 6), (16, 24), slow=True),
    *grid_cases(BASES, (16, 24), slow=True),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("saved", "grid"), GRID_CASES, indirect=["saved"])
def test_all_tokens_of_all_layers(saved: Saved, grid: tuple[int, int], dtype: torch.dtype) -> None:
    """Class token, registers and patches equal transformers', after the last block and after each block."""
    ours, theirs = saved.pair(dtype)
    assert ours.config == saved.config
    pixels = pixels_of(saved.config, grid, batch=2 if grid == (10, 6) else 1).to(dtype)
    last, raw = hf_layers(theirs, pixels)
    output = ours(pixels, layers=saved.config.depth)
    assert_same_tokens(output, last)
    for i, (layer, expected) in enumerate(zip(output.layers, raw[1:], strict=True)):
        assert_same_tokens(layer, hf_norm(theirs)(expected), f"block {i}")


@pytest.mark.parametrize(
    ("saved", "grid"),
    [*grid_cases(DEEP, (10, 6)), *grid_cases(DEEP, (16, 24), slow=True), *grid_cases(WIDE, (10, 6), slow=True)],
    indirect=["saved"],
)
def test_bfloat16_is_no_further_from_float64(saved: Saved, grid: tuple[int, int]) -> None:
    """In bfloat16 our error against float64 is at most that of transformers' bfloat16 model."""
    pixels = pixels_of(saved.config, grid, batch=2)
    exact, _ = hf_layers(copy.deepcopy(saved.model).double(), pixels.double())
    ours, theirs = saved.pair(torch.bfloat16)
    found, limit = relative(tokens(ours(pixels)), exact), relative(hf_layers(theirs, pixels.bfloat16())[0], exact)
    assert 1e-4 < found <= limit  # the lower end: the matrices are in bfloat16 indeed, which rounds by 2e-3


@pytest.mark.parametrize(
    "name", [n for n, c in ARCHITECTURES.items() if isinstance(c, ViTConfig) and not n.startswith("lingbot")]
)
def test_shapes_at_full_size(name: str) -> None:
    """Every tensor of transformers' model has its place in ours, up to 7B, on the meta device."""
    config = as_hf(ARCHITECTURES[name])
    with torch.device("meta"):
        expected = VisionTransformer(config).state_dict()
    adopted = Backbone.adopt(hf_shapes(config))
    assert adopted.config == config
    assert {name: t.shape for name, t in adopted.state_dict().items()} == {n: t.shape for n, t in expected.items()}


tiny = pytest.mark.parametrize("saved", TINY, indirect=True)


@tiny
@pytest.mark.parametrize("grid", [(5, 5), (3, 7), (11, 2)], ids="{0[0]}x{0[1]}".format)
def test_stream_before_the_final_norm(saved: Saved, grid: tuple[int, int]) -> None:
    """transformers' hidden_states equal our residual stream, after the embedding and after every block."""
    ours, theirs = saved.exact
    pixels = pixels_of(saved.config, grid, batch=2).double()
    _, raw = hf_layers(theirs, pixels)
    assert_same(ours.embed_tokens(pixels), raw[0])
    stream, taken = ours.run_blocks(pixels, indices=range(saved.config.depth))
    assert list(taken) == list(range(saved.config.depth))
    for i, expected in enumerate(raw[1:]):
        assert_same(taken[i], expected, f"block {i}")
    assert_same(stream, raw[-1])


@tiny
@pytest.mark.parametrize("norm", [False, True], ids=["raw", "normed"])
@pytest.mark.parametrize(("n", "blocks"), [(1, [1]), (2, [0, 1]), ([0], [0]), ([1, 0], [0, 1]), ([-1], [1])], ids=str)
def test_get_intermediate_layers(saved: Saved, n: int | list[int], blocks: list[int], norm: bool) -> None:
    """Meta's method returns transformers' hidden states, shallow to deep; with `norm` those after the final norm."""
    ours, theirs = saved.exact
    pixels = pixels_of(saved.config, (3, 7), batch=2).double()
    _, raw = hf_layers(theirs, pixels)
    found = ours.get_intermediate_layers(pixels, n=n, norm=norm, return_class_token=True, return_extra_tokens=True)
    assert len(found) == len(blocks)
    for i, (patches, cls_token, registers) in zip(blocks, found, strict=True):
        expected = hf_norm(theirs)(raw[i + 1]) if norm else raw[i + 1]
        assert_same_tokens(LayerOutput(cls_token, registers, patches), expected, f"block {i}")


def pieces(model: Backbone) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model; tensors that hold several weights are split into views."""
    for name, tensor in model.state_dict().items():  # buffers too
        if ".qkv." in name:
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
        elif ".gate_up." in name:
            parts = zip(("gate", "up"), tensor.chunk(2), strict=True)
        elif name == "pos_embed":
            parts = zip(("class", "patches"), (tensor[:, :1], tensor[:, 1:]), strict=True)
        elif name == "register_tokens":
            parts = zip(map(str, range(tensor.shape[1])), tensor.split(1, dim=1), strict=True)
        else:
            parts = iter([("", tensor)])
        yield from ((f"{name}[{part}]" if part else name, view) for part, view in parts)


def differs(found: BackboneOutput, expected: Tensor) -> bool:
    """Whether the comparison that all tests here use fails."""
    try:
        assert_same_tokens(found, expected)
    except AssertionError:
        return True
    return False


def unnoticed(model: Backbone, pixels: Tensor, expected: Tensor, masks: Tensor | None = None) -> set[str]:
    """Pieces that can change by 1 % (by 1 if they are zero) without failing the comparison."""
    assert_same_tokens(model(pixels, masks=masks), expected)
    found = set()
    for name, piece in pieces(model):
        kept = piece.clone()
        piece.copy_(kept * 1.01 if kept.any() else torch.ones_like(kept))
        if not differs(model(pixels, masks=masks), expected):
            found.add(re.sub(r"^blocks\.\d+\.", "", name))
        piece.copy_(kept)
    assert_same_tokens(model(pixels, masks=masks), expected)
    return found


def inert(config: ViTConfig) -> dict[str, str]:
    """Pieces that have no effect without masked patches, with the reason."""
    reasons = {}
    if config.mask_token:
        reasons["mask_token"] = "takes the place of masked patches only"
    if config.qkv_bias and not config.key_bias:
        reasons["attn.qkv.bias[key]"] = "counts as zero by definition"
    if config.qkv_bias and config.position_grid is not None:
        reasons["attn.qkv.bias[key]"] = "without RoPE it adds one number to all scores of a query: softmax removes it"
    return reasons


@tiny
def test_every_tensor_matters(saved: Saved) -> None:
    """A change of 1 % in any tensor fails the comparison with transformers, except in tensors without effect."""
    ours, theirs = saved.exact
    pixels = pixels_of(saved.config, (3, 7), batch=2).double()
    expected, _ = hf_layers(theirs, pixels)
    assert unnoticed(ours, pixels, expected) == set(inert(saved.config))


@pytest.mark.parametrize("saved", [name for name, c in TINY.items() if c.mask_token], indirect=True)
def test_masks(saved: Saved) -> None:
    """Masked patches become the mask token as in transformers, and then the mask token has an effect."""
    ours, theirs = saved.exact
    pixels = pixels_of(saved.config, (3, 7), batch=2).double()
    masks = torch.rand(2, 21, generator=torch.Generator().manual_seed(2)) < 0.4
    expected, _ = hf_layers(theirs, pixels, bool_masked_pos=masks)
    assert unnoticed(ours, pixels, expected, masks) == set(inert(saved.config)) - {"mask_token"}


@pytest.mark.parametrize("saved", ["dino"], indirect=True)
def test_no_mask_token(saved: Saved) -> None:
    """DINO has no mask token, so masks raise an error."""
    with pytest.raises(InputError, match="no mask token"):
        saved.exact[0](pixels_of(saved.config, (2, 3)).double(), masks=torch.ones(1, 6, dtype=torch.bool))
