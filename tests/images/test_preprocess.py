"""Preprocessing gives the pixels of other libraries' transforms, or a clear error."""

import math
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from pictures import complaint, photo, plain
from PIL import Image
from torch import Tensor

from dinov3_infer.errors import InputError
from dinov3_infer.images.decode import load_image
from dinov3_infer.images.preprocess import Preprocess
from dinov3_infer.zoo import MODELS, preprocess_of

IMAGENET: dict[str, Any] = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
# up and down, even spare pixels and both kinds of odd ones: 259 - 224 = 35, half of which rounds to 17 or to 18
SHAPES = [(300, 451), (299, 257), (100, 77), (257, 256), (256, 259), (901, 640)]
by_size = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")


# The same pixels as others


def resample_weights(count: int, wanted: int, name: str) -> np.ndarray:
    """[wanted, count]: the antialiased filter by definition, triangle or cubic with a = -0.5."""
    scale = count / wanted
    x = np.abs((np.arange(count) + 0.5 - (np.arange(wanted)[:, None] + 0.5) * scale) / max(scale, 1.0))
    if name == "bilinear":
        weights = np.maximum(0, 1 - x)
    else:
        far = np.where(x < 2, -0.5 * (x**3 - 5 * x**2 + 8 * x - 4), 0)
        weights = np.where(x <= 1, 1.5 * x**3 - 2.5 * x**2 + 1, far)
    return weights / weights.sum(axis=1, keepdims=True)


@by_size
@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("engine", "levels"), [("uint8", 1.7), ("pil", 1.7), ("float", 0.01)])
def test_resizing_is_the_antialiased_filter(engine, levels, name, shape) -> None:
    """Every engine is compared with the filter in float64.

    The integer engines round after the row pass and after the column pass, and cubic weights multiply the first error
    by up to 1.3; the float engine has float32 sampling positions, 1e-5 of a pixel off.
    """
    image = photo(*shape) // 2 + 64  # nothing overshoots a byte between the passes, where the integer engines clip
    rows, columns = (resample_weights(n, m, name) for n, m in zip(shape, (224, 251), strict=True))
    expected = np.einsum("ir,jc,rcd->dij", rows, columns, image.astype(np.float64), optimize=True)
    ours = plain((224, 251), filter=name, engine=engine)(image).double().numpy() * 255
    far = float(np.abs(ours - expected).max())
    assert far < levels


@by_size
@pytest.mark.parametrize("fit", ["squash", "crop", "native"])
@pytest.mark.parametrize("engine", ["uint8", "float", "pil"])
def test_pixels_do_not_depend_on_how_they_lie_in_memory(engine, fit, shape) -> None:
    """Files and arrays come channels last, tensors mostly channels first."""
    transform = plain(224, fit=fit, engine=engine)
    by_pixel = load_image(photo(*shape))
    assert by_pixel.stride(0) == 1 and transform(by_pixel).is_contiguous()
    assert torch.equal(transform(by_pixel), transform(by_pixel.contiguous()))


@pytest.mark.peers
@pytest.mark.parametrize("size", [(224, 224), (256, 256), (97, 513), (1, 300)], ids=lambda s: f"{s[0]}x{s[1]}")
@by_size
@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_uint8_resizing_equals_torchvision(name, shape, size) -> None:
    """The result equals torchvision's v2 transforms on a uint8 tensor bit for bit."""
    from torchvision.transforms.v2 import InterpolationMode, functional

    image = torch.from_numpy(photo(*shape)).permute(2, 0, 1).contiguous()
    theirs = functional.resize(image, list(size), InterpolationMode(name), antialias=True)
    assert torch.equal(plain(size, filter=name)(image), theirs / 255.0)


def processed(processor: Any, image: Image.Image) -> Tensor:
    return torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))


@by_size
@pytest.mark.parametrize("family", ["dinov2", "dino"])
def test_hf_style_equals_transformers_pil_processors(family, shape) -> None:
    """DINOv2's and DINO's published preprocessor_config.json with the PIL backend gives equal bits."""
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    if family == "dinov2":
        crop = {"height": 224, "width": 224}
        processor = BitImageProcessorPil(size={"shortest_edge": 256}, crop_size=crop, resample=3, **IMAGENET)
    else:
        processor = ViTImageProcessorPil(size={"height": 224, "width": 224}, resample=2, **IMAGENET)
    image = Image.fromarray(photo(*shape))
    row = next(row for row in MODELS.values() if row.family == family)
    assert torch.equal(preprocess_of(row, "hf")(image), processed(processor, image))


