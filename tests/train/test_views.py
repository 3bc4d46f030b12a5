"""Crops, augmentations and masks of the trainer."""

import colorsys
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pictures import complaint, photo
from PIL import Image
from torch import Tensor

from dinov3_infer.errors import InputError
from dinov3_infer.train import views
from dinov3_infer.train.draws import generator
from dinov3_infer.train.views import ViewConfig, block_mask, collate, make_views, masked_counts

PLAIN = dict(jitter_probability=0.0, grey=0.0, global_blur=(0.0, 0.0), local_blur=0.0, solarize=0.0)


def sample(height: int = 300, width: int = 400) -> Tensor:
    return torch.from_numpy(photo(height, width).transpose(2, 0, 1).copy())


def ramps(side: int = 240) -> Tensor:
    """An image whose red grows to the right and green to the bottom, so that a crop shows its region."""
    ramp = torch.linspace(0, 240, side).round().to(torch.uint8).expand(side, side)
    return torch.stack((ramp, ramp.T, torch.zeros_like(ramp)))


def region(crop: Tensor) -> tuple[float, float, bool]:
    """Height and width of a crop of `ramps` as shares of the image, and whether it was flipped."""
    red, green = crop[0].float().mean(0), crop[1].float().mean(1)
    inner = slice(len(red) // 4, 3 * len(red) // 4)  # the filter bends the ends
    scale = len(red) / (inner.stop - inner.start - 1) / 240
    width, height = (float(r[inner][-1] - r[inner][0]) * scale for r in (red, green))
    return height, abs(width), width < 0


# --- crops ------------------------------------------------------------------------------------------------------------


def test_shapes() -> None:
    """Two global crops, L local ones, and Gram crops if requested; all uint8."""
    made = make_views(sample(), ViewConfig(64, 32, gram_px=48, num_local=3), generator(0, 0, "views"))
    assert [tuple(crops.shape) for crops in made] == [(2, 3, 64, 64), (3, 3, 32, 32), (2, 3, 48, 48)]
    assert {crops.dtype for crops in made} == {torch.uint8}
    bare = make_views(sample(), ViewConfig(64, num_local=0), generator(0, 0, "views"))
    assert bare.gram_crops is None and len(bare.local_crops) == 0


@pytest.mark.parametrize("kind", ["global_crops", "local_crops"])
def test_regions_and_flips(kind: str) -> None:
    """Areas are uniform in their range, aspects lie in 3/4 to 4/3, half of the crops are mirrored."""
    config = ViewConfig(96, 96, num_local=2, **PLAIN)
    crops = [crop for i in range(150) for crop in getattr(make_views(ramps(), config, generator(0, i, "v")), kind)]
    found = [region(crop) for crop in crops]
    areas = np.array([h * w for h, w, _ in found])
    aspects = np.array([w / h for h, w, _ in found])
    low, high = config.global_scale if kind == "global_crops" else config.local_scale
    assert areas.min() > low * 0.93 and areas.max() < high * 1.07
    # squares of large area fit more often than long ones, but the quartiles stay where they are
    assert np.quantile(areas, (0.25, 0.75)) == pytest.approx(
        (0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high), rel=0.12
    )
    assert 0.72 < aspects.min() < 0.82 and 1.22 < aspects.max() < 1.4 and abs(np.log(aspects).mean()) < 0.04
    assert 0.4 < np.mean([flipped for *_, flipped in found]) < 0.6


@pytest.mark.parametrize("size", [(7, 900), (900, 7), (1, 1), (3, 4)], ids=str)
def test_odd_images(size: tuple[int, int]) -> None:
    """Strips and single pixels give crops too."""
    made = make_views(sample(*size), ViewConfig(64, 32, gram_px=32), generator(0, 0, "views"))
    assert made.global_crops.float().std() > 0 or size == (1, 1)


def test_a_strip_gives_what_fits_in_its_middle() -> None:
    """If no crop of the requested area fits, the crop is the largest permitted one in the middle."""
    assert views._region(sample(6, 900), (0.9, 1.0), iter([0.5] * 99)) == (0, 446, 6, 8)
    assert views._region(sample(900, 6), (0.9, 1.0), iter([0.5] * 99)) == (446, 0, 8, 6)


def test_resizing_is_pillows() -> None:
    """A crop equals Pillow's antialiased bicubic resize of its region."""
    image = sample()
    ours = views._cut(image, (20, 30, 200, 260), False, 96)
    theirs = (
        Image.fromarray(image.permute(1, 2, 0).numpy())
        .crop((30, 20, 290, 220))
        .resize((96, 96), Image.Resampling.BICUBIC)
    )
    assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - np.asarray(theirs).astype(int)).max() <= 1
    assert torch.equal(views._cut(image, (20, 30, 200, 260), True, 96), ours.flip(-1))


