"""The same numbers as timm, for every family, loaded from files that timm wrote."""

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from oracles import (
    Saved,
    assert_same,
    assert_same_tokens,
    grid_cases,
    pixels_of,
    randomise,
    relative,
    tokens,
)
from torch import Tensor

from dinov3_infer import Backbone
from dinov3_infer.model.vit import VisionTransformer, ViTConfig
from dinov3_infer.zoo import MODELS

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("no_grad")]


@dataclass(frozen=True)
class Case:
    """A timm model, our row with its architecture, and the tensors that timm's files leave out."""

    timm: str
    row: str
    depth: int = 2
    qkv_bias: bool | None = None  # None: as the row
    width: int | None = None  # None: as the row

    @property
    def config(self) -> ViTConfig:
        ours = MODELS[self.row].config
        qkv_bias = ours.qkv_bias if self.qkv_bias is None else self.qkv_bias
        config = replace(ours, depth=self.depth, position_resize="antialias", mask_token=False, qkv_bias=qkv_bias)
        return config if self.width is None else replace(config, embed_dim=self.width, ffn_dim=4 * self.width)

    @property
    def options(self) -> dict[str, int]:
        """Arguments of `timm.create_model`."""
        return {"depth": self.depth} | ({"embed_dim": self.width} if self.width else {})


def _case(row: str, depth: int = 2, suffix: str = "", qkv_bias: bool | None = None, width: int | None = None) -> Case:
    name = (MODELS[row].timm_id or "").rpartition("/")[2]
    return Case(name.replace("_dinov3.", f"_dinov3{suffix}."), row, depth, qkv_bias, width)