@pytest.mark.peers
@by_size
def test_hf_style_is_within_two_grey_levels_of_the_torchvision_backend(shape) -> None:
    """The two backends of transformers differ by that much; ours follows PIL, with which the models were published."""
    from transformers import BitImageProcessor

    crop = {"height": 224, "width": 224}
    processor = BitImageProcessor(size={"shortest_edge": 256}, crop_size=crop, resample=3, **IMAGENET)
    image = Image.fromarray(photo(*shape))
    far = (preprocess_of(MODELS["dinov2_vits14"], "hf")(image) - processed(processor, image)).abs()
    print(f"largest {float(far.max()):.4f}, mean {float(far.mean()):.1e} in normalised units")
    assert far.max() < 2.01 / 255 / 0.224 and far.mean() < 1e-3


@pytest.mark.peers
@by_size
@pytest.mark.parametrize("name", ["dinov3_vits16", "dinov3_vitl16_sat493m"])
def test_hf_style_equals_transformers_dinov3(name, shape) -> None:
    """transformers rescales before it resizes; the remaining difference is the order of two float32 products."""
    from transformers import DINOv3ViTImageProcessor

    row = MODELS[name]
    image = Image.fromarray(photo(*shape))
    theirs = processed(DINOv3ViTImageProcessor(image_mean=row.mean, image_std=row.std), image)
    assert (preprocess_of(row, "hf")(image) - theirs).abs().max() < 2e-6


@pytest.mark.peers
@pytest.mark.parametrize("name", [row.name for row in MODELS.values() if row.timm_id])
def test_timm_style_equals_timm(name) -> None:
    """Every row is compared with the transform that timm makes from its own table."""
    import timm

    row = MODELS[name]
    settings = timm.models.get_pretrained_cfg(str(row.timm_id).split("/")[-1]).to_dict()
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=settings))
    for shape in SHAPES:
        image = Image.fromarray(photo(*shape))
        assert torch.equal(preprocess_of(row, "timm")(image), theirs(image))


@pytest.mark.peers
@by_size
@pytest.mark.parametrize("name", ["dinov3_vits16", "dinov3_vitl16_sat493m", "dinov2_vits14", "dino_vitb8"])
def test_meta_style_equals_the_documented_transforms(name, shape) -> None:
    """The reference READMEs use v2 transforms on a uint8 tensor for DINOv3, and classic ones on PIL images before."""
    from torchvision import transforms as v1
    from torchvision.transforms import v2

    row = MODELS[name]
    if row.family == "dinov3":
        steps = [v2.ToImage(), v2.Resize((256, 256), antialias=True), v2.ToDtype(torch.float32, scale=True)]
        theirs: Any = v2.Compose([*steps, v2.Normalize(row.mean, row.std)])
    else:
        steps = [v1.Resize(256, v1.InterpolationMode.BICUBIC), v1.CenterCrop(224), v1.ToTensor()]
        theirs = v1.Compose([*steps, v1.Normalize(row.mean, row.std)])
    image = Image.fromarray(photo(*shape))
    ours, expected = preprocess_of(row, "meta")(image), theirs(image)
    # v2 multiplies by 1 / 255 in float32 where everyone else divides: the bytes are equal, the last bit is not
    assert torch.equal(ours, expected) if row.family != "dinov3" else (ours - expected).abs().max() < 2e-6


def test_a_style_that_nobody_published_is_refused() -> None:
    """Only timm publishes a transform for LingBot."""
    assert "'timm'" in complaint(InputError, lambda: preprocess_of(MODELS["lingbot_vits16"], "meta"))


# Where pixels go

FITS = [
    ("squash", 64), ("squash", (48, 80)), ("crop", 64), ("crop", (48, 80)), ("crop", (80, 48)), ("pad", 64),
    ("pad", (48, 80)), ("native", 64), ("native", None),
]  # fmt: skip
by_fit = pytest.mark.parametrize(("fit", "size"), FITS, ids=lambda v: str(v).replace(", ", "x").strip("()"))