def test_size_from_which_nothing_is_blown_up() -> None:
    """The smallest crop of each kind has at least as many pixels in the image as in the view."""
    assert ViewConfig().image_px == 430  # 96 / sqrt(0.05)
    assert ViewConfig(num_local=0).image_px == 396  # 224 / sqrt(0.32)
    assert ViewConfig(gram_px=512).image_px == 906


@pytest.mark.parametrize("distorted", [False, True], ids=["clean", "distorted"])
def test_gram_crops_show_the_same_regions(distorted: bool) -> None:
    """They are the global crops at another size, with or without their colours."""
    smooth = torch.nn.functional.interpolate(sample(12, 16)[None], size=(300, 400), mode="bicubic", antialias=True)[0]
    config = ViewConfig(96, 32, gram_px=192, num_local=0, gram_distortions=distorted, solarize=1.0)
    made = make_views(smooth, config, generator(1, 0, "views"))
    assert made.gram_crops is not None
    shrunk = torch.nn.functional.interpolate(made.gram_crops, size=(96, 96), mode="bicubic", antialias=True)
    apart = (shrunk.float() - made.global_crops.float()).abs().mean((1, 2, 3))
    if distorted:
        assert apart.max() < 1
    else:
        assert apart.min() > 5
        plain = make_views(smooth, ViewConfig(96, 32, num_local=0, **PLAIN), generator(1, 0, "views"))
        assert (
            shrunk[0].float() - plain.global_crops[0].float()
        ).abs().mean() < 1  # the first draw is that of the region


def test_views_depend_on_the_generator_alone() -> None:
    """Threads, memory layout and torch's global generator have no effect."""
    image, config = sample(), ViewConfig(64, 32)
    first = make_views(image, config, generator(0, 3, "views", 5))
    torch.rand(7)
    packed = image[None].contiguous(memory_format=torch.channels_last)[0]
    again = make_views(packed, config, generator(0, 3, "views", 5))
    assert torch.equal(first.global_crops, again.global_crops) and torch.equal(first.local_crops, again.local_crops)
    other = make_views(image, config, generator(0, 3, "views", 6))
    assert not torch.equal(first.global_crops, other.global_crops)


def test_generators_differ_in_every_argument() -> None:
    """Seed, step, purpose and index each change the draws; equal arguments give equal draws."""
    keys = [(s, t, p, i) for s in (0, 1, 11) for t in (0, 1, 11) for p in ("views", "mask") for i in (0, 1, 11)]
    drawn = {key: float(torch.rand((), generator=generator(*key), dtype=torch.float64)) for key in keys}
    assert len(set(drawn.values())) == len(keys)
    assert drawn == {key: float(torch.rand((), generator=generator(*key), dtype=torch.float64)) for key in keys}


# --- distortions ------------------------------------------------------------------------------------------------------


def test_probabilities_are_those_of_the_released_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every distortion leaves a mark on a grey image: which crops got it, and how often.

    The published code says 1.0 and 0.1 for the blur of crops 1 and 2, and does 0 and 0.9.
    """
    marks = {"blur": 1, "solarize": 2, "greyscale": 4, "jitter": 8}
    for name in ("blur", "solarize", "greyscale"):
        monkeypatch.setattr(views, name, lambda pixels, *_, mark=marks[name]: pixels.add_(mark))
    monkeypatch.setattr(views, "JITTERS", (lambda pixels, *_: pixels.add_(2),) * 4)
    grey, config = torch.full((3, 32, 32), 100, dtype=torch.uint8), ViewConfig(16, 16, num_local=1)
    made = [make_views(grey, config, generator(0, i, "views")) for i in range(600)]
    crops = torch.stack([torch.cat((m.global_crops, m.local_crops))[:, 0, 0, 0] for m in made]).int() - 100
    wanted = {"blur": (0, 0.9, 0.5), "solarize": (0, 0.2, 0), "greyscale": (0.2,) * 3, "jitter": (0.8,) * 3}
    for name, shares in wanted.items():
        found = (crops & marks[name]).bool().float().mean(0).tolist()
        assert found == pytest.approx(shares, abs=0.06), name
        assert [f for f, share in zip(found, shares, strict=True) if share == 0 and f > 0] == []


def test_jitter_amounts_and_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each amount fills its range, as does the blur's, and the four come in all orders."""
    orders, amounts = [], []
    sigmas: list[float] = []
    monkeypatch.setattr(views, "blur", lambda pixels, sigma: sigmas.append(sigma) or pixels)
    for i in range(200):
        done: list[tuple[int, float]] = []
        jitters = [lambda _, amount, k=k, done=done: done.append((k, amount)) for k in range(4)]
        monkeypatch.setattr(views, "JITTERS", jitters)
        config = ViewConfig(16, num_local=0, jitter_probability=1.0)
        make_views(sample(32, 32), config, generator(0, i, "views"))
        orders.append(tuple(k for k, _ in done[:4]))
        amounts.append([amount for _, amount in sorted(done[:4])])
    assert len(set(orders)) == 24
    strengths = np.array(config.jitter)
    assert (np.abs(amounts) < strengths).all() and (np.max(amounts, 0) > 0.9 * strengths).all()
    assert (np.min(amounts, 0) < -0.9 * strengths).all()
    assert 0.1 <= min(sigmas) < 0.2 and 1.9 < max(sigmas) <= 2


