"""The towers of dino.txt: recorded numbers of Meta's code, and transformers' modules with the same weights."""

import numpy as np
import pytest
import torch
from fill import filled, noise
from oracles import randomise, relative
from pictures import complaint
from texts import clip_tower, clip_vectors, dinov3_layers

from dinov3_infer import Backbone, InputError
from dinov3_infer.released.catalogue import HEADS
from dinov3_infer.released.dinotxt import DinoTxt
from dinov3_infer.released.towers import TextTower, VisionHead

pytestmark = pytest.mark.usefixtures("no_grad")

BOUND = {torch.float64: 1e-12, torch.float32: 1e-6}
dtypes = pytest.mark.parametrize("dtype", list(BOUND))


def test_the_text_tower_is_metas() -> None:
    tower = filled(TextTower(32, 4, 2, 48, context=12, vocabulary=64).double(), 11)
    assert len(tower.state_dict()) == 27
    ids = torch.tensor([[62, 5, 9, 63, *[0] * 8], [62, *range(1, 11), 63]])
    found = tower(ids)
    assert found.shape == (2, 48) and float(found.sum()) == pytest.approx(-4.8956573, abs=1e-6)
    assert float(found.abs().sum()) == pytest.approx(84.0412683, abs=1e-6)
    first = [-0.9139653, -1.6215891, 1.8082951, -0.5631322]
    assert found.flatten()[:4].tolist() == pytest.approx(first, abs=1e-7)
    assert float(found.flatten()[-1]) == pytest.approx(-1.4221329, abs=1e-7)
    assert relative(tower(ids[:1, :4]), found[:1]) < 1e-14, "what follows the end counts for nothing"


def test_the_vision_head_is_metas() -> None:
    head = filled(VisionHead(24, 4).double(), 12)
    found = head(noise(13, 2, 11, 24))
    assert float(found.sum()) == pytest.approx(-4.5452466, abs=1e-6)
    assert float(found.abs().sum()) == pytest.approx(416.9478851, abs=1e-6)
    assert found.flatten()[:3].tolist() == pytest.approx([-0.7987058, 1.6931574, -0.3852033], abs=1e-7)
    vectors = torch.cat((found[:, 0], found[:, 5:].mean(dim=1)), dim=-1)
    assert float(vectors.sum()) == pytest.approx(0.1790138, abs=1e-6)
    assert float(vectors.abs().sum()) == pytest.approx(58.5483337, abs=1e-6)
    assert float(vectors.flatten()[-1]) == pytest.approx(-0.2829343, abs=1e-7)


def ids_of(vocabulary: int) -> torch.Tensor:
    """[4, 77]: texts of several lengths, the longest without padding."""
    draw = np.random.default_rng(0)
    rows = torch.zeros(4, 77, dtype=torch.int64)
    for row, length in zip(rows, (0, 5, 30, 75), strict=True):
        words = torch.from_numpy(draw.integers(1, vocabulary - 2, length))
        row[: length + 2] = torch.tensor([vocabulary - 2, *words.tolist(), vocabulary - 1])
    return rows


@dtypes
def test_texts_at_full_width_are_transformers(dtype: torch.dtype) -> None:
    tower = randomise(TextTower(1280, 20, 1, 2048, vocabulary=1000), 1).to(dtype)
    ids = ids_of(1000)
    assert relative(tower(ids), clip_vectors(clip_tower(tower), ids)) < BOUND[dtype]  # type: ignore[arg-type]


@pytest.mark.slow
def test_texts_at_full_size_are_transformers() -> None:
    tower = randomise(TextTower(1280, 20, 24, 2048), 1)
    ids = ids_of(49408)
    assert relative(tower(ids), clip_vectors(clip_tower(tower), ids)) < 3e-6  # type: ignore[arg-type]


@dtypes
def test_tokens_at_full_width_are_transformers(dtype: torch.dtype) -> None:
    head = randomise(VisionHead(1024, 16), 2).to(dtype)
    tokens = torch.randn(2, 5 + 30, 1024, dtype=dtype)
    assert relative(head(tokens), dinov3_layers(head)(tokens)) < BOUND[dtype]  # type: ignore[arg-type]


@pytest.mark.parametrize("info", [row for row in HEADS if row.kind == "text"], ids=lambda row: row.name)
def test_parameters_are_those_that_were_published(info) -> None:  # type: ignore[no-untyped-def]
    with torch.device("meta"):
        model = DinoTxt(info, Backbone.from_config(info.backbone))
    count = {name: tensor.numel() for name, tensor in model.head_state().items()}
    assert sum(n for name, n in count.items() if name.startswith("visual_model.head.")) == 25_326_336
    assert sum(n for name, n in count.items() if name.startswith("text_model.")) == 538_131_200
    if info.name.startswith("dinov3"):
        assert len(count) == 302 and sum(count.values()) == 563_457_537
    else:
        assert len(count) == 301, "its logit scale was not released"


def test_what_are_no_ids() -> None:
    tower = TextTower(32, 4, 1, 48, vocabulary=64)
    text = complaint(InputError, lambda: tower(torch.zeros(1, 78, dtype=torch.int64)))
    assert text.startswith("ids are whole numbers [B, N], N from 1 to 77, got torch.int64 [1, 78]")
    assert "torch.float32 [2, 3]" in complaint(InputError, lambda: tower(torch.zeros(2, 3)))