@by_fit
@pytest.mark.parametrize("engine", ["uint8", "float", "pil"])
@pytest.mark.parametrize("shape", [(200, 120), (90, 333), (41, 41)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_a_dot_is_found_where_the_placement_says(shape, engine, fit, size) -> None:
    """The centre of mass of one bright square in the processed pixels agrees with `to_input`."""
    transform = plain(size, patch_size=8, fit=fit, engine=engine)
    middle, place = (shape[1] / 2, shape[0] / 2), transform.plan(*shape)
    for dx, dy in ((0, 0), (-8, 6), (7, -8)):  # near enough to the middle for every crop to keep it
        x, y = int(middle[0] + dx), int(middle[1] + dy)
        image = np.zeros((*shape, 3), np.uint8)
        image[y - 3 : y + 3, x - 3 : x + 3] = 255  # the edges of pixels x - 3 and x + 3: its centre is (x, y)
        pixels = transform(image)[0].double()
        rows, columns = (pixels.sum(dim=d) / pixels.sum() for d in (1, 0))
        found = [float((w * (torch.arange(len(w)) + 0.5)).sum()) for w in (columns, rows)]
        assert found == pytest.approx(place.to_input(x, y), abs=0.1)  # a filter is symmetric, but bytes are rounded


@by_fit
def test_corners_go_to_corners(fit, size) -> None:
    """The corners of the image become those of the input, or of its unpadded part; a crop is inside and central."""
    for shape in [(200, 120), (90, 333), (41, 41), (1, 1), (7, 900)]:
        placement = plain(size, patch_size=8, fit=fit).plan(*shape)
        (left, top), (right, bottom) = placement.to_input(0, 0), placement.to_input(shape[1], shape[0])
        height, width = placement.window[2:]
        if fit in ("squash", "native"):
            assert (left, top, right, bottom) == (0, 0, width, height)
        elif fit == "pad":
            assert (left, top) == (0, 0) and (right, bottom) == placement.resized[::-1]
            assert right <= width and bottom <= height and (right == width or bottom == height)
        else:
            assert left <= 0 and top <= 0 and right >= width and bottom >= height
            assert abs(left + right - width) <= 1 and abs(top + bottom - height) <= 1
            assert right - left == width or bottom - top == height


def test_every_fit_gives_whole_patches() -> None:
    """200 random sizes, patches and fits give a plan of whole patches, and pixels of that shape."""
    draw = random.Random(0)
    for _ in range(200):
        shape, patch = (draw.randint(1, 700), draw.randint(1, 700)), draw.choice([8, 14, 16])
        fit = draw.choice(["squash", "crop", "pad", "native"])
        side, other = patch * draw.randint(1, 20), patch * draw.randint(1, 20)
        size: Any = draw.choice([None, draw.randint(1, 400)] if fit == "native" else [side, (side, other)])
        pixels, placement = plain(size, patch, fit=fit).place(torch.zeros(3, *shape, dtype=torch.uint8))
        assert pixels.shape == (3, *placement.window[2:]), (shape, patch, fit, size)
        assert all(n > 0 and n % patch == 0 for n in placement.window[2:]), (shape, patch, fit, size)
        if fit == "native":
            scale = (size or max(shape)) / max(shape)
            for was, now in zip(shape, placement.resized, strict=True):
                assert abs(now - was * scale) <= patch / 2 or now == patch


@pytest.mark.parametrize(("shape", "grid"), [((200, 120), (8, 5)), ((90, 333), (2, 8)), ((41, 41), (8, 8))])
def test_padding_is_the_mean_colour_and_not_valid(shape, grid) -> None:
    """`valid` marks exactly the pixels of the image; the others are zero, which is the mean colour."""
    transform = Preprocess((0.3, 0.4, 0.5), (0.2, 0.2, 0.2), 8, 64, fit="pad")
    batch = transform.batch([np.full((*shape, 3), 255, np.uint8)])
    assert batch.valid is not None and batch.valid.sum() == math.prod(grid)
    assert batch.valid[0, : grid[0], : grid[1]].all()
    mask = batch.valid.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    assert torch.equal(batch.pixels != 0, mask.expand_as(batch.pixels))
    assert all(transform.with_options(fit=f, size=64).batch([photo(*shape)]).valid is None for f in ("crop", "native"))


@by_fit
@pytest.mark.parametrize("shape", [(1, 1), (3, 2000), (2000, 3)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_tiny_and_thin_images_give_a_result(shape, fit, size) -> None:
    """An image of one colour keeps that colour at any shape."""
    transform = plain(size, patch_size=8, fit=fit)
    pixels = transform(np.full((*shape, 3), 51, np.uint8))
    height, width = transform.plan(*shape).resized
    assert (pixels[:, :height, :width] - 0.2).abs().max() < 1e-6


def test_a_centre_crop_of_a_thread_does_not_fill_the_memory() -> None:
    """An image of 1 x 60,000 pixels would be enlarged 224 times before the crop: 9 GB."""
    try:
        resized = plain(224, patch_size=16, fit="crop").plan(1, 60_000).resized
    except InputError as error:
        assert "fit=" in str(error)
    else:
        assert math.prod(resized) < 2**28


@pytest.mark.parametrize("fit, size", [("squash", 16384), ("crop", 16384), ("native", 20000)])
def test_an_input_beyond_all_memory_is_said(fit, size) -> None:
    """Too large an input is refused before gigabytes are allocated."""
    text = complaint(InputError, lambda: plain(size, patch_size=16, fit=fit).plan(300, 400))
    assert "300x400" in text and "would become" in text and "give a smaller size=" in text
    assert ("or fit='squash'" in text) == (fit != "squash"), "what is no remedy"


def test_a_thin_image_over_the_limit_is_counted_right() -> None:
    """A side below half a patch still counts as one row of patches."""
    text = complaint(InputError, lambda: plain(None, patch_size=16, fit="native").plan(3, 5008))
    assert "3x5008" in text and "313 patches" in text and "size=" in text


# Options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(size=250), "nearest is 256"), (dict(size=(250, 333)), "(256, 336)"), (dict(size=0), "got 0"),
        (dict(size=-1), "got -1"), (dict(size=(224, 0)), "(224, 0)"), (dict(size=(1, 2, 3)), "(1, 2, 3)"),
        (dict(size=2.5), "2.5"), (dict(size="big"), "'big'"), (dict(size=None), "size="), (dict(fit="zoom"), "'zoom'"),
        (dict(size=(224, 224), fit="native"), "one size"), (dict(mean=0.5), "mean is three numbers"),
        (dict(patch_size=0), "patch_size"), (dict(patch_size=1.5), "patch_size"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_options_are_said(options, said) -> None:
    """The error states what was given and what is allowed."""
    fixed: dict[str, Any] = dict(patch_size=16, mean=(0, 0, 0), std=(1, 1, 1))
    assert said in complaint(InputError, lambda: Preprocess(**(fixed | options)))


def test_options_replace_the_published_crop() -> None:
    """`resize_to` belongs to the published size; another size drops it."""
    meta = preprocess_of(MODELS["dinov2_vits14"], "meta")
    assert meta.with_options() is meta and meta.with_options(fit="crop") is meta
    assert meta.with_options(size=448).plan(500, 700).resized == (448, 627)
    assert meta.with_options(fit="native").size is None and meta.with_options(size=98, fit="native").size == 98


def test_a_transform_can_be_pickled_and_batched_by_a_loader() -> None:
    """A Dataset can use it as its transform: the copy in a worker gives the same tensors."""
    transform = preprocess_of(MODELS["dinov2_vits14"], "meta")
    copy = pickle.loads(pickle.dumps(transform))
    images = [photo(100, 77), photo(300, 200)]
    (batch,) = torch.utils.data.DataLoader([copy(p) for p in images], batch_size=2)
    assert copy == transform and torch.equal(batch, transform.batch(images).pixels)


@by_fit
@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_the_input_is_never_changed(kind, fit, size) -> None:
    """Arrays and tensors of the caller stay unchanged, even if nothing is resized."""
    array = (photo(64, 64) / 255).astype(kind) if kind == "float32" else photo(64, 64)
    tensor, before = torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous(), array.copy()
    pixels = preprocess_of(MODELS["dinov3_vits16"]).with_options(fit="squash", size=64).batch([array, tensor]).pixels
    plain(size, patch_size=8, fit=fit).batch([array, tensor]).pixels.add_(1)
    pixels.add_(1)
    assert np.array_equal(array, before) and np.array_equal(tensor.permute(1, 2, 0).numpy(), before)


def test_naming_the_published_size_keeps_the_published_crop() -> None:
    """`size=224` is already the size of Meta's DINOv2 transform: 256 pixels, of which the middle 224 are used."""
    published = preprocess_of(MODELS["dinov2_vits14"], "meta")
    assert published.with_options(size=224) is published
    assert published.with_options(size=448).resize_to is None


@pytest.mark.parametrize(
    "options", [dict(engine="pill"), dict(filter="box"), dict(fit=""), dict(crop_rounds="up")], ids=str
)
def test_typos_in_options_are_said(options) -> None:
    assert next(iter(options)) in complaint(InputError, lambda: plain(64, **options))


def test_a_crop_larger_than_the_image_is_said() -> None:
    assert "resize_to 32" in complaint(InputError, lambda: plain(64, fit="crop", resize_to=32))