def test_distorted_pixels_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels are rounded to the nearest grey level, including white and black."""
    config = ViewConfig(16, num_local=0, **{**PLAIN, "global_blur": (1.0, 1.0)})
    for level, change, wanted in ((100, 0.6, 101), (100, 0.4, 100), (255, 0.0, 255), (0, 0.0, 0)):
        monkeypatch.setattr(views, "blur", lambda pixels, _, change=change: pixels.add_(change))
        flat = torch.full((3, 16, 16), level, dtype=torch.uint8)
        assert (make_views(flat, config, generator(0, 0, "views")).global_crops == wanted).all()


# --- masks ------------------------------------------------------------------------------------------------------------


def test_masked_counts_are_the_published_ladder() -> None:
    """As DINOv3 at 6876159 for 4 images of 256 patches: half of 8 crops, from 0.2 to 0.5 in equal steps."""
    counts = masked_counts(8, 256, generator(0, 0, "masked"))
    assert sorted(counts) == [0, 0, 0, 0, 51, 76, 102, 128]
    orders = {tuple(masked_counts(8, 256, generator(0, step, "masked"))) for step in range(20)}
    assert len(orders) > 10
    assert masked_counts(8, 256, generator(0, 0, "masked"), probability=0.0) == [0] * 8


@pytest.mark.parametrize("grid", [(16, 16), (14, 14), (8, 12), (2, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.11, 0.5, 1.0])
def test_masks_have_the_exact_count(grid: tuple[int, int], share: float) -> None:
    """Single patches fill up the rectangles to the exact count."""
    count = int(share * grid[0] * grid[1])
    for seed in range(10):
        assert int(block_mask(grid, count, generator(seed, 0, "mask")).sum()) == count


def test_masks_are_made_of_rectangles() -> None:
    """Neighbours of a masked patch are masked far more often than by chance, and no corner is preferred."""
    masks = torch.stack([block_mask((16, 16), 77, generator(i, 0, "mask")).view(16, 16) for i in range(300)]).float()
    beside = float((masks[:, :, 1:] * masks[:, :, :-1]).sum() / masks[:, :, :-1].sum())
    assert beside > 0.7  # 0.3 by chance
    often = masks.mean(0)
    corners = [float(often[y][:, x].mean()) for y in (slice(8), slice(8, 16)) for x in (slice(8), slice(8, 16))]
    assert float(often.min()) > 0 and max(corners) - min(corners) < 0.06


# --- batches ----------------------------------------------------------------------------------------------------------


def test_collate_is_crop_major_and_normalises() -> None:
    """Crop 1 of all images, then crop 2; pixels are (value / 255 - mean) / std."""
    config = ViewConfig(32, 16, num_local=3, gram_px=16)
    made = [make_views(sample(), config, generator(0, 0, "views", i)) for i in range(3)]
    parts = [views.Views(*(torch.stack(crops) for crops in zip(*some, strict=True))) for some in (made[:2], made[2:])]
    masks = torch.stack([torch.full((2, 4), i < 1) for i in range(3)])
    batch = collate(parts, masks, torch.arange(3), config)
    assert [len(crops) for crops in batch if crops is not None] == [6, 9, 6, 6, 3]
    assert batch.masks.tolist() == [[True] * 4, [False] * 4, [False] * 4] * 2
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    for crop, picture_number in ((0, 0), (0, 2), (1, 1)):
        wanted = (made[picture_number].global_crops[crop] / 255.0 - mean) / std
        assert torch.allclose(batch.global_crops[crop * 3 + picture_number], wanted, atol=1e-6)
    assert torch.allclose(batch.local_crops[7], (made[1].local_crops[2] / 255.0 - mean) / std, atol=1e-6)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(global_px=100), "global_px=100 is not a multiple of the patch size 16; the nearest is 96"),
        (dict(local_px=96, patch_size=14, global_px=112), "the nearest is 98"),
        (dict(global_scale=(0.5, 0.3)), "global_scale=(0.5, 0.3)"),
        (dict(mask_ratio=(0.0, 0.5)), "mask_ratio"),
        (dict(global_blur=(0.0, 1.5)), "global_blur=1.5 is no probability"),
        (dict(flip=-0.1), "flip=-0.1"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_wrong_settings(options: dict[str, object], said: str) -> None:
    """The error is one sentence that names the setting."""
    assert said in complaint(InputError, lambda: ViewConfig(**options))


# --- each distortion against its definition in float64, and against torchvision --------------------------------------

LUMA = np.array([0.299, 0.587, 0.114])


def grey_of(x: np.ndarray) -> np.ndarray:  # [H, W, 3] in 0..1
    return (x * LUMA).sum(-1, keepdims=True)


def turned(x: np.ndarray, amount: float) -> np.ndarray:
    def one(rgb: np.ndarray) -> tuple[float, float, float]:
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        return colorsys.hsv_to_rgb((h + amount) % 1.0, s, v)

    return np.apply_along_axis(one, -1, x)


def blurred(x: np.ndarray, sigma: float) -> np.ndarray:
    """A crop blurred by a double loop over the 81 taps."""
    offsets = range(-4, 5)
    weight = {i: math.exp(-(i**2) / (2 * sigma**2)) for i in offsets}
    padded = np.pad(x, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    height, width, _ = x.shape
    total = sum(weight[i] * weight[j] for i in offsets for j in offsets)
    return sum(
        weight[i] * weight[j] / total * padded[4 + i : 4 + i + height, 4 + j : 4 + j + width]
        for i in offsets
        for j in offsets
    )


DEFINITIONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {  # of pixels in 0..1, float64
    "brightness": lambda x, a: np.clip((1 + a) * x, 0, 1),
    "contrast": lambda x, a: np.clip((1 + a) * x - a * grey_of(x).mean(), 0, 1),
    "saturation": lambda x, a: np.clip((1 + a) * x - a * grey_of(x), 0, 1),
    "hue": turned,
    "greyscale": lambda x, _: np.broadcast_to(grey_of(x), x.shape),
    "solarize": lambda x, a: np.where(x >= a, 1 - x, x),
    "blur": blurred,
}
CASES = [
    *((name, amount) for name in ("brightness", "contrast", "saturation") for amount in (-0.4, -0.1, 0.0, 0.2, 0.4)),
    *(("hue", amount) for amount in (-0.5, -0.1, -0.03, 0.0, 0.07, 0.1, 0.49)),
    ("greyscale", 0.0),
    ("solarize", 128 / 255),
    *(("blur", sigma) for sigma in (0.1, 0.3, 0.7, 1.3, 2.0)),
]


def colours() -> np.ndarray:
    """[H, W, 3] uint8 with greys, equal channels, black, white and pure colours among noise."""
    pixels = photo(40, 33)
    pixels[:5] = pixels[:5, :, :1]
    pixels[5:9, :, 1] = pixels[5:9, :, 0]
    pixels[9:12] *= np.array([1, 0, 1], np.uint8)
    pixels[12], pixels[13], pixels[14, :, 2] = 0, 255, 255
    return pixels


def distorted(name: str, pixels: Tensor, amount: float) -> Tensor:
    arguments = {"greyscale": (), "solarize": (amount * 255,)}.get(name, (amount,))
    out = getattr(views, name)(pixels, *arguments)
    return pixels if out is None else out


@pytest.mark.parametrize("name, amount", CASES, ids=str)
def test_distortions_are_their_definitions(name: str, amount: float) -> None:
    """They agree within 0.01 grey levels with the definition in float64, the blur within 0.1."""
    pixels = colours()
    ours = distorted(name, torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32)), amount)
    wanted = DEFINITIONS[name](pixels / 255.0, amount) * 255.0
    assert np.abs(ours.permute(1, 2, 0).numpy() - wanted).max() < (0.1 if name == "blur" else 0.01)


@pytest.mark.peers
@pytest.mark.parametrize("name, amount", CASES, ids=str)
def test_distortions_are_torchvisions(name: str, amount: float) -> None:
    """They agree with torchvision's v2 functionals on float pixels, which the published recipes use."""
    v2 = pytest.importorskip("torchvision.transforms.v2.functional")
    pixels = torch.from_numpy(colours().transpose(2, 0, 1).astype(np.float32))
    peer = {
        "brightness": lambda x: v2.adjust_brightness(x, 1 + amount),
        "contrast": lambda x: v2.adjust_contrast(x, 1 + amount),
        "saturation": lambda x: v2.adjust_saturation(x, 1 + amount),
        "hue": lambda x: v2.adjust_hue(x, amount),
        "greyscale": lambda x: v2.rgb_to_grayscale(x, num_output_channels=3),
        "solarize": lambda x: v2.solarize(x, amount),
        "blur": lambda x: v2.gaussian_blur(x, [9, 9], [amount, amount]),
    }[name]
    wanted = peer(pixels / 255.0) * 255.0
    assert (distorted(name, pixels.clone(), amount) - wanted).abs().max() < 0.1
