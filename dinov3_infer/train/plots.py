"""Plots of a run: the curves of its metrics, and the first batch as the model sees it."""

import json
import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .views import Batch, ViewConfig

__all__ = ["draw_batch", "draw_curves"]

_WIDTH, _HEIGHT, _MARGIN = 360, 200, 28  # pixels: width and height of a panel, margin around its curve
_COLUMNS = 3
_INK, _LINE, _FRAME = (40, 40, 40), (31, 99, 180), (225, 225, 225)


def draw_curves(metrics: Path, target: Path) -> None:
    """Draws a `metrics.jsonl` to an image file, one panel per metric, all over the same steps."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != "step":
                curves.setdefault(name, []).append((row["step"], value))
    if not curves:
        return
    sheet = Image.new("RGB", (_COLUMNS * _WIDTH, math.ceil(len(curves) / _COLUMNS) * _HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    width, height, last = _WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN, rows[-1]["step"]
    for i, (name, points) in enumerate(curves.items()):
        left, top = i % _COLUMNS * _WIDTH + _MARGIN, i // _COLUMNS * _HEIGHT + _MARGIN
        values = [value for _, value in points]
        low, high = min(values), max(values)
        draw.rectangle((left, top, left + width, top + height), outline=_FRAME)
        draw.text((left, top - 20), f"{name}: {values[-1]:.4g}   ({low:.4g} to {high:.4g})", fill=_INK)
        draw.text((left, top + height + 4), f"step 0 to {last}", fill=_INK)
        curve = [
            (left + width * step / (last or 1), top + height * (high - value) / ((high - low) or 1))
            for step, value in points
        ]
        draw.line(curve, fill=_LINE, width=2)
        x, y = curve[-1]
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=_LINE)  # the only mark of a metric that was recorded once
    sheet.save(target)


def draw_batch(batch: Batch, views: ViewConfig, target: Path, images: int = 8) -> None:
    """Draws the first images of a batch: a row per image with its global crops (masked patches in grey), the crops of
    the Gram or distillation teacher, and its local crops.

    Args:
        batch: see `Batch` for the shapes.
        views: the settings of the crops.
        target: image file to write.
        images: number of rows, at most.
    """
    count = min(images, len(batch.indices))
    kinds = [_masked(batch.global_crops, batch.masks, views.patch_size), batch.gram_crops, batch.local_crops]
    side = min(views.global_px, 160)
    cells: list[list[Image.Image]] = [[] for _ in range(count)]
    for crops in kinds:
        if crops is None or not len(crops):
            continue
        for crop in crops.unflatten(0, (-1, len(batch.indices))):
            for row, pixels in zip(cells, crop, strict=False):
                row.append(_to_image(pixels, views).resize((side, side)))
    sheet = Image.new("RGB", (len(cells[0]) * (side + 4), count * (side + 4)), "white")
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            sheet.paste(cell, (x * (side + 4), y * (side + 4)))
    sheet.save(target)


def _masked(crops: Tensor, masks: Tensor, patch_size: int) -> Tensor:
    """Crops [2B, 3, S, S] with the masked patches, [2B, P] bool, at the mean colour."""
    rows = crops.shape[-1] // patch_size
    hidden = masks.unflatten(1, (rows, rows)).repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    return crops.masked_fill(hidden[:, None], 0.0)


def _to_image(pixels: Tensor, views: ViewConfig) -> Image.Image:
    mean, std = (torch.tensor(v, dtype=torch.float32, device="cpu").view(3, 1, 1) for v in (views.mean, views.std))
    shown = ((pixels.detach().cpu().float() * std + mean) * 255.0).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(shown.permute(1, 2, 0).numpy())
