"""What the examples share: options, a log, errors in one sentence, frames in and out, cached features, training."""

import argparse
import colorsys
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageSequence, UnidentifiedImageError
from torch import Tensor, nn
from tqdm import tqdm, trange

from dinov3_infer import (
    Backbone,
    Dinov3Error,
    Features,
    Fit,
    ImageLike,
    InputError,
    MissingFileError,
    list_images,
    load_image,
)

log = logging.getLogger("dinov3_infer.examples")  # what the package says goes the same way

MODEL = "dinov2_vits14"  # the smallest whose licence (Apache-2.0) lets everyone have it without asking


def parser(
    doc: str | None, out: str, *inputs: str, size: int = 768, steps: int = 0, layer: bool = False
) -> argparse.ArgumentParser:
    """What all have: the inputs, --model, --size, --out; and where it is for them --layer, and --steps of training."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in inputs:
        found.add_argument(name)
    found.add_argument("--model", default=MODEL, help=f"name, hub id, folder or weights file ({MODEL})")
    found.add_argument(
        "--size", type=int, default=size, help=f"pixels of the longer side as the model sees it ({size})"
    )
    found.add_argument("--out", default=out, help=f"what to write ({out})")
    if layer:
        found.add_argument(
            "--layer", type=int, help="block whose patches are compared (that at two thirds of the depth)"
        )
    if steps:
        found.add_argument("--steps", type=int, default=steps, help=f"of training ({steps})")
    return found


def run(main: Callable[[], None]) -> None:
    """Calls `main`, with the log on stderr; what is wrong with the input is said in one sentence."""
    logging.basicConfig(format="%(message)s")
    package = logging.getLogger("dinov3_infer")
    before = package.level
    package.setLevel(logging.INFO)
    try:
        main()
    except Dinov3Error as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except OSError as error:
        reason = f"{error.strerror[0].lower()}{error.strerror[1:]} '{error.filename}'" if error.strerror else str(error)
        sys.exit(f"{Path(sys.argv[0]).name}: {reason}")
    finally:
        package.setLevel(before)


def with_progress(features: Iterable[Features], count: int) -> Iterator[Features]:
    """The features of `count` images as they come, under a bar on a terminal."""
    log.info("computing features of %d image%s", count, "" if count == 1 else "s")
    yield from tqdm(features, total=count, unit="img", disable=None)


def numbers(option: str, text: str, names: str) -> list[float]:
    """Those of an option such as --box 1,2,3,4, whose `names` are L,T,R,B."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) != len(names.split(",")):
        raise InputError(f"{option} is {names} in pixels, got '{text}'; give numbers with commas between")
    return found


def save(pictures: Image.Image | Sequence[Image.Image], out: str, fps: float = 8) -> None:
    """One picture, or frames as an animated GIF or WebP."""
    frames = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    kinds = (".jpg", ".jpeg", ".png", ".webp") if len(frames) == 1 else (".gif", ".webp")
    if Path(out).suffix.lower() not in (*kinds, ".gif"):
        raise InputError(f"--out ends in one of {' '.join(kinds)}, got '{out}'")
    rest = dict(save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0) if len(frames) > 1 else {}
    frames[0].save(out, quality=90, **rest)
    print(f"wrote {out}")


def read_frames(source: str, most: int = 500) -> list[Image.Image]:
    """The first `most` frames of a folder of pictures (by name), a GIF or WebP, or, with PyAV, a video file, RGB.

    Raises: InputError where there are no frames or PyAV is missing, MissingFileError.
    """
    path = Path(source)
    if path.is_dir():
        return [Image.open(name).convert("RGB") for name in list_images(path)[:most]]
    if not path.is_file():
        raise MissingFileError(f"no video and no folder of frames at '{source}'; check the path")
    try:
        with Image.open(path) as stream:
            return [frame.convert("RGB") for frame, _ in zip(ImageSequence.Iterator(stream), range(most), strict=False)]
    except UnidentifiedImageError:
        pass  # not a picture, perhaps a video
    try:
        import av
    except ImportError:
        raise InputError(f"reading '{source}' needs PyAV; pip install av, or give a folder of frames") from None
    try:
        with av.open(str(path)) as video:
            frames = [frame.to_image() for frame, _ in zip(video.decode(video=0), range(most), strict=False)]
    except (av.FFmpegError, IndexError):
        frames = []
    if not frames:
        raise InputError(f"'{source}' holds no frames; give a video, a GIF or a folder of pictures")
    return frames


def colours(count: int) -> np.ndarray:
    """Well separated colours, [count, 3] uint8."""
    return np.array(
        [[round(255 * v) for v in colorsys.hsv_to_rgb(0.03 + 0.618 * i % 1, 0.75, 1)] for i in range(count)]
    )