DEEP = {  # small width, full depth; timm has each DINOv3 without the zero biases too
    "dinov3": _case("dinov3_vits16", 12, qkv_bias=False),
    "dinov3-qkvb": _case("dinov3_vits16", 12, "_qkvb"),
    "dinov3-gated": _case("dinov3_vits16plus", 12, qkv_bias=False),
    "dinov3-gated-qkvb": _case("dinov3_vits16plus", 12, "_qkvb"),
    "lingbot": _case("lingbot_vits16", 12),
    "dinov2": _case("dinov2_vits14", 12),
    "dinov2-registers": _case("dinov2_vits14_reg", 12),
    "dino-16": _case("dino_vits16", 12),
    "dino-8": _case("dino_vits8", 12),
}
WIDE = {  # full width, two blocks
    **{row: _case(row, 2, "_qkvb") for row in ("dinov3_vitb16", "dinov3_vitl16", "dinov3_vith16plus")},
    **{row: _case(row) for row in MODELS if row.startswith(("lingbot", "dinov2", "dino_")) and "_vits" not in row},
}
TINY = {
    "tiny-dinov3": _case("dinov3_vits16", 4, "_qkvb", width=96),
    "tiny-dinov2": _case("dinov2_vits14", 4, width=96),
    "tiny-dinov2-registers": _case("dinov2_vits14_reg", 4, width=96),
    "tiny-dino": _case("dino_vits16", 4, width=96),
}
ALL = DEEP | WIDE | TINY
DTYPES = [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32")]


@pytest.fixture(scope="module")
def make_saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    import timm
    from timm.models import save_for_hf

    @functools.lru_cache(maxsize=10)  # building takes longer than most tests
    def make(name: str) -> Saved:
        case, directory = ALL[name], tmp_path_factory.mktemp("timm")
        model = timm.create_model(case.timm, num_classes=0, dynamic_img_size=True, **case.options)
        save_for_hf(randomise(model), str(directory), safe_serialization=True)
        return Saved(case.config, model, directory)

    return make


def configs(cases: dict[str, Case]) -> dict[str, ViTConfig]:
    return {name: case.config for name, case in cases.items()}


GRID_CASES = [
    *grid_cases(configs(DEEP), (10, 6), (16, 24)),
    *grid_cases(
        configs({n: c for n, c in DEEP.items() if c.qkv_bias is None}), (14, 14), (32, 32), slow=True, native=True
    ),
    *grid_cases(configs(WIDE), (10, 6), (16, 24), slow=True),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("saved", "grid"), GRID_CASES, indirect=["saved"])
def test_all_tokens_of_all_layers(saved: Saved, grid: tuple[int, int], dtype: torch.dtype) -> None:
    """Class token, registers and patches equal timm's, after the last block and after each block."""
    config = saved.config
    ours, theirs = saved.pair(dtype)
    assert ours.config == config
    pixels = pixels_of(config, grid, batch=2 if grid == (10, 6) else 1).to(dtype)
    last, taken = theirs.forward_intermediates(pixels, norm=True, return_prefix_tokens=True, output_fmt="NLC")
    output = ours(pixels, layers=config.depth)
    assert_same_tokens(output, last)
    for i, (layer, (patches, prefix)) in enumerate(zip(output.layers, taken, strict=True)):
        assert_same_tokens(layer, torch.cat((prefix, patches), dim=1), f"block {i}")


@pytest.mark.parametrize("saved", DEEP, indirect=True)
def test_bfloat16_is_no_further_from_float64(saved: Saved) -> None:
    """In bfloat16 our error against float64 is at most that of timm's bfloat16 model."""
    pixels = pixels_of(saved.config, (10, 6), batch=2)
    exact = copy.deepcopy(saved.model).double().forward_features(pixels.double())
    ours, theirs = saved.pair(torch.bfloat16)
    found, limit = relative(tokens(ours(pixels)), exact), relative(theirs.forward_features(pixels.bfloat16()), exact)
    assert 1e-4 < found <= limit  # the lower end: the matrices are in bfloat16 indeed, which rounds by 2e-3


def assert_same_tree(ours: Any, theirs: Any) -> None:
    """Checks that two nests of lists and tuples hold the same tensors."""
    if isinstance(theirs, Tensor):
        channels = 1 if theirs.ndim == 4 else -1  # NCHW, or tokens
        assert ours.shape == theirs.shape
        assert_same(ours.movedim(channels, -1), theirs.movedim(channels, -1))
        return
    assert type(ours) is type(theirs) and len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert_same_tree(mine, other)


@pytest.mark.parametrize("saved", TINY, indirect=True)
@pytest.mark.parametrize("indices", [None, 1, 3, [3, 1], [-1, 0], (-3,), range(4)], ids=str)
def test_forward_intermediates(saved: Saved, indices: Any) -> None:
    """The method returns timm's output for every combination of its arguments."""
    ours, theirs = saved.pair(torch.float64)
    pixels = pixels_of(saved.config, (3, 5), batch=2).double()
    for prefix, norm, early, form, only in itertools.product(*[[False, True]] * 3, ("NCHW", "NLC"), [False, True]):
        asked = dict(
            indices=indices, return_prefix_tokens=prefix, norm=norm, stop_early=early, output_fmt=form,
            intermediates_only=only,
        )  # fmt: skip
        expected = theirs.forward_intermediates(pixels, **asked)
        assert_same_tree(ours.forward_intermediates(pixels, **asked), expected)


@pytest.mark.parametrize(
    "row", [name for name, row in MODELS.items() if row.timm_id and isinstance(row.config, ViTConfig)]
)
def test_shapes_at_full_size(row: str) -> None:
    """Every tensor of timm's model has its place in ours, up to 7B, on the meta device."""
    import timm

    case = _case(row, MODELS[row].config.depth, "" if "7b" in row else "_qkvb")
    with torch.device("meta"):
        theirs = timm.create_model(case.timm, num_classes=0)
        expected = VisionTransformer(case.config).state_dict()
    adopted = Backbone.adopt(theirs)
    assert adopted.config == case.config
    assert {name: t.shape for name, t in adopted.state_dict().items()} == {n: t.shape for n, t in expected.items()}
