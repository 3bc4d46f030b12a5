"""`iter_features`: images of any size, in input order, each as if it were alone, also after errors."""

import io
import itertools
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import SMALL, randomise
from pictures import complaint, photo
from PIL import Image

from dinov3_infer import Backbone, Features, ImageError, InputError, InputTypeError, ViTConfig
from dinov3_infer.features.extractor import Extractor
from dinov3_infer.features.stream import MAX_TOKENS, Batcher, Reading

SIZES = [(64, 64), (64, 96), (50, 70), (64, 64), (96, 64), (33, 120), (64, 96)]
PICTURES = [photo(*size, seed=i) for i, size in enumerate(SIZES)]
BROKEN = b"GIF89a"


def backbone(config: ViTConfig | None = None) -> Backbone:
    return randomise(Backbone.from_config(config or SMALL["dinov3"]))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def bb() -> Backbone:
    return backbone()


def same(a: Features, b: Features) -> bool:
    """Whether all tensors are equal bit for bit, and the grids too."""
    pairs = [(a, b), *zip(a.layers, b.layers, strict=True)]
    names = ("cls_token", "register_tokens", "patch_tokens")
    tokens = all(torch.equal(getattr(x, name), getattr(y, name)) for x, y in pairs for name in names)
    return tokens and torch.equal(a.embedding, b.embedding) and (a.grid, a.placements) == (b.grid, b.placements)


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}_threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# --- results ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("name", SMALL)
def test_mixed_sizes_give_what_each_image_gives_alone(name: str, batch_size: int) -> None:
    """The results are equal bit for bit, one `Features` per image, in input order."""
    bb = backbone(SMALL[name])
    found = list(bb.iter_features(PICTURES, fit="native", layers=[-1, 0], pooling="cls_mean", batch_size=batch_size))
    assert len(found) == len(PICTURES) and all(len(f) == 1 for f in found)
    for features, picture in zip(found, PICTURES, strict=True):
        assert same(features, bb.extract_features(picture, fit="native", layers=[-1, 0], pooling="cls_mean"))


@pytest.mark.parametrize("width, heads, ffn", [(384, 6, 1536), (768, 12, 3072)], ids=["width_384", "width_768"])
def test_neighbours_do_not_matter_at_real_widths(width: int, heads: int, ffn: int, threads: int) -> None:
    """Neighbours, order and batch size vary at the widths of released models, whose products are split differently."""
    bb = backbone(ViTConfig(width, 2, heads, ffn))
    pictures = [photo(*size, seed=i) for i, size in enumerate([(224, 224), (160, 336), (48, 80), (16, 16), (16, 32)])]
    alone = [bb.extract_features(picture, fit="native") for picture in pictures]
    draw = random.Random(width)
    for _ in range(4):
        order = draw.choices(range(len(pictures)), k=draw.randint(2, 9))
        stream = bb.iter_features((pictures[i] for i in order), fit="native", batch_size=draw.randint(1, 9))
        assert all(same(alone[i], f) for i, f in zip(order, stream, strict=True)), order


@pytest.mark.parametrize("num_workers", [0, 3])
def test_every_kind_of_source_and_thread(num_workers: int, bb: Backbone, tmp_path: Any) -> None:
    """Covers paths, bytes, streams, open images (one of them repeated), arrays and tensors."""
    Image.fromarray(PICTURES[0]).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    opened, tensor = Image.open(tmp_path / "a.png"), torch.from_numpy(PICTURES[0].copy()).permute(2, 0, 1)
    sources = [tmp_path / "a.png", str(tmp_path / "a.png"), content, io.BytesIO(content), PICTURES[0], tensor]
    sources += [opened] * 20
    expected = bb.extract_features(PICTURES[0], size=64)
    found = list(bb.iter_features(sources, size=64, num_workers=num_workers, batch_size=4))
    assert len(found) == len(sources) and all(same(f, expected) for f in found)