def paint(picture: Image.Image, labels: np.ndarray, strength: float = 0.55) -> Image.Image:
    """Regions [height, width] in colours over a picture of that size; 0 stays clear."""
    palette = np.concatenate((np.zeros((1, 3)), colours(max(1, int(labels.max())))))
    alpha = strength * (labels > 0)[..., None]
    mixed = (1 - alpha) * np.asarray(picture.convert("RGB")) + alpha * palette[labels]
    return Image.fromarray(mixed.round().astype(np.uint8))


def tied(first: Image.Image, second: Image.Image, here: Tensor, there: Tensor) -> Image.Image:
    """Two pictures side by side, with lines from points (x, y) [n, 2] of the one to those of the other."""
    both = Image.new("RGB", (first.width + second.width + 8, max(first.height, second.height)), "white")
    both.paste(first, (0, 0))
    both.paste(second, (first.width + 8, 0))
    pen, radius = ImageDraw.Draw(both), both.width / 250
    moved = there + torch.tensor([first.width + 8, 0])
    for start, end, colour in zip(here.tolist(), moved.tolist(), colours(len(here)).tolist(), strict=True):
        pen.line((*start, *end), fill=tuple(colour), width=max(1, round(radius / 2)))
        for x, y in (start, end):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(colour), outline="black")
    return both


def centres(features: Features, index: int = 0) -> Tensor:
    """(x, y) of the middle of each patch in pixels of original picture `index`, [P, 2], where all of it was seen."""
    (height, width), (h, w) = features.original_sizes[index], features.grid
    y, x = torch.meshgrid((torch.arange(h) + 0.5) / h * height, (torch.arange(w) + 0.5) / w * width, indexing="ij")
    return torch.stack((x, y), dim=-1).flatten(0, 1)


def read_depths(folder: str, pictures: Sequence[str], size: int) -> Tensor:
    """Metres, [N, size, size], of the files that have the names of the pictures."""
    found = []
    for stem in (Path(folder, Path(name).stem) for name in pictures):
        if stem.with_suffix(".npy").exists():
            metres = np.load(stem.with_suffix(".npy")).astype(np.float32)
        elif stem.with_suffix(".png").exists():
            metres = np.array(Image.open(stem.with_suffix(".png")), np.float32) / 1000
        else:
            raise MissingFileError(f"no depth at '{stem}.npy' or '{stem}.png'; give one for each picture")
        found.append(F.interpolate(torch.from_numpy(metres)[None, None], size=(size, size), mode="nearest-exact")[0, 0])
    return torch.stack(found).nan_to_num(0, 0, 0)


def upright(picture: ImageLike) -> Image.Image:
    """RGB, turned as its EXIF tag says."""
    return Image.fromarray(load_image(picture).permute(1, 2, 0).contiguous().numpy())


def load(args: argparse.Namespace) -> Backbone:
    log.info("loading %s", args.model)
    return Backbone.from_pretrained(args.model)


def maps(bb: Backbone, pictures: Sequence[ImageLike], size: int, layers: Sequence[int] = ()) -> Tensor:
    """Feature maps of pictures squashed to a square, to train on, [N, C, h, w]; of several layers [N, L * C, h, w]."""
    found = bb.iter_features(
        list(pictures), size=max(1, size // bb.patch_size) * bb.patch_size, fit="squash", layers=layers
    )
    each = with_progress(found, len(pictures))
    return torch.cat([torch.cat([layer.feature_map for layer in f.layers or (f,)], dim=1) for f in each])


def layer_features(
    bb: Backbone, pictures: Sequence[ImageLike], layer: int | None = None, size: int = 768, fit: Fit = "native"
) -> Iterator[Features]:
    """Features whose patches are those of one block; None for that at two thirds of the depth.

    There patches know best what exactly they show; later ones know more of the whole.
    """
    block = bb.config.depth * 2 // 3 - 1 if layer is None else layer
    each = bb.iter_features(pictures, layers=[block], size=size, fit=fit, batch_size=1)
    for found in with_progress(each, len(pictures)):
        yield replace(found, patch_tokens=found.layers[0].patch_tokens, layers=())


def fit(
    head: nn.Module, loss: Callable[[Tensor], Tensor], count: int, steps: int, *, batch_size: int = 8, lr: float = 1e-3
) -> None:
    """Trains `head` to lessen `loss` of the examples whose numbers [batch_size], out of `count`, it is given."""
    optimizer = torch.optim.AdamW(head.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    order = torch.empty(0, dtype=torch.long)
    head.train()
    log.info("training a head with %d examples, %d steps", count, steps)
    for step in (bar := trange(steps, unit="step", disable=None)):
        if not len(order):
            order = torch.randperm(count)
        now, order = order[:batch_size], order[batch_size:]
        optimizer.zero_grad()
        value = loss(now)
        value.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)
        if bar.disable and (step + 1) % max(1, steps // 10) == 0:  # no terminal
            log.info("step %d of %d: loss %.3f", step + 1, steps, value.item())
    head.eval()
