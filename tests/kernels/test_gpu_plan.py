"""The plan for CUDA on a GPU: that it is used, that its numbers are right, and that nothing waits before the end."""

from typing import Any

import numpy as np
import pytest
import torch
from oracles import randomise
from pictures import photo
from torch.nn.functional import cosine_similarity

from dinov3_infer import Backbone, ViTConfig
from dinov3_infer.model.dispatch import _PLANS

pytest.importorskip("triton", minversion="3.6")
pytestmark = pytest.mark.gpu

CONFIGS = {
    "mlp": ViTConfig(128, 3, 2, 256),
    "gated": ViTConfig(128, 3, 2, 192, gated=True, prefix_norm=True),
    "wide": ViTConfig(256, 2, 2, 512, gated=True, qkv_bias=False),  # heads of 128 channels
    "learned": ViTConfig(128, 3, 2, 256, patch_size=14, position_grid=5, key_bias=True, norm_eps=1e-6),
}
PHOTOS = [photo(96, 144, seed=i) for i in range(7)]


def pair(config: ViTConfig, dtype: Any = None) -> tuple[Backbone, Backbone]:
    """The same model on the CPU in float32 and on the GPU, whose plan has to be used."""
    here, there = (randomise(Backbone.from_config(config)) for _ in range(2))
    there = there.to("cuda") if dtype is None else there.to("cuda", dtype)
    assert there.why_not_plan() is None  # type: ignore[operator]
    return here, there  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_plan_is_used_and_right(name: str, dtype: Any) -> None:
    """For short and long images, large and small batches, and each call of a graph: first, captured, replayed."""
    here, there = pair(CONFIGS[name], dtype)
    side = here.patch_size
    for size, count in ((4 * side, 1), (16 * side, 3), (20 * side, 7)):
        expected = here.extract_features(PHOTOS[:count], size=size, layers=[0])
        for _ in range(4):
            found = there.extract_features(PHOTOS[:count], size=size, layers=[0])
            for a, b in ((expected, found), (expected.layers[0], found.layers[0])):
                for part in ("cls_token", "register_tokens", "patch_tokens"):
                    ours, theirs = getattr(b, part).cpu(), getattr(a, part)
                    assert not theirs.numel() or cosine_similarity(ours, theirs, dim=-1).min() >= 0.998
    assert _PLANS[there].plan is not None


@pytest.mark.parametrize("name", CONFIGS)
def test_the_plan_of_several_sizes(name: str) -> None:
    here, there = pair(CONFIGS[name])
    images = [photo(80, 144), photo(160, 96), photo(80, 144, seed=1)]
    options: Any = dict(size=12 * here.patch_size, fit="native")
    pairs = zip(here.iter_features(images, **options), there.iter_features(images, **options), strict=True)
    for expected, found in pairs:
        assert cosine_similarity(expected.last_hidden_state, found.last_hidden_state, dim=-1).min() >= 0.998


def test_the_plan_waits_for_nothing_before_the_end() -> None:
    """Once it is warm: no copy that stops the host, no number that is read."""
    _, there = pair(CONFIGS["mlp"])
    extractor = there.extractor
    for count in (1, 64):
        images = [photo(96, 96, seed=i) for i in range(count)]
        for mode in ("default", "default", "default", "error"):
            batch = extractor.batch(there.preprocess.with_options(64), images)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(mode)
            try:
                extractor.launched([batch])
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_the_plan_in_a_stream_of_batches() -> None:
    """Rows of `embed` are the vectors of each image, whatever flies beside it."""
    _, there = pair(CONFIGS["mlp"])
    rows = there.embed(PHOTOS * 5, size=64, batch_size=4)
    for row, image in zip(rows, PHOTOS * 5, strict=True):
        alone = there.extract_features(image, size=64).embedding[0].cpu().numpy()
        assert np.abs(row - alone).max() < 0.05 * np.abs(alone).max()


def test_graphs_of_a_plan_follow_the_weights() -> None:
    """A change of a parameter ends the graphs with the plan."""
    _, there = pair(CONFIGS["mlp"], torch.bfloat16)
    before = [there.extract_features(PHOTOS[0], size=64).cls_token for _ in range(3)][-1]
    with torch.no_grad():
        there.blocks[0].attn.proj.weight.mul_(-1.0)
    after = [there.extract_features(PHOTOS[0], size=64).cls_token for _ in range(3)]
    assert all((a - before).abs().max() > 1e-2 for a in after)
    assert all(cosine_similarity(a, after[0], dim=-1).min() > 0.9999 for a in after)