def test_reading_beside_the_model_gives_the_same(bb: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a GPU, threads read the next images while a pass runs."""
    expected = list(bb.iter_features(PICTURES, size=64))
    monkeypatch.setattr(Extractor, "reading", lambda *_: Reading(3, ahead=True))
    found = list(bb.iter_features(PICTURES, size=64, batch_size=2))
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    taken = itertools.count()
    stream = bb.iter_features((PICTURES[next(taken) * 0] for _ in itertools.count()), size=32, batch_size=4)
    for _ in range(3):
        next(stream)
    assert next(taken) <= 2 * 4 + 3 + 1
    stream.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("dinov3-infer-read")]


def test_padding_is_known_to_each_image(bb: Backbone) -> None:
    """Each result has its `valid`, and its mean leaves the padding out."""
    for features, picture in zip(bb.iter_features(PICTURES, size=64, fit="pad", pooling="mean"), PICTURES, strict=True):
        expected = bb.extract_features(picture, size=64, fit="pad", pooling="mean")
        assert same(features, expected) and torch.equal(features.valid, expected.valid)  # type: ignore[arg-type]


def test_results_own_their_memory(bb: Backbone) -> None:
    """Keeping the vector of one image does not keep its tokens or its neighbours in memory."""
    features = list(bb.iter_features([PICTURES[0]] * 8, size=64))[3]
    for tensor in (features.embedding, features.cls_token, features.patch_tokens):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4


def test_a_model_in_training_gives_the_same() -> None:
    """In training, a packed pass uses the norm for local crops; features never use it."""
    config = replace(SMALL["dinov3"], prefix_norm=True, local_cls_norm=True)
    bb, training = backbone(config), backbone(config).train()
    pairs = zip(bb.iter_features(PICTURES, fit="native"), training.iter_features(PICTURES, fit="native"), strict=True)
    assert all(same(a, b) for a, b in pairs)


# --- how the stream runs ------------------------------------------------------------------------------------------


def passes(bb: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Records the number of images per size for every later pass."""
    seen: list[list[int]] = []
    forward, packed = bb.forward, bb.forward_packed
    monkeypatch.setattr(bb, "forward", lambda x, *a, **k: (seen.append([len(x)]), forward(x, *a, **k))[1])
    monkeypatch.setattr(
        bb, "forward_packed", lambda x, *a, **k: (seen.append([len(t) for t in x]), packed(x, *a, **k))[1]
    )
    return seen


def test_neighbours_of_several_sizes_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal sizes are stacked, and no image waits outside of its batch."""
    bb = backbone()
    seen = passes(bb, monkeypatch)
    list(bb.iter_features(PICTURES, fit="native", batch_size=4))
    assert seen == [[2, 1, 1], [1, 1, 1]]


def test_a_pass_is_bounded_by_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four images of 16 patches fill a pass of 64 tokens; an image above the limit runs alone."""
    bb = backbone()
    monkeypatch.setitem(MAX_TOKENS, "cpu", 64)
    seen = passes(bb, monkeypatch)
    list(bb.iter_features(PICTURES[:6], size=64))
    assert seen == [[4], [2]]
    seen.clear()
    list(bb.iter_features(PICTURES[:2], size=160))
    assert seen == [[1], [1]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_full_batch_does_not_wait_for_the_next_image(num_workers: int, bb: Backbone) -> None:
    """A camera gets the features of each frame before it is asked for the next one."""
    taken = itertools.count()
    camera = (PICTURES[next(taken) * 0] for _ in itertools.count())
    stream = bb.iter_features(camera, size=32, batch_size=1, num_workers=num_workers)
    for number in range(1, 4):
        next(stream)
        assert next(taken) == 2 * number - 1


def test_a_model_on_the_cpu_has_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """No image is read during a pass."""
    bb, read, during = backbone(), itertools.count(), []
    load, forward = Batcher._load, bb.forward

    def loaded(batcher: Any, item: Any) -> Any:
        time.sleep(0.02)
        next(read)
        return load(batcher, item)

    def run(*args: Any, **options: Any) -> Any:
        before = next(read)
        time.sleep(0.1)
        during.append(next(read) - before - 1)
        return forward(*args, **options)

    monkeypatch.setattr(Batcher, "_load", loaded)
    monkeypatch.setattr(bb, "forward", run)
    list(bb.iter_features([PICTURES[0]] * 10, size=32, batch_size=4, num_workers=2))
    assert during == [0, 0, 0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_endless_stream_is_read_as_needed(num_workers: int, bb: Backbone) -> None:
    """Reading stays at most two batches ahead, and closing the stream ends the threads."""
    taken = itertools.count()
    stream = bb.iter_features((PICTURES[next(taken) * 0] for _ in itertools.count()), size=32, batch_size=4,
                              num_workers=num_workers)  # fmt: skip
    for _ in range(3):
        next(stream)
    assert next(taken) <= 2 * 4 + num_workers + 1
    stream.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("dinov3-infer-read")]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_image_costs_its_own_place(num_workers: int, bb: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    """ "skip" yields None and logs the reason; "raise" raises after all earlier images were yielded."""
    images = [*PICTURES[:2], BROKEN, PICTURES[3], "missing.png", PICTURES[4]]
    found = list(bb.iter_features(images, size=64, on_error="skip", num_workers=num_workers))
    assert [f is None for f in found] == [False, False, True, False, True, False]
    assert all(same(f, bb.extract_features(i, size=64)) for f, i in zip(found, images, strict=True) if f is not None)
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 2 and "item 2" in said[0] and "missing.png" in said[1] and "item 4" in said[1]
    returned = list(bb.iter_features(images, size=64, on_error="return", num_workers=num_workers))
    assert [str(e) for e in returned if isinstance(e, ImageError | FileNotFoundError)] == [
        s.split(": ", 1)[1] for s in said
    ]
    stream = bb.iter_features(images, size=64, num_workers=num_workers)
    assert same(next(stream), found[0]) and same(next(stream), found[1])  # type: ignore[arg-type]
    assert "item 2" in complaint(ImageError, lambda: next(stream))


def test_memory_that_does_not_do_is_halved(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The batch is halved until it fits, with one log line each time; the features do not change."""
    bb = backbone()
    bb.mode = "plain"  # replacing forward would drop the plan, which rounds differently
    expected = list(bb.iter_features([*PICTURES, *PICTURES], size=64))
    forward, sizes = bb.forward, []

    def tight(pixels: torch.Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(len(pixels))
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(pixels, *args, **options)

    monkeypatch.setattr(bb, "forward", tight)
    found = list(bb.iter_features([*PICTURES, *PICTURES], size=64, batch_size=8))
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert sizes == [8, 4, *[2] * 7]
    assert [r.getMessage() for r in caplog.records][0] == "out of memory with 8 images per pass; continuing with 4"


def test_one_image_too_large_for_the_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own error is raised, with a note that gives the remedy."""
    bb = backbone()

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bb, "forward", full)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        list(bb.iter_features([PICTURES[0]] * 2, size=64))
    assert caught.value.__notes__ == ["item 0 does not fit in memory even alone; give a smaller size="]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (dict(batch_size=0), InputError, "batch_size is a whole number of at least 1, got 0"),
        (dict(batch_size=2.5), InputTypeError, "got 2.5"), (dict(num_workers=-1), InputError, "num_workers"),
        (dict(on_error="ignore"), InputError, "one of raise, skip, return; got 'ignore'"),
        (dict(pooling="max"), InputError, "'max'"), (dict(layers=[9]), IndexError, "layer 9"),
        (dict(facet="keys", layers=1), InputError, "got 'keys'"), (dict(facet="key"), InputError, "layers=[-1]"),
        (dict(size=250), InputError, "nearest is 256"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_options_are_said_at_the_call(options: dict[str, Any], error: Any, said: str, bb: Backbone) -> None:
    """The call itself raises, before an image is read."""
    assert said in complaint(error, lambda: bb.iter_features(iter([]), **options))


def test_nothing_in_nothing_out(bb: Backbone) -> None:
    assert list(bb.iter_features([])) == [] and list(bb.iter_features([], num_workers=2)) == []
