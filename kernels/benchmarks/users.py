"""Parts of the short run: models as users call them, from images on the host, and the ceilings of the chip.

Every contestant begins with images on the host and ends with tokens on the device.  Ours is `extract_features`, which
takes uint8 images and checks its result; peers take the float32 pixels that their processors return.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from measure import Cell, relative_error
from models import INFERENCE_LIMIT, B, L, S, all_tokens, built, compiled, flops_of, twin
from operators import Plan
from torch import Tensor

from dinov3_infer.cli.bench.contest import Run, Settings, elapsed
from dinov3_infer.model.network import normalised

# model, pixels, images: the most important first
EAGER = ((L, 224, 64), (L, 224, 1), (S, 224, 64), (S, 224, 1), (B, 224, 64), (B, 224, 1), (L, 512, 8))
COMPILED = ((L, 224, 64), (L, 224, 1))
REHEARSAL = ((S, 32, 2), (S, 32, 1))
SIMULATED = Path(__file__).resolve().parent / "records" / "simulated.json"
# contestant -> its name in the simulation
PREDICTED = {
    "extract_features": "plan",
    "as written, autocast": "ours autocast",
    "transformers, bfloat16": "transformers",
    "transformers, autocast": "transformers autocast",
    "timm, bfloat16": "timm",
    "timm, autocast": "timm autocast",
}


@dataclass(frozen=True)
class Images:
    """A batch on the host, in the form that each side takes."""

    whole: Tensor  # [B, 3, H, W] uint8
    pixels: Tensor  # [B, 3, H, W] float32, normalised, pageable


def eager_part(settings: Settings) -> list[Plan]:
    """Without a compiler, so that all of them fit in a minute."""
    cells = EAGER if settings.cuda else REHEARSAL
    return [(_what(*cell), partial(_cell, *cell, settings, False)) for cell in cells]


def compiled_part(settings: Settings) -> list[Plan]:
    """Peers through torch.compile, beside ours."""
    cells = COMPILED if settings.cuda else REHEARSAL[:1]
    return [(_what(*cell), partial(_cell, *cell, settings, True)) for cell in cells]


def _what(name: str, size: int, batch: int) -> dict[str, Any]:
    return dict(model=name, pixels=size, batch=batch)


def _cell(name: str, size: int, batch: int, settings: Settings, compiling: bool) -> Cell:
    half = dict(built(name, settings, torch.bfloat16))
    ours = twin(half.pop("ours"), share=False).float()
    ours.mixed_precision = True
    scale = (ours.preprocess.mean, ours.preprocess.std)
    inputs = []
    for seed in range(2):
        draw = torch.Generator().manual_seed(seed)
        whole = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=draw)
        inputs.append(Images(whole, normalised(whole, scale)))
    with torch.no_grad():
        exact = all_tokens(ours(inputs[0].pixels[:1].to(settings.device))).double()

    def extract(images: Images) -> Any:
        if (reason := ours.why_not_plan()) is not None:
            raise RuntimeError(f"no plan: {reason}")
        return ours.extract_features(images.whole, size=size)

    def run(model: Callable[[Tensor], Any], autocast: bool, images: Images) -> Any:
        pixels = images.pixels.to(settings.device)
        with torch.no_grad(), torch.autocast(settings.device.type, torch.bfloat16, enabled=autocast):
            return model(pixels if autocast else pixels.to(torch.bfloat16))

    calls: dict[str, Callable[[Images], Any]] = {"extract_features": extract}
    if compiling:
        for label, model in half.items():
            calls[f"{label}, bfloat16, compiled"] = partial(run, compiled(model, settings), False)
    else:
        calls["as written, autocast"] = partial(run, ours, True)
        for label, model in half.items():
            calls[f"{label}, bfloat16"] = partial(run, model, False)
            calls[f"{label}, autocast"] = partial(run, twin(model, share=False).float(), True)

    def judge(output: Any) -> float:
        tokens = all_tokens(output)
        return relative_error(tokens[:1], exact) if bool(tokens.isfinite().all()) else float("inf")

    notes = {"predicted_ms": predictions(name, size, batch)}
    flops = batch * flops_of(name, exact.shape[1])
    return Cell(_what(name, size, batch), inputs, calls, judge, INFERENCE_LIMIT, flops, replay=False, notes=notes)


def predictions(name: str, size: int, batch: int) -> dict[str, float]:
    """Simulated milliseconds, to compare with the measured ones."""
    short = {S: "S", B: "B", L: "L"}[name]
    found = _simulated().get(f"{short} {size} {batch}", {})
    return {label: found[who]["wall"] * 1e3 for label, who in PREDICTED.items() if who in found}


@cache
def _simulated() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(SIMULATED.read_text(encoding="utf-8"))["cells"] if SIMULATED.exists() else {}
    return found


def ceilings(settings: Settings) -> dict[str, float]:
    """Bytes a second of a copy, FLOP/s of a large product, bytes a second from two kinds of memory of the host."""
    side, size = (8192, 1 << 30) if settings.cuda else (64, 1 << 16)
    a, b = (torch.randn(side, side, device=settings.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.zeros(size, dtype=torch.uint8, device=settings.device)
    into = torch.empty_like(source)
    host = torch.zeros(size // 4, dtype=torch.uint8, pin_memory=settings.cuda)
    pageable = torch.zeros(size // 4, dtype=torch.uint8)
    part = into[: size // 4]

    def rate(run: Run, amount: float) -> float:
        run()
        return 1e3 * amount / min(elapsed(run, 5, settings) for _ in range(3))

    return {
        "copy_bytes_per_s": rate(lambda: into.copy_(source), 2.0 * size),
        "product_flops": rate(lambda: a @ b, 2.0 * side**3),
        "pinned_bytes_per_s": rate(lambda: part.copy_(host, non_blocking=True), size / 4),
        "pageable_bytes_per_s": rate(lambda: part.copy_(pageable), size / 4),
    }
