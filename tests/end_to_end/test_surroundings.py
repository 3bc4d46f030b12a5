"""Settings of the process do not change results: torch's default dtype and device, and other threads."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from pictures import photo
from torch import Tensor

from dinov3_infer import Backbone, tasks
from dinov3_infer.tasks.clusters import kmeans
from dinov3_infer.train.draws import generator
from dinov3_infer.train.views import ViewConfig, make_views

IMAGES = [photo(40, 60, seed=i) for i in range(4)]


@pytest.fixture(scope="module")
def bb() -> Backbone:
    return Backbone.from_pretrained("nano", device="cpu")


@pytest.fixture(params=["float64", "bfloat16", "meta"])
def defaults(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Makes a call with other defaults of torch and restores them."""

    def change() -> None:
        if request.param == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, request.param))

    yield change
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)  # type: ignore[arg-type]
    vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)  # torch 2.8 cannot name its default after None


def tensors(found: Any) -> list[Tensor]:
    """All tensors in a result."""
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, np.ndarray):
        return [torch.from_numpy(found)]
    if isinstance(found, dict):
        return [t for one in found.values() for t in tensors(one)]
    if isinstance(found, (list, tuple)):
        return [t for one in found for t in tensors(one)]
    return [found.cls_token, found.register_tokens, found.patch_tokens] if hasattr(found, "cls_token") else []


def masks() -> list[np.ndarray]:
    found = np.zeros((40, 60), bool)
    found[10:30, 15:45] = True
    return [found] * len(IMAGES)


CALLS: dict[str, Callable[[Backbone], Any]] = {
    "preprocess": lambda bb: bb.preprocess(IMAGES[0]),
    "hf preprocess": lambda bb: Backbone.from_pretrained("nano", device="cpu", preprocessing="hf").preprocess(
        IMAGES[0]
    ),
    "features": lambda bb: bb.extract_features(IMAGES, size=32, layers=[0], pooling="cls_mean"),
    "padded": lambda bb: bb.extract_features(IMAGES, size=64, fit="pad").valid,
    "float image": lambda bb: bb.extract_features(IMAGES[0] / np.float32(255), size=32),
    "facet": lambda bb: list(bb.extract_features(IMAGES[0], size=32, layers=[1], facet="key").layers),
    "stream": lambda bb: [f.embedding for f in bb.iter_features(iter(IMAGES), size=32)],
    "embed": lambda bb: bb.embed(IMAGES, size=32),
    "attention": lambda bb: bb.attention_maps(IMAGES[0], size=32, query=(3, 3)),
    "loaded anew": lambda bb: Backbone.from_pretrained("nano", device="cpu").extract_features(IMAGES[0], size=32),
    "periods": lambda bb: Backbone.from_pretrained("nano", device="cpu", rope_periods="exact").rope_periods,
    "dense": lambda bb: tasks.dense_features(bb, IMAGES[0], size=64, tile=32, scales=(1.0, 0.5), flip=True),
    "one shot": lambda bb: tasks.OneShotSegmenter().fit(bb.extract_features(IMAGES, size=32), masks()).tensors,
    "head": lambda bb: tasks.SegmentationHead(steps=2).fit(bb.extract_features(IMAGES, size=32), masks()).tensors,
    "linear": lambda bb: tasks.LinearProbe(steps=3).fit(bb.embed(IMAGES, size=32), [0, 1, 0, 1]).tensors,
    "logistic": lambda bb: tasks.LogisticProbe(C=1.0).fit(bb.embed(IMAGES, size=32), [0, 1, 0, 1]).tensors,
    "attentive": lambda bb: (
        tasks.AttentiveProbe(learning_rates=(1e-3,), epochs=1)
        .fit(bb.extract_features(IMAGES, size=32).patch_tokens, [0, 1, 0, 1])
        .tensors
    ),
    "region": lambda bb: tasks.region_vector(bb.extract_features(IMAGES[0], size=32), mask=masks()[0]),
    "k-means": lambda bb: kmeans(
        lambda: iter([torch.from_numpy(photo(8, 8)[0].astype(np.float32))]), 3, torch.Generator("cpu").manual_seed(0)
    ),
    "views": lambda bb: tuple(
        make_views(
            torch.from_numpy(IMAGES[0]).permute(2, 0, 1),
            ViewConfig(global_px=32, local_px=16),
            generator(0, 0, "views"),
        )
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_defaults_of_torch_change_nothing(bb: Backbone, defaults: Callable[[], None], name: str) -> None:
    """Results are equal bit for bit, in the same dtype, on the same device."""
    before = tensors(CALLS[name](bb))
    defaults()
    after = tensors(CALLS[name](bb))
    assert before and len(before) == len(after)
    for a, b in zip(before, after, strict=True):
        assert (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape)
        assert torch.equal(a, b)
