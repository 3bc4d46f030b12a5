"""Shared by the examples: options, a log, errors in one sentence, frames, cached features, a training loop."""

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

log = logging.getLogger("dinov3_infer.examples")  # a child of the package's logger, so that both print alike

MODEL = "dinov2_vits14"  # the smallest model under Apache-2.0, which needs no request for access


def parser(
    doc: str | None, out: str, *inputs: str, size: int = 768, steps: int = 0, layer: bool = False
) -> argparse.ArgumentParser:
    """Makes a parser with the inputs, --model, --size and --out; optionally --layer and --steps."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in inputs:
        found.add_argument(name)
    found.add_argument("--model", default=MODEL, help="name, hub id, folder or weights file (default: %(default)s)")
    found.add_argument(
        "--size", type=int, default=size, help="pixels of the long side of the model input (default: %(default)s)"
    )
    found.add_argument("--out", default=out, help="file to write (default: %(default)s)")
    if layer:
        found.add_argument(
            "--layer", type=int, help="block whose patches are compared (default: the one at two thirds of the depth)"
        )
    if steps:
        found.add_argument("--steps", type=int, default=steps, help="training steps (default: %(default)s)")
    return found


def run(main: Callable[[], None]) -> None:
    """Calls `main` with the log on stderr; wrong input ends the program with one sentence."""
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
    """The numbers of an option such as --box 1,2,3,4, whose `names` are L,T,R,B.

    Raises: InputError for other text.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) != len(names.split(",")):
        raise InputError(f"{option} is {names} in pixels, got '{text}'; give numbers separated by commas")
    return found


def save(images: Image.Image | Sequence[Image.Image], out: str, fps: float = 8) -> None:
    """Writes one image, or frames as an animated GIF or WebP.

    Raises: InputError for another suffix.
    """
    frames = [images] if isinstance(images, Image.Image) else list(images)
    kinds = (".jpg", ".jpeg", ".png", ".webp") if len(frames) == 1 else (".gif", ".webp")
    if Path(out).suffix.lower() not in (*kinds, ".gif"):
        raise InputError(f"--out should end in one of {' '.join(kinds)}, got '{out}'; rename it")
    rest = dict(save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0) if len(frames) > 1 else {}
    frames[0].save(out, quality=90, **rest)
    print(f"wrote {out}")


def read_frames(source: str, most: int = 500) -> list[Image.Image]:
    """The first `most` frames, in RGB, of a folder of images (by name), a GIF or WebP, or, with PyAV, a video file.

    Raises: InputError if there are no frames or PyAV is missing, MissingFileError if the path does not exist.
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
        pass  # it may be a video
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
        raise InputError(f"'{source}' holds no frames; give a video, a GIF or a folder of images")
    return frames


def colours(count: int) -> np.ndarray:
    """Distinct colours, [count, 3] uint8."""
    return np.array(
        [[round(255 * v) for v in colorsys.hsv_to_rgb(0.03 + 0.618 * i % 1, 0.75, 1)] for i in range(count)]
    )


def paint(image: Image.Image, labels: np.ndarray, strength: float = 0.55) -> Image.Image:
    """Draws regions [height, width] in colours over an image of that size; 0 stays clear."""
    palette = np.concatenate((np.zeros((1, 3)), colours(max(1, int(labels.max())))))
    alpha = strength * (labels > 0)[..., None]
    mixed = (1 - alpha) * np.asarray(image.convert("RGB")) + alpha * palette[labels]
    return Image.fromarray(mixed.round().astype(np.uint8))


def tied(first: Image.Image, second: Image.Image, here: Tensor, there: Tensor) -> Image.Image:
    """Two images side by side, with lines from points (x, y) [n, 2] of the first to points of the second."""
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
    """(x, y) of the centre of each patch in pixels of original image `index`, [P, 2], for an image without cropping."""
    (height, width), (h, w) = features.original_sizes[index], features.grid
    y, x = torch.meshgrid((torch.arange(h) + 0.5) / h * height, (torch.arange(w) + 0.5) / w * width, indexing="ij")
    return torch.stack((x, y), dim=-1).flatten(0, 1)


def read_depths(folder: str, images: Sequence[str], size: int) -> Tensor:
    """Depths in metres, [N, size, size], from the files with the names of the images.

    Raises: MissingFileError for an image without a depth.
    """
    found = []
    for stem in (Path(folder, Path(name).stem) for name in images):
        if stem.with_suffix(".npy").exists():
            metres = np.load(stem.with_suffix(".npy")).astype(np.float32)
        elif stem.with_suffix(".png").exists():
            metres = np.array(Image.open(stem.with_suffix(".png")), np.float32) / 1000
        else:
            raise MissingFileError(f"no depth at '{stem}.npy' or '{stem}.png'; give one for each image")
        found.append(F.interpolate(torch.from_numpy(metres)[None, None], size=(size, size), mode="nearest-exact")[0, 0])
    return torch.stack(found).nan_to_num(0, 0, 0)


def upright(image: ImageLike) -> Image.Image:
    """The image in RGB, after EXIF rotation."""
    return Image.fromarray(load_image(image).permute(1, 2, 0).contiguous().numpy())


def load(args: argparse.Namespace) -> Backbone:
    """The model that --model names."""
    log.info("loading %s", args.model)
    return Backbone.from_pretrained(args.model)


def maps(bb: Backbone, images: Sequence[ImageLike], size: int, layers: Sequence[int] = ()) -> Tensor:
    """Feature maps [N, C, h, w] of images squashed to a square, for training.

    The maps of several layers are concatenated, [N, L * C, h, w].
    """
    found = bb.iter_features(
        list(images), size=max(1, size // bb.patch_size) * bb.patch_size, fit="squash", layers=layers
    )
    each = with_progress(found, len(images))
    return torch.cat([torch.cat([layer.feature_map for layer in f.layers or (f,)], dim=1) for f in each])


def layer_features(
    bb: Backbone, images: Sequence[ImageLike], layer: int | None = None, size: int = 768, fit: Fit = "native"
) -> Iterator[Features]:
    """Features whose patches come from one block; None takes the block at two thirds of the depth.

    Patches of this block describe local content best; later blocks describe more of the whole image.
    """
    block = bb.config.depth * 2 // 3 - 1 if layer is None else layer
    each = bb.iter_features(images, layers=[block], size=size, fit=fit, batch_size=1)
    for found in with_progress(each, len(images)):
        yield replace(found, patch_tokens=found.layers[0].patch_tokens, layers=())


def fit(
    head: nn.Module, loss: Callable[[Tensor], Tensor], count: int, steps: int, *, batch_size: int = 8, lr: float = 1e-3
) -> None:
    """Trains `head` to minimise `loss`, a function from example numbers [batch_size] to a scalar []."""
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
