"""Streams that reuse the memory of a frame give the right row for every frame, for any number of threads."""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from pictures import photo
from PIL import Image, ImageSequence

from dinov3_infer import Backbone

FRAMES = [photo(40, 60, seed=i) for i in range(4)]


@pytest.fixture(scope="module")
def bb() -> Backbone:
    return Backbone.from_pretrained("nano", device="cpu")


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}_threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def arrays() -> Iterator[np.ndarray]:
    frame = np.empty_like(FRAMES[0])
    for one in FRAMES:
        frame[:] = one
        yield frame


def views() -> Iterator[np.ndarray]:
    """Slices of one larger array, as a ring buffer yields them."""
    ring = np.empty((1, *FRAMES[0].shape), np.uint8)
    for one in FRAMES:
        ring[0] = one
        yield ring[0]


def floats() -> Iterator[np.ndarray]:
    frame = np.empty(FRAMES[0].shape, np.float32)
    for one in FRAMES:
        np.divide(one, 255, out=frame, dtype=np.float32)
        yield frame


def tensors() -> Iterator[torch.Tensor]:
    frame = torch.empty(3, 40, 60, dtype=torch.uint8)
    for one in FRAMES:
        frame.copy_(torch.from_numpy(one).permute(2, 0, 1))
        yield frame


def streams() -> Iterator[io.BytesIO]:
    stream = io.BytesIO()
    for one in FRAMES:
        stream.seek(0)
        stream.truncate()
        Image.fromarray(one).save(stream, "png")
        yield stream


def pasted() -> Iterator[Image.Image]:
    picture = Image.new("RGB", (60, 40))
    for one in FRAMES:
        picture.paste(Image.fromarray(one))
        yield picture


def animation() -> Any:
    content = io.BytesIO()
    first, *rest = map(Image.fromarray, FRAMES)
    first.save(content, "png", save_all=True, append_images=rest)
    return ImageSequence.Iterator(Image.open(content))


class Rows(Sequence):  # type: ignore[type-arg]
    """A sequence that is not a list: it makes each item on request."""

    def __init__(self) -> None:
        self.frame = np.empty_like(FRAMES[0])

    def __len__(self) -> int:
        return len(FRAMES)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        if index >= len(FRAMES):
            raise IndexError
        self.frame[:] = FRAMES[index]
        return self.frame


class Numbered:
    """A Dataset like those of torch."""

    def __init__(self) -> None:
        self.rows = Rows()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.rows[index], 0


MAKERS = [arrays, views, floats, tensors, streams, pasted, animation, Rows]
WAYS: dict[str, Callable[[Backbone, Any], np.ndarray]] = {
    "embed": lambda bb, images: bb.embed(images, size=32),
    "small batches": lambda bb, images: bb.embed(images, size=32, batch_size=3),
    "workers": lambda bb, images: bb.embed(images, size=32, num_workers=3),
    "iter_features": lambda bb, images: np.concatenate([f.embedding for f in bb.iter_features(images, size=32)]),
    "extract_features": lambda bb, images: bb.extract_features(images, size=32).embedding.numpy(),
}


@pytest.mark.parametrize("make", MAKERS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("way", WAYS)
def test_every_frame_has_its_row(bb: Backbone, threads: int, way: str, make: Callable[[], Any]) -> None:
    frames = [one / np.float32(255) for one in FRAMES] if make is floats else list(FRAMES)
    truth = bb.embed(frames, size=32)
    assert len({row.tobytes() for row in truth}) == len(FRAMES)
    assert np.abs(WAYS[way](bb, make()) - truth).max() < 1e-5


def test_a_file_of_a_stream_has_every_frame(bb: Backbone, threads: int, tmp_path: Any) -> None:
    bb.embed(arrays(), tmp_path / "a.npy", size=32)
    assert np.array_equal(np.load(tmp_path / "a.npy"), bb.embed(list(FRAMES), size=32))


def test_a_dataset_with_one_buffer_is_asked_by_one_thread_at_a_time(bb: Backbone) -> None:
    found = bb.embed(Numbered(), size=32, num_workers=4)
    assert np.array_equal(found, bb.embed(list(FRAMES), size=32))


def test_what_is_given_is_not_changed(bb: Backbone) -> None:
    before = [one.copy() for one in FRAMES]
    bb.embed(iter(FRAMES), size=32)
    assert all(np.array_equal(a, b) for a, b in zip(before, FRAMES, strict=True))
