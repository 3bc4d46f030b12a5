"""Arrays, tensors and streams as images are accepted or refused with an error."""

import io

import numpy as np
import pytest
import torch
from pictures import complaint, photo
from PIL import Image

from dinov3_infer.errors import ImageError, InputError
from dinov3_infer.images.decode import load_image


def test_an_array_with_a_mask_is_refused_and_one_without_is_taken() -> None:
    pixels = photo(20, 30)
    hidden = np.ma.array(pixels, mask=pixels > 200)
    assert "fill them first" in complaint(InputError, lambda: load_image(hidden))
    assert torch.equal(load_image(np.ma.array(pixels)), load_image(pixels))
    assert torch.equal(load_image(hidden.filled(0)), load_image(np.where(pixels > 200, 0, pixels).astype(np.uint8)))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_odd_tensors_are_refused_in_a_sentence(number: int) -> None:
    floats = torch.rand(3, 20, 30)
    odd = (
        floats.to_sparse(),
        torch.quantize_per_tensor(floats, 0.1, 0, torch.quint8),
        torch.empty(3, 20, 30, device="meta"),
    )
    assert "give a dense tensor" in complaint(ImageError, lambda: load_image(odd[number]))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_grey_arrays_and_tensors_are_what_pillow_makes_of_grey(dtype: type) -> None:
    grey = photo(20, 30)[..., 0]
    want = load_image(Image.fromarray(grey))
    given = grey if dtype is np.uint8 else grey / np.float32(255)
    for shape in (given, given[..., None], torch.from_numpy(given), torch.from_numpy(given)[None]):
        found = load_image(shape)
        assert found.shape == want.shape and found.stride() == want.stride()
        assert torch.equal(found if dtype is np.uint8 else (found * 255).round().to(torch.uint8), want)


@pytest.mark.parametrize("shape", [(30, 3), (30, 4), (30,), (20, 30, 2), (20, 30, 4), (1, 20, 30), (2, 20, 30, 1)])
def test_arrays_that_may_be_something_else_are_refused(shape: tuple[int, ...]) -> None:
    complaint(ImageError, lambda: load_image(np.zeros(shape, np.uint8)))


def _png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(photo(20, 30)).save(stream, "png")
    return stream.getvalue()


@pytest.mark.parametrize("place", [0, 16, "end"], ids=str)
def test_a_stream_is_read_from_its_start_where_it_does_not_stand_at_an_image(place: int | str) -> None:
    content = _png()
    stream = io.BytesIO(content)
    stream.seek(len(content) if place == "end" else place)
    assert torch.equal(load_image(stream), load_image(content))


def test_an_image_within_a_stream_is_read_from_where_it_stands() -> None:
    stream = io.BytesIO(b"some header" + _png())
    stream.seek(11)
    assert torch.equal(load_image(stream), load_image(_png()))


def test_a_stream_that_cannot_go_back_says_where_it_stands() -> None:
    class Pipe(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: object) -> int:
            return 0

    assert "a stream at its end" in complaint(ImageError, lambda: load_image(Pipe()))  # type: ignore[arg-type]
