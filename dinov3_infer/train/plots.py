"""Pictures of a run: the curves of its metrics, and the first batch as the model sees it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .views import Batch, ViewConfig

__all__ = ["draw_batch", "draw_curves"]

_PANEL = (360, 200)  # width, height in pixels
_MARGIN = 28
_COLUMNS = 3
_INK, _LINE, _GRID = (40, 40, 40), (31, 99, 180), (225, 225, 225)


def draw_curves(metrics: Path, target: Path) -> None:
    """One panel per metric of a `metrics.jsonl`, written as PNG."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, (int, float))))
    curves = {
        name: [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
        for name in names
        if name != "step"
    }
    if not curves:
        return
    lines = math.ceil(len(curves) / _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _PANEL[0], lines * _PANEL[1]), "white")
    for i, (name, points) in enumerate(curves.items()):
        _draw_panel(sheet, (i % _COLUMNS * _PANEL[0], i // _COLUMNS * _PANEL[1]), name, points)
    sheet.save(target)


def _draw_panel(sheet: Image.Image, corner: tuple[int, int], name: str, points: Sequence[tuple[float, float]]) -> None:
    draw = ImageDraw.Draw(sheet)
    points = [point for point in points if math.isfinite(point[1])]
    left, top = corner[0] + _MARGIN, corner[1] + _MARGIN
    width, height = _PANEL[0] - 2 * _MARGIN, _PANEL[1] - 2 * _MARGIN
    draw.rectangle((left, top, left + width, top + height), outline=_GRID)
    if not points:
        draw.text((left, corner[1] + 8), f"{name}: no finite value", fill=_INK)
        return
    steps, values = zip(*points, strict=True)
    low, high = min(values), max(values)
    first, last = min(steps), max(steps)
    draw.text((left, corner[1] + 8), f"{name}: {values[-1]:.4g}   ({low:.4g} to {high:.4g})", fill=_INK)
    draw.text((left, top + height + 4), f"step {first} to {last}", fill=_INK)
    xs = [left + width * (step - first) / max(last - first, 1) for step in steps]
    ys = [top + height * (1.0 - (value - low) / ((high - low) or 1.0)) for value in values]
    if len(points) == 1:
        draw.ellipse((xs[0] - 2, ys[0] - 2, xs[0] + 2, ys[0] + 2), fill=_LINE)
    else:
        draw.line(list(zip(xs, ys, strict=True)), fill=_LINE, width=2)


def draw_batch(batch: Batch, views: ViewConfig, target: Path, pictures: int = 8) -> None:
    """A row per picture: global crops with the masked patches in grey, those of another teacher, local crops."""
    count = min(pictures, len(batch.indices))
    kinds = [_masked(batch.global_crops, batch.masks, views.patch_size), batch.gram_crops, batch.local_crops]
    side = min(views.global_px, 160)
    cells: list[list[Image.Image]] = [[] for _ in range(count)]
    for crops in kinds:
        if crops is None or not len(crops):
            continue
        for crop in crops.unflatten(0, (-1, len(batch.indices))):
            for row, pixels in zip(cells, crop, strict=False):
                row.append(_picture(pixels, views).resize((side, side)))
    sheet = Image.new("RGB", (len(cells[0]) * (side + 4), count * (side + 4)), "white")
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            sheet.paste(cell, (x * (side + 4), y * (side + 4)))
    sheet.save(target)


def _masked(crops: Tensor, masks: Tensor, patch_size: int) -> Tensor:
    """Masked patches at the mean colour, [2B, 3, S, S]."""
    rows = crops.shape[-1] // patch_size
    hidden = masks.unflatten(1, (rows, rows)).repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    return crops.masked_fill(hidden[:, None], 0.0)


def _picture(pixels: Tensor, views: ViewConfig) -> Image.Image:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (views.mean, views.std))
    shown = ((pixels.detach().cpu().float() * std + mean) * 255.0).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(shown.permute(1, 2, 0).numpy())
